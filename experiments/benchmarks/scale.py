"""Ten thousand clients, and a thousand large updates: how long, and in how much memory.

    python -m experiments.benchmarks.scale [ROUNDS=200] [workers=2] [clients=10000]

First the vision workload's CNN (6 thousand parameters) over 10,000 simulated clients with 10 random images each, 100
sampled in a round: `seconds_per_round`, and `memory_growth`, what this process and its workers have written after
the last round by that after the first quarter. Then one aggregation of 1,000 updates of a million numbers: `models` is
how much the process's peak memory grew by, in updates.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.scale", __doc__)

import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from experiments.benchmarks.report import report
from fedclaw.clients.vision import VisionWorkload
from fedclaw.learning.registry import schema_class
from fedclaw.learning.workload import Table
from fedclaw.protocol.terms import LocalTraining, RoundRules, StrategyRecord
from fedclaw.server.round_report import Outcome, RoundReport
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.training import WeightedSum
from fedclaw.simulation import SimulatedFederation, SimulationSettings, simulate_cohorts, simulated

CLIENTS, ASKED, EXAMPLES, ROUNDS = 10_000, 100, 10, 200
UPDATES, NUMBERS = 1000, 1_000_000
_SCHEMA = '{"shape": [1, 8, 8], "labels": ["0","1","2","3","4","5","6","7","8","9"], "mean": [0.5], "std": [0.3]}'


class Memory:
    """An observer that notes the resident memory after each round."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []

    def started(self, record: RunRecord, first_round: int) -> None:
        """See Observer."""

    def finished_round(self, report: RoundReport) -> None:
        """See Observer."""
        processes = [os.getpid(), *_children(os.getpid())]
        self.megabytes.append(sum(_resident(process) for process in processes))

    def finished(self, outcome: Outcome) -> None:
        """See Observer."""


def measure_clients(clients: int, rounds: int, workers: int) -> tuple[float, list[float]]:
    """Seconds of a round, and megabytes after each."""
    generator = np.random.default_rng(0)
    count = clients * EXAMPLES
    table = Table(generator.random((count, 1, 8, 8), np.float32), generator.integers(0, 10, count))
    workload = VisionWorkload(schema_class("vision").parse(_SCHEMA, "benchmark"))
    federation = SimulatedFederation(workload, table, np.split(np.arange(count), clients), test=_first(table, 1000))
    settings = SimulationSettings(workers=workers)
    record = RunRecord(
        run="scale",
        federation="benchmark",
        workload=workload.name,
        schema_text=workload.schema.to_json(),
        model=workload.default_model(),
        strategy=StrategyRecord(name="fedavg"),
        rounds=rounds,
        training=LocalTraining(epochs=2, batch_size=8, learning_rate=0.05),
        privacy=None,
        rules=RoundRules(minimum=1, fraction=ASKED / clients),
    )
    memory = Memory()
    with tempfile.TemporaryDirectory(prefix="fedclaw-benchmark-") as root:
        directory = RunDirectory.create(Path(root) / "scale", simulated(record, settings, clients))
        began = time.perf_counter()
        simulate_cohorts(directory, federation, settings, [memory])
        return (time.perf_counter() - began) / rounds, memory.megabytes


def measure_aggregation(updates: int, numbers: int) -> float:
    """How many updates' memory one sum of `updates` takes, the update that is being added included."""
    generator = np.random.default_rng(0)
    before = _peak()
    total = WeightedSum({"w": np.zeros(numbers, np.float32)})
    for _ in range(updates):
        total.add({"w": generator.standard_normal(numbers, np.float32)}, 1.0, 1)
    return (_peak() - before) / (numbers * 4 / 1e6)


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the table and one line of JSON."""
    torch.set_num_threads(1)
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    rounds = next((int(argument) for argument in arguments if argument.isdecimal()), ROUNDS)
    clients, workers = int(options.get("clients", CLIENTS)), int(options.get("workers", 2))
    models = measure_aggregation(UPDATES, NUMBERS)
    seconds, megabytes = measure_clients(clients, rounds, workers)
    growth = megabytes[-1] / megabytes[len(megabytes) // 4]
    figures = {"seconds_per_round": seconds, "memory_growth": growth, "megabytes": megabytes[-1], "models": models}
    report(
        f"{clients} clients, {ASKED} a round, {rounds} rounds, {workers} worker processes",
        [
            ("a round", f"{seconds * 1e3:.0f} ms", ""),
            (
                "memory, all processes",
                f"{megabytes[-1]:.0f} MB",
                f"x {growth:.3f} of that after a quarter of the rounds",
            ),
            (f"a sum of {UPDATES} updates", f"{models:.1f} models", f"{UPDATES} if all were held"),
        ],
        {name: round(value, 4) for name, value in figures.items()},
    )


def _first(table: Table, count: int) -> Table:
    return table.take(slice(count))


def _peak() -> float:
    """Megabytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _resident(process: int) -> float:
    """Megabytes that a process has written: what it shares with its parent counts in parts, libraries' files do not."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) * 1024 / 1e6


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


if __name__ == "__main__":
    main(sys.argv[1:])
