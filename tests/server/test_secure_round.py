"""Secure aggregation under the real loop and the real sites: the exact sum, drop-outs at every stage, and who pays."""

import logging
import os

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message
from scipy.stats import chi2

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.errors import RoundError, UsageError
from fedclaw.learning import postprocess
from fedclaw.privacy.accounting import NoiseEvent, epsilon_of
from fedclaw.privacy.fixed_point import Encoding
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import flattened, pack, shapes_of, unflattened
from fedclaw.protocol.message_identity import assume_server_identity, number_of
from fedclaw.protocol.messages import CONFIRM, CONSENT, KEYS, SHARES, UNMASK
from fedclaw.protocol.questions import Outgoing, question, questions
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import CentralNoise, LocalTraining, Plan, PrivacyRequest, RoundRules, SecureRequest
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.exchange import ask
from fedclaw.server.run_directory import PendingRound, RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.server.training import TrainingQuestion, session_of
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.chance import TINY, frequencies_fit
from tests.samples import plan_of, run_record

STEPS = LocalTraining(steps=3, batch_size=1000, learning_rate=0.2)
ONE_STEP = LocalTraining(steps=1, batch_size=1, learning_rate=0.5)
NUMBERS = 200_000


class Flaky:
    """A site that gives no usable answer to messages of one type."""

    def __init__(self, site, silent_at=None):
        self.site = site
        self.silent_at = silent_at
        self.asked = []
        self.sent = []

    def answer(self, message):
        kind = message.metadata.message_type
        self.asked.append(kind)
        if kind == self.silent_at:
            return Message(Error(RefusalCode.FAILED, "gone"), reply_to=message)
        reply = self.site.answer(message)
        self.sent.append((kind, reply))
        return reply

    def release(self, message, reply, size, digest):
        self.site.release(message, reply, size, digest)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("sites")
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    return write_sites(root, DatasetSettings(name="breast_cancer", sites=5), policy)


@pytest.fixture
def sites(directories):
    assume_server_identity(5)
    return {name: Flaky(service) for name, service in open_sites(directories, "clinic").items()}


@pytest.fixture
def record(sites):
    schema = next(iter(sites.values())).site.workload.schema
    return run_record(schema_text=schema.to_json(), rounds=1, training=STEPS, privacy=None)


SECURE = SecureRequest(dropouts=0.2, corrupt=0.0, largest_weight=1000)


def run(root, record, sites):
    directory = RunDirectory(root) if (root / "run.json").exists() else RunDirectory.create(root, record)
    return run_rounds(LocalGrid(sites, 5), directory, initial_parameters(directory.record()))


def secure(record, **changes):
    return record.model_copy(update={"secure": SECURE, **changes})


@pytest.mark.parametrize(("weighting", "cap"), [("examples", None), ("uniform", None), ("capped", 50)])
def test_the_model_is_that_of_the_plain_sum(tmp_path, record, sites, weighting, cap):
    changes = {"weighting": weighting, "weight_cap": cap}
    # Full batches: nothing about the updates is random.
    plain = run(tmp_path / "plain", record.model_copy(update=changes), sites)
    masked = run(tmp_path / "masked", secure(record, run="masked", **changes), sites)
    for name, array in plain.parameters.items():
        np.testing.assert_allclose(masked.parameters[name], array, rtol=0, atol=2e-6)
    assert masked.metrics == pytest.approx(plain.metrics, abs=1e-3)


def test_what_leaves_a_site_is_masked(tmp_path, record, sites):
    run(tmp_path / "run", secure(record), sites)
    site = next(iter(sites.values()))
    (train,) = (reply for kind, reply in site.sent if kind == "train")
    assert set(train.content.array_records) == {"masked"}
    vector = np.frombuffer(train.content.array_records["masked"]["vector"].data, np.uint32, offset=128)
    counts = np.bincount(vector >> 28, minlength=16)
    assert frequencies_fit(counts)
    receipt = next(iter(RunDirectory(tmp_path / "run").read_receipts().values())).receipt
    assert receipt.secure_aggregation


def test_a_site_cannot_scale_the_servers_noise_by_examples_that_have_no_weight(tmp_path, record, sites, monkeypatch):
    name = sorted(sites)[2]
    honest = sites[name].answer

    def answer(message):
        reply = honest(message)
        if message.metadata.message_type == "train":
            reply.content["metrics"]["examples"] = 10**9
        return reply

    monkeypatch.setattr(sites[name], "answer", answer)
    run(tmp_path / "run", secure(record), sites)
    (line,) = RunDirectory(tmp_path / "run").read_metrics()
    assert line["declined"] == {name: "unusable"}
    assert name not in line["answered"]


@pytest.mark.parametrize("stage", [KEYS, SHARES, CONFIRM, "train", CONSENT, UNMASK])
def test_one_site_may_drop_out_at_any_stage(tmp_path, record, sites, stage):
    name = sorted(sites)[2]
    sites[name].silent_at = stage
    outcome = run(tmp_path / "run", secure(record), sites)
    others = {key: Flaky(flaky.site) for key, flaky in sites.items() if key != name or stage in (CONSENT, UNMASK)}
    expected = run(tmp_path / "plain", record.model_copy(update={"run": "plain"}), others)
    for key, array in expected.parameters.items():
        np.testing.assert_allclose(outcome.parameters[key], array, rtol=0, atol=2e-6)
    asked = sites[name].asked
    assert asked[asked.index(stage) + 1 :] in ([], ["evaluate"]), "it was asked again after it had dropped out"


@pytest.mark.parametrize("stage", [KEYS, SHARES, CONFIRM, "train", CONSENT])
def test_too_few_sites_make_no_sum_and_nothing_is_unmasked(tmp_path, record, sites, stage):
    for name in sorted(sites)[:3]:
        sites[name].silent_at = stage
    with pytest.raises(RoundError, match="too few") as failed:
        run(tmp_path / "run", secure(record, rules=RoundRules(minimum=2, attempts=2)), sites)
    assert not any(UNMASK in flaky.asked for flaky in sites.values())
    paid = {name for name, flaky in sites.items() if flaky.site.ledger.rounds("run-1", "clinic")}
    if stage in (KEYS, SHARES, CONFIRM):
        assert not paid
        assert "Nothing is lost" in str(failed.value)
    else:
        assert paid == {name for name, flaky in sites.items() if flaky.silent_at != "train"}
        assert "pay again" in str(failed.value)
        assert all(flaky.asked.count("train") <= 1 for flaky in sites.values()), "the round was asked twice"


class Certified(LocalGrid):
    """A server that has the authority's certificate, as the one over gRPC has."""

    @property
    def verifier(self):
        return next(iter(self._sites.values()))[1].site.secure.verifier


@pytest.mark.parametrize("stage", [KEYS, CONSENT])
@pytest.mark.parametrize("grid", [Certified, LocalGrid])
def test_a_site_that_signs_falsely_is_left_out_where_the_server_can_tell(tmp_path, record, sites, stage, grid):
    """Keys it cannot judge without the authority's certificate: the other sites refuse to go on, before they pay.

    All that is signed later is signed by those keys, so that anybody can judge it.
    """
    liar = sorted(sites)[2]
    honest = sites[liar].answer

    def answer(message):
        reply = honest(message)
        if message.metadata.message_type == stage:
            said = reply.content["secure"]
            said["signature"] = bytes([said["signature"][0] ^ 1]) + said["signature"][1:]
        return reply

    sites[liar].answer = answer
    directory = RunDirectory.create(tmp_path / "run", secure(record))
    if grid is LocalGrid and stage == KEYS:
        with pytest.raises(RoundError):
            run_rounds(grid(sites, 5), directory, initial_parameters(record))
        assert not any(flaky.site.ledger.rounds("run-1", "clinic") for flaky in sites.values())
        return
    run_rounds(grid(sites, 5), directory, initial_parameters(record))
    (line,) = directory.read_metrics()
    assert line["declined"] == {liar: "unusable"}
    assert (liar in line["answered"]) == (stage == CONSENT), "what it had masked before it lied is in the sum"


def put(reply, **changes):
    """The protocol's part of a reply, written over."""
    reply.content["secure"] = ConfigRecord({**dict(reply.content.config_records["secure"]), **changes})
    return reply


def noise_like(values):
    return [os.urandom(len(value)) for value in values]


LIES = {
    "garbage in the place of shares": (SHARES, lambda said: {"sealed": noise_like(said["sealed"])}),
    "shares for some": (
        SHARES,
        lambda said: {name: said[name][:-1] for name in ("receivers", "sealed", "commitments", "signatures")},
    ),
    "shares that prove nothing": (SHARES, lambda said: {"key_proof": os.urandom(len(said["key_proof"]))}),
    "complaints of everybody": (CONFIRM, lambda _said: {"unsigned": ["hospital-north", "hospital-west"]}),
    "a consent that is none": (CONSENT, lambda _said: {"signature": os.urandom(64)}),
    "wrong shares": (UNMASK, lambda said: {"seed_shares": [v[:-1] + bytes([v[-1] ^ 1]) for v in said["seed_shares"]]}),
    "shares in another order": (UNMASK, lambda said: {"seed_shares": said["seed_shares"][::-1]}),
    "no shares": (UNMASK, lambda _said: {"seed_shares": [], "seed_owners": []}),
    "another's name": (CONFIRM, lambda _said: {"site": "hospital-north"}),
}


@pytest.mark.parametrize(("stage", "lie"), LIES.values(), ids=LIES)
def test_a_site_that_lies_in_a_stage_is_named_alone_and_the_round_goes_on(
    tmp_path, record, sites, stage, lie, caplog: pytest.LogCaptureFixture
):
    liar = "hospital-east"
    honest = sites[liar].answer

    def answer(message):
        reply = honest(message)
        if message.metadata.message_type != stage or reply.has_error():
            return reply
        return put(reply, **lie(dict(reply.content.config_records["secure"])))

    sites[liar].answer = answer
    outcome = run(tmp_path / "run", secure(record), sites)
    (line,) = outcome.directory.read_metrics()
    assert line["declined"] == {liar: "unusable"}
    (told,) = {text for text in caplog.messages if "declined" in text}
    site, _, reason = told.partition(" declined (unusable): ")
    assert site.endswith(liar)
    assert liar in reason
    paid = {name: flaky.site.ledger.rounds("run-1") for name, flaky in sites.items()}
    before = stage in (SHARES, CONFIRM)
    assert paid == {name: 0 if before and name == liar else 1 for name in sites}, "and nobody trained twice"
    assert (liar in line["answered"]) is not before, "what it had masked before it lied is in the sum"
    others = {key: flaky for key, flaky in sites.items() if key != liar or not before}
    expected = run(tmp_path / "plain", record.model_copy(update={"run": "plain"}), others)
    for key, array in expected.parameters.items():
        np.testing.assert_allclose(outcome.parameters[key], array, rtol=0, atol=2e-6)


class CriesGarbage(LocalGrid):
    """A server that has the answers of one stage and says that they were none; it may take up old message ids."""

    def __init__(self, sites, stage):
        super().__init__(sites, 5)
        self.stage, self.known, self.reuse, self.kinds = stage, {}, False, []

    def send_and_receive(self, messages, *, timeout=None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        return iter([reply for reply in replies if reply.metadata.message_type != self.stage])

    def _answer(self, message):
        about = (message.metadata.dst_node_id, message.metadata.message_type)
        self.kinds.append(message.metadata.message_type)
        if self.reuse and about in self.known:
            message.metadata.__dict__["_message_id"] = self.known[about]
        self.known.setdefault(about, message.metadata.message_id)
        return super()._answer(message)


@pytest.mark.parametrize("reuse", [False, True], ids=["new messages", "under the old messages' ids"])
@pytest.mark.parametrize("stage", ["train", CONSENT, UNMASK])
def test_a_server_that_cries_garbage_gets_no_second_sum_without_a_second_charge(sites, record, stage, reuse):
    for flaky in sites.values():
        flaky.site.policy = flaky.site.policy.model_copy(
            update={"epsilon": 60.0, "allow_training_without_privacy": False}
        )
    private = secure(record, central=distributed("example", sample_rate=0.3), training=ONE_STEP, rounds=2)
    outgoing, grid = Outgoing(initial_parameters(private)), CriesGarbage(sites, stage)
    nodes = sorted(grid.get_node_ids())

    def attempt():
        plan = session_of(plan_of(private).model_copy(update={"cohort": 5}), sorted(sites), outgoing, private.secure, 2)
        return ask(grid, nodes, TrainingQuestion(plan, outgoing), 10)

    def charged():
        return [flaky.site.ledger.rounds("run-1") for flaky in sites.values()]

    first = attempt()
    assert (first.answered, charged()) == ([], [1] * 5)
    grid.stage, grid.reuse, grid.kinds = None, reuse, []
    second = attempt()
    if stage == UNMASK:
        assert second.answered == []
        assert set(grid.kinds) == {KEYS}, "a round whose unmasking has begun was asked for more"
        assert charged() == [1] * 5
        assert any("has been unmasked before" in declined.reason for declined in second.declined)
    elif second.answered:
        assert charged() == [2] * 5, "a second sum of one charge"
    else:
        assert reuse, "an honest second attempt is trained, and paid, anew"


def test_within_a_session_nothing_is_done_twice(sites, record):
    """Every message of a sum is sent again, at once: the second is refused, and costs nothing."""
    grid, refused = LocalGrid(sites, 5), []
    answer = grid._answer

    def twice(message):
        reply = answer(message)
        again = answer(message)
        refused.append((message.metadata.message_type, again.has_error()))
        return reply

    grid._answer = twice
    outgoing = Outgoing(initial_parameters(record))
    asked = secure(record)
    plan = session_of(plan_of(asked).model_copy(update={"cohort": 5}), sorted(sites), outgoing, asked.secure, 2)
    trained = ask(grid, sorted(grid.get_node_ids()), TrainingQuestion(plan, outgoing), 10)
    assert {kind for kind, error in refused if not error} <= {KEYS}, "a session that is opened anew begins anew"
    assert trained.answered == [], "the first session of each was closed by the second"
    refused.clear()

    def later(message):
        return answer(message) if message.metadata.message_type == KEYS else twice(message)

    grid._answer = later
    plan = session_of(plan_of(asked).model_copy(update={"cohort": 5}), sorted(sites), outgoing, asked.secure, 2)
    trained = ask(grid, sorted(grid.get_node_ids()), TrainingQuestion(plan, outgoing), 10)
    assert len(trained.answered) == 5
    assert {kind for kind, _ in refused} == {SHARES, CONFIRM, "train", CONSENT, UNMASK}
    assert all(error for _, error in refused)
    assert {flaky.site.ledger.rounds("run-1") for flaky in sites.values()} == {1}


def test_a_run_goes_on_after_a_failed_secure_round(tmp_path, record, sites):
    gone = sorted(sites)[:3]
    for name in gone:
        sites[name].silent_at = "train"
    with pytest.raises(RoundError):
        run(tmp_path / "run", secure(record), sites)
    for name in gone:
        sites[name].silent_at = None
    outcome = run(tmp_path / "run", secure(record), sites)
    assert len(outcome.receipts) == 5
    rounds = {name: receipt.receipt.rounds for name, receipt in outcome.receipts.items()}
    assert rounds == {name: 1 if name in gone else 2 for name in sites}


def distributed(unit, **changes):
    fields = {
        "unit": unit,
        "noise_by": "sites",
        "epsilon": 8.0,
        "delta": 1e-3,
        "clip": 1.0,
        "noise_multiplier": 1.2,
    }
    return CentralNoise(**{**fields, **changes})


CASES = [
    ("site", STEPS, "uniform", None, 1.0),
    ("site", STEPS, "capped", 40, 40.0),
    ("example", ONE_STEP, "examples", None, 0.5 / 0.25),
]


@pytest.mark.parametrize(("unit", "training", "weighting", "cap", "bound"), CASES)
def test_the_sum_carries_the_noise_after_the_tolerated_drop_outs(unit, training, weighting, cap, bound):
    setting = distributed(unit, sample_rate=0.25 if unit == "example" else 1.0)
    record = run_record(
        privacy=None,
        central=setting,
        secure=SecureRequest(dropouts=0.4, corrupt=0.0),
        training=training,
        weighting=weighting,
        weight_cap=cap,
    )
    template = {"w": np.zeros(NUMBERS, np.float32)}
    names = [f"site-{number}" for number in range(5)]
    plan = session_of(plan_of(record), names, Outgoing(template), record.secure, 2)
    assert plan.secure.tolerated == 2
    integers, source = mechanism_of(plan).integers(), GaussianSource()
    encoded = [integers.encode(flattened(template), source) for _ in range(3)]
    total = np.sum(encoded, axis=0, dtype=np.uint32)
    noise = unflattened(Encoding(plan.secure.step).decode(total), shapes_of(template))["w"].astype(np.float64)
    statistic = float(np.square(noise).sum()) / (1.2 * bound) ** 2
    assert statistic > chi2.ppf(TINY, NUMBERS), "less noise than promised"
    assert statistic < 1.01 * chi2.isf(TINY, NUMBERS)
    assert integers.shares.noise_multiplier >= 1.2


def test_a_site_charges_the_noise_that_is_really_added_and_trusts_enough_of_the_others(tmp_path, record, sites):
    for flaky in sites.values():
        flaky.site.policy = flaky.site.policy.model_copy(
            update={"epsilon": 30.0, "allow_training_without_privacy": False}
        )
    setting = distributed("example", sample_rate=0.3)
    private = secure(record, central=setting, training=ONE_STEP, rounds=2)
    outcome = run(tmp_path / "run", private, sites)
    for flaky in sites.values():
        receipt = outcome.receipts[flaky.site.name].receipt
        assert (receipt.mechanism, receipt.central.unit, receipt.trust, receipt.accountant) == (
            "distributed",
            "example",
            "aggregation",
            "pld",
        )
        assert receipt.noise_multiplier >= 1.2
        expected = epsilon_of([NoiseEvent(0.3, receipt.noise_multiplier, 2)], 1e-3)
        assert receipt.epsilon_run == pytest.approx(expected)
    prices = [line["noise_price"] for line in outcome.directory.read_metrics()]
    assert len(prices) == 2
    assert all(1 <= price["rounding_inflation"] <= 1.001 for price in prices)
    assert all(price["wrap_probability"] < 2**-40 for price in prices)
    tolerated = 1  # of five: dropouts 0.2
    assert all(price["extra_variance"] == pytest.approx(5 / (5 - tolerated) - 1) for price in prices)


def test_distributed_noise_without_a_session_is_refused(record, sites, caplog):
    caplog.set_level(logging.WARNING)
    site = next(iter(sites.values())).site
    plan = plan_of(record.model_copy(update={"central": distributed("example"), "training": ONE_STEP}))
    (message,) = questions(
        [number_of(site.name)], plan.round, "train", question(plan, Outgoing(initial_parameters(record)))
    )
    reply = site.answer(message)
    assert RefusalCode(reply.error.code) is RefusalCode.SECURE_AGGREGATION
    assert site.ledger.rounds(plan.run) == 0


class Meddling(LocalGrid):
    """A server that changes what it says between the stages."""

    def __init__(self, sites, change):
        super().__init__(sites, 5)
        self.change = change

    def send_and_receive(self, messages, *, timeout=None):
        return super().send_and_receive([self.change(message) for message in messages], timeout=timeout)


@pytest.mark.parametrize(
    "changes",
    [{"minimum": 5}, {"step": 1.0}, {"tolerated": 3}, {"threshold": 4}, {"session": "0" * 32}],
)
def test_a_server_that_changes_the_terms_after_the_sites_joined_gets_nothing(tmp_path, record, sites, changes):
    central = distributed("example", sample_rate=0.3)
    private = secure(record, central=central, training=ONE_STEP, rules=RoundRules(minimum=4))

    def change(message):
        if message.metadata.message_type == "train":
            plan = Plan.model_validate_json(message.content.config_records["plan"]["json"])
            worse = plan.model_copy(update={"secure": plan.secure.model_copy(update=changes)})
            message.content["plan"] = ConfigRecord({"json": worse.model_dump_json()})
        return message

    directory = RunDirectory.create(tmp_path / "run", private)
    with pytest.raises(RoundError):
        run_rounds(Meddling(sites, change), directory, initial_parameters(private))
    assert all(flaky.site.ledger.rounds("run-1") == 0 for flaky in sites.values())


def test_a_server_that_tells_two_sites_different_terms_gets_nothing(tmp_path, record, sites):
    """One site would bring little noise, and the others would count on it."""
    private = secure(record, central=distributed("example", sample_rate=0.3), training=ONE_STEP)
    victim = sorted(sites)[0]

    def change(message):
        plan = Plan.model_validate_json(message.content.config_records["plan"]["json"])
        if plan.secure and message.metadata.dst_node_id == number_of(victim):
            worse = plan.model_copy(update={"central": plan.central.model_copy(update={"noise_multiplier": 0.1})})
            message.content["plan"] = ConfigRecord({"json": worse.model_dump_json()})
        return message

    directory = RunDirectory.create(tmp_path / "run", private)
    with pytest.raises(RoundError):
        run_rounds(Meddling(sites, change), directory, initial_parameters(private))
    assert all(flaky.site.ledger.rounds("run-1") == 0 for flaky in sites.values())


def test_a_site_that_weighs_more_than_the_sum_was_made_for_takes_no_part(tmp_path, record, sites):
    heavy = max(len(flaky.site.data.train) for flaky in sites.values())
    request = SecureRequest(dropouts=0.2, corrupt=0.0, largest_weight=heavy - 1)
    outcome = run(tmp_path / "run", record.model_copy(update={"secure": request}), sites)
    assert 0 < len(outcome.receipts) < 5


def test_weights_without_a_bound_are_a_wrong_setting(tmp_path, record, sites):
    request = SecureRequest(dropouts=0.2, corrupt=0.0)
    with pytest.raises(UsageError, match=r"secure\.largest_weight is not set"):
        run(tmp_path / "run", record.model_copy(update={"secure": request}), sites)


def test_drop_outs_and_corrupt_sites_that_no_sum_survives_are_a_wrong_setting(tmp_path, record, sites):
    request = SecureRequest(dropouts=0.4, corrupt=0.4, largest_weight=1000)
    with pytest.raises(UsageError, match="secure: 5 sites cannot do with 2 drop-outs"):
        run(tmp_path / "run", record.model_copy(update={"secure": request}), sites)


def test_secure_aggregation_goes_with_local_noise_and_with_the_servers(tmp_path, record, sites):
    local = PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1)
    central = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1.0, noise_multiplier=0.5)
    outcome = run(tmp_path / "run", secure(record, privacy=local, central=central, weighting="uniform"), sites)
    receipt = next(iter(outcome.receipts.values())).receipt
    assert (receipt.mechanism, receipt.trust, receipt.secure_aggregation) == ("dp-sgd", "nobody", True)
    assert (receipt.central.unit, receipt.central.epsilon) == ("site", 8)
    assert receipt.epsilon_run <= 4


def test_arrays_survive_being_flattened():
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.full((1,), 7, np.float32)}
    again = unflattened(flattened(arrays).astype(np.float64), shapes_of(arrays))
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
    assert postprocess.template(arrays, plan_of(run_record())).keys() == arrays.keys()


@pytest.mark.parametrize(
    "changes",
    [{"neighbours": 2, "threshold": 2}, {"threshold": 3, "colluding": 1}],
    ids=["a sparse graph", "a threshold that a colluding site helps over"],
)
def test_a_site_joins_no_sum_that_could_be_one_of_few(record, sites, changes):
    """What the server chooses of the protocol is checked by the rule that an honest one chooses by."""
    site = next(iter(sites.values())).site
    plan = plan_of(record.model_copy(update={"weighting": "uniform"})).model_copy(update={"cohort": 5})
    whole = session_of(plan, sorted(sites), Outgoing(initial_parameters(record)), SECURE, 3)
    for secure, refused in ((whole.secure, False), (whole.secure.model_copy(update=changes), True)):
        asked = whole.model_copy(update={"secure": secure})
        (message,) = questions([number_of(site.name)], 1, KEYS, question(asked))
        reply = site.answer(message)
        assert reply.has_error() == refused
        if refused:
            assert "that is not enough" in reply.error.reason


def test_sites_that_are_sent_other_parameters_than_the_rest_take_no_part(tmp_path, record, sites):
    """Dead parameters for all but one site would make its update the sum."""
    dead = {name: np.zeros_like(array) for name, array in initial_parameters(record).items()}

    def change(message):
        if message.metadata.message_type == "train" and message.metadata.dst_node_id != number_of(sorted(sites)[0]):
            message.content["arrays"] = pack(dead)
        return message

    directory = RunDirectory.create(tmp_path / "run", secure(record))
    with pytest.raises(RoundError, match="are not those that the session's sites were told of"):
        run_rounds(Meddling(sites, change), directory, initial_parameters(record))
    assert sum(flaky.site.ledger.rounds("run-1") for flaky in sites.values()) == 1


def test_a_round_that_fails_while_it_is_unmasked_is_passed_over(tmp_path, record, sites):
    for name in sorted(sites)[:3]:
        sites[name].silent_at = UNMASK
    two = secure(record, rounds=2)
    with pytest.raises(RoundError, match="passed over"):
        run(tmp_path / "run", two, sites)
    for flaky in sites.values():
        flaky.silent_at = None
    PendingRound.drop(tmp_path / "run")
    outcome = run(tmp_path / "run", two, sites)
    assert [line["round"] for line in RunDirectory(tmp_path / "run").read_metrics()] == [2]
    assert {receipt.receipt.rounds for receipt in outcome.receipts.values()} == {2}, "both were paid for"


def test_steps_too_coarse_for_the_servers_noise_are_a_wrong_setting(tmp_path, record, sites):
    central = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1e-6, noise_multiplier=1.0)
    coarse = secure(record, central=central, weighting="uniform")
    with pytest.raises(UsageError, match="too coarse for noise by the server"):
        run(tmp_path / "run", coarse, sites)
