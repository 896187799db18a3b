"""The launchers and the sweeper with jobs of their own size, in real processes; and with real federations, slowly."""

import csv
import os

import pytest
import yaml

from experiments.sweeps.directory import SweepDirectory
from tests.conftest import run_module
from tests.experiments.sweep_application import arguments

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
SUBMITIT = ("hydra/launcher=submitit", "hydra.launcher.cluster=local", "hydra.launcher.parallel=2")
RAY = ("hydra/launcher=ray", "hydra.launcher.init.num_cpus=2")
OPTUNA = ("hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=1")


def launch(out, *more):
    out.mkdir(exist_ok=True)
    return run_module("tests.experiments.sweep_application", "-m", *more, *arguments(out))


def ran(out):
    """x of each job that got to its end, and how often it was run."""
    return {float(path.name[4:]): len(path.read_text().split()) for path in out.glob("job-*")}


@pytest.mark.parametrize("launcher", [JOBLIB, SUBMITIT], ids=["joblib", "submitit"])
def test_jobs_run_in_other_processes_and_a_lost_one_costs_no_other(tmp_path, launcher):
    done = launch(tmp_path / "out", "+x=1,2,13,3", *launcher)
    out = tmp_path / "out"
    assert done.code == 0, done.errors + done.output
    assert sorted(ran(out)) == [1, 2, 3]
    assert (out / "lost-13").is_file(), "nobody was told of the lost job"
    assert len(list(out.glob("lost-*"))) == 1
    processes = {path.read_text().split()[0] for path in out.glob("job-*")}
    assert str(os.getpid()) not in processes
    for number, x in enumerate((1, 2, 13, 3)):
        overrides = yaml.safe_load((out / "sweep" / str(number) / ".hydra" / "overrides.yaml").read_text())
        assert f"+x={x}" in overrides


def test_submitit_in_this_process(tmp_path):
    done = launch(tmp_path / "out", "+x=1,2", *SUBMITIT[:1], "hydra.launcher.cluster=debug")
    assert done.code == 0, done.errors + done.output
    assert len({path.read_text() for path in (tmp_path / "out").glob("job-*")}) == 1


def test_optuna_finds_the_best_and_an_interrupted_study_goes_on(tmp_path):
    out, space = tmp_path / "out", "+x=int(interval(-5,20))"
    first = launch(out, space, *OPTUNA, "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=minimize")
    assert first.code == 0, first.errors + first.output
    before = ran(out)
    assert sum(before.values()) == 3
    second = launch(out, space, *OPTUNA, "hydra.sweeper.n_trials=5", "hydra.sweeper.direction=minimize")
    assert second.code == 0, second.errors + second.output
    assert sum(ran(out).values()) == 5
    best = yaml.safe_load((out / "sweep" / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(x**2 for x in ran(out))
    assert best["best_params"] == {"+x": min(ran(out), key=abs)}


def test_a_failed_trial_is_asked_again_and_does_not_count(tmp_path):
    out = tmp_path / "out"
    first = launch(out, "+x=choice(7)", *OPTUNA, "hydra.sweeper.n_trials=1")
    assert first.code == 0, first.errors
    assert not (out / "sweep" / "optimization_results.yaml").exists()
    (out / "mended").touch()
    assert launch(out, "+x=choice(7)", *OPTUNA, "hydra.sweeper.n_trials=1").code == 0
    assert ran(out) == {7: 2}
    assert yaml.safe_load((out / "sweep" / "optimization_results.yaml").read_text())["best_value"] == 49


@pytest.mark.parametrize(
    ("space", "words"), [("+x=interval(3,1)", "lower to a higher"), ("+x=tag(log,interval(0,1))", "above 0")]
)
def test_an_impossible_interval_is_told(tmp_path, space, words):
    done = launch(tmp_path / "out", space, *OPTUNA)
    assert done.code == 1
    assert words in done.errors
    assert "Traceback" not in done.errors


def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path):
    """A module of that name that cannot be imported stands in its place."""
    (tmp_path / "optuna.py").write_text("raise ImportError('gone')")
    command = ("tests.experiments.sweep_application", "-m", "+x=choice(1,2)", *OPTUNA, *arguments(tmp_path / "out"))
    done = run_module(*command, cwd=tmp_path)
    assert done.code == 1
    assert "pip install 'fedclaw[sweeps]'" in done.errors
    assert "Traceback" not in done.errors


FEDERATIONS = ("strategy=fedavg,fedadam", "privacy=none", "rounds=2", "dataset.sites=2", "workload.model.name=logistic")


@pytest.mark.slow
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("launcher", [JOBLIB, SUBMITIT, RAY], ids=["joblib", "submitit", "ray"])
def test_federations_by_each_launcher(tmp_path, launcher):
    runs = tmp_path / "runs"
    done = run_module("experiments.run", "-m", *FEDERATIONS, *launcher, f"runs={runs}", timeout=500, cwd=tmp_path)
    assert done.code == 0, done.errors + done.output
    (root,) = (runs / "sweeps").iterdir()
    assert {member.status for member in SweepDirectory.open(root).members()} == {"finished"}
    assert len(list(csv.DictReader((root / "comparison.csv").open()))) == 2
    models = {path: path.stat().st_mtime_ns for path in runs.glob("*/model.npz")}
    again = run_module("experiments.run", "-m", *FEDERATIONS, *launcher, f"runs={runs}", timeout=500, cwd=tmp_path)
    assert again.code == 0
    assert "2 runs are finished" in again.errors
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/model.npz")} == models
    assert len(models) == 2


@pytest.mark.slow
@pytest.mark.timeout(1100)
def test_federations_chosen_by_optuna(tmp_path):
    runs = tmp_path / "runs"
    searched = ("training.learning_rate=tag(log,interval(0.01,1))", "strategy=fedavg,fedadam")
    more = ("privacy=none", "rounds=2", "dataset.sites=2", "workload.model.name=logistic", f"runs={runs}")
    command = ("experiments.run", "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", *searched, *more)
    assert run_module(*command, timeout=500, cwd=tmp_path).code == 0
    (root,) = (runs / "sweeps").iterdir()
    assert len(SweepDirectory.open(root).members()) == 3
    best = yaml.safe_load((root / "optimization_results.yaml").read_text())
    accuracies = [float(row["accuracy"]) for row in csv.DictReader((root / "comparison.csv").open())]
    assert best["best_value"] == pytest.approx(max(accuracies))
