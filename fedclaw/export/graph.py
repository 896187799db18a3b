"""A torch model as a torch.export program and as an ONNX model, both for any batch size and independent of FedClaw.

Neither file contains the example that it was traced with, source paths, or stack traces. `compare` is the parity check:
does an exported model compute what the torch model does, for batches of several sizes?

Legend: N examples, C classes, D input shape without the batch.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedclaw.errors import BundleError, UsageError
from fedclaw.export.layout import BATCH, INPUT, ParityFigures
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.workload import Floats
from fedclaw.progress import quieter

if TYPE_CHECKING:
    from fedclaw.export.onnx_model import OnnxModel

TRACE_BATCH = 3
"""Any size except 0 and 1: torch.export takes those for constants."""
CHATTY_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class Linked(nn.Module):
    """`model` with the two outputs of a bundle, (N, K) each: the raw output, and the same after the task's link."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (N, *D) to raw outputs and to what they mean: probabilities or values."""
        outputs = self.model(inputs)
        return outputs, self.task.link(outputs)


def require_exporter() -> Any:
    """The `onnx` package. Raises UsageError when it, or what torch.onnx needs besides, is not installed."""
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx imports it later, with a longer message
    except ImportError as error:
        raise UsageError(f"export needs {error.name}; install it with: pip install 'fedclaw[export]'") from error
    return onnx


def trace(model: nn.Module, task: Task, input_shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """The program of `Linked(model, task)` in evaluation mode, for any batch size.

    It is traced with zeros, so no example is left in it. Raises BundleError if the model cannot be traced, or only for
    one batch size.
    """
    linked = Linked(model, task).eval()
    example = torch.zeros(TRACE_BATCH, *input_shape)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                linked, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim(BATCH)}}, strict=False
            )
    except Exception as error:  # torch.export has no common base for what it raises
        raise BundleError(f"the model cannot be exported: {_first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write `program` as a .pt2 file. Raises BundleError."""
    with quiet(), as_bundle_error("the model cannot be written as a torch.export program"):
        torch.export.save(program, path)


def load_program(path: Path) -> nn.Module:
    """Load a .pt2 file that this process wrote. Never use it on a file from elsewhere that was not verified."""
    with quiet(), as_bundle_error("the torch.export program cannot be read back"):
        return torch.export.load(path).module()


def to_onnx(program: torch.export.ExportedProgram, task: Task, input_shape: tuple[int, ...]) -> "OnnxModel":
    """`program` as an ONNX model, which looks at the program's weights.

    Raises UsageError when the extra is not installed, BundleError when ONNX has no operator for the model.
    """
    require_exporter()
    from fedclaw.export.onnx_model import OnnxModel

    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                (torch.zeros(TRACE_BATCH, *input_shape),),
                dynamo=True,
                input_names=[INPUT],
                output_names=list(task.head),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter's errors have no public common base
        raise BundleError(f"the model cannot be written as ONNX: {_first_line(error)}") from error
    with quiet(), as_bundle_error("the model cannot be written as ONNX"):
        model = OnnxModel.of(exported)
        _tidy(model.message)
        model.check()
    return model


def save_onnx(program: torch.export.ExportedProgram, task: Task, input_shape: tuple[int, ...], path: Path) -> None:
    """Write `program` as one ONNX file with its weights embedded.

    Raises what `to_onnx` raises, and BundleError for a model larger than an ONNX file can be (2 GiB).
    """
    to_onnx(program, task, input_shape).write(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporters' progress, warnings and log lines. Errors are raised as usual."""
    sink = io.StringIO()
    hidden = warnings.catch_warnings(action="ignore")
    with quieter(logging.CRITICAL, *CHATTY_LOGGERS), redirect_stdout(sink), redirect_stderr(sink), hidden:
        yield


@contextmanager
def as_bundle_error(what: str) -> Iterator[None]:
    """Turn the errors of torch, onnx and protobuf, which have no common base, into a BundleError about `what`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise BundleError(f"{what}: {_first_line(error)}") from error


def parameters_of(model: nn.Module) -> "dict[str, np.ndarray[Any, np.dtype[np.float32]]]":
    """The model's parameters by name, as they are sent to sites."""
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def torch_outputs(module: nn.Module, inputs: "np.ndarray[Any, np.dtype[np.float32]]") -> list[Any]:
    """`module`'s two outputs for a batch, as numpy arrays. Raises BundleError when the model fails on it."""
    with torch.no_grad(), as_bundle_error(f"the model fails on a batch of shape {inputs.shape}"):
        return [output.numpy() for output in module(torch.from_numpy(inputs))]


def _tidy(model: Any) -> None:
    """Remove what the exporter recorded about this machine, and name the batch dimension."""
    graph = model.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if symbol and symbol in dimension.dim_param:
                dimension.dim_param = dimension.dim_param.replace(symbol, BATCH)
    for owner in (model, graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node):
        del owner.metadata_props[:]
        owner.doc_string = ""
    for function in model.functions:
        for owner in (function, *function.node):
            del owner.metadata_props[:]
            owner.doc_string = ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


Forward = Callable[[Floats], Sequence[Floats]]
"""A batch (n, *D) to its outputs, each (n, C)."""

BATCH_SIZES = (1, 2, 7, 64)
"""1 and an odd size catch a batch size fixed in the graph; the largest, a kernel that depends on the size."""
ORDINARY = 10.0
"""Up to outputs of this size only the absolute tolerance counts."""
RELATIVE = 1e-5
"""Relative to the largest output: how much float32 results may differ when terms are added in another order (its
machine epsilon is 6e-8). Outputs of 20,000 may differ by 0.004; 1e-4 asks for digits that float32 does not have."""
MAX_EXAMPLES = 4096
"""More inputs take time and add no certainty."""


def compare(reference: Forward, exported: Forward, inputs: Floats) -> ParityFigures:
    """The largest absolute difference over all outputs, for `inputs` (N >= 1, *D) cut into each of `BATCH_SIZES`.

    Inputs are repeated where there are fewer than a batch. Raises BundleError when the number or the shapes of the
    outputs differ, or a value is not finite: a NaN on both sides is no agreement.
    """
    if len(inputs) == 0:
        raise BundleError("the parity check was given no inputs")
    inputs = inputs[:MAX_EXAMPLES]
    largest, scale = 0.0, 0.0
    for batch in _batches(inputs):
        expected, given = reference(batch), exported(batch)
        if len(expected) != len(given):
            raise BundleError(f"the exported model has {len(given)} outputs, the torch model {len(expected)}")
        for left, right in zip(expected, given, strict=True):
            largest = max(largest, _difference(left, right))
            scale = max(scale, float(np.abs(left).max()))
    own = scale if scale > ORDINARY else None
    return ParityFigures(max_abs_diff=largest, examples=len(inputs), batch_sizes=BATCH_SIZES, scale=own)


def allowed(figures: ParityFigures, tolerance: float) -> float:
    """The largest difference allowed: `tolerance`, or `RELATIVE` times the largest output if that is more."""
    return max(tolerance, RELATIVE * (figures.scale or 0.0))


def require_parity(figures: ParityFigures, tolerance: float, form: str) -> None:
    """Raise BundleError when `form` differs from the torch model by more than is `allowed`."""
    bound = allowed(figures, tolerance)
    if figures.max_abs_diff > bound:
        raise BundleError(
            f"{form} differs from the torch model by {figures.max_abs_diff:.3g} on {figures.examples} inputs, "
            f"allowed is {bound:g}; nothing was written (tolerance=… sets another bound)"
        )


def _batches(inputs: Floats) -> Iterator[Floats]:
    for size in BATCH_SIZES[:-1]:
        yield inputs[np.arange(size) % len(inputs)]
    largest = BATCH_SIZES[-1]
    if len(inputs) < largest:
        yield inputs[np.arange(largest) % len(inputs)]
    for start in range(0, len(inputs), largest):
        yield inputs[start : start + largest]


def _difference(left: Floats, right: Floats) -> float:
    if left.shape != right.shape:
        raise BundleError(f"the exported model's output has shape {right.shape}, the torch model's {left.shape}")
    difference = np.abs(left.astype(np.float64) - right.astype(np.float64)).max()
    if not np.isfinite(difference):
        raise BundleError("the outputs of the torch model or of the exported model hold NaN or infinite values")
    return float(difference)
