"""A signal in the middle of what a sweep tells MLflow: its run there is whole, and ends."""

import pytest
from mlflow import MlflowClient

from tests import warm
from tests.conftest import environment

SIGNALLED = """
import os, signal, sys
from pathlib import Path
from experiments.sweeps import callback
from experiments.sweeps.directory import SweepDirectory, SweepRecord
from experiments.sweeps.parent import Parent
from fedclaw import startup
from fedclaw.report.tracking import TrackingSettings

root, when = Path(sys.argv[1]), sys.argv[2]
sweep = SweepDirectory(root / "sweeps" / "made")
sweep.begin(SweepRecord(name="made", overrides=("rounds=2", "seed=1,2", "strategy=fedavg")))
parent = Parent(TrackingSettings(), root, sweep)
client = parent._store.client
tell = getattr(client, when)

def signalled(*told):
    setattr(client, when, tell)
    os.kill(os.getpid(), signal.SIGTERM)
    return tell(*told)

setattr(client, when, signalled)
startup.begin("made"); startup.under_way()
try:
    parent.begin()
    parent.finish((), {"best": 1.0, "worst": 0.5}, complete=True)
except startup.Stopped as error:
    callback._begun.append(parent)
    if when == "log_param":
        callback.break_off(error)
"""


@pytest.mark.parametrize(("when", "status"), [("log_param", "KILLED"), ("log_metric", "FINISHED")])
def test_a_signal_waits_for_what_the_store_is_told(tmp_path, when, status):
    done = warm.run(["-c", SIGNALLED, tmp_path, when], env=environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'fedclaw'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == status
    assert run.data.params == {"rounds": "2", "seed": "1,2", "strategy": "fedavg"}
    assert run.data.metrics == ({"best": 1.0, "worst": 0.5} if when == "log_metric" else {})
