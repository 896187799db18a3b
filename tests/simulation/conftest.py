"""Made-up clients: a few hundred random images, and rows of a table, dealt unevenly."""

import json
from itertools import pairwise

import numpy as np
import pytest

from fedclaw.clients.tabular import TabularWorkload
from fedclaw.clients.vision import VisionWorkload
from fedclaw.learning.registry import schema_class
from fedclaw.learning.workload import Table
from fedclaw.protocol.terms import LocalTraining, ModelSpec, RoundRules, StrategyRecord
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.simulation import SimulatedFederation, SimulationSettings, simulate_cohorts, simulated

SIZES = (31, 4, 17, 9, 8, 22, 5, 13, 16, 7)
MODELS = {
    "cnn": ModelSpec(name="cnn", args={"channels": [4, 6]}),
    "resnet": ModelSpec(name="resnet", args={"channels": [4, 6], "blocks": [[3], [5, 4]]}),
    "mlp": ModelSpec(name="mlp", args={"hidden": [12, 7]}),
    **dict.fromkeys(("squared", "huber", "poisson"), ModelSpec(name="mlp", args={"hidden": [12, 7]})),
}
"""The last ones are of a number, by its loss."""


def deal(sizes):
    bounds = np.cumsum([0, *sizes])
    return [np.arange(start, end) for start, end in pairwise(bounds)]


def make_federation(kind, sizes=SIZES, **options):
    """Clients of these sizes; the labels can be learnt, a little."""
    generator = np.random.default_rng(5)
    count = sum(sizes)
    targets = generator.integers(0, 3, count)
    if kind in ("cnn", "resnet"):
        schema = schema_class("vision").parse(
            json.dumps({"shape": [1, 6, 6], "labels": ["a", "b", "c"], "mean": [0.5], "std": [0.25]}), "test"
        )
        inputs = generator.normal(size=(count, 1, 6, 6)) + targets[:, None, None, None]
        workload = VisionWorkload(schema)
    else:
        columns = [{"name": f"x{i}", "kind": "numeric", "center": 0, "scale": 1} for i in range(5)]
        target = {"name": "y", "labels": ["a", "b", "c"]}
        if kind != "mlp":
            target = {"name": "y", "kind": "numeric", "range": [0, 8], "loss": kind}
        schema = schema_class("tabular").parse(json.dumps({"columns": columns, "target": target}), "test")
        inputs = generator.normal(size=(count, 5)) + targets[:, None]
        workload = TabularWorkload(schema)
    table = Table(inputs.astype(np.float32), targets.astype(workload.task.target_dtype))
    tested = options.pop("test", table)
    return SimulatedFederation(workload, table, deal(sizes), test=tested, **options)


def make_record(federation, kind, **changes):
    fields = {
        "run": "simulated",
        "federation": "lab",
        "workload": federation.workload.name,
        "schema_text": federation.workload.schema.to_json(),
        "model": MODELS[kind],
        "task": federation.workload.task.name,
        "metrics": federation.workload.task.metrics,
        "strategy": StrategyRecord(name="fedavg"),
        "rounds": 3,
        "training": LocalTraining(epochs=2, batch_size=8, learning_rate=0.1),
        "privacy": None,
        "rules": RoundRules(minimum=1),
        "seed": 3,
    }
    return RunRecord(**{**fields, **changes})


@pytest.fixture
def run(tmp_path):
    """Runs a simulation in a directory of its own and returns the outcome."""
    count = iter(range(100))

    def go(kind, settings=None, observers=(), federation=None, **changes):
        settings = settings or SimulationSettings()
        federation = federation or make_federation(kind)
        record = simulated(make_record(federation, kind, **changes), settings, len(federation))
        directory = RunDirectory.create(tmp_path / f"run-{next(count)}", record)
        return simulate_cohorts(directory, federation, settings, observers)

    return go
