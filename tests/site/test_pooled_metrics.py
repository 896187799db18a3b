"""What of counts and histograms leaves a real site, by which clause, and what a federation makes of it."""

import logging
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.learning.tasks.class_sums import COUNTS
from fedclaw.learning.tasks.classification import METRICS, classification
from fedclaw.learning.workload import Table
from fedclaw.protocol.arrays import Form, unpack_wire
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.messages import SCORE_NOISE, SCORES
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import SCORE_HISTOGRAM, LocalTraining
from fedclaw.report.terminal import TerminalProgress
from fedclaw.report.tracking import _values
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.site.evaluation import metrics_mechanism
from fedclaw.site.policy.policy import SAFE_METRICS, DataSetBudget
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.samples import run_record

BINS = 32
FORM = {SCORES: Form(np.dtype(np.float64), (1, 2, BINS))}


def allowed(asker, *metrics, **changes):
    asker.site.policy = asker.site.policy.model_copy(update={"metrics": metrics, **changes})


def evaluation(asker, **changes):
    return asker.ask("evaluate", **{"score_bins": BINS, **changes})


def test_by_default_counts_leave_with_the_ratios_and_histograms_do_not(asker):
    content = evaluation(asker).content
    record, test = content["metrics"], asker.site.data.test
    assert sum(record["asked"]) == sum(record["given"]) == len(test)
    np.testing.assert_array_equal(record["asked"], np.bincount(test.targets))
    assert sum(record["hits"]) == pytest.approx(record["accuracy"])
    assert SCORES not in content


@pytest.mark.parametrize("shared", [("accuracy",), ("loss",), ("auroc",), ("accuracy", "loss", "auroc")])
def test_a_policy_without_a_ratio_lets_no_count_leave(asker, shared):
    """How common the classes are does not follow from the accuracy."""
    allowed(asker, *shared)
    content = evaluation(asker).content
    assert set(content["metrics"]) == {"weight", "examples", *shared}
    assert SCORES not in content


def test_counts_of_metrics_that_were_not_asked_for_do_not_leave(asker):
    assert not set(COUNTS) & set(evaluation(asker, metrics=("accuracy", "auroc")).content["metrics"])


def test_histograms_leave_by_their_own_clause(asker):
    allowed(asker, *SAFE_METRICS, SCORE_HISTOGRAM)
    content, test = evaluation(asker).content, asker.site.data.test
    scores = unpack_wire(content[SCORES], FORM)[SCORES]
    assert content["metrics"][SCORE_NOISE] == 0
    np.testing.assert_array_equal(scores.sum(axis=2)[0], np.bincount(test.targets))
    assert SCORES not in evaluation(asker, score_bins=None).content


@pytest.mark.parametrize("asked", [("accuracy",), (SCORE_HISTOGRAM,), ()])
def test_a_policy_of_histograms_alone_lets_nothing_else_leave(asker, asked):
    allowed(asker, SCORE_HISTOGRAM)
    content = evaluation(asker, metrics=asked).content
    assert set(content["metrics"]) == {"weight", "examples", SCORE_NOISE}
    assert SCORES in content
    asker.site.policy = asker.site.policy.model_copy(update={"minimum_test_examples": 10**6})
    assert evaluation(asker, metrics=asked).error.code == RefusalCode.METRICS


def test_with_noise_no_count_leaves_and_a_histogram_has_its_own_share_of_it(asker, monkeypatch):
    """Three numbers of sensitivity 1 each: two sums and one histogram."""
    budget = DataSetBudget(epsilon=50.0, delta=1e-5)
    noise = {"metrics_epsilon": 2.0, "metrics_budget": budget}
    allowed(asker, *METRICS, SCORE_HISTOGRAM, **noise)
    asker.site.test_ledger = asker.site.ledger
    z = metrics_mechanism(asker.site.policy).noise_multiplier
    content = evaluation(asker).content
    assert set(content["metrics"]) == {"weight", "examples", "loss", "accuracy", SCORE_NOISE}
    assert content["metrics"][SCORE_NOISE] == pytest.approx(z * 3**0.5)
    noised = unpack_wire(content[SCORES], FORM)[SCORES]
    assert (noised != np.round(noised)).all()
    assert (noised < 0).any()
    drawn = []
    monkeypatch.setattr(
        "fedclaw.privacy.noise.GaussianSource.perturb_", lambda _, values, std: drawn.append(std) or values
    )
    exact = unpack_wire(evaluation(asker).content[SCORES], FORM)[SCORES]
    assert (exact == np.round(exact)).all()
    assert drawn == pytest.approx([z * 3**0.5]), "on all of it together"
    evaluation(asker, score_bins=None)
    assert drawn[1:] == pytest.approx([z * 2**0.5])


@pytest.fixture
def federation(tmp_path):
    """Three hospitals; all test examples of the first are of one class, of the second of the other."""
    policy = SitePolicy(
        epsilon=None, delta=1e-3, allow_training_without_privacy=True, metrics=(*METRICS, SCORE_HISTOGRAM)
    )
    directories = write_sites(tmp_path / "sites", DatasetSettings(name="breast_cancer", sites=3), policy)
    assume_server_identity(5)
    sites = open_sites(directories, "clinic")
    for site, label in zip(sites.values(), (0, 1, None), strict=True):
        test = site.data.test
        kept = slice(None) if label is None else test.targets == label
        site.data = replace(site.data, test=Table(test.inputs[kept], test.targets[kept]))
    return sites


def run(root, sites, observers=(), **changes):
    schema = next(iter(sites.values())).workload.schema
    record = run_record(
        **{
            "schema_text": schema.to_json(),
            "training": LocalTraining(steps=4, batch_size=1000, learning_rate=0.2),
            "privacy": None,
            "score_bins": 1024,
            **changes,
        }
    )
    directory = RunDirectory.create(root, record)
    # A model that answers every input with the first class.
    blank = {name: np.zeros_like(array) for name, array in initial_parameters(record).items()}
    return run_rounds(LocalGrid(sites, 5), directory, blank, observers=observers)


def test_a_run_tells_the_figures_of_all_examples_together(federation, tmp_path):
    console = Console(file=StringIO(), width=300)
    outcome = run(tmp_path / "run", federation, (TerminalProgress(console),))
    line = outcome.directory.read_metrics()[-1]
    sites = list(federation.values())
    inputs = np.concatenate([site.data.test.inputs for site in sites])
    targets = np.concatenate([site.data.test.targets for site in sites])
    weight, bias = outcome.parameters["head.weight"], outcome.parameters["head.bias"]
    logits = inputs.astype(np.float64) @ weight.T.astype(np.float64) + bias
    together = classification(logits, targets)
    for name in ("accuracy", "precision", "recall", "f1"):
        assert outcome.metrics[name] == pytest.approx(together[name])
    assert outcome.metrics["auroc"] == pytest.approx(together["auroc"], abs=min(0.002, line["auroc"]["bound"]))
    assert line["over_sites"]["recall"]["sites"] == 2
    assert line["over_sites"]["auroc"]["sites"] == 1
    share = np.bincount(targets).max() / len(targets)
    assert line["majority"]["accuracy"] == pytest.approx(share)
    said = console.file.getvalue()
    assert f"(majority class {share:.4f})" in said
    assert "mean over sites, and spread: " in said
    told = _values(line)
    assert told["majority_class"] == pytest.approx(share)
    assert told["over_sites/recall"] == line["over_sites"]["recall"]["mean"]
    assert told["auroc_low"] <= together["auroc"] <= told["auroc_high"]


@pytest.mark.parametrize("learns", [True, False])
def test_a_run_that_does_not_beat_the_majority_class_says_so_once(federation, tmp_path, caplog, monkeypatch, learns):
    if not learns:
        workload = type(next(iter(federation.values())).workload)
        monkeypatch.setattr(workload, "loss", lambda _, logits, __: logits.sum() * 0)
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "run", federation)
    said = [record.getMessage() for record in caplog.records if "majority class" in record.getMessage()]
    assert len(said) == (0 if learns else 1)
