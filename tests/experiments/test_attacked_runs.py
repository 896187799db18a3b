"""attack= of `experiments.run`, on both of its runtimes that have hostile sites."""

import pytest

from experiments.experiment import run_experiment
from experiments.settings import ExperimentSettings
from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError
from fedclaw.learning.tasks.means import MOST_LOSS

SMALL = (
    "dataset.sites=5",
    "partition=iid",
    "privacy=none",
    "tracking=none",
    "rounds=4",
    "training.epochs=null",
    "training.steps=4",
    "training.batch_size=1000",  # every example: nothing is drawn
    "training.learning_rate=0.3",
    "attack=sign_flip",
    "attack.scale=50",
)


def metrics_of(tmp_path, *overrides: str) -> dict[str, float]:
    settings = compose_settings("run", (*SMALL, f"runs={tmp_path}", *overrides), ExperimentSettings)
    return run_experiment(settings, quiet=True).metrics


def accuracy(tmp_path, *overrides: str) -> float:
    return metrics_of(tmp_path, *overrides)["accuracy"]


@pytest.mark.parametrize("runtime", ["sites", "simulation"])
def test_a_hostile_site_ruins_fedavg_and_not_the_median(tmp_path, runtime):
    assert accuracy(tmp_path, f"runtime={runtime}", "strategy=fedavg") < 0.7
    assert accuracy(tmp_path, f"runtime={runtime}", "strategy=median") > 0.85


def test_a_model_that_has_diverged_has_an_accuracy_and_the_largest_loss_that_is_told(tmp_path):
    metrics = metrics_of(tmp_path, "runtime=simulation", "strategy=fedavg")
    assert metrics["loss"] == MOST_LOSS
    assert metrics["accuracy"] < 0.7


def test_strategies_that_need_more_sites_than_there_are_say_so(tmp_path):
    with pytest.raises(UsageError, match=r"bulyan.*at least 7 sites.*counts with 5"):
        accuracy(tmp_path, "strategy=bulyan")


def test_ray_has_no_hostile_sites(tmp_path):
    with pytest.raises(UsageError, match="take runtime=sites or runtime=simulation"):
        accuracy(tmp_path, "runtime=ray", "strategy=median")
