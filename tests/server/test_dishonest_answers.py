"""A site that lies about what a round cost it, or about its figures: refused and named, and no statement gets better.

The site is real and trains for real; what it sends is changed on its way.
"""

import json
import logging

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.errors import UpdateError
from fedclaw.export.statement import Receipts, state
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.tasks.regression import Regression
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.receipts import check_receipt
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.terms import CentralNoise, LocalTraining, PrivacyRequest
from fedclaw.server.cohort_question import LONGEST_REASON, Declined, reasons_of
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.evaluation import EvaluationQuestion
from fedclaw.server.run_directory import RunDirectory, SiteReceipt
from fedclaw.server.session import initial_parameters
from fedclaw.site.privacy_budget import charge_for
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.samples import plan_of, receipt, run_record

LIES = {
    "negative": {"epsilon_run": -5.0},
    "endless": {"epsilon_lifetime": 1e300},
    "not a number": {"epsilon_run": float("nan")},
    "eight megabytes of head": {"ledger_head": "a" * (8 << 20)},
    "script": {"ledger_head": "<script>alert(1)</script>"},
    "no head": {"ledger_head": ""},
    "no ledger": {"ledger_head": "simulated"},
    "another field": {"note": "<b>all is well</b>"},
    "no noise": {"mechanism": "none"},
    "the server's noise": {"mechanism": "central", "trust": "server"},
    "trusts the server": {"trust": "server"},
    "another clip": {"max_grad_norm": 1e-3},
    "another sampler": {"sampler": "shuffle"},
    "fewer steps": {"steps": 1},
    "another rate": {"sample_rate": 1e-9},
    "another delta": {"delta": 0.5},
    "masked": {"secure_aggregation": True},
    "noise on the sum": {"central": {"unit": "site", "noise_by": "server", "epsilon": 1e-3, "delta": 1e-9}},
    "nothing charged": {"rounds": 0},
    "no noise multiplier": {"noise_multiplier": 0.0},
    "unbounded but not in all": {"epsilon_run": None, "epsilon_lifetime": 1.0},
    "another unit": {"unit": "person"},
    "a unit of its own": {"unit": "site"},
    "another relation": {"relation": "whatever"},
    "beyond its budget": {"epsilon_left": 0.0},
    "unbounded with a rest": {"epsilon_run": None, "epsilon_lifetime": None, "epsilon_left": 3.0},
}


class Liar:
    """A real site; `lies` change the receipts that it sends, by round, and `figures` stand for its evaluations."""

    def __init__(self, site, lies=None, figures=None):
        self.site, self.lies, self.figures = site, lies or {}, figures or {}

    def answer(self, message):
        reply = self.site.answer(message)
        round = int(message.metadata.group_id)
        if reply.has_content() and "receipt" in reply.content.config_records:
            told = json.loads(reply.content["receipt"]["json"]) | self.lies.get(round, {})
            reply.content["receipt"] = ConfigRecord({"json": json.dumps(told)})
        elif reply.has_content() and round in self.figures:
            reply.content["metrics"] = MetricRecord(self.figures[round])
        return reply

    def release(self, *_):
        """What a liar's own books say is its own affair."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("sites")
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    return write_sites(root, DatasetSettings(name="breast_cancer", sites=3), policy)


@pytest.fixture
def sites(directories):
    assume_server_identity(5)
    return open_sites(directories, "clinic")


def record_of(sites, **changes):
    fields = {
        "schema_text": next(iter(sites.values())).workload.schema.to_json(),
        "training": LocalTraining(steps=2, batch_size=16, learning_rate=0.2),
        "privacy": PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1),
    }
    return run_record(**{**fields, **changes})


class Telling:
    """What observers are told."""

    def __init__(self):
        self.reports = []

    def started(self, record, first_round):
        pass

    def finished_round(self, report):
        self.reports.append(report)

    def finished(self, outcome):
        pass


def run(root, record, sites):
    directory = RunDirectory.create(root, record)
    telling = Telling()
    outcome = run_rounds(LocalGrid(sites, 5), directory, initial_parameters(record), observers=[telling])
    return outcome, telling.reports


def test_a_receipt_that_cannot_be_true_makes_its_answer_unusable_and_names_the_site(tmp_path, sites, caplog):
    name, *honest = sorted(sites)
    sites[name] = Liar(sites[name], dict(enumerate(LIES.values(), 1)))
    outcome, reports = run(tmp_path / "run", record_of(sites, rounds=len(LIES)), sites)
    for lie, report in zip(LIES, reports, strict=True):
        assert [(item.site, item.code) for item in report.declined] == [(name, "unusable")], lie
        assert sorted(report.answered) == honest, lie
        (reason,) = [item.reason for item in report.declined]
        assert "receipt" in reason, lie
        assert len(reason) <= LONGEST_REASON, lie
    assert sorted(outcome.receipts) == honest, "an impossible receipt is told to nobody"
    assert all(len(record.getMessage()) < 2 * LONGEST_REASON for record in caplog.records)


def test_what_a_site_has_said_of_a_run_never_gets_better(tmp_path, sites, caplog):
    """Honest, then unbounded, then cheap: what is told stays unbounded, in files, to observers and after a resume."""
    name = sorted(sites)[0]
    unbounded = {"epsilon_run": None, "epsilon_lifetime": None, "epsilon_left": None}
    cheap = {"epsilon_run": 0.01, "epsilon_lifetime": 0.01, "epsilon_left": 7.0, "rounds": 1}
    sites[name] = Liar(sites[name], {2: unbounded, 3: cheap, 4: cheap})
    outcome, reports = run(tmp_path / "run", record_of(sites, rounds=4), sites)
    told = [report.receipts[name].receipt for report in reports]
    assert told[0].epsilon_run > 0
    assert [item.epsilon_run for item in told[1:]] == [None, None, None]
    assert [item.epsilon_left for item in told[1:]] == [None, None, None]
    assert [item.rounds for item in told] == [1, 2, 2, 2]
    kept = RunDirectory(tmp_path / "run").read_receipts()
    assert kept[name].receipt == outcome.receipts[name].receipt == told[-1]
    statement = state([Receipts("run-1", "training", kept)], None, "None.")
    assert statement.guarantee == "some sites"
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum(f"{name} says that less is spent" in line for line in warned) == 2


def test_a_falling_epsilon_keeps_the_larger_one_with_its_head():
    before = receipt(epsilon_run=2.0, epsilon_lifetime=3.0, epsilon_left=5.0, rounds=4, ledger_head="aa" * 32)
    now = receipt(epsilon_run=1.0, epsilon_lifetime=3.5, epsilon_left=7.0, rounds=5, ledger_head="bb" * 32)
    told = now.after(before)
    assert (told.epsilon_run, told.epsilon_lifetime, told.epsilon_left, told.rounds) == (2.0, 3.5, 5.0, 5)
    assert told.ledger_head == "aa" * 32
    grown = receipt(epsilon_run=2.5, epsilon_lifetime=3.5, epsilon_left=4.5, rounds=5, ledger_head="bb" * 32)
    assert grown.after(before) == grown, "an honest ledger's receipt stands as it is"


def test_whom_a_site_once_trusted_stays_told():
    before = receipt(mechanism="none", trust="everybody", accountant="none", noise_multiplier=0.0, epsilon_run=None)
    told = receipt(mechanism="central", trust="server").after(before)
    assert (told.mechanism, told.trust, told.epsilon_run) == ("none", "everybody", None)


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"accuracy": 1e300}, "accuracy"),
        ({"accuracy": -0.5}, "accuracy"),
        ({"auroc": 1e6}, "auroc"),
        ({"loss": -1.0}, "loss"),
        ({"loss": 1e300}, "loss"),
        ({"loss": float("inf")}, "loss"),
        ({"loss": [1.0, 2.0]}, "loss"),
        ({"weight": 1e12}, "weight"),
        ({"weight": 1e-46}, "weight"),
        ({"examples": 10**15, "weight": 1e15}, "examples"),
    ],
)
def test_figures_out_of_their_range_are_unusable(figures, says):
    evaluated = evaluation(("loss", "accuracy", "auroc"), Classification(("no", "yes")))
    assert not declined_of(evaluated, "north", {"loss": 12.0, "accuracy": 15.0, "auroc": 20.0})
    before = dict(evaluated.tally.metrics)
    (declined,) = declined_of(evaluated, "liar", {"loss": 12.0, "accuracy": 15.0, "auroc": 20.0, **figures})
    assert (declined.site, declined.code) == ("liar", "unusable")
    assert says in declined.reason
    assert evaluated.tally.metrics == before == {"loss": 0.6, "accuracy": 0.75, "auroc": 1.0}


def evaluation(metrics: tuple[str, ...], task: Task) -> EvaluationQuestion:
    return EvaluationQuestion(plan_of(run_record(metrics=metrics)), {}, task)


def declined_of(evaluated: EvaluationQuestion, site: str, figures) -> list[Declined]:
    asked = Message(RecordDict(), dst_node_id=1, message_type="evaluate")
    content = RecordDict({"metrics": MetricRecord({"weight": 20.0, "examples": 20, **figures})})
    count = len(evaluated.declined)
    evaluated.add_reply(site, Message(content, reply_to=asked))
    return evaluated.declined[count:]


def test_a_site_that_claims_nearly_all_test_examples_is_named_once(tmp_path, sites, caplog):
    name = sorted(sites)[0]
    many = {"examples": 10**9, "weight": 1e9, "accuracy": 0.0}
    sites[name] = Liar(sites[name], figures={1: many, 2: many})
    run(tmp_path / "run", record_of(sites, rounds=2, privacy=None), sites)
    said = [record.getMessage() for record in caplog.records if "nearly its own" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"{name} says that it has 1000000000 of all")


def test_what_an_honest_site_says_of_any_mechanism_is_believed(sites):
    """The site's own rule and the server's are two: they have to agree for each mechanism there is."""
    record = record_of(sites)
    site = next(iter(sites.values()))
    one_step = LocalTraining(steps=1, batch_size=16, learning_rate=0.2)
    by_server = CentralNoise(
        unit="example", noise_by="server", epsilon=4, delta=1e-3, clip=1, noise_multiplier=2, sample_rate=0.1
    )
    kinds = {
        "dp-sgd": (record, site.policy),
        "none": (record.model_copy(update={"privacy": None}), site.policy),
        "central": (
            record.model_copy(update={"privacy": None, "central": by_server, "training": one_step}),
            site.policy.model_copy(update={"trust_server_noise": True}),
        ),
    }
    for kind, (asked, policy) in kinds.items():
        plan = plan_of(asked)
        mechanism = mechanism_of(plan)
        charge = charge_for(policy, 120, mechanism)
        bounded = kind != "none"
        spent = Receipt.figures(1.0 if bounded else float("inf"), 2.0 if bounded else float("inf"), policy.epsilon)
        fields = {"delta": policy.delta, **mechanism.receipt_fields(120, charge), **spent}
        honest = Receipt(**fields, rounds=1, ledger_head="ab" * 32)
        assert honest.mechanism == kind
        check_receipt(honest, plan, 120)
        with pytest.raises(UpdateError, match="contradicts"):
            check_receipt(honest.model_copy(update={"max_grad_norm": 7.0}), plan, 120)


def test_a_receipt_is_kept_with_an_example_count_that_can_be():
    with pytest.raises(ValueError, match="examples"):
        SiteReceipt(examples=10**15, receipt=receipt())


def test_a_line_names_twenty_sites_however_many_lie():
    answers = evaluation(("loss",), Classification())
    answers.declined = [Declined(f"site-{n}", "unusable", "r" * LONGEST_REASON) for n in range(1000)]
    answers.failure = "no sum"
    told = reasons_of(answers)
    assert told.startswith("no sum; site-0: ")
    assert told.endswith("; and 981 more")
    assert len(told) < 20 * 2 * LONGEST_REASON


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"squared_error": 20.5}, "squared_error"),
        ({"target": -21.0}, "target"),
        ({"target_square": float("nan")}, "no finite number"),
        ({"absolute_error": [1.0, 2.0]}, "of type list"),
        ({"squared_error": 12.0}, "contradict each other"),
        ({"weight": 1e12}, "weight"),
    ],
)
def test_a_numbers_sums_beyond_what_its_examples_allow_are_unusable(figures, says):
    """No answer moves RMSE or R2 further than so many targets in range can."""
    assume_server_identity(3)
    evaluated = evaluation(("rmse", "mae", "r2"), Regression("y", 0.0, 10.0, center=5.0, scale=5.0))
    honest = {"squared_error": 5.0, "absolute_error": 8.0, "target": 2.0, "target_square": 6.0}
    assert not declined_of(evaluated, "north", honest)
    before = dict(evaluated.tally.metrics)
    (declined,) = declined_of(evaluated, "liar", {**honest, **figures})
    assert (declined.site, declined.code) == ("liar", "unusable")
    assert says in declined.reason
    assert evaluated.tally.metrics == before
    assert before["rmse"] == pytest.approx(10 * (5 / 20) ** 0.5)
    assert before["r2"] == pytest.approx(1 - 4 * 5 / (6 - 2**2 / 20))
