"""resume= of experiments.run: what a run that stops advises is there, and takes the run's own settings."""

import pytest

from experiments.experiment import run_experiment
from experiments.resumed import resumed
from experiments.settings import ExperimentSettings
from experiments.sweeps.identity import EXPERIMENT_FILE
from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError
from fedclaw.server.run_directory import RunDirectory
from tests.conftest import run_module

TINY = ("tracking=none", "privacy=none", "rounds=3", "training.steps=2", "training.epochs=null", "seed=3")
MODEL = ("workload.model.name=logistic", "dataset.sites=3", "strategy=fedprox", "strategy.mu=0.3")


def settings_of(*overrides):
    return compose_settings("run", overrides, ExperimentSettings)


class StopAfter:
    def __init__(self, number):
        self.number = number

    def started(self, record, first_round):
        self.first = first_round

    def finished_round(self, report):
        if report.round == self.number:
            raise KeyboardInterrupt

    def finished(self, outcome):
        pass


@pytest.mark.parametrize("runtime", ["sites", "simulation"])
def test_a_run_that_was_stopped_goes_on_by_its_directory_alone(tmp_path, monkeypatch, runtime):
    whole = settings_of(*TINY, *MODEL, f"runtime={runtime}", f"runs={tmp_path}", "run=whole")
    expected = run_experiment(whole, quiet=True)

    begun = whole.model_copy(update={"run": "begun"})
    stop = StopAfter(1)
    monkeypatch.setattr("experiments.experiment.make_tracker", lambda *_: stop)
    stop.failed = lambda _: None
    with pytest.raises(KeyboardInterrupt):
        run_experiment(begun, quiet=True)
    monkeypatch.undo()

    root = tmp_path / "begun"
    asked = settings_of("tracking=none", f"resume={root}")
    found = resumed(asked, root, [f"resume={root}", "tracking=none"])
    assert found.strategy == whole.strategy
    assert (found.dataset, found.partition, found.runtime) == (whole.dataset, whole.partition, whole.runtime)
    outcome = run_experiment(found, resume=True, quiet=True)
    if runtime == "simulation":  # sites draw their batches from the system's own source
        assert outcome.metrics == expected.metrics
    assert [line["round"] for line in RunDirectory(root).read_metrics()] == [1, 2, 3]
    with pytest.raises(UsageError, match="rounds cannot be changed on resume"):
        resumed(asked, root, [f"resume={root}", "rounds=9"])


def test_a_run_of_an_earlier_version_is_told_what_to_give_again(tmp_path):
    begun = settings_of(*TINY, *MODEL, f"runs={tmp_path}", "run=old")
    run_experiment(begun, quiet=True)
    root = tmp_path / "old"
    (root / EXPERIMENT_FILE).unlink()
    with pytest.raises(UsageError, match="give the command that began it again, with resume="):
        resumed(settings_of(f"resume={root}"), root, [f"resume={root}"])
    again = resumed(begun.model_copy(update={"resume": root}), root, [*TINY, *MODEL])
    assert (again.run, again.runs) == ("old", tmp_path)


def test_the_command_takes_it(tmp_path):
    nowhere = run_module("experiments.run", f"resume={tmp_path / 'nowhere'}", cwd=tmp_path)
    assert nowhere.code == 2, nowhere.errors
    assert "nowhere" in nowhere.lines[0]
    run_experiment(settings_of(*TINY, *MODEL, f"runs={tmp_path}", "run=done"), quiet=True)
    done = run_module("experiments.run", f"resume={tmp_path / 'done'}", cwd=tmp_path)
    assert done.code == 0, done.errors
    assert "run done is finished" in done.output
