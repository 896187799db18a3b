"""The job "digits-100" of the simulation benchmark, as FedClaw runs it and as a researcher would write it by hand.

scikit-learn's digits, a fifth of them for testing; 100 clients by Dirichlet 0.5 with at least 4 examples each; rounds
of 20 clients, two local epochs in batches of 8, SGD with 0.1; averaged by examples. Models: `cnn`, the vision
workload's (1-16-32 channels, group normalisation, 6 thousand parameters), and `mlp`, 64-512-512-10 (301 thousand).
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from experiments.partitions.in_memory import in_memory
from experiments.sources import DatasetSettings
from fedclaw.learning.registry import schema_class, workload_class
from fedclaw.learning.workload import Table
from fedclaw.protocol.terms import LocalTraining, ModelSpec, RoundRules, StrategyRecord
from fedclaw.report.tracking import TrackingSettings, make_tracker
from fedclaw.server.round_report import Observer
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.simulation import SimulatedFederation, SimulationSettings, simulate_cohorts, simulated
from fedclaw.simulation.partitions.labels import Dirichlet
from fedclaw.simulation.settings import Device, Mode

CLIENTS, ASKED, EPOCHS, BATCH, RATE = 100, 20, 2, 8, 0.1
PIXELS, LABELS = 64, 10


@dataclass(frozen=True)
class Job:
    """The clients' data, and the model that they train."""

    federation: SimulatedFederation
    model: ModelSpec
    test: Table

    @classmethod
    def make(cls, kind: str) -> "Job":
        """`kind`: cnn or mlp."""
        dealt = in_memory(DatasetSettings(name="digits", public=0.2, test=0), Dirichlet(alpha=0.5, minimum=4), CLIENTS)
        table, test = dealt.table, dealt.public
        if kind == "cnn":
            workload = workload_class(dealt.workload)(dealt.schema)
            model = workload.default_model()
        else:
            table, test = (replace(part, inputs=part.inputs.reshape(len(part), -1)) for part in (table, test))
            columns = [{"name": f"p{i}", "kind": "numeric", "center": 0, "scale": 1} for i in range(PIXELS)]
            target = {"name": "digit", "labels": [str(label) for label in range(LABELS)]}
            schema = schema_class("tabular").parse(json.dumps({"columns": columns, "target": target}), "benchmark")
            workload = workload_class("tabular")(schema)
            model = ModelSpec(name="mlp", args={"hidden": [512, 512]})
        return cls(SimulatedFederation(workload, table, dealt.shares, test=test), model, test)


def run_fedclaw(
    job: Job,
    rounds: int,
    workers: int,
    runs: Path,
    name: str,
    *,
    seed: int = 0,
    mode: Mode = "auto",
    device: Device = "cpu",
) -> float:
    """The last accuracy of a run with everything that a run has: record, checkpoints, metrics, model file, MLflow."""
    settings, workload = SimulationSettings(workers=workers, mode=mode, device=device), job.federation.workload
    record = RunRecord(
        run=name,
        federation="benchmark",
        workload=workload.name,
        schema_text=workload.schema.to_json(),
        model=job.model,
        strategy=StrategyRecord(name="fedavg"),
        rounds=rounds,
        training=LocalTraining(epochs=EPOCHS, batch_size=BATCH, learning_rate=RATE),
        privacy=None,
        rules=RoundRules(minimum=1, fraction=ASKED / CLIENTS),
        seed=seed,
    )
    directory = RunDirectory.create(runs / name, simulated(record, settings, CLIENTS))
    tracker = make_tracker(TrackingSettings(), directory)
    observers: Sequence[Observer] = [tracker] if tracker else []
    return simulate_cohorts(directory, job.federation, settings, observers).metrics["accuracy"]


def run_plain(job: Job, rounds: int, *, seed: int = 0) -> float:
    """The same by a plain loop on one thread."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    inputs, targets = torch.from_numpy(job.federation.table.inputs), torch.from_numpy(job.federation.table.targets)
    shares = [torch.from_numpy(job.federation.share(client)) for client in range(CLIENTS)]
    test = torch.from_numpy(job.test.inputs), torch.from_numpy(job.test.targets)
    model = job.federation.workload.build(job.model)
    accuracy = 0.0
    for _ in range(rounds):
        start = copy.deepcopy(model.state_dict())
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        cohort = generator.choice(CLIENTS, ASKED, replace=False)
        examples = sum(len(shares[client]) for client in cohort)
        for client in cohort:
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            for _ in range(EPOCHS):
                for rows in torch.split(shares[client][torch.randperm(len(shares[client]))], BATCH):
                    optimizer.zero_grad()
                    functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            for name, value in model.state_dict().items():
                total[name] += value * (len(shares[client]) / examples)
        model.load_state_dict(total)
        with torch.no_grad():
            accuracy = float((model(test[0]).argmax(1) == test[1]).float().mean())
    return accuracy
