"""Latency of an exported model of about 10 million parameters, pruned to 10% of them, by that of the whole one.

    python -m experiments.benchmarks.latency [ROUNDS]

A multilayer perceptron and a convolutional network, both with fresh weights, on which latency does not depend. Every
form (float32, int8, float16) of the whole and of the pruned model runs in ONNX Runtime on one thread. The forms take
turns in each round, so all of them see the same machine; shown are medians. Agreement is not measured here: it says
nothing of weights that were not trained.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.latency", __doc__)

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from experiments.benchmarks.report import Row, report
from fedclaw.clients.tabular import Mlp
from fedclaw.clients.vision import Cnn, CnnArguments
from fedclaw.compress.latency import LATENCY_BATCHES, median_milliseconds
from fedclaw.compress.prune import prune_to_fraction
from fedclaw.errors import UsageError
from fedclaw.export.graph import save_onnx, trace
from fedclaw.export.layout import FORMS
from fedclaw.export.quantise import to_float16, to_int8
from fedclaw.export.runtime import open_session, run_session
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.workload import Floats

FRACTION = 0.1
REACH = 3.0
"""How many times faster the pruned model is to be, in float32 and at both batch sizes."""
ROUNDS, SECONDS = 100, 10.0
"""Timed rounds at a batch size, at most, and the seconds after which no further one begins."""
CALIBRATION_INPUTS = 64
TASK = Classification(tuple(str(digit) for digit in range(10)))


@dataclass(frozen=True)
class Case:
    """A net (N, *D) -> (N, 10), and D."""

    model: nn.Module
    shape: tuple[int, ...]


def cases() -> dict[str, Case]:
    """The nets that are measured, of about 10 million parameters each."""
    torch.manual_seed(0)
    images = (3, 32, 32)
    convolutions = CnnArguments(channels=(64, 128, 256, 512, 1024), grid=1, hidden=3500)
    return {
        "mlp": Case(Mlp(784, (2048, 2048, 2048), len(TASK.labels)).eval(), (784,)),
        "cnn": Case(Cnn(images, convolutions, len(TASK.labels)).eval(), images),
    }


def count(model: nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def write_forms(model: nn.Module, shape: tuple[int, ...], inputs: Floats, directory: Path) -> dict[str, bytes]:
    """The ONNX file of each precision, by its name."""
    directory.mkdir()
    paths = {precision: directory / name for precision, name in FORMS.items()}
    save_onnx(trace(model, TASK, shape), TASK, shape, paths["float32"])
    to_int8(paths["float32"], paths["int8"], inputs)
    to_float16(paths["float32"], paths["float16"])
    return {precision: path.read_bytes() for precision, path in paths.items()}


def measure(files: Mapping[str, bytes], inputs: Floats, rounds: int) -> dict[int, dict[str, float]]:
    """Median milliseconds of each file, by batch size."""
    sessions = {name: open_session(content, name, "export", threads=1) for name, content in files.items()}
    found = {}
    for size in LATENCY_BATCHES:
        calls = [partial(run_session, session, inputs[:size]) for session in sessions.values()]
        found[size] = dict(zip(sessions, median_milliseconds(calls, rounds, SECONDS), strict=True))
    return found


def compare(name: str, case: Case, rounds: int) -> tuple[list[Row], dict[str, float | dict[str, float]]]:
    """The table's rows of one net, and its figures."""
    inputs = np.random.default_rng(0).normal(size=(CALIBRATION_INPUTS, *case.shape)).astype(np.float32)
    pruned = prune_to_fraction(case.model, case.shape, FRACTION).model
    models = {"whole": case.model, "pruned": pruned}
    with tempfile.TemporaryDirectory() as directory:
        files = {
            f"{which} {precision}": content
            for which, model in models.items()
            for precision, content in write_forms(model, case.shape, inputs, Path(directory) / which).items()
        }
    timed = measure(files, inputs, rounds)
    whole = {size: took["whole float32"] for size, took in timed.items()}
    rows: list[Row] = []
    figures: dict[str, float | dict[str, float]] = {
        f"{name} parameters": count(case.model),
        f"{name} pruned parameters": count(pruned),
    }
    for form, content in files.items():
        faster = {str(size): round(whole[size] / timed[size][form], 2) for size in timed}
        took = ", ".join(f"{timed[size][form]:.3f}" for size in timed)
        against = f"{len(content):,} bytes, {' and '.join(f'{times:.1f}' for times in faster.values())} times faster"
        reach = f"; reach: {REACH:g}" if form == "pruned float32" else ""
        rows.append((f"{name} {form}", f"{took} ms", against + reach))
        figures[f"{name} {form} times faster"] = faster
    return rows, figures


def main(arguments: Sequence[str]) -> None:
    """Measure and report. Raises UsageError."""
    rounds = int(arguments[0]) if arguments and arguments[0].isdigit() else ROUNDS
    if rounds < 1 or len(arguments) > 1:
        raise UsageError("give the number of rounds, 1 or more")
    torch.set_num_threads(1)
    rows: list[Row] = []
    figures: dict[str, float | int | str | Mapping[str, float]] = {}
    for name, case in cases().items():
        print(f"{name}: {count(case.model):,} parameters", file=sys.stderr)
        found, numbers = compare(name, case, rounds)
        rows += found
        figures |= numbers
    batches = " and ".join(str(size) for size in LATENCY_BATCHES)
    figures["least times faster"] = min(
        times
        for form, faster in figures.items()
        if form.endswith("pruned float32 times faster") and isinstance(faster, Mapping)
        for times in faster.values()
    )
    report(
        f"Latency at batch {batches} (ONNX Runtime, 1 thread): 10 million parameters, and 10% of them left",
        rows,
        figures,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
