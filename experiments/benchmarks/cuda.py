"""What a GPU does with FedClaw's steps, simulations, evaluations and bundles, beside the CPU and beside Opacus.

    python -m experiments.benchmarks.cuda [quick] [compiled] [device=cuda]

Where there is no CUDA device one line says so, and that is no failure. All that is compared is measured in one run, on
one thread of the CPU and on the first GPU, which is waited for whenever a clock is read:

- a step without privacy, on the CPU (the reference `cpu`), on the GPU in 32 bits, and in bfloat16 as a site takes large
  models' (`fedclaw.site.device.precision`);
- a private step by each engine, beside Opacus' hooks with the whole batch at once on the same GPU (the reference
  `opacus`), and beside the plain one there. The noise is the CPU's, from the cryptographic source, so a large model's
  step waits for it and its way to the card;
- a simulation, many clients at once and one by one, beside the CPU's one process: digits-100, 5 rounds;
- an evaluation's forward passes; and a bundle's, by ONNX Runtime's CUDA provider beside its CPU's, if installed.

A ratio is time by the reference's: below 1 is faster. `compiled` times compiled steps too, which takes a minute or more
to compile; `quick` takes one small model and few steps. `device=cpu` tries the script itself where there is no card.
It takes less than five minutes.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.cuda", __doc__)

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from experiments.benchmarks.digits import Job, run_fedclaw
from experiments.benchmarks.dp_step import CLASSES, loss, make_step
from experiments.benchmarks.report import Row, report
from fedclaw.clients.tabular import Mlp
from fedclaw.clients.vision import Cnn, CnnArguments
from fedclaw.export.graph import save_onnx, trace
from fedclaw.export.runtime import open_session, run_session
from fedclaw.learning.tasks.classification import Classification
from fedclaw.privacy.gradients.choice import ENGINES
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import Mode, StepSpeed
from fedclaw.privacy.steps import PlainGradients, PrivateGradients
from fedclaw.site.device import SMALL_MODEL, precision

CPU = torch.device("cpu")
ROUNDS, QUICK_ROUNDS = 5, 1
SECONDS, MOST_STEPS = 1.5, 30
"""Of steps of one kind, after those that warm up."""
SCORED = 8192
"""Inputs of an evaluation."""
FIGURES = (
    *("plain", "mixed", "private", "by_opacus", "private_by_cpu"),
    *("simulation", "stacked", "evaluation", "serving"),
)
"""Ratios: of a plain step to the CPU's, of mixed precision to 32 bits, of a private step to the plain one, to Opacus'
and to the CPU's, of a simulation to the CPU's, of many at once to one by one; of the last two to the CPU's."""
PROVIDER = "CUDAExecutionProvider"

Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Case:
    """A model, and the batch of its steps."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


WIDE = CnnArguments(channels=(64, 128, 256), hidden=512)
CASES = (
    Case("cnn_6k", lambda: Cnn((1, 8, 8), CnnArguments(), CLASSES), (1, 8, 8), 64),
    Case("cnn_wide", lambda: Cnn((3, 32, 32), WIDE, CLASSES), (3, 32, 32), 64),
    Case("mlp_2M", lambda: Mlp(784, (1024, 1024), CLASSES), (784,), 128),
)


def wait(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, most: int) -> float:
    """The median of some goes, after two that warm up."""
    times: list[float] = []
    for go in range(most + 2):
        began = time.perf_counter()
        work()
        wait(device)
        if go > 1:
            times.append(time.perf_counter() - began)
        if sum(times) > SECONDS:
            break
    return statistics.median(times)


@contextmanager
def step_of(case: Case, device: torch.device, mode: Mode | None, mixed: bool) -> Iterator[Callable[[], None] | None]:
    """A step on one batch, without privacy (`mode` None) or by an engine; None if that engine gave way to another."""
    torch.manual_seed(0)
    model = case.build().to(device)
    inputs = torch.randn(case.batch, *case.shape).to(device)
    targets = torch.randint(0, CLASSES, (case.batch,)).to(device)
    private = mode is not None
    with precision(device, SMALL_MODEL if mixed else 0, private):
        if not private:
            yield make_step(PlainGradients(model, loss), model, inputs, targets)
            return
        with PrivateGradients(
            model,
            loss,
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            expected_batch_size=case.batch,
            source=GaussianSource(),
            speed=StepSpeed(mode=mode or "auto", chunk_size=case.batch if mode == "opacus" else None),
        ) as taker:
            step = make_step(taker, model, inputs, targets)
            step()
            yield step if mode in ("auto", taker.engine) else None


def measure_steps(case: Case, device: torch.device, modes: Sequence[Mode], most: int, figures: Figures) -> list[Row]:
    """Plain steps on both, in both precisions, and private ones by engine."""

    def timed(where: torch.device, mode: Mode | None, mixed: bool = False) -> float | None:
        with step_of(case, where, mode, mixed) as step:
            return None if step is None else seconds(step, where, most)

    on_cpu, plain = timed(CPU, None), timed(device, None)
    assert on_cpu is not None
    assert plain is not None
    rows: list[Row] = [
        (f"{case.name} b{case.batch}, plain, CPU", _ms(on_cpu), ""),
        (f"{case.name}, plain", _ms(plain), _times(plain / on_cpu, "the CPU's")),
    ]
    figures["plain"][case.name] = plain / on_cpu
    if (mixed := timed(device, None, mixed=True)) is not None:
        figures["mixed"][case.name] = mixed / plain
        rows.append((f"{case.name}, plain, mixed precision", _ms(mixed), _times(mixed / plain, "32 bits'")))
    reference = timed(device, "opacus")
    assert reference is not None
    for mode in modes:
        found = reference if mode == "opacus" else timed(device, mode)
        if found is None:
            continue
        figures["private"][f"{case.name}_{mode}"] = found / plain
        figures["by_opacus"][f"{case.name}_{mode}"] = found / reference
        beside = f"{_times(found / plain, 'plain')}, {_times(found / reference, 'Opacus')}"
        rows.append((f"{case.name}, private, {mode}", _ms(found), beside))
    private_cpu = timed(CPU, "auto")
    assert private_cpu is not None
    figures["private_by_cpu"][case.name] = figures["private"][f"{case.name}_auto"] * plain / private_cpu
    rows.append((f"{case.name}, private, auto, CPU", _ms(private_cpu), ""))
    return rows


def measure_simulation(
    kind: str, device: Literal["cpu", "cuda"], rounds: int, root: Path, figures: Figures
) -> list[Row]:
    """Many clients at once and one by one, beside one process on the CPU."""
    job, times = Job.make(kind), {}
    for name, where, mode in (("cpu", "cpu", "auto"), ("many", device, "many"), ("one", device, "one")):
        run_fedclaw(job, 1, 1, root, f"{kind}-warm-{name}", mode=mode, device=where)  # type: ignore[arg-type]
        began = time.perf_counter()
        run_fedclaw(job, rounds, 1, root, f"{kind}-{name}", mode=mode, device=where)  # type: ignore[arg-type]
        times[name] = time.perf_counter() - began
    figures["simulation"] |= {f"{kind}_{name}": times[name] / times["cpu"] for name in ("many", "one")}
    figures["stacked"][kind] = times["many"] / times["one"]
    names = {"cpu": "CPU", "many": "many at once", "one": "one by one"}
    beside = {name: _times(took / times["cpu"], "the CPU's") for name, took in times.items() if name != "cpu"}
    return [
        (f"simulation, {kind}, {names[name]}", f"{took:.2f} s", beside.get(name, "")) for name, took in times.items()
    ]


def measure_scoring(case: Case, device: torch.device, most: int, figures: Figures) -> list[Row]:
    """Forward passes over an evaluation's inputs, on both."""
    torch.manual_seed(0)
    model, inputs, times = case.build().eval(), torch.randn(SCORED, *case.shape), {}
    for where in (CPU, device):
        there, batch = model.to(where), inputs.to(where)
        with torch.no_grad():
            times[where.type] = seconds(lambda: there(batch), where, most)  # noqa: B023
    figures["evaluation"][case.name] = times[device.type] / times["cpu"]
    rate = f"{SCORED / times[device.type]:,.0f} rows/s"
    return [(f"{case.name}, evaluation", rate, _times(figures["evaluation"][case.name], "the CPU's"))]


def measure_serving(case: Case, most: int, root: Path, figures: Figures) -> list[Row]:
    """The exported graph, by ONNX Runtime's providers; none where it has no CUDA provider that starts."""
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        return [(f"{case.name}, ONNX Runtime", "no CUDA provider", "pip install onnxruntime-gpu in its place")]
    task = Classification(tuple(map(str, range(CLASSES))))
    path = root / f"{case.name}.onnx"
    save_onnx(trace(case.build(), task, case.shape), task, case.shape, path)
    inputs, times = torch.randn(256, *case.shape).numpy(), {}
    for device in ("cpu", "cuda"):
        session = open_session(path.read_bytes(), path.name, "export", device)  # type: ignore[arg-type, unused-ignore]
        times[device] = seconds(lambda: run_session(session, inputs), CPU, most)  # noqa: B023
    figures["serving"][case.name] = times["cuda"] / times["cpu"]
    rate = f"{len(inputs) / times['cuda']:,.0f} rows/s"
    return [(f"{case.name}, ONNX Runtime's CUDA provider", rate, _times(figures["serving"][case.name], "its CPU's"))]


def _ms(duration: float) -> str:
    return f"{duration * 1e3:.2f} ms"


def _times(ratio: float, of: str) -> str:
    return f"{ratio:.2f} x {of}"


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the table and one line of JSON."""
    wanted = next((word.split("=")[1] for word in arguments if word.startswith("device=")), "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        print(f"No CUDA device that torch {torch.__version__} can use here: nothing to measure.")
        return
    torch.set_num_threads(1)
    device, quick = torch.device(wanted), "quick" in arguments
    modes: list[Mode] = ["auto", *(mode for mode in ENGINES if mode != "compiled" or "compiled" in arguments)]  # type: ignore[list-item]
    figures: Figures = {name: {} for name in FIGURES}
    rows: list[Row] = []
    most = 3 if quick else MOST_STEPS
    with tempfile.TemporaryDirectory(prefix="fedclaw-benchmark-") as directory:
        root = Path(directory)
        for case in CASES[:1] if quick else CASES:
            rows += measure_steps(case, device, modes, most, figures)
            rows += measure_scoring(case, device, most, figures)
            rows += measure_serving(case, most, root, figures)
        for kind in ("mlp",) if quick else ("cnn", "mlp"):
            rows += measure_simulation(kind, wanted, QUICK_ROUNDS if quick else ROUNDS, root, figures)  # type: ignore[arg-type]
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rounded = {name: {case: round(value, 3) for case, value in found.items()} for name, found in figures.items()}
    references = {"reference": "the CPU, and Opacus on the same device", "device": card}
    report(f"On {card}; times by those of the reference", rows, {**rounded, **references})


if __name__ == "__main__":
    main(sys.argv[1:])
