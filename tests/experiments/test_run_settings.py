"""What `experiments.run` sets up for itself, so that a run needs no second setting to begin."""

import pytest

from experiments.experiment import run_experiment
from experiments.settings import ExperimentSettings
from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError

TINY = ("tracking=none", "rounds=2", "training.epochs=null", "training.steps=2", "privacy=none", "partition=iid")


def run(tmp_path, *overrides):
    settings = compose_settings("run", (*TINY, f"runs={tmp_path}", *overrides), ExperimentSettings)
    return run_experiment(settings, quiet=True)


def test_buffered_rounds_need_no_further_setting(tmp_path):
    outcome = run(tmp_path, "strategy=fedbuff", "dataset.sites=3", "rounds=3")
    assert [len(line["answered"]) for line in outcome.directory.read_metrics()] == [2, 2, 2]
    with pytest.raises(UsageError, match="steps on 2 answers"):
        run(tmp_path, "strategy=fedbuff", "dataset.sites=1")


def test_made_sites_allow_the_delta_of_noise_on_the_sum(tmp_path):
    asked = ("central=example", "central.noise_by=sites", "training=one_step", "secure=secagg", "central.delta=1e-3")
    outcome = run(tmp_path, *asked, "training.steps=1", "central.sample_rate=0.1")
    assert all(item.receipt.delta == 1e-3 for item in outcome.receipts.values())
    assert len(outcome.receipts) == 4
