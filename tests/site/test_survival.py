"""How a site answers for survival curves: refused in time, charged, noised, and one row moves one cell by one."""

import json

import numpy as np
import pytest
import yaml
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.learning.statistics import survival_design
from fedclaw.privacy.accounting import calibrate
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.message_identity import assign_message_id, assume_server_identity
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.statistics import STATISTICS, ScoreQuestion, StatisticsRequest, SurvivalQuestion
from fedclaw.protocol.terms import ModelSpec, SecureRequest
from fedclaw.server.statistics import with_session
from fedclaw.site import pipeline
from fedclaw.site.directory import open_service
from fedclaw.site.policy.policy import StatisticsAllowance, sentences
from fedclaw.site.privacy_budget import Asking
from fedclaw.site.settings import load_site_settings
from fedclaw.site.statistics import StatisticsAnswer, statistics_vector
from tests.chance import scale_is_right
from tests.made_survival import make_survival_sites
from tests.neighbours import Coupled

QUESTION = SurvivalQuestion(time="days", event="outcome", event_level="dead", group="arm", bins=6)


def opened(root):
    assume_server_identity(1)
    return open_service(root, load_site_settings(root), "clinic", durable=False)


def request_for(site, question=QUESTION, **changes):
    fields = {
        "federation": "clinic",
        "run": "survival-1",
        "cohort": 3,
        "workload": "tabular",
        "schema_digest": site.schema_digest,
        "columns": (),
        "labels": False,
        "bins": 0,
        "epsilon": 1.0,
        "delta": 1e-4,
        "survival": question,
        **changes,
    }
    return StatisticsRequest(**fields)


def ask_text(site, text, identity="message-1"):
    content = RecordDict({"request": ConfigRecord({"json": text})})
    message = Message(content, dst_node_id=7, message_type=STATISTICS, group_id="0")
    assign_message_id(message, identity)
    return site.answer(message)


def ask(site, request, identity="message-1"):
    return ask_text(site, request.model_dump_json(), identity)


def vector(site, question=QUESTION):
    return statistics_vector(site, survival_design(site.workload.schema, question))


@pytest.fixture
def root(tmp_path):
    return make_survival_sites(tmp_path, count=1, rows=120)[0]


def test_it_is_charged_and_noised_like_any_release(root):
    """40 answers of 24 cells: a scale that is a quarter off is 9 standard errors off."""
    site = opened(root)
    exact, noise = vector(site), []
    for number in range(40):
        reply = ask(site, request_for(site, run=f"survival-{number}"), f"message-{number}")
        assert not reply.has_error(), reply.error.reason
        if number == 0:
            assert 0.95 < site.ledger.spent(1e-4) <= 1.0
        noise.append(unpack(reply.content["sum"])["statistics"] - exact)
    assert exact.sum() == sum(line.split(",")[0] != "" for line in (root / "train.csv").read_text().splitlines()[1:])
    assert scale_is_right(noise, calibrate(1.0, 1e-4, 1.0, 1)), "a row is in one cell: sensitivity 1, no more noise"


LONG = "x" * 600
HOSTILE = {
    "a million bins": ({"bins": 10**6}, RefusalCode.MALFORMED, "less than or equal to 512"),
    "no bins": ({"bins": None}, RefusalCode.MALFORMED, "either bins or ends"),
    "bins and ends": ({"ends": [1.0, 2.0]}, RefusalCode.MALFORMED, "either bins or ends"),
    "overlapping ends": ({"bins": None, "ends": [1.0, 3.0, 2.0]}, RefusalCode.MALFORMED, "larger than the one before"),
    "equal ends": ({"bins": None, "ends": [1.0, 1.0]}, RefusalCode.MALFORMED, "larger than the one before"),
    "many ends": ({"bins": None, "ends": list(range(600))}, RefusalCode.MALFORMED, "at most 512 items"),
    "no such time": ({"time": "weeks"}, RefusalCode.SCHEMA, "no column 'weeks' for the time"),
    "time of levels": ({"time": "code"}, RefusalCode.SCHEMA, "'code' has levels"),
    "time without bounds": ({"time": "age"}, RefusalCode.SCHEMA, "no bounds are declared of 'age'"),
    "no such event": ({"event": "death"}, RefusalCode.SCHEMA, "no column 'death' for the event"),
    "event of numbers": ({"event": "age"}, RefusalCode.SCHEMA, "'age' holds numbers"),
    "no such level": ({"event_level": "gone"}, RefusalCode.SCHEMA, "no level 'gone'"),
    "no such group": ({"group": "ward"}, RefusalCode.SCHEMA, "no column 'ward' for the group"),
    "group of numbers": ({"group": "age"}, RefusalCode.SCHEMA, "'age' holds numbers"),
    "many groups": ({"group": "code"}, RefusalCode.SCHEMA, "at most 32 levels, and the column 'code' has 200"),
    "group is the event": ({"group": "outcome"}, RefusalCode.MALFORMED, "cannot tell both"),
    "a long name": ({"event_level": LONG}, RefusalCode.MALFORMED, "at most 512 characters"),
    "unknown field": ({"weights": [1, 2]}, RefusalCode.MALFORMED, "weights"),
}


@pytest.mark.parametrize(("changes", "code", "words"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_questions_are_refused_before_anything_is_paid(root, changes, code, words):
    refused(opened(root), code, words, survival=changes)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_ends_that_are_no_numbers_are_refused(root, number):
    site = opened(root)
    plain = json.loads(request_for(site).model_dump_json())
    plain["survival"] |= {"bins": None, "ends": [1.0, 123456.0]}
    reply = ask_text(site, json.dumps(plain).replace("123456.0", number))
    assert RefusalCode(reply.error.code) is RefusalCode.MALFORMED
    assert "finite number" in reply.error.reason
    assert site.ledger.spent(1e-4) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": ["days"]}, "survival is asked for alone"),
        ({"labels": True}, "survival is asked for alone"),
        ({"bins": 8}, "survival is asked for alone"),
        ({"scores": ScoreQuestion(model=ModelSpec(name="linear")).model_dump()}, "asked for alone"),
    ],
)
def test_another_question_beside_it_is_refused(root, changes, words):
    refused(opened(root), RefusalCode.MALFORMED, words, **changes)


def refused(site, code, words, survival=None, **changes):
    """A site refuses with one sentence of no great length, and charges nothing."""
    plain = json.loads(request_for(site).model_dump_json()) | changes
    plain["survival"] |= survival or {}
    reply = ask_text(site, json.dumps(plain))
    assert reply.has_error()
    assert RefusalCode(reply.error.code) is code
    assert words in reply.error.reason
    assert "\n" not in reply.error.reason
    assert len(reply.error.reason) < 600
    assert site.ledger.spent(1e-4) == 0


@pytest.mark.parametrize("allowed", [StatisticsAllowance(epsilon=8), StatisticsAllowance(epsilon=8, scores=True)])
def test_it_takes_a_permission_of_its_own(root, allowed):
    site = opened(root)
    site.policy = site.policy.model_copy(update={"statistics": allowed})
    refused(site, RefusalCode.STATISTICS, "does not say statistics: survival")
    assert not any("survival" in said for said in sentences(site.policy, "north"))
    opening = site.policy.model_copy(update={"statistics": StatisticsAllowance(epsilon=1, survival=True)})
    assert any("survival curves" in said for said in sentences(opening, "north"))


def test_every_clause_of_statistics_holds_for_it(root):
    site = opened(root)
    for code, changes in {
        RefusalCode.EPSILON: {"statistics": StatisticsAllowance(epsilon=0.5, survival=True)},
        RefusalCode.SECURE_AGGREGATION: {"require_secure_aggregation": True},
        RefusalCode.COHORT: {"minimum_cohort": 4},
        RefusalCode.FEDERATION: {"federations": ("other",)},
    }.items():
        before = site.policy
        site.policy = site.policy.model_copy(update=changes)
        refused(site, code, "")
        site.policy = before
    assert not ask(site, request_for(site)).has_error()


def test_sites_that_know_of_no_survival_read_every_other_request(root):
    site = opened(root)
    assert "survival" not in json.loads(request_for(site, None).model_dump_json())


# Neighbouring data: the same site with a row, with nothing known in its place, or without it.

CELL = st.sampled_from(["0", "1", "500", "500.0000001", "2999.9", "3000", ""])
ROW = st.tuples(CELL, st.sampled_from(["60", ""]), st.sampled_from(["1", "0", ""]), st.sampled_from(["old", "new", ""]))
QUESTIONS = st.builds(
    dict,
    event=st.sampled_from([("outcome", "dead"), ("outcome", "alive"), ("relapsed", "true"), ("arm", "new")]),
    group=st.sampled_from([None, "arm", "relapsed", "outcome"]),
    bins=st.sampled_from([{"bins": 1}, {"bins": 6}, {"bins": 512}, {"ends": (1.0, 500.0)}, {"ends": (-5.0,)}]),
).filter(lambda made: made["event"][0] != made["group"])


class Pair:
    """One site directory whose training data is written anew; asked with noise that is held fixed."""

    def __init__(self, root):
        self.path = root / "train.csv"
        self.root = root
        self.lines = self.path.read_text().splitlines()[:12]

    def answered(self, rows, question, source):
        """What leaves in answer, the receipt without the ledger's head among it, with `rows` as the last ones."""
        self.path.write_text("\n".join([*self.lines, *rows]) + "\n")
        site = opened(self.root)
        site.source = source
        reply = ask(site, request_for(site, question))
        assert not reply.has_error(), reply.error.reason
        receipt = json.loads(str(reply.content["receipt"]["json"]))
        receipt.pop("ledger_head")
        return unpack(reply.content["sum"])["statistics"].tobytes(), receipt, sorted(reply.content)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair(make_survival_sites(tmp_path_factory.mktemp("sites"), count=1, rows=20, delta=0.02)[0])


@settings(max_examples=25, deadline=None)
@given(row=ROW, other=st.sampled_from(["nothing known", "no row"]), asked=QUESTIONS, died=st.booleans())
def test_neighbouring_data_are_told_apart_by_noise_alone(pair, row, other, asked, died):
    """Before the noise one number moves, by 1, which is what the noise is made for; all else is the same bytes.

    The second site's noise makes the first one's answer of its own (`tests.neighbours`).
    """
    days, age, relapsed, arm = row
    event, level = asked["event"]
    question = SurvivalQuestion(time="days", event=event, event_level=level, group=asked["group"], **asked["bins"])
    present = [f"{days},{age},{relapsed},{arm},c1,{'dead' if died else 'alive'}"]
    told_apart_by_noise_alone(pair, present, [] if other == "no row" else [",,,,,alive"], question)


def told_apart_by_noise_alone(pair, present, absent, question):
    first = Coupled(present=True)
    one = pair.answered(present, question, first)
    second = Coupled(present=False, of=first.noised)
    assert pair.answered(absent, question, second) == one
    (mine,), (theirs,) = first.noised, second.noised
    moved = mine.before - theirs.before
    assert sorted(set(moved.tolist())) in ([0.0], [0.0, 1.0])
    assert np.abs(moved).sum() <= mine.std / one[1]["noise_multiplier"] == 1.0
    return one


@pytest.fixture(scope="module")
def persons(tmp_path_factory):
    """The same where the column `who` says whose a row is, and other statistics use three of each."""
    root = make_survival_sites(tmp_path_factory.mktemp("sites"), count=1, rows=20, delta=0.02)[0]
    schema = yaml.safe_load((root / "schema.yaml").read_text())
    (root / "schema.yaml").write_text(yaml.safe_dump({**schema, "person": "who", "rows_per_person": 3}))
    for name in ("train.csv", "test.csv"):
        head, *rows = (root / name).read_text().splitlines()
        owned = [f"{name}{number // 2},{row}" for number, row in enumerate(rows)]
        (root / name).write_text("\n".join([f"who,{head}", *owned]) + "\n")
    return Pair(root)


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(ROW, st.booleans()), min_size=1, max_size=5), asked=QUESTIONS)
def test_a_person_with_all_rows_is_told_apart_by_noise_for_one_cell(persons, rows, asked):
    event, level = asked["event"]
    question = SurvivalQuestion(time="days", event=event, event_level=level, group=asked["group"], **asked["bins"])
    present = [
        f"anna,{days},{age},{relapsed},{arm},c1,{'dead' if died else 'alive'}"
        for (days, age, relapsed, arm), died in rows
    ]
    _, receipt, _ = told_apart_by_noise_alone(persons, present, ["anna,,,,,,alive"], question)
    assert receipt["unit"] == "person"


def test_of_a_person_the_first_row_alone_is_in_a_cell(tmp_path):
    """Whatever rows_per_person other statistics go by: the noise is made for one cell of a person."""
    root = make_survival_sites(tmp_path, count=1, rows=9)[0]
    schema = yaml.safe_load((root / "schema.yaml").read_text())
    (root / "schema.yaml").write_text(yaml.safe_dump({**schema, "person": "who", "rows_per_person": 3}))
    for name in ("train.csv", "test.csv"):
        rows = [f"{days},60,1,{arm},c1,dead" for days, arm in ((100, "old"), (600, "old"), (1600, "new")) * 3]
        owned = [f"{name}{number // 3},{row}" for number, row in enumerate(rows)]
        (root / name).write_text("\n".join(["who,days,age,relapsed,arm,code,outcome", *owned]) + "\n")
    cells = vector(opened(root)).reshape(2, 6, 2)
    assert cells[0, 0, 1] == cells.sum() == 3


def under_the_mask(pair, row, question):
    """The integers that a secure sum would mask, drawn with the same random numbers each time."""
    pair.path.write_text("\n".join([*pair.lines, row]) + "\n")
    site = opened(pair.root)
    site.source = GaussianSource(insecure_fixed_key_for_tests=bytes(32))
    asked = SecureRequest(dropouts=0.0, corrupt=0.0, largest_weight=1000)
    design = survival_design(site.workload.schema, question)
    request = with_session(request_for(site, question), ["east", "north", "west"], asked, design, 2)
    content = RecordDict({"request": ConfigRecord({"json": request.model_dump_json()})})
    message = Message(content, dst_node_id=7, message_type=STATISTICS, group_id="0")
    assign_message_id(message, "message-1")
    seen = []
    answering = StatisticsAnswer(site, Asking(message, "clinic", request.run, request.round, request.rounds), request)
    pipeline.answer(answering, lambda integers: seen.append(integers.astype(np.int64)) or {})
    return seen[0], request.secure.step


@settings(max_examples=10, deadline=None)
@given(row=ROW, asked=QUESTIONS)
def test_under_the_mask_of_a_secure_sum_neighbouring_data_differ_by_one_row_in_one_number(pair, row, asked):
    days, age, relapsed, arm = row
    event, level = asked["event"]
    question = SurvivalQuestion(time="days", event=event, event_level=level, group=asked["group"], **asked["bins"])
    present, step = under_the_mask(pair, f"{days},{age},{relapsed},{arm},c1,dead", question)
    absent, _ = under_the_mask(pair, ",,,,,alive", question)
    moved = np.abs((present - absent + 2**31) % 2**32 - 2**31) * step
    assert sorted(moved[moved != 0].tolist()) in ([], [1.0])
