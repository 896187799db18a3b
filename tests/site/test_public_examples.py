"""A site whose operator declares how many examples there are: nothing that leaves it depends on how many there are.

Two sites differ in one row that no sample takes. What they answer is compared as the bytes of a message's content,
before it is sealed (under masks, as the integers before they are masked).
"""

import json
import logging
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ConfigRecord, Message, RecordDict

from fedclaw.errors import DataError, LedgerError, UsageError
from fedclaw.learning.workload import Table
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import pack
from fedclaw.protocol.messages import ARRAYS, JSON, METRICS, PLAN, RECEIPT, SUM
from fedclaw.protocol.questions import questions
from fedclaw.protocol.records import hash_of
from fedclaw.protocol.refusal import Refusal
from fedclaw.protocol.terms import Plan, PrivacyRequest
from fedclaw.site import pipeline
from fedclaw.site.directory import open_service
from fedclaw.site.journal import ledger as journal
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.policy.policy import DataSetBudget, Policy
from fedclaw.site.preflight.check import examine
from fedclaw.site.privacy_budget import Asking
from fedclaw.site.settings import load_site_settings
from fedclaw.site.training import TrainingAnswer
from fedclaw.transport.grpc.message_codec import encode
from tests.least_squares import service
from tests.made_tables import make_sites
from tests.neighbours import (
    INPUTS,
    Asked,
    Coupled,
    Nets,
    parameters_of,
    plan_of,
    question_of,
    strategies,
)
from tests.site.conftest import Asker
from tests.site.test_statistics import Asker as StatisticsAsker
from tests.site.test_statistics import receipt_of, vector_of

ROWS, DECLARED = 12, 20
"""Rows that are there but for the extra one, and how many there are by declaration."""
MASKED = ("local-secure", "example-sites", "site-sites")


class Aligned(GaussianSource):
    """Noise under a fixed key; rows are sampled from streams of their own, one a draw, and never those after ROWS."""

    def __init__(self, rows: int = ROWS) -> None:
        super().__init__(insecure_fixed_key_for_tests=bytes(32))
        self._rows = rows
        self._draws = 0

    def bernoulli(self, count, q):
        mask = self._stream().bernoulli(count, q)
        mask[self._rows :] = False
        return mask

    def permutation(self, count):
        return self._stream().permutation(count)

    def _stream(self) -> GaussianSource:
        self._draws += 1
        return GaussianSource(insecure_fixed_key_for_tests=self._draws.to_bytes(32, "big"))


class Noon(datetime):
    """When the ledgers' entries are made."""

    @classmethod
    def now(cls, tz=None):
        return datetime(2026, 11, 30, 12, tzinfo=tz or UTC)


@pytest.fixture(autouse=True)
def same_ledgers(monkeypatch):
    """Ledgers differ in their secret identity and the time of day, so heads do; here they do not."""
    monkeypatch.setattr(journal, "datetime", Noon)
    monkeypatch.setattr("fedclaw.site.journal.ledger.secrets.token_hex", lambda size: "ab" * size)


def table(rows: int, seed: int = 3) -> Table:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(40, INPUTS)).astype(np.float32)
    return Table(inputs[:rows], (np.arange(40) % 2)[:rows])


def site_of(rows: int, *, test: Table | None = None, declared: int | None = DECLARED, tested: int | None = 15, **rules):
    """A site with so many rows of the same table."""
    asked = {"allow_training_without_privacy": False, "trust_server_noise": True, "epsilon": None, "delta": 1e-2}
    noised = {"metrics_epsilon": 1.0, "metrics_budget": DataSetBudget(epsilon=None, delta=1e-3)}
    clauses = {"strategies": tuple(strategies()), **asked, **noised, **rules}
    site = service("a", Nets(INPUTS), table(rows), test=table(15, 5) if test is None else test, **clauses)
    site.data = replace(site.data, public_examples=declared, public_test_examples=tested)
    site.test_ledger = Ledger.open(":memory:", "a/test")
    site.source = Aligned(min(rows, ROWS))
    return site


def content_of(reply: Message) -> bytes:
    """What is sealed of an answer or an error."""
    return b"".join(encode(reply.error if reply.has_error() else reply.content).parts)


def answered(site, asked: Asked, message: Message) -> bytes:
    if asked.kind == "train" and asked.mechanism in MASKED:
        plan = Plan.model_validate_json(str(message.content.config_records[PLAN][JSON]))
        vectors = []
        training = TrainingAnswer(site, Asking(message, plan.federation, plan.run, plan.round, plan.rounds), plan)
        try:
            content = pipeline.answer(training, lambda vector: vectors.append(vector.copy()) or {})
        except Refusal as refusal:
            return repr((refusal.code, refusal.reason)).encode()
        return vectors[0].tobytes() + b"".join(encode(content).parts)
    reply = site.answer(message)
    site.release(message, reply, 10, "00" * 32)
    return content_of(reply)


def answers(site, messages) -> list[bytes]:
    return [answered(site, asked, message) for asked, message in messages]


def rounds_of(*asked: Asked):
    """The same messages for both sites."""
    assumed = site_of(ROWS)
    return [(one, question_of(one, assumed, number, one.kind)) for number, one in enumerate(asked, 1)]


@pytest.mark.parametrize("mechanism", ["local", "local-secure", "both", "example-server", "example-sites"])
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_a_row_that_is_never_sampled_changes_no_byte(mechanism, strategy):
    weighting = "examples" if mechanism.startswith("example") else "uniform"
    asked = Asked(strategy, mechanism, weighting=weighting)
    messages = rounds_of(asked, asked, replace(asked, kind="evaluate"))
    sides = [answers(site_of(rows), messages) for rows in (ROWS, ROWS + 1)]
    assert sides[0] == sides[1]
    if strategy == "fedavg":
        assert b"zero-out" not in sides[0][0]
        assert b"add-or-remove" in sides[0][0], "not refused"


@pytest.mark.parametrize("mechanism", ["local", "example-server", "example-sites"])
def test_neither_does_the_only_row_there_is(mechanism):
    """No rows and one are neighbours too; a step on an empty sample is a step."""
    messages = rounds_of(*2 * [Asked("fedavg", mechanism)])
    sides = []
    for rows in (0, 1):
        site = site_of(rows)
        site.source = Aligned(rows=0)
        sides.append(answers(site, messages))
    assert sides[0] == sides[1]
    assert b"add-or-remove" in sides[0][1]


@pytest.mark.parametrize("mechanism", ["none", "site-server"])
def test_where_steps_go_through_all_rows_the_trained_numbers_alone_depend_on_them(mechanism):
    messages = rounds_of(Asked("fedavg", mechanism))
    replies = []
    for rows in (0, ROWS, ROWS + 1, 2 * DECLARED):
        site = site_of(rows, allow_training_without_privacy=True)
        replies.append(site.answer(messages[0][1]).content)
    told = [(dict(reply[METRICS]), reply[RECEIPT][JSON]) for reply in replies]
    assert all(one == told[0] for one in told)
    assert told[0][0] == {"weight": DECLARED, "examples": DECLARED}
    sums = [{name: array.numpy() for name, array in reply[SUM].items()} for reply in replies]
    assert not any(array.any() for array in sums[0].values()), "there was nothing to learn from"
    assert any(array.any() for array in sums[1].values())
    assert {array.shape for array in sums[0].values()} == {array.shape for array in sums[3].values()}


def changed(kind: str, session=None, privacy=None, **fields) -> tuple[Asked, Message]:
    """A plan for local noise, changed."""
    site = site_of(ROWS)
    asked = Asked("fedavg", "local-secure" if session else "local", kind)
    plan = plan_of(asked, site, 1)
    content = RecordDict({ARRAYS: pack(parameters_of())})
    digest = hash_of(content.array_records).hexdigest()
    plan["secure"] = {**plan["secure"], "content": digest, **session} if session else None
    plan |= {"privacy": {**plan["privacy"], **(privacy or {})}, **fields}
    content[PLAN] = ConfigRecord({JSON: json.dumps(plan)})
    return asked, questions([7], 1, kind, content, 100.0)[0]


def test_neither_does_how_many_steps_an_epoch_has():
    """Of the rows that there are, 12 or 13, it would be 3 or 4."""
    asked, message = changed("train", training={"epochs": 1.0, "batch_size": 4, "learning_rate": 0.1})
    sides = [answered(site_of(rows), asked, message) for rows in (ROWS, ROWS + 1)]
    assert sides[0] == sides[1]
    assert b'"steps":5,' in sides[0]


BETWEEN = ROWS + 0.5
REFUSED = {
    "below one over the number of examples": ({"privacy": {"delta": 1 / BETWEEN}}, {"delta": 0.2}),
    "at most 12 local steps": (
        {"training": {"epochs": 1.0, "batch_size": 1, "learning_rate": 0.1}},
        {"max_local_steps": ROWS},
    ),
    "this site has more examples": ({"session": {"largest_weight": BETWEEN}}, {}),
    "at least 16 test examples": ({"kind": "evaluate"}, {"minimum_test_examples": 16}),
    "sets no metrics_epsilon": ({"kind": "evaluate"}, {"metrics_epsilon": None, "metrics_budget": None}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_are_by_the_declared_number(reason):
    plan, rules = REFUSED[reason]
    question = changed(**{"kind": "train", **plan})
    told = [answered(site_of(rows, test=table(rows + 3, 5), **rules), *question) for rows in (ROWS, ROWS + 1)]
    assert told[0] == told[1]
    assert reason.encode() in told[0]


def test_so_is_what_is_left_of_a_budget():
    runs = [changed("train", run=name) for name in ("run-1", "run-2")]
    sides = [answers(site_of(rows, epsilon=4.1, delta=1e-5), runs) for rows in (ROWS, ROWS + 1)]
    assert sides[0] == sides[1]
    assert b"add-or-remove" in sides[0][0]
    assert b"privacy budget: what is left" in sides[0][1]


def test_metrics_without_noise_would_tell_how_many_there_are():
    _, message = changed("evaluate")
    site = site_of(ROWS, metrics_epsilon=None, metrics_budget=None)
    assert "metrics_epsilon" in site.answer(message).error.reason
    site.data = replace(site.data, public_test_examples=None)
    assert not site.answer(message).has_error()


def misjudged(rows: int) -> Table:
    """Test rows whose last one the first parameters judge wrongly."""
    whole, site = table(rows, 5), site_of(ROWS)
    model = site.model(Nets(INPUTS).default_model(), parameters_of())
    label = int(model(torch.from_numpy(whole.inputs))[-1].argmax())
    return Table(whole.inputs, np.concatenate([whole.targets[:-1], [1 - label]]))


def test_a_test_row_that_adds_nothing_changes_no_byte():
    _, message = changed("evaluate", metrics=("accuracy",))
    whole = misjudged(16)
    fewer = Table(whole.inputs[:-1], whole.targets[:-1])
    sides = [content_of(site_of(ROWS, test=test).answer(message)) for test in (whole, fewer)]
    assert sides[0] == sides[1]
    assert b"add-or-remove" in sides[0]


@pytest.mark.parametrize("rows", [0, 15])
def test_a_test_row_moves_what_is_noised_by_no_more_than_its_sensitivity(rows):
    """And nothing else, the first one neither."""
    _, message = changed("evaluate")
    sides, others = [], []
    for test in (table(rows, 5), table(rows + 1, 5)):
        site = site_of(ROWS, test=test, metrics=("accuracy", "loss", "score_histogram"))
        site.source = Coupled(present=True)
        reply = site.answer(message)
        receipt = json.loads(str(reply.content[RECEIPT][JSON]))
        (noised,) = site.source.noised
        sides.append((noised.before, noised.std / receipt["noise_multiplier"]))
        others.append((receipt, reply.content[METRICS]["examples"], reply.content[METRICS]["weight"], noised.std))
    assert 0 < np.linalg.norm(sides[0][0] - sides[1][0]) <= sides[0][1] * (1 + 1e-6)
    assert others[0] == others[1]


@pytest.fixture
def numbers(tmp_path):
    """Two directories of a site with the same table, the second one with a row more."""
    roots = []
    for number in range(2):
        root = make_sites(tmp_path / str(number), count=1, standardise="schema").directories[0]
        path = root / "train.csv"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: 101 + number]))
        write(root, {"public_examples": 150, "public_test_examples": 200})
        roots.append(root)
    return roots


def write(root, data=None, **clauses):
    path = root / "site.yaml"
    site = yaml.safe_load(path.read_text())
    site["policy"].update(clauses)
    site["data"] = {name: value for name, value in {**site["data"], **(data or {})}.items() if value is not None}
    path.write_text(yaml.safe_dump(site))


def test_statistics_differ_by_one_row_of_length_one_and_tell_nothing_else(numbers):
    vectors, receipts, sizes = [], [], []
    for root in numbers:
        asker = StatisticsAsker(root, durable=False)
        asker.site.source = Aligned()
        reply = asker.ask(identity="same")
        vectors.append(vector_of(reply))
        receipts.append(receipt_of(reply))
        sizes.append(len(content_of(reply)))
    assert 0.5 < np.linalg.norm(vectors[0] - vectors[1]) <= 1 + 1e-4
    # The head is a hash over the content of the data under the ledger's secret identity.
    assert receipts[0].model_copy(update={"ledger_head": receipts[1].ledger_head}) == receipts[1]
    assert receipts[0].relation == "add-or-remove"
    assert sizes[0] == sizes[1]


def test_statistics_are_refused_by_the_declared_number(numbers):
    reasons = []
    for root in numbers:
        asker = StatisticsAsker(root, durable=False)
        asker.allow(delta=0.1)
        reasons.append(asker.ask(delta=1 / 100.5).error.reason)
    assert reasons[0] == reasons[1]


@pytest.mark.parametrize("unit", ["example", "person"])
def test_a_site_without_any_rows_serves(numbers, unit):
    root = numbers[0]
    schema = yaml.safe_load((root / "schema.yaml").read_text())
    persons = {} if unit == "example" else {"person": "patient", "rows_per_person": 2}
    (root / "schema.yaml").write_text(yaml.safe_dump({**schema, **persons}))
    for name in ("train.csv", "test.csv"):
        path = root / name
        path.write_text(("patient," if persons else "") + path.read_text().splitlines(keepends=True)[0])
    write(root, metrics_epsilon=1.0, metrics_budget={"epsilon": 3.0}, metrics=["accuracy", "loss"])
    asker = StatisticsAsker(root)
    assert len(asker.site.data.train) == len(asker.site.data.test) == 0
    assert (asker.site.examples, asker.site.test_examples) == (150, 200 if unit == "example" else 400)
    told = receipt_of(reply := asker.ask())
    assert np.isfinite(vector_of(reply)).all()
    assert (told.unit, told.relation) == (unit, "add-or-remove")
    whole = Asker(root)
    for kind in ("train", "evaluate"):
        content = whole.ask(kind, privacy=PrivacyRequest(epsilon=1, delta=1e-4, max_grad_norm=1)).content
        receipt = json.loads(str(content[RECEIPT][JSON]))
        assert (receipt["unit"], receipt["relation"]) == (unit, "add-or-remove")
    assert examine(root, load_site_settings(root)).findings.failure is None
    write(root, {"public_examples": None})
    with pytest.raises(DataError, match="no data rows"):
        open_service(root, load_site_settings(root), "clinic", durable=False)


def test_constants_of_the_federation_leave_the_declared_numbers(tmp_path):
    root = make_sites(tmp_path, count=1, standardise="federated").directories[0]
    write(root, {"public_examples": 150, "public_test_examples": 210})
    site = open_service(root, load_site_settings(root), "clinic", durable=False)
    before = (site.examples, site.test_examples)
    from fedclaw.site.site import prepare

    prepare(site, site.workload.schema.shared_constants({"dose": (5000.0, 1e6), "age": (60.0, 400.0)}))
    assert (site.examples, site.test_examples) == before == (150, 210)


def test_a_site_whose_test_rows_are_training_rows_does_not_start(root):
    settings = load_site_settings(root)
    with settings.data.test.open("a") as file:
        file.write(settings.data.train.read_text().splitlines(keepends=True)[3])
    open_service(root, settings, "clinic", durable=False)
    for declared in ({"public_examples": 400}, {"public_examples": None, "public_test_examples": 100}):
        write(root, declared)
        with pytest.raises(DataError, match="test rows are training rows"):
            open_service(root, load_site_settings(root), "clinic")
    write(root, maximum_shared_test_rows=0.1)
    open_service(root, load_site_settings(root), "clinic")


# The ledger


def charge(root) -> None:
    asker = Asker(root)
    assert not asker.ask(privacy=PrivacyRequest(epsilon=0.5, delta=1e-4, max_grad_norm=1)).has_error()
    asker.site.ledger.close()


@pytest.mark.parametrize(("first", "second"), [(400, 401), (400, None), (None, 400)])
def test_the_declared_number_is_fixed_for_a_data_sets_life(root, first, second):
    write(root, {"public_examples": first})
    charge(root)
    write(root, {"public_examples": second})
    with pytest.raises(LedgerError, match="fixed for a data set's life") as refused:
        open_service(root, load_site_settings(root), "clinic")
    text = str(refused.value)
    back = "take data.public_examples out" if first is None else "put data.public_examples: 400 back"
    assert back in text
    assert "backup" not in text
    found = examine(root, load_site_settings(root)).findings
    assert isinstance(found.failure, LedgerError)
    write(root, {"public_examples": first})
    charge(root)
    entries = Ledger.open(root / "state" / "ledger.sqlite", "hospital-north").entries()
    charges = [entry.body for entry in entries if entry.body["kind"] == "reserve"]
    assert [body.get("public_examples") for body in charges] == [first, first]


def test_nobody_charges_beside_another_number(root):
    """Whoever opened the ledger."""
    write(root, {"public_examples": 400})
    charge(root)
    with Ledger.open(root / "state" / "ledger.sqlite", "hospital-north", public_examples=500) as ledger:
        charging = {"federation": "clinic", "run": "run-2", "round": 1, "mechanism": None}
        with pytest.raises(LedgerError, match="400"):
            ledger.reserve("m", **charging, budget=journal.Budget(None, 1e-3))


def test_so_is_that_of_the_test_data_whether_or_not_metrics_leave_with_noise_now(root):
    noise = {"metrics": ["accuracy"], "metrics_epsilon": 0.5, "metrics_budget": {"epsilon": 3.0, "delta": 1e-3}}
    write(root, {"public_test_examples": 100}, **noise)
    asker = Asker(root)
    assert not asker.ask("evaluate").has_error()
    asker.site.ledger.close()
    without = {"metrics_epsilon": None, "metrics_budget": None}
    for declared, clauses in ((None, noise), (None, without), (90, noise)):
        write(root, {"public_test_examples": declared}, **clauses)
        with pytest.raises(LedgerError, match=r"put data\.public_test_examples: 100 back"):
            open_service(root, load_site_settings(root), "clinic")


# What the operator is told, and nobody else


def test_check_tells_a_declaration_that_is_far_off(root):
    rows = len(open_service(root, load_site_settings(root), "clinic", durable=False).data.train)
    for declared, off in ((round(1.05 * rows), False), (round(1.2 * rows), True), (round(0.8 * rows), True)):
        write(root, {"public_examples": declared})
        found = examine(root, load_site_settings(root)).findings
        assert any(f"{declared} is declared, and there are {rows}" in warning for warning in found.warnings) is off
        assert any(f"public_examples: {declared} is declared" in fact for fact in found.facts)
    write(root, {"public_test_examples": 100})
    assert any("metrics_epsilon" in warning for warning in examine(root, load_site_settings(root)).findings.warnings)


MEANINGLESS = [{"public_examples": 0}, {"public_examples": True}, {"public_test_examples": 10, "test": None}]


@pytest.mark.parametrize("wrong", MEANINGLESS)
def test_a_declaration_that_means_nothing_is_refused(root, wrong):
    write(root, wrong)
    with pytest.raises(UsageError, match="public_"):
        load_site_settings(root)


def test_the_policy_has_no_part_in_it():
    assert not [name for name in Policy.model_fields if name.startswith("public")]
    assert logging.getLogger("fedclaw.site").name
