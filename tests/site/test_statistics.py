"""How a site answers a request for statistics: what leaves has its noise, is paid for once, and is refused in time."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedclaw.learning.statistics import design_of
from fedclaw.privacy.accounting import calibrate
from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.message_identity import assign_message_id, assume_server_identity, envelope_of, rebuild
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.statistics import STATISTICS, StatisticsReceipt, StatisticsRequest
from fedclaw.site.directory import open_service
from fedclaw.site.journal.reconciliation import check as check_journal
from fedclaw.site.journal.reconciliation import open_journal
from fedclaw.site.policy.policy import sentences
from fedclaw.site.settings import load_site_settings
from fedclaw.site.statistics import statistics_vector
from tests.made_tables import make_sites

COLUMNS = ("dose", "age", "smoker", "ward")


class Asker:
    """Asks one site; `request` is what an honest server would send, `ask` sends a changed one."""

    def __init__(self, root, *, durable=True):
        assume_server_identity(1)
        self.root = root
        self.site = open_service(root, load_site_settings(root), "clinic", durable=durable)
        self.request = StatisticsRequest(
            federation="clinic",
            run="statistics-1",
            cohort=3,
            workload="tabular",
            schema_digest=self.site.schema_digest,
            columns=COLUMNS,
            bins=16,
            epsilon=1.0,
            delta=1e-3,
        )
        self._count = 0

    @property
    def design(self):
        asked = self.request
        return design_of(self.site.workload.schema, asked.columns, asked.labels, asked.bins)

    def message(self, *, identity=None, content=None, **changes):
        if content is None:
            text = self.request.model_copy(update=changes).model_dump_json()
            content = RecordDict({"request": ConfigRecord({"json": text})})
        message = Message(content, dst_node_id=7, message_type=STATISTICS, group_id="0")
        self._count += 1
        assign_message_id(message, identity or f"message-{self._count}")
        return message

    def ask(self, *, release=True, **changes):
        message = self.message(**changes)
        reply = self.site.answer(message)
        if release:
            self.site.release(message, reply, 10, "00" * 32)
        return reply

    def allow(self, **changes):
        self.site.policy = self.site.policy.model_copy(update=changes)


def vector_of(reply):
    return unpack(reply.content["sum"])["statistics"].astype(np.float64)


def receipt_of(reply):
    return StatisticsReceipt.model_validate_json(reply.content["receipt"]["json"])


def refused(reply, code):
    assert reply.has_error(), "the site answered"
    assert RefusalCode(reply.error.code) is code
    return reply.error.reason


@pytest.fixture
def root(tmp_path):
    return make_sites(tmp_path, count=1).directories[0]


@pytest.fixture
def asker(root):
    return Asker(root)


def test_the_noise_at_the_wire_has_the_scale_that_the_ledger_charged(root):
    """4800 draws: a right scale fails with probability 1e-7, one that is 10% too small passes with 1e-6."""
    asker = Asker(root, durable=False)
    asker.allow(epsilon=None)
    exact = statistics_vector(asker.site, asker.design)
    replies = [asker.ask() for _ in range(100)]
    charged = {receipt_of(reply).noise_multiplier for reply in replies}
    assert charged == {calibrate(1.0, 1e-3, 1.0, 1)}
    noise = np.stack([vector_of(reply) - exact for reply in replies])
    deviation = charged.pop()
    assert noise.size == 4800
    assert np.std(noise) == pytest.approx(deviation, rel=0.055)
    assert abs(noise.mean()) < 6 * deviation / np.sqrt(noise.size)
    assert np.abs(np.std(noise, axis=0) / deviation - 1).max() < 0.5, "a coordinate has too little noise, or too much"
    neighbours = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(neighbours) < 6 / np.sqrt(noise.size), "two answers share their noise"


def test_two_sites_do_not_share_their_noise(tmp_path):
    sites = [Asker(root, durable=False) for root in make_sites(tmp_path, count=2, epsilon=None).directories]
    noise = []
    for asker in sites:
        exact = statistics_vector(asker.site, asker.design)
        noise.append(np.concatenate([vector_of(asker.ask()) - exact for _ in range(50)]))
    assert abs(np.corrcoef(*noise)[0, 1]) < 6 / np.sqrt(len(noise[0]))


def test_one_row_more_in_the_file_moves_what_is_noised_by_at_most_one(root):
    """From the file to the vector: any row that the schema lets in, a missing cell, a label, the ends of the ranges."""
    text = (root / "train.csv").read_text()
    before = Asker(root, durable=False)
    exact = statistics_vector(before.site, before.design)
    rows = ("15000,120,1,c,yes", "-5000,,0,,no", "5000,0,,a,yes", "15000,?,yes,NA,no", "-5000,120,f,b,no")
    for row in rows:
        (root / "train.csv").write_text(text + row + "\n")
        after = Asker(root, durable=False)
        moved = np.linalg.norm(statistics_vector(after.site, after.design) - exact)
        assert 0.5 < moved <= 1 + 1e-9


def test_the_ledger_is_charged_once_however_often_the_reply_is_sent(asker, root):
    message = asker.message(identity="same")
    reply = asker.site.answer(message)
    charged = asker.site.ledger.spent(1e-3)
    assert 0.95 < charged <= 1.0
    for _ in range(3):
        asker.site.release(message, reply, 10, "00" * 32)
    assert asker.site.ledger.spent(1e-3) == charged
    assert asker.site.ledger.rounds("statistics-1") == 1
    journal = open_journal(root)
    (data_set,) = journal.spending().data_sets
    assert data_set.runs[0].open == 0
    check_journal(journal.index, journal.outbound)


def test_an_answer_that_never_left_is_not_charged_again(asker):
    asker.ask(identity="same", release=False)
    once = asker.site.ledger.spent(1e-3)
    asker.ask(identity="same")
    assert asker.site.ledger.spent(1e-3) == once


def test_what_leaves_is_logged_with_its_receipt(asker, root):
    receipt = receipt_of(asker.ask())
    asker.ask(cohort=1)
    lines = [json.loads(line)["entry"] for line in (root / "state" / "outbound.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == [STATISTICS, STATISTICS]
    assert {line["run"] for line in lines} == {"statistics-1"}
    assert lines[0]["receipt"] == receipt.model_dump()
    assert lines[1]["receipt"] is None
    assert receipt.epsilon_left == pytest.approx(10 - receipt.epsilon_lifetime)


def test_refusals(asker):
    say = refused
    assert "'outbreak'" in say(asker.ask(federation="outbreak"), RefusalCode.FEDERATION)
    assert "'vision'" in say(asker.ask(workload="vision"), RefusalCode.WORKLOAD)
    assert "schema" in say(asker.ask(schema_digest="0"), RefusalCode.SCHEMA)
    assert "'height'" in say(asker.ask(columns=("height",)), RefusalCode.SCHEMA)
    assert "at least 2" in say(asker.ask(cohort=1), RefusalCode.COHORT)
    assert "at most 8 per release" in say(asker.ask(epsilon=9), RefusalCode.EPSILON)
    assert "at most 0.001" in say(asker.ask(delta=1e-2), RefusalCode.EPSILON)
    assert "version 9" in say(asker.ask(version=9), RefusalCode.MALFORMED)
    assert "more than once" in say(asker.ask(columns=("age", "age")), RefusalCode.MALFORMED)
    assert say(asker.ask(bins=10**9), RefusalCode.MALFORMED)
    assert say(asker.ask(epsilon=1e-9, delta=1e-12), RefusalCode.EPSILON)
    assert asker.site.ledger.spent(1e-3) == 0, "nothing was charged for what was refused"


def test_each_clause_of_the_policy_is_kept(asker):
    """A policy is changed, the same honest question is asked."""
    site = asker.site

    def under(code, **changes):
        policy = site.policy
        asker.allow(**changes)
        reason = refused(asker.ask(), code)
        site.policy = policy
        return reason

    assert "does not allow" in under(RefusalCode.STATISTICS, statistics=None)
    assert "requires secure aggregation" in under(RefusalCode.SECURE_AGGREGATION, require_secure_aggregation=True)
    assert "other" in under(RefusalCode.FEDERATION, federations=("other",))
    assert "tabular" in under(RefusalCode.WORKLOAD, workloads=("vision",))
    assert "clinic" in under(RefusalCode.FEDERATION, combinations=())
    assert "per run" in under(RefusalCode.EPSILON, epsilon_per_run=0.5)
    assert "per data set" in under(RefusalCode.EPSILON, epsilon=0.5)
    assert "at least 4" in under(RefusalCode.COHORT, minimum_cohort=4)
    assert site.ledger.spent(1e-3) == 0
    assert not asker.ask().has_error()
    assert "asked too often" in under(RefusalCode.FREQUENCY, rounds_per_day=1)


def test_statistics_are_refused_by_default(tmp_path):
    (root,) = make_sites(tmp_path, count=1, statistics=None).directories
    asker = Asker(root)
    refused(asker.ask(), RefusalCode.STATISTICS)
    assert "Statistics of the training data are refused." in sentences(load_site_settings(root).policy)
    allowed = load_site_settings(make_sites(tmp_path / "other", count=1).directories[0]).policy
    (said,) = (one for one in sentences(allowed) if "Statistics" in one)
    assert "each release may cost at most epsilon 8 of the same budget" in said


def test_a_delta_that_would_let_single_examples_be_published_is_refused(tmp_path):
    (root,) = make_sites(tmp_path, count=1, delta=0.5).directories
    reason = refused(Asker(root).ask(delta=1 / 200), RefusalCode.EPSILON)
    assert "200" not in reason.replace("0.005", "")


def test_the_budget_is_the_same_as_for_training_and_ends(asker, caplog):
    replies = [asker.ask(run=f"statistics-{number}", epsilon=4.0) for number in range(8)]
    assert not replies[0].has_error()
    assert "privacy budget" in refused(replies[-1], RefusalCode.BUDGET)
    assert asker.site.ledger.spent(1e-3) <= 10


def test_data_that_have_changed_are_not_taken_for_those_that_were_charged(asker, root, caplog):
    (root / "train.csv").write_text((root / "train.csv").read_text() + "5000,50,1,a,yes\n")
    reason = refused(asker.ask(), RefusalCode.FAILED)
    assert "train.csv" not in reason
    assert "has changed since the client read it" in caplog.text


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": "x"}'])
def test_a_request_that_cannot_be_read_is_refused(asker, text):
    refused(asker.ask(content=RecordDict({"request": ConfigRecord({"json": text})})), RefusalCode.MALFORMED)
    refused(asker.ask(content=RecordDict()), RefusalCode.MALFORMED)


def test_numbers_without_declared_bounds_are_refused_by_name(tmp_path):
    (root,) = make_sites(tmp_path, count=1, standardise="schema").directories
    schema = (root / "schema.yaml").read_text().replace("  range:\n  - 0\n  - 120\n", "")
    (root / "schema.yaml").write_text(schema)
    asker = Asker(root)
    reason = refused(asker.ask(), RefusalCode.SCHEMA)
    assert "no bounds are declared of 'age', and" in reason
    assert not asker.ask(columns=("dose", "ward")).has_error()


def test_after_a_restart_the_log_still_knows_the_run_and_a_question_without_content_is_refused(asker, root):
    message = asker.message(identity="again")
    reply = asker.site.answer(message)
    bare = rebuild(envelope_of(message), RecordDict())
    empty = rebuild(envelope_of(message), Error(0))
    asker.site.release(empty, reply, 10, "00" * 32)
    (line,) = open_journal(root).outbound
    assert line.run == "statistics-1"
    for nothing in (bare, empty):
        refused(asker.site.answer(nothing), RefusalCode.MALFORMED)
