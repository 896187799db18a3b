"""Each clause of a site's policy, broken by a server's question to the real service on real data and a real ledger."""

from datetime import datetime, timedelta

import pytest
import yaml

from fedclaw.errors import DataError, UsageError
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import CentralNoise, LocalTraining, PrivacyRequest, SecureAggregation
from fedclaw.site.evaluation import EvaluationAnswer
from fedclaw.site.journal import history, outbound
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.reconciliation import open_journal
from fedclaw.site.secure import SecureIdentity
from fedclaw.site.settings import load_site_settings
from tests.site.conftest import Asker

ONE_STEP = LocalTraining(steps=1, batch_size=16, learning_rate=0.1)


@pytest.fixture
def serve(root):
    """Write clauses into the policy of site.yaml and open the site with them, as its operator would."""
    opened = []

    def write(**clauses) -> Asker:
        path = root / "site.yaml"
        site = yaml.safe_load(path.read_text())
        site["policy"].update(clauses)
        path.write_text(yaml.safe_dump(site))
        while opened:
            opened.pop().site.ledger.close()
        opened.append(Asker(root))
        return opened[-1]

    return write


def refused(reply, code):
    assert reply.has_error(), "the site took part"
    assert RefusalCode(reply.error.code) is code
    return reply.error.reason


def taken(reply):
    assert not reply.has_error(), reply.error.reason
    return reply


def central(**changes):
    fields = {"unit": "site", "noise_by": "server", "epsilon": 4.0, "delta": 1e-3, "clip": 1.0, "noise_multiplier": 4.0}
    return CentralNoise(**{**fields, **changes})


def secure(sites=("hospital-north", "a", "b", "c"), **changes):
    count = len(sites)
    fields = {"session": "0" * 32, "sites": sites, "threshold": count, "neighbours": count - 1, "minimum": count}
    return SecureAggregation(**{**fields, "length": 62, "step": 0.01, "value_range": 8.0, **changes})


# Who may ask


def test_a_combination_that_is_not_allowed(serve):
    rules = [{"federation": "clinic", "strategies": ["fedavg"]}, {"federation": "outbreak", "workloads": ["tabular"]}]
    asker = serve(federations=["clinic", "outbreak"], combinations=rules)
    taken(asker.ask())
    reason = refused(asker.ask(strategy="fedadam"), RefusalCode.STRATEGY)
    assert "to federation 'clinic' this site allows fedavg with workload 'tabular'" in reason
    refused(asker.ask("evaluate", strategy="fedadam"), RefusalCode.STRATEGY)
    asker = serve(combinations=[rules[1]])
    assert "this site allows outbreak" in refused(asker.ask(), RefusalCode.FEDERATION)
    asker = serve(workloads=["tabular", "vision"], combinations=[{"federation": "clinic", "workloads": ["vision"]}])
    assert "'tabular'" in refused(asker.ask(), RefusalCode.WORKLOAD)
    asker = serve(combinations=[])
    refused(asker.ask(), RefusalCode.FEDERATION)


# Budgets


def test_a_data_sets_own_budget_takes_the_place_of_the_general_one(root, serve):
    asker = serve(budgets={"hospital-north": {"epsilon": 1.0, "delta": 1e-4}, "other": {"epsilon": 50.0}})
    ask = {"privacy": PrivacyRequest(epsilon=1.5, delta=1e-4, max_grad_norm=1)}
    assert "at most 1 per data set" in refused(asker.ask(**ask), RefusalCode.EPSILON)
    ask = {"privacy": PrivacyRequest(epsilon=0.9, delta=1e-3, max_grad_norm=1)}
    assert "at most 0.0001" in refused(asker.ask(**ask), RefusalCode.EPSILON)
    ask = {"privacy": PrivacyRequest(epsilon=0.9, delta=1e-4, max_grad_norm=1), "rounds": 1}
    receipt = Receipt.model_validate_json(taken(asker.ask(**ask)).content["receipt"]["json"])
    assert receipt.epsilon_left == pytest.approx(1 - receipt.epsilon_lifetime)
    for run in range(2, 20):
        reply = asker.ask(**ask, run=f"run-{run}")
        if reply.has_error():
            break
    refused(reply, RefusalCode.BUDGET)
    spent = open_journal(root).spending().data_set("hospital-north")
    assert (spent.budget.epsilon, spent.budget.delta) == (1.0, 1e-4)
    assert 0.8 < spent.epsilon <= 1


def test_a_lowered_budget_counts_what_was_spent_before(serve):
    asker = serve()
    taken(asker.ask(rounds=1))
    asker = serve(budgets={"hospital-north": {"epsilon": 1.0, "delta": 1e-3}})
    ask = {"privacy": PrivacyRequest(epsilon=0.5, delta=1e-3, max_grad_norm=1), "run": "another"}
    refused(asker.ask(**ask), RefusalCode.BUDGET)


# Whose noise counts


def test_the_servers_noise_counts_only_where_it_is_trusted(serve):
    asker = serve()
    ask = {"privacy": None, "central": central(), "weighting": "uniform"}
    assert "noise by the server alone" in refused(asker.ask(**ask), RefusalCode.PRIVACY_REQUIRED)
    assert serve(trust_server_noise=True).ask(**ask).has_content()


@pytest.mark.parametrize("unit", ["site", "example"])
@pytest.mark.parametrize(
    ("clauses", "noise", "reason"),
    [
        ({"epsilon_per_run": 2.0}, {"epsilon": 2.5}, "at most 2 per run"),
        ({}, {"epsilon": 6.5}, "at most 6 per data set"),
        ({}, {"delta": 2e-3}, "at most 0.001"),
    ],
)
def test_noise_on_the_sum_keeps_the_limits_whatever_its_unit(serve, unit, clauses, noise, reason):
    asker = serve(trust_server_noise=True, **clauses)
    how = {"training": ONE_STEP} if unit == "example" else {"weighting": "uniform"}
    made = central(unit=unit, **({"sample_rate": 0.1} if unit == "example" else {}), **noise)
    assert reason in refused(asker.ask(privacy=None, central=made, **how), RefusalCode.EPSILON)


def test_a_server_that_claims_more_noise_than_it_asks_for_is_stopped_by_the_ledger(serve):
    """The plan says epsilon 1; its noise multiplier costs more, which is what is charged."""
    asker = serve(trust_server_noise=True, epsilon_per_run=2.0)
    thin = central(epsilon=1.0, noise_multiplier=0.3)
    refused(asker.ask(privacy=None, central=thin, weighting="uniform"), RefusalCode.BUDGET)
    assert asker.site.ledger.spent(1e-3) == 0


def test_shares_of_sites_that_are_assumed_dishonest_do_not_count(serve):
    asker = serve(assumed_dishonest=0.5)
    shares = central(noise_by="sites")
    ask = {"privacy": None, "central": shares, "weighting": "uniform", "cohort": 4}
    for kind in ("query.keys", "train"):
        reason = refused(asker.ask(kind, **ask, secure=secure(colluding=1)), RefusalCode.SECURE_AGGREGATION)
        assert "at most 1 of 4 sites are dishonest; this site asks for enough with 2" in reason
        reason = refused(asker.ask(kind, **ask, secure=secure(colluding=2)), RefusalCode.SECURE_AGGREGATION)
        assert "no certificate at hand" in reason, "the policy has no more to say"


# Aggregation and cohort


def test_an_update_in_the_clear_where_secure_aggregation_is_required(serve):
    asker = serve(require_secure_aggregation=True)
    assert "requires secure aggregation" in refused(asker.ask(), RefusalCode.SECURE_AGGREGATION)
    assert asker.site.ledger.spent(1e-3) == 0
    taken(asker.ask("evaluate"))


def test_a_cohort_that_the_server_only_says_is_large(serve):
    asker = serve(minimum_cohort=4)
    refused(asker.ask(cohort=3), RefusalCode.COHORT)
    taken(asker.ask(cohort=4))


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": ("hospital-north", "a", "b")},
        {"sites": ("hospital-north", "a", "a", "b")},
        {"threshold": 3},
        {"minimum": 3, "tolerated": 1},
    ],
)
def test_a_secure_cohort_that_the_site_cannot_be_sure_of(serve, changes):
    """Whatever the plan's cohort says: named twice, or fewer who have to sign, or fewer who may be left."""
    asker = serve(minimum_cohort=4)
    for kind in ("query.keys", "train"):
        reply = asker.ask(kind, cohort=4, secure=secure(**changes))
        assert "has to be sure of at least 4" in refused(reply, RefusalCode.COHORT)


# How much, how often


def test_too_many_steps_and_too_large_a_model(serve):
    asker = serve(max_local_steps=3, max_update_mb=0.0001)
    refused(asker.ask(), RefusalCode.LOCAL_STEPS)
    refused(asker.ask(training=ONE_STEP), RefusalCode.UPDATE_SIZE)
    refused(asker.ask("evaluate"), RefusalCode.UPDATE_SIZE)


def test_a_round_more_than_a_day_allows_of_whatever_run_and_after_a_restart(serve):
    asker = serve(rounds_per_day=2)
    taken(asker.ask(round=1))
    taken(asker.ask(round=2))
    assert "2 round(s) in 24 hours" in refused(asker.ask(round=3), RefusalCode.FREQUENCY)
    refused(asker.ask(round=1, run="another-name"), RefusalCode.FREQUENCY)
    asker = serve()
    refused(asker.ask(round=3, identity="after a restart"), RefusalCode.FREQUENCY)
    asker = serve(rounds_per_day=3)
    taken(asker.ask(round=3, identity="new"))
    refused(asker.ask(round=4, identity="newer"), RefusalCode.FREQUENCY)


def test_rounds_that_come_too_fast(serve):
    asker = serve(minimum_seconds_between_rounds=3600)
    taken(asker.ask())
    assert "ask again in 36" in refused(asker.ask(round=2), RefusalCode.FREQUENCY)


def test_the_same_question_after_a_broken_connection_is_not_another_round(serve):
    asker = serve(rounds_per_day=1)
    taken(asker.ask(identity="same", release=False))
    asker = serve()
    taken(asker.ask(identity="same"))
    assert asker.site.ledger.rounds("run-1") == 1
    refused(asker.ask(identity="same"), RefusalCode.FREQUENCY)


def test_another_question_under_an_open_ones_name_is_another_round(serve):
    asker = serve(rounds_per_day=1)
    taken(asker.ask(identity="same", release=False))
    refused(asker.ask(identity="same", training=ONE_STEP), RefusalCode.FREQUENCY)


def test_evaluations_are_counted_by_the_outbound_log_and_refusals_are_not(serve):
    asker = serve(rounds_per_day=2)
    refused(asker.ask("evaluate", strategy="median"), RefusalCode.STRATEGY)
    taken(asker.ask("evaluate"))
    taken(asker.ask("evaluate", identity="second"))
    refused(asker.ask("evaluate"), RefusalCode.FREQUENCY)
    asker = serve()
    refused(asker.ask("evaluate", identity="third"), RefusalCode.FREQUENCY)
    taken(asker.ask(identity="fourth"))


class _Clock(datetime):
    """The site's clock, moved by `shift`."""

    shift = timedelta()

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + cls.shift


@pytest.fixture
def clock(monkeypatch):
    for module in ("fedclaw.site.journal.ledger", "fedclaw.site.journal.outbound", "fedclaw.site.privacy_budget"):
        monkeypatch.setattr(f"{module}.datetime", _Clock)
    monkeypatch.setattr(_Clock, "shift", timedelta())
    return _Clock


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_day_later_there_is_another_round(serve, clock, kind):
    asker = serve(rounds_per_day=1)
    taken(asker.ask(kind))
    clock.shift = timedelta(hours=23, minutes=59)
    refused(asker.ask(kind, round=2), RefusalCode.FREQUENCY)
    clock.shift = timedelta(hours=24, minutes=1)
    taken(asker.ask(kind, round=2))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_clock_that_is_set_back_opens_nothing(serve, clock, kind):
    asker = serve(rounds_per_day=2)
    taken(asker.ask(kind))
    clock.shift = timedelta(days=-3)
    taken(asker.ask(kind, round=2))
    refused(asker.ask(kind, round=3), RefusalCode.FREQUENCY)
    clock.shift = timedelta(days=-1)
    refused(asker.ask(kind, round=3), RefusalCode.FREQUENCY)
    clock.shift = timedelta(hours=25)
    taken(asker.ask(kind, round=3))
    asker = serve(rounds_per_day=None, minimum_seconds_between_rounds=60)
    clock.shift = timedelta(days=-3)
    refused(asker.ask(kind, round=4, identity="a new one"), RefusalCode.FREQUENCY)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_round_that_was_noted_with_a_clock_set_back_was_not_long_ago(serve, clock, kind):
    """Its place in the books says so: it came after one of today."""
    asker = serve()
    taken(asker.ask(kind))
    clock.shift = timedelta(days=-3)
    taken(asker.ask(kind, round=2))
    clock.shift = timedelta(hours=12)
    asker = serve(rounds_per_day=1)
    refused(asker.ask(kind, round=3, identity="a new one"), RefusalCode.FREQUENCY)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_limited_question_reads_what_is_new_and_not_the_whole_book(serve, monkeypatch, kind):
    """Entries of ledger and log whose place in the chain is worked out: as many for the tenth question as before."""
    linked = []

    def counting(link):
        def count(previous, text):
            linked.append(text)
            return link(previous, text)

        return count

    asker = serve(rounds_per_day=1000)
    for module in (history, outbound):
        monkeypatch.setattr(module, "link", counting(module.link))
    costs = []
    for number in range(10):
        before = len(linked)
        asked = {
            "run": f"run-{number}",
            "rounds": 1,
            "privacy": PrivacyRequest(epsilon=0.3, delta=1e-3, max_grad_norm=1),
        }
        taken(asker.ask(kind, **asked))
        costs.append(len(linked) - before)
    assert costs[-1] == costs[1], costs


# Metrics


def test_metrics_that_may_not_leave(serve):
    asker = serve(metrics=["auroc"])
    assert set(taken(asker.ask("evaluate")).content["metrics"]) == {"weight", "examples", "auroc"}
    refused(asker.ask("evaluate", metrics=("accuracy",)), RefusalCode.METRICS)
    refused(serve(minimum_test_examples=100_000).ask("evaluate"), RefusalCode.METRICS)


NOISED = {"metrics_epsilon": 1.0, "metrics_budget": {"epsilon": 2.5, "delta": 1e-3}}


def test_metrics_with_noise_are_charged_to_the_test_data_until_its_budget_is_spent(root, serve):
    asker = serve(**NOISED)
    answers = []
    for _ in range(20):
        reply = asker.ask("evaluate")
        if reply.has_error():
            break
        answers.append(reply)
    assert "privacy budget" in refused(reply, RefusalCode.BUDGET)
    assert len(answers) > 2, "they compose by less than their sum"
    receipts = [Receipt.model_validate_json(answer.content["receipt"]["json"]) for answer in answers]
    assert receipts[0].mechanism == "metrics"
    assert receipts[0].epsilon_lifetime <= 1
    assert receipts[0].epsilon_left == pytest.approx(2.5 - receipts[0].epsilon_lifetime)
    assert receipts[-1].epsilon_lifetime <= 2.5
    journal = open_journal(root)
    spent = journal.spending()
    assert spent.data_set("hospital-north").epsilon == 0
    assert spent.data_set("hospital-north/test").epsilon == pytest.approx(receipts[-1].epsilon_lifetime)
    assert spent.data_set("hospital-north/test").open == 0, "what left is settled"
    taken(asker.ask())
    assert asker.site.ledger.spent(1e-3) > 0
    asker = serve()
    refused(asker.ask("evaluate", identity="after a restart"), RefusalCode.BUDGET)


def test_exact_metrics_do_not_leave_where_noise_is_asked_for(serve, monkeypatch):
    """By whatever fault they came about: that metrics are named is no clause for them then."""
    asker = serve(**NOISED)
    monkeypatch.setattr(EvaluationAnswer, "_is_noised", False)
    assert "has no metrics_without_noise" in refused(asker.ask("evaluate"), RefusalCode.PRIVACY_REQUIRED)


def test_metrics_without_a_bound_do_not_leave_when_metrics_are_noised(serve):
    asker = serve(**NOISED, metrics=["loss", "accuracy", "auroc", "f1"])
    assert set(taken(asker.ask("evaluate")).content["metrics"]) == {"weight", "examples", "loss", "accuracy"}
    assert "shares loss, accuracy" in refused(asker.ask("evaluate", metrics=("auroc",)), RefusalCode.METRICS)
    assert asker.site.test_ledger.rounds("run-1") == 1, "nothing was charged for what was refused"


def test_an_evaluation_does_not_hide_behind_the_name_of_a_training(serve):
    """The server names its messages; the same name must not make a second evaluation free."""
    asker = serve(**NOISED)
    taken(asker.ask(identity="same"))
    taken(asker.ask("evaluate", identity="same"))
    taken(asker.ask("evaluate", identity="same"))
    assert asker.site.test_ledger.rounds("run-1") == 2
    taken(asker.ask(identity="same"))
    assert asker.site.ledger.rounds("run-1") == 2


def test_an_evaluation_whose_answer_never_left_is_paid_for_once(serve):
    asker = serve(**NOISED)
    first = taken(asker.ask("evaluate", identity="same", release=False))
    asker = serve()
    second = taken(asker.ask("evaluate", identity="same"))
    assert asker.site.test_ledger.rounds("run-1") == 1
    assert first.content["metrics"]["accuracy"] != second.content["metrics"]["accuracy"], "and the noise is fresh"


def test_noised_evaluations_are_limited_in_their_frequency_too(serve):
    asker = serve(**NOISED, rounds_per_day=1)
    taken(asker.ask("evaluate"))
    refused(asker.ask("evaluate"), RefusalCode.FREQUENCY)
    taken(asker.ask())
    refused(asker.ask(), RefusalCode.FREQUENCY)


def test_test_data_that_is_the_training_data_has_no_budget_of_its_own(root, serve):
    (root / "data" / "test.csv").write_bytes((root / "data" / "train.csv").read_bytes())
    with pytest.raises(DataError, match="has to be held out"):
        serve(**NOISED)


def test_two_views_of_one_ledger_see_each_other(tmp_path):
    """The training data's and the test data's: one chain, and neither is misled by the other's entries."""
    with Ledger.open(tmp_path / "l", "north") as train, Ledger.open(tmp_path / "l", "north/test") as test:
        for number in range(6):
            ledger, other = (train, test) if number % 2 else (test, train)
            ledger.reserve(f"k{number}", "f", "r", number, None, budget=open_budget())
            assert other.head() == ledger.head()
            ledger.settle(f"k{number}")
        assert train.rounds("r") == test.rounds("r") == 3
        train.verify()


def open_budget():
    from fedclaw.site.journal.ledger import Budget

    return Budget(epsilon=None, delta=1e-5)


# site.yaml


@pytest.mark.parametrize(
    ("clauses", "message"),
    [
        ({"metrics_epsilon": 1.0}, "needs metrics_budget"),
        ({"metrics_budget": {"epsilon": 1.0}}, "goes with metrics_epsilon"),
        ({"budgets": {"hospital-north/test": {"epsilon": 1.0}}}, "goes with metrics_epsilon"),
        ({"metrics_epsilon": 3.0, "metrics_budget": {"epsilon": 1.0}}, "larger than metrics_budget"),
        ({"budgets": {"a b": {"epsilon": 1.0}}}, "policy.budgets"),
        ({"budgets": {"a": {"delta": 1e-5}}}, "epsilon"),
        ({"combinations": [{"federation": "clinic", "strategies": ["median"]}]}, "'median' is not in strategies"),
        ({"federations": ["a"], "combinations": [{"federation": "b"}]}, "'b' is not in federations"),
        ({"epsilon": None, "allow_training_without_privacy": True, "budgets": {"a": {"epsilon": 1}}}, "in budgets too"),
        ({"rounds_per_day": 0}, "rounds_per_day"),
        ({"minimum_seconds_between_rounds": -1}, "minimum_seconds_between_rounds"),
        ({"assumed_dishonest": 1.1}, "assumed_dishonest"),
    ],
)
def test_clauses_that_make_no_sense_are_refused_when_read(root, clauses, message):
    path = root / "site.yaml"
    site = yaml.safe_load(path.read_text())
    site["policy"].update(clauses)
    path.write_text(yaml.safe_dump(site))
    with pytest.raises(UsageError) as caught:
        load_site_settings(root)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("clauses", "changes", "code"),
    [
        ({"max_update_mb": 0.0001}, {}, RefusalCode.UPDATE_SIZE),
        ({"max_local_steps": 3}, {}, RefusalCode.LOCAL_STEPS),
        ({"epsilon_per_run": 3.0}, {}, RefusalCode.EPSILON),
        ({}, {"privacy": None}, RefusalCode.PRIVACY_REQUIRED),
        ({"rounds_per_day": 1}, {}, RefusalCode.FREQUENCY),
    ],
)
def test_a_site_declines_before_it_joins_a_session_rather_than_drop_out_of_it(serve, clauses, changes, code):
    asker = serve(**clauses)
    if "rounds_per_day" in clauses:
        taken(asker.ask())
    asker.site.secure = SecureIdentity(None, None, None)  # no session is begun
    refused(asker.ask("query.keys", cohort=4, secure=secure(), **changes), code)
