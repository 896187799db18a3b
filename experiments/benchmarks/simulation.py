"""How long a simulated federation takes, beside the loop that a researcher would write by hand.

    python -m experiments.benchmarks.simulation [RUNS] [rounds=30] [cases=cnn_1,cnn_2,mlp_1,mlp_2]

The job "digits-100" (`experiments.benchmarks.digits`), RUNS (5) times each in turn: the plain loop on one thread, then
FedClaw with one worker process and with two, with everything that a run has: its record, checkpoints, metrics, the
model file, the MLflow run. `ratio` is the median over the runs of FedClaw's wall-clock time by the plain loop's in the
same run, `processor` the same of this process's processor time (others' load is not in it; with two workers their own
work is not either). `accuracy` is the median of the last round's. What is imported once is not counted, for either.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments.benchmarks.digits import Job, run_fedclaw, run_plain
from experiments.benchmarks.report import report

RUNS, ROUNDS = 5, 30
TARGETS = {"cnn_1": 0.55, "cnn_2": 0.35, "mlp_1": 0.90, "mlp_2": 0.55}


@dataclass
class Timed:
    """Seconds and accuracies of one contestant, by run."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def run(self, work: Callable[[], float]) -> None:
        """Once more."""
        wall, processor = time.perf_counter(), time.process_time()
        self.accuracy.append(work())
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)


def measure(kind: str, workers: Sequence[int], runs: int, rounds: int, root: Path) -> dict[str, Timed]:
    """The plain loop and FedClaw, alternating, after one short run of each that warms up."""
    job = Job.make(kind)
    timed = {"plain": Timed(), **{f"{kind}_{count}": Timed() for count in workers}}
    run_plain(job, 1)
    for count in workers:
        run_fedclaw(job, 1, count, root, f"{kind}-warm-{count}")
    for number in range(runs):
        timed["plain"].run(lambda seed=number: run_plain(job, rounds, seed=seed))  # type: ignore[misc]
        for count in workers:
            name = f"{kind}-{count}-{number}"
            timed[f"{kind}_{count}"].run(
                lambda count=count, name=name, seed=number: run_fedclaw(job, rounds, count, root, name, seed=seed)  # type: ignore[misc]
            )
    return timed


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the table and one line of JSON."""
    torch.set_num_threads(1)
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    runs = next((int(argument) for argument in arguments if argument.isdecimal()), RUNS)
    rounds = int(options.get("rounds", ROUNDS))
    cases = options.get("cases", ",".join(TARGETS)).split(",")
    ratio, processor, accuracy, rows = {}, {}, {}, []
    with tempfile.TemporaryDirectory(prefix="fedclaw-benchmark-") as directory:
        for kind in dict.fromkeys(case.split("_")[0] for case in cases):
            workers = [int(case.split("_")[1]) for case in cases if case.startswith(kind)]
            timed = measure(kind, workers, runs, rounds, Path(directory))
            plain = timed.pop("plain")
            accuracy[f"{kind}_plain"] = statistics.median(plain.accuracy)
            rows.append((f"{kind}, plain loop", f"{statistics.median(plain.wall):.2f} s", ""))
            for case, found in timed.items():
                ratio[case] = _ratio(found.wall, plain.wall)
                processor[case] = _ratio(found.processor, plain.processor)
                accuracy[case] = round(statistics.median(found.accuracy), 4)
                figure = f"{statistics.median(found.wall):.2f} s, x {ratio[case]:.2f}, accuracy {accuracy[case]:.3f}"
                rows.append((f"{kind}, FedClaw, {case[-1]} worker(s)", figure, f"at most x {TARGETS[case]:.2f}"))
    title = f"digits-100: {rounds} rounds, medians of {runs} alternating runs"
    report(title, rows, {"ratio": ratio, "processor": processor, "accuracy": accuracy, "rounds": rounds})


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


if __name__ == "__main__":
    main(sys.argv[1:])
