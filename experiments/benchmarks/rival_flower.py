"""The job "digits-100" as a user of Flower would simulate it: its FedAvg, a ClientApp, its engine on Ray.

Two actors of one core each. The clients' data lie in a file, which an actor reads once, as it builds the model once.
The server tests each round's model. Ray's start is part of a run, as the start of FedClaw's workers is part of its.
Flower draws its nodes and Ray's actors their batches with generators of their own: a seed fixes the first model only.

The actors import this module. It therefore imports, at its top, nothing but what a client needs.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional

if TYPE_CHECKING:
    from flwr.serverapp import Grid, ServerApp

    from experiments.benchmarks.digits import Job

Build = Callable[[], torch.nn.Module]


@dataclass(frozen=True)
class Training:
    """How a client trains."""

    epochs: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Held:
    """What an actor keeps from one message to the next: a model, all examples, and which of them are whose."""

    model: torch.nn.Module
    inputs: torch.Tensor
    targets: torch.Tensor
    shares: list[torch.Tensor]


_held: dict[Path, Held] = {}


def client_app(file: Path, build: Build, training: Training) -> ClientApp:
    """Clients that train on their shares of the examples in `file`."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        held = at_hand(file, build)
        held.model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        rows = held.shares[int(context.node_config["partition-id"])]
        train_on(held, rows, training)
        content = RecordDict(
            {"arrays": ArrayRecord(held.model.state_dict()), "metrics": MetricRecord({"num-examples": len(rows)})}
        )
        return Message(content=content, reply_to=message)

    return app


def at_hand(file: Path, build: Build) -> Held:
    """What this process keeps of `file`; at the first call it is read."""
    if file not in _held:
        with np.load(file, allow_pickle=False) as arrays:
            inputs, targets, rows = (torch.from_numpy(arrays[name]) for name in ("inputs", "targets", "rows"))
            _held[file] = Held(build(), inputs, targets, list(torch.split(rows, arrays["sizes"].tolist())))
    return _held[file]


def train_on(held: Held, rows: torch.Tensor, training: Training) -> None:
    """Train the held model on the examples of `rows`."""
    optimizer = torch.optim.SGD(held.model.parameters(), lr=training.rate)
    for _ in range(training.epochs):
        for batch in torch.split(rows[torch.randperm(len(rows))], training.batch):
            optimizer.zero_grad()
            functional.cross_entropy(held.model(held.inputs[batch]), held.targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def run_flower(job: "Job", rounds: int, seed: int = 0) -> float:
    """The last accuracy on the job's test examples. Raises RuntimeError if a client of a round did not answer.

    Raises UsageError without Ray (`pip install 'fedclaw[ray]'`). It listens on loopback only, for the time of the run.
    """
    from experiments.benchmarks.digits import ASKED, BATCH, CLIENTS, EPOCHS, RATE
    from fedclaw.transport.ray import RaySettings, require_ray

    require_ray()
    settings = RaySettings(cpus=2)
    settings.prepare()
    # Imports Ray: not before it is prepared.
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    model = job.federation.workload.build(job.model)
    accuracies: list[float] = []
    answers: list[int] = []
    with tempfile.TemporaryDirectory(prefix="fedclaw-benchmark-") as directory:
        clients = client_app(
            written(job, Path(directory)),
            partial(job.federation.workload.build, job.model),
            Training(EPOCHS, BATCH, RATE),
        )
        server = _server_app(model, job, rounds, accuracies, answers)
        run_simulation(server, clients, CLIENTS, backend_config=settings.backend())
    if answers != [ASKED] * rounds:
        raise RuntimeError(f"Flower: {ASKED} clients were asked in each of {rounds} rounds, and {answers} answered")
    return accuracies[-1]


def _server_app(
    model: torch.nn.Module, job: "Job", rounds: int, accuracies: list[float], answers: list[int]
) -> "ServerApp":
    """Flower's FedAvg, which weights by examples; it appends to `accuracies` and `answers` by round."""
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    from experiments.benchmarks.digits import ASKED, CLIENTS

    inputs, targets = torch.from_numpy(job.test.inputs), torch.from_numpy(job.test.targets)
    app = ServerApp()

    def count(replies: list[RecordDict], _weighted_by: str) -> MetricRecord:
        answers.append(len(replies))
        return MetricRecord({"answers": len(replies)})

    def test(_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.no_grad():
            accuracies.append(float((model(inputs).argmax(1) == targets).float().mean()))
        return MetricRecord({"accuracy": accuracies[-1]})

    @app.main()
    def main(grid: "Grid", context: Context) -> None:  # noqa: ARG001 (Flower's signature)
        strategy = FedAvg(
            fraction_train=ASKED / CLIENTS,
            fraction_evaluate=0.0,
            min_train_nodes=ASKED,
            min_available_nodes=CLIENTS,
            train_metrics_aggr_fn=count,
        )
        strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds, evaluate_fn=test)

    return app


def written(job: "Job", directory: Path) -> Path:
    """A file of the job's training examples, and of which are whose."""
    federation = job.federation
    rows = [federation.share(client) for client in range(len(federation))]
    file = directory / "examples.npz"
    table = federation.table
    np.savez(file, inputs=table.inputs, targets=table.targets, rows=np.concatenate(rows), sizes=federation.sizes)
    return file
