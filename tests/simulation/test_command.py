"""python -m experiments.run runtime=simulation."""

import json

from fedclaw.server.run_directory import RunDirectory
from tests.conftest import run_module

ARGUMENTS = (
    "runtime=simulation",
    "runtime.clients=30",
    "runtime.workers=2",
    "dataset.test=0",
    "partition.minimum=3",
    "privacy=none",
    "fraction=0.2",
    "rounds=2",
    "tracking=none",
)


def test_a_simulation_from_the_command_line(tmp_path):
    done = run_module("experiments.run", *ARGUMENTS, "run=x", cwd=tmp_path)
    assert done.code == 0, done.errors
    directory = RunDirectory.open(tmp_path / "runs" / "x")
    assert directory.record().simulated.clients == 30
    assert [len(line["answered"]) for line in directory.read_metrics()] == [6, 6]
    assert len(json.loads((directory.root / "receipts.json").read_text())) > 6
    assert directory.read_model()


def test_secure_aggregation_is_refused_in_one_line(tmp_path):
    done = run_module("experiments.run", *ARGUMENTS, "secure=secagg", "run=y", cwd=tmp_path)
    assert done.code == 2
    assert "runtime=sites" in done.errors
    assert "Traceback" not in done.errors
