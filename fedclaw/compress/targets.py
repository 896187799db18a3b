"""How small is small enough: a share of the parameters, of the multiply-adds, or of the measured latency.

Parameters and multiply-adds are computed from the widths. Latency is measured: the median of a forward pass of one
example, on the CPU with one thread, of the candidate and the unpruned model in turns, so that both see the same
machine. It depends on the widths alone, not on the weights, so candidates are not trained.
"""

import copy
import io
import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from fractions import Fraction

import torch
from torch import nn

from fedclaw.compress.channel_groups import Widths
from fedclaw.compress.latency import median_milliseconds
from fedclaw.compress.pruning_record import Runtime, Target
from fedclaw.compress.size import Sizes
from fedclaw.compress.spread import Path
from fedclaw.errors import CompressionError, UsageError
from fedclaw.progress import quieter

REPEATS = 200
"""Forward passes of each model in one measurement."""
SECONDS = 10.0
"""After which a measurement of a slow model ends."""
MARGIN = 0.97
"""A latency must be below this share of what was asked while widths are looked for: the next measurement is another."""

STRIDES = 64
"""In so many parts a path is looked through: a time is not known more finely than to a few hundredths."""

Build = Callable[[Widths], nn.Module]
Call = Callable[[], object]


class Goal(ABC):
    """Chooses the widths that are small enough."""

    measured_on: str | None = None
    """Where and how shares were measured; None: they were computed."""

    @abstractmethod
    def share(self, widths: Widths) -> float:
        """The share of the unpruned model's that a model of these widths has."""

    @abstractmethod
    def widths(self, path: Path) -> dict[str, int]:
        """The widths furthest to the front of `path` that are within the target. Raises CompressionError."""


class Counted(Goal):
    """A target of parameters or multiply-adds."""

    def __init__(self, target: Target, sizes: Sizes) -> None:
        self._target = target
        self._count = sizes.parameters if target.kind == "parameters" else sizes.multiply_adds
        self._whole = self._count(sizes.full)
        self._most = int(Fraction(target.share).limit_denominator(10**9) * self._whole)

    def share(self, widths: Widths) -> float:
        """Computed."""
        return self._count(widths) / self._whole

    def widths(self, path: Path) -> dict[str, int]:
        """As near to the target as possible: a channel more in any group is too much."""
        smallest = self._count(path.at(len(path.removals)))
        if smallest > self._most:
            what = self._target.kind.replace("_", "-")
            raise CompressionError(
                f"the model has {self._whole} {what} and cannot be pruned to {self._target.share:g} of them "
                f"({self._most}): the fewest channels of each layer leave {smallest}, which is "
                f"{_setting(self._target)}={_ceil_share(smallest, self._whole)}; ask for at least that"
            )
        return path.filled(path.first(lambda widths: self._count(widths) <= self._most), self._fits)

    def _fits(self, widths: Widths) -> bool:
        return self._count(widths) <= self._most


class Timed(Goal):
    """A target of latency. Times differ from one measurement to the next, so what was found is measured again."""

    def __init__(self, target: Target, runtime: Runtime, build: Build, model: nn.Module, example: torch.Tensor) -> None:
        self._target, self._build, self._example = target, build, example.cpu()
        self._call = _in_torch if runtime == "torch" else _in_onnxruntime
        self._whole = self._call(copy.deepcopy(model).cpu().eval(), self._example)
        self._shares: dict[tuple[int, ...], float] = {}
        self.measured_on = _how(runtime)

    def share(self, widths: Widths) -> float:
        """As last measured."""
        key = tuple(widths.values())
        return self._shares[key] if key in self._shares else self._measure(widths)

    def widths(self, path: Path) -> dict[str, int]:
        """The first on the path that are fast enough in two measurements."""
        last = len(path.removals)
        if (reached := self._measure(path.at(last))) > self._target.share:
            raise CompressionError(
                f"the model cannot be pruned to {self._target.share:g} of its latency ({self.measured_on}): the "
                f"fewest channels of each layer leave {reached:.2f} of it; ask for at least "
                f"pruning.latency={math.ceil(100 * reached) / 100}"
            )
        stride = max(1, last // STRIDES)
        removed = path.first(lambda widths: self._measure(widths) <= MARGIN * self._target.share, stride)
        while removed < last and self._measure(path.at(removed)) > self._target.share:
            removed = min(last, removed + stride)
        return path.at(removed)

    def _measure(self, widths: Widths) -> float:
        """Milliseconds of a model of these widths by those of the unpruned one, measured now."""
        candidate = self._call(self._build(widths).cpu(), self._example)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            whole, narrow = median_milliseconds([self._whole, candidate], REPEATS, SECONDS)
        finally:
            torch.set_num_threads(threads)
        self._shares[tuple(widths.values())] = narrow / whole
        return narrow / whole


def make_goal(
    target: Target, runtime: Runtime, sizes: Sizes, build: Build, model: nn.Module, example: torch.Tensor
) -> Goal:
    """The goal for a target; `build` gives a model of some widths, whatever its weights."""
    if target.kind == "latency":
        return Timed(target, runtime, build, model, example)
    return Counted(target, sizes)


def _how(runtime: Runtime) -> str:
    if runtime == "torch":
        name = f"torch {torch.__version__}"
    else:
        import onnxruntime

        name = f"ONNX Runtime {onnxruntime.__version__}"
    return f"{name}, CPU, one thread, batch 1, median of {REPEATS} passes in turns with the unpruned model"


def _in_torch(model: nn.Module, example: torch.Tensor) -> Call:
    def call() -> None:
        with torch.inference_mode():
            model(example)

    return call


def _in_onnxruntime(model: nn.Module, example: torch.Tensor) -> Call:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "pruning to a latency in ONNX Runtime needs the exporter: pip install fedclaw[compress,export]; or take "
            "pruning.runtime=torch"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_onnx(model, example), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: example.numpy()}
    return lambda: session.run(None, feed)


def _onnx(model: nn.Module, example: torch.Tensor) -> bytes:
    """The model as an ONNX file for a batch of one. Raises CompressionError."""
    sink = io.StringIO()
    try:
        with (
            quieter(logging.CRITICAL, "torch.onnx", "torch.export", "onnxscript", "onnx_ir"),
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(sink),
            redirect_stderr(sink),
        ):
            exported = torch.onnx.export(model, (example,), dynamo=True, external_data=False, verbose=False)
    except Exception as error:  # the exporter's errors have no public common base
        raise CompressionError(
            f"the latency in ONNX Runtime cannot be measured, as the model cannot be written as ONNX "
            f"({' '.join(str(error).split())[:200]}); take pruning.runtime=torch"
        ) from error
    assert exported is not None
    content: bytes = exported.model_proto.SerializeToString()
    return content


def _setting(target: Target) -> str:
    return "fraction" if target.kind == "parameters" else f"pruning.{target.kind}"


def _ceil_share(part: int, whole: int) -> float:
    """part / whole, rounded up to four digits: as a share it can be asked for."""
    return -(-part * 10_000 // whole) / 10_000
