"""What leaves a site of a regression's evaluation, with noise and without, and who is refused what."""

import math

import numpy as np
import pytest
import torch

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.learning.tasks.classification import METRICS
from fedclaw.learning.tasks.regression import ABSOLUTE_ERROR, SQUARED_ERROR, TARGET, TARGET_SQUARE, Regression
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import LocalTraining, ModelSpec, PrivacyRequest
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.evaluation import EvaluationQuestion
from fedclaw.server.exchange import ask
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.site.evaluation import metrics_mechanism
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.policy.policy import DataSetBudget
from fedclaw.transport.in_process import local_grid, open_sites
from tests.samples import plan_of, run_record

NAMES = Regression.METRICS[:-1]
SUMS = {SQUARED_ERROR, ABSOLUTE_ERROR, TARGET, TARGET_SQUARE}
ABOUT = {"weight", "examples"}


@pytest.fixture
def sites(tmp_path):
    """Three clinics with a part of the diabetes table each."""
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True, metrics=NAMES)
    return open_sites(write_sites(tmp_path / "sites", DatasetSettings(name="diabetes", sites=3), policy), "clinic")


@pytest.fixture
def record(sites):
    return run_record(
        schema_text=next(iter(sites.values())).workload.schema.to_json(),
        model=ModelSpec(name="linear"),
        task="regression",
        metrics=NAMES,
        privacy=None,
        training=LocalTraining(steps=20, batch_size=32, learning_rate=0.05),
    )


def asked(sites, record, metrics):
    """The answers to an evaluation of a model of random parameters."""
    parameters = initial_parameters(record)
    plan = plan_of(record).model_copy(update={"metrics": metrics})
    grid = local_grid(sites, record.run)
    found = ask(grid, list(grid.get_node_ids()), EvaluationQuestion(plan, parameters, record.make_schema().task), 30.0)
    return found, parameters


def together(sites, parameters):
    """The figures of one evaluation of all sites' test examples."""
    workload = next(iter(sites.values())).workload
    inputs, targets = (
        np.concatenate([getattr(site.data.test, part) for site in sites.values()]) for part in ("inputs", "targets")
    )
    outputs = inputs.astype(np.float64) @ parameters["head.weight"].T.astype(np.float64) + parameters["head.bias"]
    return workload.task.evaluate(outputs, targets)


def test_figures_are_of_all_test_examples_together(sites, record):
    found, parameters = asked(sites, record, NAMES)
    assert found.read().metrics == pytest.approx(together(sites, parameters), rel=1e-5)
    assert found.examples == sum(len(site.data.test) for site in sites.values())
    alone = [site.workload.task for site in sites.values()]
    assert found.tally.over_sites["rmse"]["sites"] == len(alone) == 3


def test_a_run_trains_tells_and_pays(sites, record, tmp_path):
    for site in sites.values():
        site.policy = site.policy.model_copy(update={"allow_training_without_privacy": False})
    asked_for = record.model_copy(
        update={"privacy": PrivacyRequest(epsilon=20, delta=1e-3, max_grad_norm=1.0), "rounds": 3}
    )
    directory = RunDirectory.create(tmp_path / "run", asked_for)
    outcome = run_rounds(local_grid(sites, record.run), directory, initial_parameters(asked_for))
    line = directory.read_metrics()[-1]
    assert outcome.metrics == line["metrics"] == pytest.approx(together(sites, outcome.parameters), rel=1e-5)
    assert line["over_sites"]["mae"]["sites"] == 3
    assert directory.record().task == "regression"
    assert all(0 < item.receipt.epsilon_run <= 20 for item in outcome.receipts.values())


def test_only_the_sums_of_permitted_metrics_leave(sites, record):
    for shared, sums in (
        (("mae",), {ABSOLUTE_ERROR}),
        (("rmse",), {SQUARED_ERROR}),
        (("r2", "rmse"), {SQUARED_ERROR, TARGET, TARGET_SQUARE}),
        (("loss",), {"loss"}),
    ):
        heard = heard_from(sites, record, NAMES, {"metrics": shared})
        assert all(set(told) == ABOUT | sums for told in heard.values())


def heard_from(sites, record, metrics, policy):
    """By site, the numbers in its answer."""
    for site in sites.values():
        site.policy = site.policy.model_copy(update=policy)
    grid = local_grid(sites, record.run)
    answers = {}

    class Listening(type(grid)):
        def send_and_receive(self, messages, *, timeout=None):
            for reply in grid.send_and_receive(messages, timeout=timeout):
                if not reply.has_error():
                    answers[reply.metadata.src_node_id] = dict(reply.content.metric_records["metrics"])
                yield reply

    listening = Listening(sites, 1)
    plan = plan_of(record).model_copy(update={"metrics": metrics})
    question = EvaluationQuestion(plan, initial_parameters(record), record.make_schema().task)
    ask(listening, list(grid.get_node_ids()), question, 30.0)
    return answers


def test_with_noise_all_sums_leave_bounded_and_paid_for(sites, record, monkeypatch):
    budget = DataSetBudget(epsilon=50.0, delta=1e-5)
    noise = {"metrics": NAMES, "metrics_epsilon": 2.0, "metrics_budget": budget}
    for site in sites.values():
        site.test_ledger = Ledger.open(":memory:", f"{site.name}/test")
    drawn = []
    perturb = "fedclaw.privacy.noise.GaussianSource.perturb_"
    monkeypatch.setattr(perturb, lambda _, values, std: drawn.append((len(values), std)) or values)
    heard = heard_from(sites, record, NAMES, noise)
    # Five sums of sensitivity one, together one vector with noise for all five.
    z = metrics_mechanism(next(iter(sites.values())).policy).noise_multiplier
    assert drawn == [(5, pytest.approx(z * math.sqrt(5)))] * 3
    for told in heard.values():
        assert set(told) == ABOUT | SUMS | {"loss"}
        count = told["examples"]
        assert 0 <= told[SQUARED_ERROR] <= told[ABSOLUTE_ERROR] <= count
        assert abs(told[TARGET]) <= count
    for site in sites.values():
        assert site.test_ledger.spent(1e-5) == pytest.approx(2.0, rel=0.05)


def test_noised_figures_are_near_the_exact_ones(sites, record):
    budget = DataSetBudget(epsilon=1000.0, delta=1e-3)
    exact, _ = asked(sites, record, NAMES)
    for site in sites.values():
        site.policy = site.policy.model_copy(update={"metrics_epsilon": 60.0, "metrics_budget": budget})
        site.test_ledger = Ledger.open(":memory:", f"{site.name}/test")
    found, _ = asked(sites, record.model_copy(update={"run": "noised"}), NAMES)
    assert found.read().metrics["rmse"] == pytest.approx(exact.read().metrics["rmse"], rel=0.1)
    assert found.read().metrics["rmse"] != exact.read().metrics["rmse"]
    assert (exact.noised, found.noised) == (False, True)


@pytest.mark.parametrize("metrics", [("accuracy",), ("rmse", "auroc"), METRICS])
def test_a_regression_site_is_not_asked_for_classes(sites, record, metrics):
    found, _ = asked(sites, record, metrics)
    assert found.answered == []
    assert {declined.code for declined in found.declined} == {"metrics"}
    assert all("a regression task has no metric" in declined.reason for declined in found.declined)


def test_a_classification_site_is_not_asked_for_numbers(asker):
    error = asker.ask("evaluate", metrics=("accuracy", "rmse")).error
    assert error.code == RefusalCode.METRICS
    assert "a classification task has no metric rmse" in error.reason


def test_a_model_of_classes_is_no_model_of_a_number(sites, record):
    plan = plan_of(record).model_copy(update={"model": ModelSpec(name="logistic")})
    grid = local_grid(sites, record.run)
    arrays = {"head.weight": np.zeros((1, 10), np.float32), "head.bias": np.zeros(1, np.float32)}
    found = ask(grid, list(grid.get_node_ids()), EvaluationQuestion(plan, arrays, record.make_schema().task), 30.0)
    assert {declined.code for declined in found.declined} == {"model"}
    assert "tells classes apart" in found.declined[0].reason


def test_targets_reach_the_model_as_numbers(sites):
    site = next(iter(sites.values()))
    _, targets = site.on_device("test")
    assert targets.dtype == torch.float32
    assert float(targets.max()) > 100
