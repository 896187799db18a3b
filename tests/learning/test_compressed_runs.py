"""Compressed updates under the real loop and the real sites: what travels, who may ask for it, and what is refused."""

import numpy as np
import pytest
import torch

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError
from fedclaw.learning.compressors import LargestK, Stochastic, kept
from fedclaw.learning.postprocess import positions
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import flattened, pack_wire, payload
from fedclaw.protocol.frozen import check_settings
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.terms import (
    CentralNoise,
    HalfPrecision,
    LocalTraining,
    ModelSpec,
    PowerSgd,
    PrivacyRequest,
    Quantisation,
    RandomK,
    SecureRequest,
    TopK,
)
from fedclaw.report.terminal import bytes_words
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.early_checks import check_combination
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.server.settings import RunSettings
from fedclaw.site.directory import open_service
from fedclaw.site.settings import load_site_settings
from fedclaw.strategies.fedavg import FedAvg
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.samples import plan_of, run_record
from tests.site.conftest import Asker

SITES = 3
STEPS = LocalTraining(steps=2, batch_size=1000, learning_rate=0.2)
# Full batches: nothing about a delta is random.
METHODS = {
    "fp16": HalfPrecision(method="fp16"),
    "int8": Quantisation(method="int8"),
    "int4": Quantisation(method="int4", block=64),
    "topk": TopK(method="topk", fraction=0.1),
    "randk": RandomK(method="randk", fraction=0.5, feedback=True),
    "powersgd": PowerSgd(method="powersgd", rank=2),
}
SECURE = SecureRequest(dropouts=0.2, corrupt=0.0, largest_weight=1000)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("sites")
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    return write_sites(root, DatasetSettings(name="breast_cancer", sites=SITES), policy)


@pytest.fixture
def sites(directories):
    assume_server_identity(5)
    return open_sites(directories, "clinic")


@pytest.fixture
def record(sites):
    schema = next(iter(sites.values())).workload.schema.to_json()
    model = ModelSpec(name="mlp", args={"hidden": [24]})
    return run_record(schema_text=schema, rounds=1, training=STEPS, privacy=None, model=model)


def run(root, record, sites):
    directory = RunDirectory.create(root / record.run, record)
    return run_rounds(LocalGrid(sites, 5), directory, initial_parameters(record))


def with_(record, **changes):
    return type(record).model_validate({**record.model_dump(), **changes})


def moved(outcome, record):
    """How far the run's one round moved the parameters: the mean of the sites' deltas (d,)."""
    return flattened(outcome.parameters) - flattened(initial_parameters(record))


# A run


@pytest.mark.parametrize(
    ("method", "off", "share"),
    [
        ("fp16", 1e-3, 0.505),
        ("int8", 0.02, 0.258),
        ("int4", 0.3, 0.145),
        ("topk", 0.6, 0.132),
        ("randk", 0.9, 0.51),
        ("powersgd", 0.3, 0.229),
    ],
)
def test_a_round_comes_close_to_the_plain_one_in_fewer_bytes(tmp_path, record, sites, method, off, share):
    for number, service in enumerate(sites.values()):
        # A random start may be nearly orthogonal to the update, and then one power iteration leaves more of it.
        service.source = GaussianSource(insecure_fixed_key_for_tests=bytes([number]) * 32)
    plain = run(tmp_path, with_(record, run="plain"), sites)
    found = run(tmp_path, with_(record, run=method, compression=METHODS[method]), sites)
    wanted = moved(plain, record)
    assert 0 < np.linalg.norm(moved(found, record) - wanted) < off * np.linalg.norm(wanted)
    (before,), (after,) = (outcome.directory.read_metrics() for outcome in (plain, found))
    size = payload(initial_parameters(record))
    assert before["bytes_up"] == before["bytes_down"] == after["bytes_down"] == SITES * size
    assert after["bytes_up"] == pytest.approx(share * SITES * size, rel=0.03)
    assert len(after["answered"]) == SITES
    assert f"MB from the sites (compression {method})" in bytes_words(found.directory)


@pytest.mark.parametrize("feedback", [True, False])
def test_under_secure_aggregation_random_k_gives_the_plain_sum(tmp_path, record, sites, feedback):
    request = RandomK(method="randk", fraction=0.25, feedback=feedback)
    two = with_(record, rounds=2, compression=request)
    plain = run(tmp_path, with_(two, run="plain"), sites)
    masked = run(tmp_path, with_(two, run="masked", secure=SECURE), sites)
    for name, array in plain.parameters.items():
        np.testing.assert_allclose(masked.parameters[name], array, rtol=0, atol=1e-5)
    whole = run(tmp_path, with_(two, run="whole", compression=None, secure=SECURE), sites)
    up = [outcome.directory.read_metrics()[0]["bytes_up"] for outcome in (plain, masked, whole)]
    assert up[0] == up[1] < 0.27 * up[2]


def test_a_site_that_sends_what_no_encoder_makes_is_declined_and_the_others_count(tmp_path, record, sites):
    compressed = with_(record, compression=METHODS["topk"])
    name = sorted(sites)[0]
    answer = sites[name].answer

    def repeated(message):
        reply = answer(message)
        if "sum" in reply.content.array_records:
            arrays = {key: array.numpy() for key, array in reply.content["sum"].items()}
            arrays["positions"][1] = arrays["positions"][0]
            reply.content["sum"] = pack_wire(arrays)
        return reply

    sites[name].answer = repeated
    outcome = run(tmp_path, compressed, sites)
    (line,) = outcome.directory.read_metrics()
    assert line["declined"] == {name: "unusable"}
    others = {key: site for key, site in sites.items() if key != name}
    without = run(tmp_path, with_(compressed, run="without"), others)
    assert line["bytes_up"] == without.directory.read_metrics()[0]["bytes_up"]
    for key, array in without.parameters.items():
        np.testing.assert_allclose(outcome.parameters[key], array, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_an_option_of_the_configuration(method):
    overrides = [f"compression={method}", "workload.schema_file=schema.yaml", "seed=3"]
    keys = list(RunSettings.model_fields)
    settings = compose_settings("federated", overrides, _Whole)
    assert settings.compression.method == method
    assert settings.compression == type(settings.compression).model_validate(settings.compression.model_dump())
    assert "compression" in keys
    if method == "randk":
        assert settings.compression.seed == 3
    assert compose_settings("federated", overrides[1:], _Whole).compression is None


class _Whole(RunSettings):
    """conf/federated.yaml, with what an entry point adds."""

    runs: str
    run: str | None
    tracking: dict


# What a site remembers


@pytest.fixture
def asker(directories, monkeypatch):
    made = Asker(directories[0])
    made.plan = made.plan.model_copy(update={"privacy": None, "training": STEPS, "cohort": SITES})
    yield made
    made.site.ledger.close()


def sent(asker, **changes):
    reply = asker.ask(**changes)
    return {name: array.numpy() for name, array in reply.content["sum"].items()}


def test_a_sites_memory_survives_a_restart_and_a_repeated_round_begins_where_it_began(asker, directories):
    """The same parameters each time, so the same delta: what is sent shows what was remembered."""
    whole = sent(asker, run="plain")
    request = RandomK(method="randk", fraction=0.1, feedback=True)
    memory = {name: np.zeros_like(array) for name, array in whole.items()}

    def expected(round):
        """What leaves in `round`, which changes the memory."""
        leaves = {}
        for name, array in whole.items():
            chosen = positions(request, round, name, array.size)
            memory[name] = memory[name] + array
            leaves[name] = memory[name].reshape(-1)[chosen]
            memory[name].reshape(-1)[chosen] = 0
        return leaves

    first, second, third = (expected(round) for round in (1, 2, 3))
    assert _same(sent(asker, compression=request, round=1), first)
    assert _same(sent(asker, compression=request, round=2), second)
    assert _same(sent(asker, compression=request, round=2), second), "asked again"
    asker.site.ledger.close()
    asker.site = open_service(directories[0], load_site_settings(directories[0]), "clinic")
    assert _same(sent(asker, compression=request, round=2), second), "asked again after a restart"
    assert _same(sent(asker, compression=request, round=3), third)
    assert not _same(sent(asker, compression=request, round=4, run="other"), third)


def _same(found, wanted):
    # Training twice may differ in a last bit.
    return found.keys() == wanted.keys() and all(np.allclose(found[k], wanted[k], rtol=1e-3, atol=1e-5) for k in found)


# Privacy


@pytest.mark.parametrize("method", ["int8", "topk"])
def test_what_leaves_is_a_function_of_the_noised_delta(directories, method):
    """Two sites with the same keystream make the same noised delta; one compresses what the other sends."""
    key = bytes(range(32))
    replies, askers = [], []
    for compression in (None, METHODS[method]):
        asker = Asker(directories[0])
        asker.site.source = GaussianSource(insecure_fixed_key_for_tests=key)
        asker.parameters = askers[0].parameters if askers else asker.parameters
        askers.append(asker)
        asker.plan = asker.plan.model_copy(
            update={
                "privacy": PrivacyRequest(epsilon=2, delta=1e-3, max_grad_norm=1),
                "training": LocalTraining(epochs=1, batch_size=16, learning_rate=0.1),
                "cohort": SITES,
                "run": f"{method}-{compression is not None}",
            }
        )
        replies.append(asker.ask(compression=compression))
        asker.site.ledger.close()
    noised = {name: array.numpy() for name, array in replies[0].content["sum"].items()}
    compressor = LargestK(0.1) if method == "topk" else Stochastic(8, 256)
    wanted = compressor.encode(noised, askers[0].site.source, {}).wire
    found = {name: array.numpy() for name, array in replies[1].content["sum"].items()}
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    spent = [reply.content["receipt"]["json"] for reply in replies]
    assert '"mechanism":"dp-sgd"' in spent[1]


CENTRAL = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1)


@pytest.mark.parametrize("method", METHODS)
def test_what_would_break_a_guarantee_is_refused_at_start_and_by_the_plan(record, method):
    request = METHODS[method]
    if method != "randk":
        with pytest.raises(ValueError, match=f"compression={method} does not go with secure aggregation"):
            with_(record, compression=request, secure=SECURE)
    reason = "what a site remembers" if method == "randk" else "beyond the bound that the noise was made for"
    with pytest.raises(ValueError, match=reason):
        with_(record, compression=request, central=CENTRAL, weighting="uniform")
    plan = plan_of(record)
    with pytest.raises(ValueError, match=reason):
        plan.model_validate({**plan.model_dump(), "central": CENTRAL, "compression": request, "weighting": "uniform"})


def test_random_k_without_feedback_goes_with_noise_on_the_sum_and_with_masks(record):
    request = RandomK(method="randk", feedback=False)
    with_(record, compression=request, central=CENTRAL, weighting="uniform", secure=SECURE)


def test_noise_by_the_sites_is_made_for_the_numbers_that_are_sent(tmp_path, record, sites):
    """The secure sum is shorter, all sites' noise is in it, and the other numbers stay where they were."""
    request = RandomK(method="randk", fraction=0.25, feedback=False)
    central = CENTRAL.model_copy(update={"noise_by": "sites"})
    noisy = with_(record, compression=request, central=central, weighting="uniform", secure=SECURE)
    outcome = run(tmp_path, noisy, sites)
    start = initial_parameters(record)
    (line,) = outcome.directory.read_metrics()
    sent = 0
    for name, array in outcome.parameters.items():
        where = np.flatnonzero((array - start[name]).reshape(-1))
        assert set(where) <= set(positions(request, 1, name, array.size)), "noise where nothing was sent"
        sent += kept(request.fraction, array.size)
    assert line["bytes_up"] == 4 * sent * SITES
    step = flattened(outcome.parameters) - flattened(start)
    # clip x multiplier / sites in each number of the mean, a little more for the drop-outs, times d / k
    assert step[step != 0].std() == pytest.approx(4 / SITES, rel=0.4)


def test_the_reason_is_told_as_a_wrong_setting(record):
    with pytest.raises(UsageError, match="a masked number has four bytes"):
        check_settings({**record.model_dump(), "compression": METHODS["int8"], "secure": SECURE}, type(record))


def test_numbers_that_cannot_be_compared_are_refused(record, monkeypatch):
    monkeypatch.setattr(FedAvg, "needs_single_updates", True)
    model = torch.nn.Linear(2, 2)
    check_combination(with_(record, compression=METHODS["int8"]), FedAvg(), model)
    with pytest.raises(UsageError, match="most of what is compared are zeros"):
        check_combination(with_(record, compression=METHODS["topk"]), FedAvg(), model)
