"""How long a simulated federation takes, beside the loop that a researcher would write by hand.

    python -m experiments.benchmarks.simulation [RUNS] [rounds=30] [cases=cnn_1,cnn_2,mlp_1,mlp_2] [rivals=1]

The job "digits-100" (`experiments.benchmarks.digits`), RUNS (5) times each in turn: the plain loop on one thread, then
FedClaw with one worker process and with two, with everything that a run has: its record, checkpoints, metrics, the
model file, the MLflow run. `ratio` is the median over the runs of FedClaw's wall-clock time by the plain loop's in the
same run, `processor` the same of this process's processor time (others' load is not in it; with two workers their own
work is not either). `accuracy` is the median of the last round's. What is imported once is not counted, for either.

What decides the MLP's ratio is how often a weight comes from memory. Ten clients' weights are 12 MB, and each was read
and written in every step; since plain steps keep large weights as factors (`fedclaw.learning.stacked.factors`), clients
share the one that they begin with, which stays in the cache. What is left beside the steps, with either model, is the
evaluation, which the plain loop has too, and what MLflow is told. Threads are one everywhere.

Where they are installed, Flower on Ray with two actors (the extra `ray`) and Apple's pfl in one process (see
`experiments.benchmarks.rival_pfl`) do the same job in the first `rivals` of these runs; 0 leaves them out. One run is
the default, because Flower takes many times as long as the plain loop: of one run, read the ratio's first digit. Their
ratios to the plain loop of the same run are `rivals`, by cnn_flower, cnn_pfl, mlp_flower, mlp_pfl. Flower's
hold Ray's start, which of 30 rounds is about half; more rounds lessen its share.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.simulation", __doc__)

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments.benchmarks import rivals
from experiments.benchmarks.digits import Job, run_fedclaw, run_plain
from experiments.benchmarks.report import Row, report

RUNS, ROUNDS, RIVAL_RUNS = 5, 30, 1
TARGETS = {"cnn_1": 0.40, "cnn_2": 0.32, "mlp_1": 0.75, "mlp_2": 0.55}


@dataclass
class Timed:
    """Seconds and accuracies of one contestant, by run, and why it has been given up, if it has."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    failure: str = ""

    def run(self, work: Callable[[], float]) -> None:
        """Once more."""
        wall, processor = time.perf_counter(), time.process_time()
        self.accuracy.append(work())
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)

    def run_rival(self, rival: str, kind: str, rounds: int, seed: int) -> None:
        """Once more, unless it has failed: another library's failure does not cost our figures."""
        if self.failure:
            return
        try:
            seconds, accuracy = rivals.timed(rival, kind, rounds, seed)
        except rivals.RivalError as error:
            self.failure = str(error)
            return
        self.wall.append(seconds)
        self.accuracy.append(accuracy)


@dataclass(frozen=True)
class Plan:
    """How often and how long."""

    runs: int
    rounds: int
    rival_runs: int


def measure(kind: str, workers: Sequence[int], plan: Plan, root: Path) -> dict[str, Timed]:
    """The plain loop, FedClaw and the installed rivals, alternating, after one short run of each that warms up."""
    job, rounds = Job.make(kind), plan.rounds
    timed = {"plain": Timed(), **{f"{kind}_{count}": Timed() for count in workers}}
    run_plain(job, 1)
    for count in workers:
        run_fedclaw(job, 1, count, root, f"{kind}-warm-{count}")
    for number in range(plan.runs):
        timed["plain"].run(lambda seed=number: run_plain(job, rounds, seed=seed))  # type: ignore[misc]
        for count in workers:
            name = f"{kind}-{count}-{number}"
            timed[f"{kind}_{count}"].run(
                lambda count=count, name=name, seed=number: run_fedclaw(job, rounds, count, root, name, seed=seed)  # type: ignore[misc]
            )
        for rival in _present() if number < plan.rival_runs else ():
            timed.setdefault(f"{kind}_{rival}", Timed()).run_rival(rival, kind, rounds, number)
    return timed


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the table and one line of JSON."""
    torch.set_num_threads(1)
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    runs = next((int(argument) for argument in arguments if argument.isdecimal()), RUNS)
    plan = Plan(runs, int(options.get("rounds", ROUNDS)), min(runs, int(options.get("rivals", RIVAL_RUNS))))
    cases = options.get("cases", ",".join(TARGETS)).split(",")
    figures: dict[str, dict[str, float]] = {"ratio": {}, "processor": {}, "accuracy": {}, "rivals": {}}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedclaw-benchmark-") as directory:
        for kind in dict.fromkeys(case.split("_")[0] for case in cases):
            workers = [int(case.split("_")[1]) for case in cases if case.startswith(kind)]
            rows += judge(kind, measure(kind, workers, plan, Path(directory)), figures)
    if plan.rival_runs:
        rows += [(rival, "not installed", hint) for rival, hint in rivals.HINTS.items() if not rivals.installed(rival)]
    title = f"digits-100: {plan.rounds} rounds, medians of {runs} alternating runs"
    report(title, rows, {**figures, "rounds": plan.rounds})


def judge(kind: str, timed: dict[str, Timed], figures: dict[str, dict[str, float]]) -> list[Row]:
    """The rows of one model, whose ratios and accuracies are added to `figures`."""
    plain = timed.pop("plain")
    figures["accuracy"][f"{kind}_plain"] = accuracy = statistics.median(plain.accuracy)
    rows = [(f"{kind}, plain loop", f"{statistics.median(plain.wall):.2f} s, accuracy {accuracy:.3f}", "")]
    for case, found in timed.items():
        name = case.removeprefix(f"{kind}_")
        ours = name not in rivals.NEEDS
        title = f"{kind}, FedClaw, {name} worker(s)" if ours else f"{kind}, {name}, {len(found.wall)} run(s)"
        if found.failure:
            rows.append((title, "failed", found.failure))
        if not found.wall:
            continue
        ratio = _ratio(found.wall, plain.wall)
        figures["ratio" if ours else "rivals"][case] = ratio
        figures["accuracy"][case] = accuracy = round(statistics.median(found.accuracy), 4)
        if ours:
            figures["processor"][case] = _ratio(found.processor, plain.processor)
        figure = f"{statistics.median(found.wall):.2f} s, x {ratio:.2f}, accuracy {accuracy:.3f}"
        rows.append((title, figure, f"at most x {TARGETS[case]:.2f}" if ours else ""))
    return rows


def _present() -> list[str]:
    return [rival for rival in rivals.NEEDS if rivals.installed(rival)]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the runs that both have made: a rival may have made fewer."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=False)), 3)


if __name__ == "__main__":
    main(sys.argv[1:])
