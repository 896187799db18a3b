"""What a DP-SGD step costs beside the same step without DP.

    python -m experiments.benchmarks.dp_step [BLOCKS] [eager] [profile]

One thread. Models: the vision workload's default CNN (6 thousand parameters, 8 x 8 images) and an MLP 64-512-512-10
(301 thousand), in batches of 8 and of 64. A step is the loss, its gradient and an SGD update; the private one clips
and adds noise from the cryptographic source besides. In each of BLOCKS blocks every way takes a few steps in turn, the
plain one first, and a figure is the median over the blocks of its processor time by the plain one's in the same block:
load that others put on the machine hits both. `ratio` is that of what mode `auto` takes with STEPS_AHEAD steps to go,
`by_mode` that of every way that is available here (`compiled` needs a C++ compiler; the time it takes to compile, a
minute or several, is not in the figure; `eager` leaves it out). `persons_by_rows` is the step of a batch of persons
with 1 to 20 rows each, whose gradients are summed and clipped together, by the private step of the same rows as units
of their own. `profile` prints where the time of the plain and of the `auto` step goes, by operator.

What stands in the way of less, by these profiles: with the MLP the noise, 3 to 5 ns a number by how busy the machine
is, of which a fifth is AES, a half the logarithm, root, sine and cosine, the rest passes over memory in the cache; and
the sum in float64, whose product takes twice the time of float32's (137 us against 71 for the 512 x 512 layer at batch
8, 790 against 360 at batch 64), and which the bound rests on. With the CNN at batch 8 it is some 50 calls of a few
microseconds each, which only compiling would fuse; but that takes minutes, and STEPS_AHEAD such steps about a second.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.dp_step", __doc__)

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from torch.profiler import profile

from fedclaw.clients.tabular import Mlp
from fedclaw.clients.vision import Cnn, CnnArguments
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import Mode, StepSpeed
from fedclaw.privacy.steps import PlainGradients, PrivateGradients, StepTaker

BLOCKS = 25
BLOCK_STEPS = 10
LONG_STEP = 0.01
"""Seconds of a step from which a block has one step of its kind only."""
STEPS_AHEAD = 1000
CLASSES = 10
REACH = {"cnn_b8": 1.3, "cnn_b64": 1.8, "mlp_b8": 3.5, "mlp_b64": 2.0}
PLAIN = "plain"
PERSONS = (1, 2, 20, 4, 1, 12, 8, 16)
"""The rows of each person of a batch."""
PROFILED_STEPS = 50
PROFILE_ROWS = 14

Step = Callable[[], None]


def make_model(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model and the shape of one input."""
    if kind == "cnn":
        return Cnn((1, 8, 8), CnnArguments(), CLASSES), (1, 8, 8)
    return Mlp(64, (512, 512), CLASSES), (64,)


def loss(_: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy."""
    return functional.cross_entropy(outputs, targets)


def make_step(
    taker: StepTaker,
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    units: torch.Tensor | None = None,
) -> Step:
    """One step on the same batch: gradients and an update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)

    def step() -> None:
        taker.gradients(inputs, targets, units)
        optimizer.step()

    return step


def make_steps(
    kind: str, batch: int, modes: Sequence[Mode], stack: ExitStack
) -> tuple[dict[str, Step], dict[str, str]]:
    """A step for the plain way and for each mode, warmed up, and the way that each mode has really taken."""
    start, shape = make_model(kind)
    inputs, targets = torch.randn(batch, *shape), torch.randint(0, CLASSES, (batch,))
    steps: dict[str, Step] = {PLAIN: make_step(PlainGradients(start, loss), start, inputs, targets)}
    ways: dict[str, str] = {}
    for mode in modes:
        model, _ = make_model(kind)
        model.load_state_dict(start.state_dict())
        taker = PrivateGradients(
            model,
            loss,
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            expected_batch_size=batch,
            source=GaussianSource(),
            speed=StepSpeed(mode=mode),
            steps_ahead=STEPS_AHEAD,
        )
        stack.enter_context(taker)
        steps[mode] = make_step(taker, model, inputs, targets)
        for _ in range(3):
            steps[mode]()
        ways[mode] = str(taker.engine)
    return steps, ways


def make_steps_of_persons(kind: str, stack: ExitStack) -> dict[str, Step]:
    """A private step of rows, and one of the same rows as those of PERSONS, warmed up."""
    start, shape = make_model(kind)
    persons = torch.repeat_interleave(torch.arange(len(PERSONS)), torch.tensor(PERSONS))
    inputs, targets = torch.randn(len(persons), *shape), torch.randint(0, CLASSES, (len(persons),))
    steps = {}
    for name, units in {"rows": None, "persons": persons}.items():
        model, _ = make_model(kind)
        model.load_state_dict(start.state_dict())
        taker = PrivateGradients(
            model,
            loss,
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            expected_batch_size=len(PERSONS),
            source=GaussianSource(),
            speed=StepSpeed(mode="bookkeeping"),
        )
        stack.enter_context(taker)
        steps[name] = make_step(taker, model, inputs, targets, units)
        steps[name]()
    return steps


def seconds(step: Step, count: int) -> float:
    """The median of `count` steps' seconds of processor time, after one that warms the caches."""
    if count > 1:
        step()
    times = []
    for _ in range(count):
        began = time.thread_time()
        step()
        times.append(time.thread_time() - began)
    return statistics.median(times)


def measure(steps: dict[str, Step], blocks: int) -> tuple[float, dict[str, float]]:
    """Seconds of the first step, and each other one's time by the first one's."""
    (first, *others) = steps
    counts = {mode: 1 if seconds(step, 2) > LONG_STEP else BLOCK_STEPS for mode, step in steps.items()}
    table = [{mode: seconds(step, counts[mode]) for mode, step in steps.items()} for _ in range(blocks)]
    ratios = {mode: statistics.median(row[mode] / row[first] for row in table) for mode in others}
    return statistics.median(row[first] for row in table), ratios


def print_profile(console: Console, title: str, step: Step) -> None:
    """Milliseconds a step by operator, the largest first."""
    with profile() as record:
        for _ in range(PROFILED_STEPS):
            step()
    rows = sorted(record.key_averages(), key=lambda row: -row.self_cpu_time_total)[:PROFILE_ROWS]
    table = Table(title=title, title_justify="left")
    table.add_column("operator")
    table.add_column("us a step", justify="right")
    table.add_column("calls a step", justify="right")
    for row in rows:
        table.add_row(row.key, f"{row.self_cpu_time_total / PROFILED_STEPS:.0f}", f"{row.count / PROFILED_STEPS:.0f}")
    console.print(table)


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the table and one line of JSON."""
    torch.set_num_threads(1)
    numbers = [int(argument) for argument in arguments if argument.isdecimal()]
    console = Console()
    table = Table(title="A DP-SGD step, one thread, by the same step without DP", title_justify="left")
    modes: list[Mode] = [mode for mode in get_args(Mode) if mode != "compiled" or "eager" not in arguments]
    for column in ("model, batch", "plain step", *modes, "auto takes", "reach"):
        table.add_column(column, justify="right")
    by_mode: dict[str, dict[str, float]] = {}
    for case, reach in REACH.items():
        kind, batch = case.split("_b")
        with ExitStack() as stack:
            steps, ways = make_steps(kind, int(batch), modes, stack)
            plain, ratios = measure(steps, *(numbers or [BLOCKS]))
            # A mode that gave way to another one is not available here.
            by_mode[case] = {mode: round(ratios[mode], 2) for mode in modes if mode in ("auto", ways[mode])}
            shown = [f"{by_mode[case][mode]:.2f}" if mode in by_mode[case] else "-" for mode in modes]
            table.add_row(case, f"{plain * 1e3:.2f} ms", *shown, ways["auto"], f"{reach:.1f}")
            if "profile" in arguments:
                for mode in (PLAIN, "auto"):
                    print_profile(console, f"{case}: {mode} step", steps[mode])
    console.print(table)
    of_persons: dict[str, float] = {}
    for kind in ("cnn", "mlp"):
        with ExitStack() as stack:
            rows, ratios = measure(make_steps_of_persons(kind, stack), *(numbers or [BLOCKS]))
        of_persons[kind] = round(ratios["persons"], 2)
        console.print(
            f"{kind}, {len(PERSONS)} persons of 1 to 20 rows, {sum(PERSONS)} in all: {of_persons[kind]:.2f} times the "
            f"private step of rows, which takes {rows * 1e3:.2f} ms"
        )
    figures = {
        "ratio": {case: ratios["auto"] for case, ratios in by_mode.items()},
        "by_mode": by_mode,
        "persons_by_rows": of_persons,
        "reference": "the same step without DP",
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
