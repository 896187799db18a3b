"""Noise on the sum: as much as the weights that were used ask for, once, and never for a guarantee that cannot hold."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from pydantic import ValidationError

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.errors import UsageError
from fedclaw.learning import postprocess
from fedclaw.learning.postprocess import SiteContext
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.sum_noise import clip_to, moved
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.provenance import Bounded, Raw
from fedclaw.protocol.arrays import Update
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.terms import (
    AdaptiveClip,
    CentralNoise,
    CentralRequest,
    LocalTraining,
    PrivacyRequest,
    RoundRules,
    SecureRequest,
)
from fedclaw.server import checkpoint
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.run_directory import PENDING, RunDirectory
from fedclaw.server.session import calibrated, initial_parameters
from fedclaw.server.training import WeightedSum
from fedclaw.site.privacy_budget import charge_for
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.chance import scale_is_right
from tests.samples import plan_of, run_record

NUMBERS = 400_000
CONTEXT = SiteContext(GaussianSource())
ONE_STEP = LocalTraining(steps=1, batch_size=1, learning_rate=0.5)


def central(**changes):
    fields = {
        "unit": "site",
        "noise_by": "server",
        "epsilon": 8.0,
        "delta": 1e-3,
        "clip": 2.0,
        "noise_multiplier": 1.5,
    }
    return CentralNoise(**{**fields, **changes})


def noised_mean(plan, weights, examples):
    """The mean of sites that all send zeros."""
    total = WeightedSum({"w": np.zeros(NUMBERS, np.float32)})
    for weight, count in zip(weights, examples, strict=True):
        total.add({"w": np.zeros(NUMBERS, np.float32)}, weight, count)
    return postprocess.at_server(total.take(), plan, {}).arrays["w"]


def assert_deviation(values, expected):
    """1% off is 9 standard errors off."""
    assert scale_is_right(values, expected)


@pytest.mark.parametrize(
    ("weighting", "cap", "weights", "largest_share"),
    [
        ("examples", None, [990.0, 5.0, 5.0], 0.99),
        ("uniform", None, [1.0, 1.0, 1.0], 1 / 3),
        ("capped", 20, [20.0, 5.0, 5.0], 2 / 3),
    ],
)
def test_the_noise_follows_the_heaviest_site_and_not_the_number_of_sites(weighting, cap, weights, largest_share):
    plan = plan_of(run_record(privacy=None, central=central(), weighting=weighting, weight_cap=cap))
    values = noised_mean(plan, weights, [990, 5, 5])
    assert_deviation(values, 1.5 * 2.0 * largest_share)


def test_the_noise_for_single_examples_is_that_of_one_step_on_the_pooled_data():
    plan = plan_of(run_record(privacy=None, central=central(unit="example", sample_rate=0.25), training=ONE_STEP))
    values = noised_mean(plan, [30.0, 70.0], [30, 70])
    assert_deviation(values, 1.5 * 0.5 * 2.0 / (0.25 * 100))


def test_a_round_of_nobody_is_all_noise():
    plan = plan_of(run_record(privacy=None, central=central(sample_rate=0.5, expected_sites=4.0), weighting="uniform"))
    assert_deviation(noised_mean(plan, [], []), 1.5 * 2.0 / 4.0)


def test_an_update_is_clipped_over_all_its_arrays_together():
    arrays = {"a": np.full(50, 3.0, np.float32), "b": np.full((5, 10), 4.0, np.float32)}
    direction = arrays["a"][0] / arrays["b"][0, 0]
    assert clip_to(arrays, 2.0) == pytest.approx(math.sqrt(50 * 25))
    norm = math.sqrt(sum(float(np.square(array.astype(np.float64)).sum()) for array in arrays.values()))
    assert 1.999 < norm <= 2.0
    assert arrays["a"][0] / arrays["b"][0, 0] == pytest.approx(direction)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_update_that_is_not_finite_counts_as_zero(value):
    arrays = {"a": np.array([1.0, value], np.float32), "b": np.ones(3, np.float32)}
    assert clip_to(arrays, 1.0) == math.inf
    assert not any(array.any() for array in arrays.values())


def test_a_sum_of_more_examples_than_were_declared_is_brought_within_the_length_that_its_rounding_is_counted_for():
    """Of 100 examples at rate 0.25 a sample has at most min(100, 25 + 10 x 5 + 50) = 100; each adds 2 at most."""
    request = central(unit="example", sample_rate=0.25)
    mechanism = mechanism_of(plan_of(run_record(privacy=None, central=request, training=ONE_STEP)))
    within, beyond = np.array([120.0, 160.0]), np.array([180.0, 240.0])
    left = []
    for vector in (within, beyond, beyond + np.array([0.6, 0.8])):
        part = Bounded(Update({"w": vector.copy()}, 1.0, 100), 2.0)
        bounded = mechanism.bound(part)
        assert bounded.sensitivity == 2.0
        left.append(bounded.value.arrays["w"])
    assert np.array_equal(left[0], within)
    assert left[1] == pytest.approx([120.0, 160.0], rel=1e-15)
    assert np.linalg.norm(left[2] - left[1]) < 1e-12, "no jump at the bound: neighbours come no further apart"


def test_an_adaptive_bound_finds_the_quantile_of_the_norms():
    adaptive = AdaptiveClip(quantile=0.8, learning_rate=0.3, count_noise=1e-3)
    plan = plan_of(
        run_record(
            privacy=None,
            central=central(clip=0.05, noise_multiplier=1e-4, adaptive=adaptive),
            weighting="uniform",
        )
    )
    norms = np.linspace(0.01, 1.0, 100)
    clip = 0.05
    for _ in range(60):
        now = plan.model_copy(update={"central": plan.central.model_copy(update={"clip": clip})})
        total = WeightedSum(postprocess.template({"w": np.zeros(4, np.float32)}, now))
        for norm in norms:
            update = postprocess.at_site(
                Raw(Update({"w": np.full(4, norm / 2, np.float32)}, 1.0, 7)), now, CONTEXT
            ).value
            total.add(update.arrays, update.weight, 7)
        mean = postprocess.at_server(total.take(), now, {})
        assert mean.arrays.keys() == {"w"}
        clip = mean.clip
    assert clip == pytest.approx(0.8, abs=0.03)


def test_the_bound_moves_geometrically():
    """Andrew et al. 2021, section 2: C exp(-eta (b - gamma))."""
    adaptive = AdaptiveClip(quantile=0.5, learning_rate=0.2, count_noise=1.0)
    assert moved(2.0, 1.0, adaptive) == pytest.approx(2.0 * math.exp(-0.1))
    assert moved(2.0, 0.0, adaptive) == pytest.approx(2.0 * math.exp(0.1))
    assert moved(2.0, 9.0, adaptive) == moved(2.0, 1.0, adaptive)


def test_the_count_of_an_adaptive_bound_pays_out_of_the_same_noise():
    """Andrew et al. 2021, theorem 1: the two together are one mechanism of the whole multiplier."""
    with_count = central(adaptive=AdaptiveClip(count_noise=5.0))
    z = mechanism_of(run_record(privacy=None, central=with_count, weighting="uniform")).update_noise_multiplier
    assert z > with_count.noise_multiplier
    assert z**-2 + (2 * 5.0) ** -2 == pytest.approx(1.5**-2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"central": central(unit="example"), "training": LocalTraining(epochs=1, batch_size=8, learning_rate=0.1)},
            "one",
        ),
        ({"central": central(unit="example"), "training": ONE_STEP, "weighting": "uniform"}, "weighting: examples"),
        (
            {
                "central": central(unit="example"),
                "training": ONE_STEP,
                "privacy": PrivacyRequest(epsilon=1, delta=1e-3, max_grad_norm=1),
            },
            "without local noise",
        ),
        (
            {"central": central(unit="example"), "training": ONE_STEP.model_copy(update={"momentum": 0.5})},
            "no momentum",
        ),
        ({"central": central(noise_by="sites"), "weighting": "uniform"}, "needs secure aggregation"),
        ({"central": central(sample_rate=0.5)}, "weighting: uniform"),
        (
            {"central": central(sample_rate=0.5), "weighting": "uniform", "secure": SecureRequest()},
            "tells its sites who",
        ),
        ({"weighting": "capped"}, "weight_cap goes with"),
        ({"weight_cap": 9}, "weight_cap goes with"),
    ],
)
def test_a_setting_whose_guarantee_would_not_hold_is_refused_with_its_reason(changes, words):
    with pytest.raises(ValidationError, match=words):
        run_record(**{"privacy": None, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unit": "example", "adaptive": AdaptiveClip(count_noise=9)}, "unit: site"),
        ({"noise_by": "sites", "sample_rate": 0.5}, "asks every site"),
        ({"adaptive": AdaptiveClip(count_noise=0.7)}, "count_noise has to be above"),
    ],
)
def test_central_settings_that_contradict_themselves_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        run_record(privacy=None, central=central(**changes))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("sites")
    policy = SitePolicy(epsilon=20.0, delta=1e-3, trust_server_noise=True)
    return write_sites(root, DatasetSettings(name="breast_cancer", sites=3), policy)


@pytest.fixture
def sites(directories):
    assume_server_identity(5)
    return open_sites(directories, "clinic")


@pytest.fixture
def record(sites):
    schema = next(iter(sites.values())).workload.schema
    return run_record(schema_text=schema.to_json(), rounds=3, training=ONE_STEP, privacy=None)


def run(root, record, sites):
    directory = RunDirectory(root) if (root / "run.json").exists() else RunDirectory.create(root, record)
    return run_rounds(LocalGrid(sites, 5), directory, initial_parameters(directory.record()))


def test_one_round_is_one_step_on_the_pooled_data(tmp_path, record, sites):
    """With every example taken, a bound that nothing reaches and hardly any noise: plain gradient descent."""
    setting = central(unit="example", clip=1e3, noise_multiplier=0.011).model_copy(update={"noise_multiplier": 1e-9})
    trusting = {name: _without_budget(site) for name, site in sites.items()}
    outcome = run(tmp_path / "run", record.model_copy(update={"rounds": 1, "central": setting}), trusting)
    start = initial_parameters(record)
    inputs = np.concatenate([site.data.train.inputs for site in sites.values()])
    targets = np.concatenate([site.data.train.targets for site in sites.values()])
    weight, bias = (next(a for n, a in start.items() if n.endswith(end)) for end in ("weight", "bias"))
    logits = inputs @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(targets)), targets] -= 1
    expected = weight - 0.5 * (p.T @ inputs) / len(targets)
    found = next(a for n, a in outcome.parameters.items() if n.endswith("weight"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def _without_budget(site):
    site.policy = site.policy.model_copy(
        update={"epsilon": None, "allow_training_without_privacy": True, "trust_server_noise": False}
    )
    return site


def test_a_site_that_trusts_the_servers_noise_pays_for_it_and_says_whom_it_trusts(tmp_path, record, sites):
    setting = central(unit="example", sample_rate=0.2, noise_multiplier=1.0)
    outcome = run(tmp_path / "run", record.model_copy(update={"central": setting}), sites)
    for site in sites.values():
        receipt = outcome.receipts[site.name].receipt
        assert (receipt.mechanism, receipt.trust) == ("central", "server")
        assert receipt.central.unit == "example"
        assert receipt.central.epsilon == 8.0
        assert (receipt.sample_rate, receipt.noise_multiplier, receipt.rounds) == (0.2, 1.0, 3)
        assert 0 < receipt.epsilon_run == pytest.approx(site.ledger.spent(1e-3))


def test_a_site_that_does_not_trust_the_server_takes_part_in_nothing_without_noise(tmp_path, record, sites):
    for site in sites.values():
        site.policy = site.policy.model_copy(update={"trust_server_noise": False})
    setting = central(unit="example", sample_rate=0.2)
    with pytest.raises(Exception, match="which this site does not trust"):
        run(tmp_path / "run", record.model_copy(update={"central": setting}), sites)
    assert all(site.ledger.spent(1e-3) == 0 for site in sites.values())


class Watched:
    """A site that notes how large a cohort it is told of."""

    def __init__(self, site):
        self.site = site
        self.cohorts = set()

    def answer(self, message):
        self.cohorts.add(json.loads(message.content.config_records["plan"]["json"])["cohort"])
        return self.site.answer(message)

    def release(self, message, reply, size, digest):
        self.site.release(message, reply, size, digest)


def test_who_is_asked_cannot_be_foreseen_and_does_not_change_the_divisor(tmp_path, record, sites):
    setting = central(sample_rate=0.5, noise_multiplier=3.0)
    rules = RoundRules(minimum=1)
    cohorts = set()
    for name in ("a", "b"):
        changes = {"central": setting, "weighting": "uniform", "rounds": 12, "rules": rules, "run": name}
        watched = {key: Watched(site) for key, site in sites.items()}
        run(tmp_path / name, record.model_copy(update=changes), watched)
        lines = RunDirectory(tmp_path / name).read_metrics()
        cohorts.add(tuple(tuple(line["answered"]) for line in lines))
        asked = [site.cohorts for site in watched.values()]
        assert set().union(*asked) == {3}, "a site is told how many could have been asked, not how many were"
    assert len(cohorts) == 2, "the same seed asked the same sites"
    assert len({len(answered) for cohort in cohorts for answered in cohort}) > 1


class StopsAtEvaluation(LocalGrid):
    """A server that is killed when the round is done and before it knows how good it was."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if messages and messages[0].metadata.message_type == "evaluate":
            raise KeyboardInterrupt
        return super().send_and_receive(messages, timeout=timeout)


def test_a_server_that_stops_before_the_evaluation_does_not_draw_its_noise_again(tmp_path, record, sites):
    adaptive = AdaptiveClip(count_noise=9.0)
    record = record.model_copy(update={"central": central(adaptive=adaptive), "weighting": "uniform", "rounds": 1})
    directory = RunDirectory.create(tmp_path / "run", record)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(StopsAtEvaluation(sites, 5), directory, initial_parameters(record))
    saved = checkpoint.newest(directory.root)
    assert saved.round == 1
    assert saved.clip not in (None, 2.0)
    assert (directory.root / PENDING).stat().st_mode & 0o077 == 0
    outcome = run(directory.root, record, sites)
    np.testing.assert_array_equal(outcome.parameters["head.weight"], saved.parameters["head.weight"])
    assert outcome.metrics["accuracy"] > 0
    assert all(receipt.receipt.rounds == 1 for receipt in outcome.receipts.values())


def test_an_epsilon_that_no_noise_keeps_is_a_wrong_setting():
    asked = CentralRequest(unit="site", noise_by="server", epsilon=1e-9, delta=1e-9, clip=1)
    with pytest.raises(UsageError, match="central: no noise multiplier"):
        calibrated(asked, 100)


def test_hiding_a_site_hides_an_example_half_as_well(sites, record):
    """Two updates within the bound can lie twice the bound apart: zero is between them, and not at one end."""
    setting = central(noise_multiplier=3.0)
    plan = plan_of(record.model_copy(update={"central": setting}))
    site = next(iter(sites.values()))
    assert charge_for(site.policy, len(site.data.train), mechanism_of(plan)).mechanism == NoiseEvent(1.0, 1.5, 1)
    ones, others = (
        postprocess.at_site(Raw(Update({"w": np.full(4, value, np.float32)}, 1.0, 1)), plan, CONTEXT).value.arrays["w"]
        for value in (9.0, -9.0)
    )
    assert np.linalg.norm(ones - others) == pytest.approx(2 * setting.clip, rel=1e-5)


def test_neither_a_norm_nor_the_noise_on_the_sum_takes_another_model():
    """Both are worked out in float64, which a second copy of a large model would be twice its size in."""
    update, total = np.ones(1 << 20, np.float32), np.ones(1 << 20)
    noise = mechanism_of(plan_of(run_record(privacy=None, central=central(), weighting="uniform")))
    tracemalloc.start()
    try:
        assert clip_to({"w": update}, 1.0) == pytest.approx(1 << 10)
        noise.noised(Update({"w": total}, 1.0, 1))
        assert tracemalloc.get_traced_memory()[1] < update.nbytes
    finally:
        tracemalloc.stop()
