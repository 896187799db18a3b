"""What leaves a site beside its noised numbers: sizes, refusals, receipts. docs/privacy.md says the same, with reasons.

Each site here is a real service with the same number of rows. Their rows have nothing in common, or are replaced by
nothing at all (a row that is not finite adds a gradient of zero).
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedclaw.identity.seal import Binding, Sealer, generate
from fedclaw.learning.tasks.base import BoundedSum
from fedclaw.learning.workload import Table
from fedclaw.privacy.mechanisms.sum_noise import moved
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.message_identity import assign_message_id
from fedclaw.protocol.questions import Outgoing, question, questions
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.statistics import STATISTICS, StatisticsRequest
from fedclaw.protocol.terms import AdaptiveClip, LocalTraining, PrivacyRequest
from fedclaw.site.evaluation import bounded_together, noised
from fedclaw.site.service import SiteService
from fedclaw.transport.grpc.message_codec import encode
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.in_process import open_sites
from tests.hostile import EXAMPLE, ONE_STEP, SITE, ask, plan_for, wary_site
from tests.made_tables import make_sites
from tests.small_nets import first

DATA = ("one", "another", "nothing")
ROWS = 20


def site_with(data: str, **policy: Any) -> SiteService:
    """A site of ROWS rows and as many test rows; its noise and samples are its own."""
    site = wary_site(**policy)
    if data == "one":
        return site
    generator = np.random.default_rng(99)
    inputs = 40 * generator.normal(size=(2, ROWS, 3)).astype(np.float32)
    if data == "nothing":
        inputs[0] = np.nan
    labels = np.zeros(ROWS, np.int64)
    site.data = replace(site.data, train=Table(inputs[0], labels), test=Table(inputs[1], labels), fingerprint=data)
    return site


def size_of(reply: Message) -> int:
    """Bytes of an answer or a refusal as they go to be sealed."""
    return encode(reply.error if reply.has_error() else reply.content).size


def forms_in(reply: Message) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each array that left: on the way they are filled up to multiples of 64 bytes."""
    return {name: (array.dtype, tuple(array.shape)) for name, array in reply.content["sum"].items()}


COMPRESSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {"method": "fp16"},
    "int8": {"method": "int8", "block": 4},
    "int4": {"method": "int4"},
    "topk": {"method": "topk", "fraction": 0.3},
    "topk as a map": {"method": "topk", "fraction": 0.8},
    "randk": {"method": "randk", "fraction": 0.5},
    "powersgd": {"method": "powersgd", "rank": 1},
}


RUNS: dict[str, dict[str, Any]] = {"private": {}, "plain": {"privacy": None}}


@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_an_answers_size_follows_from_the_model_and_the_plan(compression):
    """However compressed, over two rounds: what error feedback remembers changes no size either. With noise in the
    steps, and without, where every zero of an update would show."""
    sizes = {}
    for data in DATA:
        site = site_with(data, allow_training_without_privacy=True, epsilon=None)
        terms = [{"round": round, "run": run} | changes for run, changes in RUNS.items() for round in (1, 2)]
        rounds = [ask(site, "fedavg", compression=compression or None, **changes) for changes in terms]
        assert not any(reply.has_error() for reply in rounds), rounds[0]
        sizes[data] = [(size_of(reply), forms_in(reply)) for reply in rounds]
    assert sizes["one"] == sizes["another"] == sizes["nothing"]


MECHANISMS: dict[str, dict[str, Any]] = {
    "local": {},
    "local and the server's": {"central": SITE},
    "the server's, for examples": {"privacy": None, "central": EXAMPLE, "training": ONE_STEP},
    "the server's, for sites": {"privacy": None, "central": SITE},
}


@pytest.mark.parametrize("changes", MECHANISMS.values(), ids=MECHANISMS)
def test_nothing_beside_the_arrays_depends_on_the_data(changes):
    """Records, names, types and shapes; weight, number and receipt, but for the head of the ledger."""
    told = []
    for data in DATA:
        reply = ask(site_with(data), "fedavg", **changes)
        content = reply.content
        receipt = json.loads(str(content["receipt"]["json"]))
        assert re.fullmatch("[0-9a-f]{64}", receipt.pop("ledger_head"))
        forms = {name: (array.dtype, array.shape) for name, array in unpack(content["sum"]).items()}
        told.append((sorted(content), forms, dict(content["metrics"]), receipt, size_of(reply)))
    assert told[0] == told[1] == told[2]


def test_a_ledgers_head_says_nothing_to_who_does_not_know_the_ledgers_own_number():
    """It is a hash over what was charged and the digest of the data, and over 128 random bits that never leave."""
    heads, numbers = set(), set()
    for _ in range(2):
        site = site_with("one")
        reply = ask(site, "fedavg")
        heads.add(json.loads(str(reply.content["receipt"]["json"]))["ledger_head"])
        (number,) = {entry.body["ledger"] for entry in site.ledger.entries() if "ledger" in entry.body}
        assert len(str(number)) == 32
        assert str(number) not in str(reply.content.config_records)
        numbers.add(number)
    assert len(heads) == len(numbers) == 2


@pytest.mark.parametrize("suite", ["x25519", "mlkem768-x25519"])
def test_a_seal_adds_as_much_to_whatever_it_seals(suite):
    sealer = Sealer(suite, generate(suite).public)
    for length in (0, 1000, (1 << 20) + 5):
        sealed = [
            sealer.seal([content], Binding("clinic", 1, "1", f"message-{number}", "north"))
            for number, content in enumerate((bytes(length), b"\xff" * length))
        ]
        assert len({len(one.header) for one in sealed}) == 1
        bodies = [sum(len(one.segment(index)) for index in range(one.count)) for one in sealed]
        assert bodies[0] == bodies[1] == length + 16 * sealed[0].count


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return make_sites(tmp_path_factory.mktemp("tables"))


@pytest.fixture
def table_sites(tables, tmp_path):
    shutil.copytree(tables.root, tmp_path / "tables")
    return open_sites([tmp_path / "tables" / path.relative_to(tables.root) for path in tables.directories], "clinic")


def statistics_of(site: SiteService, **changes: Any) -> Message:
    fields = {"federation": "clinic", "run": "statistics-1", "cohort": 4, "workload": "tabular", "bins": 8}
    fields |= {"columns": ("dose", "age"), "epsilon": 1.0, "delta": 1e-4, "schema_digest": site.schema_digest}
    asked = StatisticsRequest(**{**fields, **changes})
    content = RecordDict({"request": ConfigRecord({"json": asked.model_dump_json()})})
    message = Message(content, dst_node_id=7, message_type=STATISTICS, group_id="0")
    assign_message_id(message, f"message-{changes.get('run', 1)}")
    return site.answer(message)


def test_statistics_have_the_size_that_the_schema_and_the_request_make(table_sites):
    """Four sites whose data differ as much as sites do."""
    replies = [statistics_of(site) for site in table_sites.values()]
    assert not any(reply.has_error() for reply in replies)
    assert len({size_of(reply) for reply in replies}) == 1
    assert len({unpack(reply.content["sum"])["statistics"].dtype for reply in replies}) == 1


# Refusals


def asking(epsilon: float, delta: float = 1e-5) -> PrivacyRequest:
    return PrivacyRequest(epsilon=epsilon, delta=delta, max_grad_norm=1)


CASES: dict[RefusalCode, tuple[str, dict[str, Any], dict[str, Any]]] = {
    RefusalCode.MALFORMED: ("train", {"training": LocalTraining(steps=1, batch_size=4, learning_rate=1e9)}, {}),
    RefusalCode.FEDERATION: ("train", {"federation": "other"}, {}),
    RefusalCode.WORKLOAD: ("train", {"workload": "vision"}, {}),
    RefusalCode.SCHEMA: ("train", {"schema_digest": "0" * 64}, {}),
    RefusalCode.MODEL: ("another model's parameters", {}, {}),
    RefusalCode.STRATEGY: ("train", {}, {"strategies": ("fedprox",)}),
    RefusalCode.PRIVACY_REQUIRED: ("train", {"privacy": None}, {}),
    RefusalCode.EPSILON: ("train", {"privacy": asking(4, delta=1 / ROWS)}, {"delta": 0.1}),
    RefusalCode.BUDGET: ("train", {"privacy": asking(9.9)}, {"epsilon": 10}),
    RefusalCode.COHORT: ("train", {"cohort": 1}, {"minimum_cohort": 2}),
    RefusalCode.LOCAL_STEPS: (
        "train",
        {"training": LocalTraining(epochs=1, batch_size=1, learning_rate=0.1)},
        {"max_local_steps": ROWS - 1},
    ),
    RefusalCode.METRICS: ("evaluate", {}, {"metrics": ()}),
    RefusalCode.UPDATE_SIZE: ("train", {}, {"max_update_mb": 1e-6}),
    RefusalCode.SECURE_AGGREGATION: ("train", {}, {"require_secure_aggregation": True}),
    RefusalCode.FREQUENCY: ("train", {}, {"minimum_seconds_between_rounds": 1e6}),
    RefusalCode.STATISTICS: ("statistics", {}, {}),
}
"""What makes a site refuse with this code: the kind of question, what is in it, and the policy.

Where the number of rows decides, one row less would be answered.
"""

BY_THE_DATA = {RefusalCode.METRICS, RefusalCode.SECURE_AGGREGATION, RefusalCode.FAILED}
"""Codes that the content of the data can bring about, too: the tests below show how, docs/privacy.md says why."""

NEVER_SAID_BY_A_SITE = {RefusalCode.SLOW}
"""How long a site takes depends on its data, and the server sees that."""


def refused(site: SiteService, kind: str, changes: dict[str, Any]) -> tuple[RefusalCode, str, int]:
    if kind == "statistics":
        reply = statistics_of(site, workload=site.workload.name)
    elif kind == "another model's parameters":
        content = question(plan_for(site, "fedavg"), Outgoing(first("normed", 3), None, {}))
        (message,) = questions([7], 1, "train", content, 100.0)
        reply = site.answer(message)
    else:
        ask(site, "fedavg", kind, run="earlier")
        reply = ask(site, "fedavg", kind, **changes)
    assert reply.has_error()
    # How long to wait is the clock's.
    reason = re.sub(r"in \d+ seconds", "in some seconds", reply.error.reason)
    return RefusalCode(reply.error.code), reason, size_of(reply)


def test_every_code_is_looked_at():
    assert set(CASES) | BY_THE_DATA | NEVER_SAID_BY_A_SITE == set(RefusalCode)


@pytest.mark.parametrize("code", CASES, ids=lambda code: code.name)
def test_a_refusal_says_the_same_whatever_the_data_are(code):
    kind, changes, policy = CASES[code]
    told = {data: refused(site_with(data, **policy), kind, changes) for data in DATA}
    assert told["one"][0] is code
    assert told["one"][:2] == told["another"][:2] == told["nothing"][:2]
    if code is not RefusalCode.FREQUENCY:
        assert len({size for _, _, size in told.values()}) == 1


def test_whether_test_rows_are_training_rows_shows_by_a_refusal():
    """Not closed: a server that knows a test row learns if it was trained on. The reason does not say which, or how
    many."""
    site = site_with("one", metrics=("loss",))
    assert not ask(site, "fedavg", "evaluate").has_error()
    site.shared_test_rows = 1
    one = ask(site, "fedavg", "evaluate")
    site.shared_test_rows = 3
    assert RefusalCode(one.error.code) is RefusalCode.METRICS
    assert ask(site, "fedavg", "evaluate").error.reason == one.error.reason


def test_a_failure_tells_no_more_than_that_there_was_one(table_sites):
    """What failed is in the site's own log: data that changed, data that is gone, and data that cannot be read."""
    reasons = set()
    for site, spoil in zip(
        table_sites.values(), (Path.unlink, lambda path: path.write_text("x"), lambda path: path.touch()), strict=False
    ):
        train = site.data.files.train
        spoil(train)
        reply = statistics_of(site, run=f"spoilt-{len(reasons)}")
        if reply.has_error():
            assert RefusalCode(reply.error.code) is RefusalCode.FAILED
            reasons.add(reply.error.reason)
    assert len(reasons) == 1
    assert "train" not in reasons.pop()


# Exactness and progress


def last_bits(values: Any) -> bool:
    """Whether some number has more digits than a float32."""
    values = np.asarray(values, np.float64)
    return bool((values != values.astype(np.float32)).any())


def test_noised_numbers_leave_with_a_float32s_digits(table_sites):
    """Every way out that adds noise to floats rounds once more afterwards: the mitigation of Mironov's attack."""
    site = next(iter(table_sites.values()))
    assert unpack(statistics_of(site).content["sum"])["statistics"].dtype == np.float32
    for changes in ({}, {"compression": {"method": "topk", "fraction": 0.3}}):
        left = ask(site_with("one"), "fedavg", **changes).content["sum"]
        assert not any(last_bits(array.numpy()) for array in left.values())
    policy = site_with("one", metrics_epsilon=1.0, metrics_budget={"epsilon": 9.0, "delta": 1e-5}).policy
    sums = {"correct": BoundedSum(np.array(7.0)), "scores": BoundedSum(np.full((2, 8), 3.0), sensitivity=2.0)}
    told = noised(policy, bounded_together(sums), ROWS, GaussianSource()).value
    assert told.numbers["correct"] != 7.0
    assert not last_bits(told.numbers["correct"])
    assert not last_bits(told.arrays["scores"])
    assert last_bits(told.arrays["scores"] + 1e-12), "the check sees a double's digits"


def test_an_adaptive_clipping_bound_is_told_with_a_float32s_digits():
    """It follows from a noised count, and every site gets it with the next plan."""
    adaptive = AdaptiveClip(quantile=0.5, learning_rate=0.2, count_noise=3.0)
    bounds = [moved(1.0, share, adaptive) for share in np.random.default_rng(1).random(50)]
    assert len(set(bounds)) == 50
    assert not last_bits(bounds)


def test_the_frames_of_a_connection_have_no_place_for_progress():
    """Between a question and its answer a site says nothing but that it is there, every few seconds."""
    frames = {field.name for field in pb.Frame.DESCRIPTOR.oneofs_by_name["body"].fields}
    assert frames == {"hello", "welcome", "refuse", "heartbeat", "offer", "accept", "chunk", "done"}
    assert [field.name for field in pb.Heartbeat.DESCRIPTOR.fields] == ["sequence"]
