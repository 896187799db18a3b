"""Sweeps as their users start them: real processes, real MLflow, a real kill -9."""

import csv
import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from experiments.sweep import main as make_again
from experiments.sweeps.directory import SweepDirectory
from fedclaw.server.run_directory import RunDirectory
from tests.conftest import Background, run_module

SMALL = ("rounds=2", "dataset.sites=2", "workload.model.name=logistic")
PATIENCE = 280
"""Seconds that one command may take on a busy machine."""


def sweep(runs, *arguments):
    """The command, to its end."""
    return run_module("experiments.run", "-m", *arguments, f"runs={runs}", *SMALL, timeout=PATIENCE, cwd=runs.parent)


def the_sweep(runs) -> SweepDirectory:
    (directory,) = (runs / "sweeps").iterdir()
    return SweepDirectory.open(directory)


def run_directories(runs) -> dict[tuple[tuple[str, str], ...], Path]:
    """By what a run varies."""
    found = the_sweep(runs)
    return {tuple(sorted(member.settings.items())): found.run_directory(member) for member in found.members()}


def mlflow_runs(runs):
    """(parent, children)."""
    client = MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'fedclaw'")
    found = client.search_runs([experiment.experiment_id])
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    (parent,) = [run for run in found if run not in children]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    return client, parent, children


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.timeout(600)
def test_a_sweep_leaves_a_parent_with_its_runs_a_table_and_plots(tmp_path):
    runs = tmp_path / "runs"
    done = sweep(runs, "strategy=fedavg,fedadam", "privacy.epsilon=2,8")
    assert done.code == 0, done.errors
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "the working directory stays clean"
    assert "Sweep of 4 runs" in done.output
    client, parent, children = mlflow_runs(runs)
    asked = {(run.data.params["strategy.name"], float(run.data.params["privacy.epsilon"])) for run in children}
    assert asked == {("fedavg", 2.0), ("fedavg", 8.0), ("fedadam", 2.0), ("fedadam", 8.0)}
    assert len(children) == 4
    for run in children:
        assert run.info.status == "FINISHED"
        spent = [value for name, value in run.data.metrics.items() if name.startswith("epsilon/")]
        assert len(spent) == 2
        assert max(spent) <= float(run.data.params["privacy.epsilon"])
        names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert {"model.npz", "run.json", "receipts.json"} <= names
        history = client.get_metric_history(run.info.run_id, "accuracy")
        assert [point.step for point in history] == [1, 2]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["strategy"] == "fedavg,fedadam"
    assert parent.data.params["privacy.epsilon"] == "2,8"
    summary = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    plots = {"accuracy_by_round.png", "accuracy_by_epsilon.png"}
    assert summary == {"comparison.csv", "comparison.json"} | plots
    root = the_sweep(runs).root
    rows = list(csv.DictReader((root / "comparison.csv").open()))
    best = max(rows, key=lambda row: float(row["accuracy"]))
    assert [row["best"] for row in rows].count("1") == 1
    assert float(best["accuracy"]) == pytest.approx(parent.data.metrics["best_accuracy"])
    check_made_again(root)


def check_made_again(root):
    """Table and plots, from the run directories alone."""
    before = {path.name: path.read_bytes() for path in root.glob("comparison.*")}
    for path in (*root.glob("comparison.*"), *root.glob("*.png")):
        path.unlink()
    make_again([str(root)])
    assert {path.name: path.read_bytes() for path in root.glob("comparison.*")} == before
    assert {path.name for path in root.glob("*.png")} == {"accuracy_by_round.png", "accuracy_by_epsilon.png"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path):
    runs, rounds = tmp_path / "runs", 15
    command = ("-m", "strategy=fedavg", "privacy.epsilon=2,4,8", f"runs={runs}", *SMALL[1:], f"rounds={rounds}")
    first = Background(tmp_path / "first.log", "experiments.run", *command)

    def half_way() -> bool:
        finished = list(runs.glob("fedavg-*/model.npz"))
        begun = [path for path in runs.glob("fedavg-*/metrics.jsonl") if len(path.read_text().splitlines()) >= 3]
        return len(finished) == 1 and len(begun) == 2

    end = time.monotonic() + PATIENCE
    while not half_way():
        assert first.process.poll() is None, first.text()
        assert time.monotonic() < end, first.text()
        time.sleep(0.02)
    first.kill()
    (done,) = [path.parent for path in runs.glob("fedavg-*/model.npz")]
    (half,) = [path.parent for path in runs.glob("fedavg-*/metrics.jsonl") if path.parent != done]
    stopped_at = len(RunDirectory.open(half).read_metrics())
    assert stopped_at < rounds, "killed too late to show anything"
    finished, begun = times(done), json.loads((half / "run.json").read_text())

    second = run_module("experiments.run", *command, timeout=PATIENCE)
    assert second.code == 0, second.errors
    assert times(done) == finished, "a finished run was touched"
    assert json.loads((half / "run.json").read_text()) == begun, "a half-finished run was begun anew"
    spent = {}
    for settings, root in run_directories(runs).items():
        directory = RunDirectory.open(root)
        assert [line["round"] for line in directory.read_metrics()] == list(range(1, rounds + 1))
        asked = float(dict(settings)["privacy.epsilon"])
        for site, receipt in directory.read_receipts().items():
            assert receipt.receipt.rounds == rounds
            spent[site, asked] = receipt.receipt.epsilon_run / asked
    assert len(spent) == 6
    assert min(spent.values()) > 0.95, "a continued run forgot what its first part cost"
    assert max(spent.values()) <= 1
    client, parent, children = mlflow_runs(runs)
    assert len(children) == 3
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    for run in children:
        history = client.get_metric_history(run.info.run_id, "accuracy")
        assert sorted({point.step for point in history}) == list(range(1, rounds + 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_fails_is_listed_and_tried_again_and_costs_no_other(tmp_path):
    """The first time the data cannot be written, for all runs; the second time one run is still impossible."""
    runs, arguments = tmp_path / "runs", ("privacy.epsilon=8,-1", "seed=1,2", "tracking=none")
    runs.mkdir()
    (runs / "data").write_text("in the way")
    first = sweep(runs, *arguments)
    assert first.code == 1
    assert {member.status for member in the_sweep(runs).members()} == {"failed"}
    assert "4 of 4 runs failed" in first.errors

    (runs / "data").unlink()
    second = sweep(runs, *arguments)
    assert second.code == 1
    assert "Traceback" not in second.errors + second.output
    assert "2 of 4 runs failed" in second.errors
    assert "mean ± deviation over seed" in second.output
    for member in the_sweep(runs).members():
        good = member.settings["privacy.epsilon"] == "8"
        assert member.status == ("finished" if good else "failed")
        assert good or ("privacy.epsilon" in member.reason and member.reason in second.output)
    rows = list(csv.DictReader((the_sweep(runs).root / "comparison.csv").open()))
    assert [(row["runs"], row["failed"], row["best"]) for row in rows] == [("2", "0", "1"), ("2", "2", "0")]
