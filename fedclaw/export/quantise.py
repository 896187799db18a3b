"""An 8-bit copy of the ONNX model: smaller and often faster on a CPU, and not the same function.

Static quantisation (weights and activations) with ranges taken from the parity inputs; the ranges end up in the
file, so with real inputs the smallest and largest activations of those inputs are part of what is published.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedclaw.errors import BundleError, UsageError
from fedclaw.export.graph import quiet
from fedclaw.export.layout import INPUT, ONNX, QUANTISED, QuantisedFigures
from fedclaw.export.runtime import open_session, run_session
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.workload import Floats

CALIBRATION_BATCH = 64


def quantise(exact: Path, target: Path, inputs: Floats, task: Task) -> QuantisedFigures:
    """Write the 8-bit form of `exact` to `target` and measure how it differs on `inputs` (N, *D).

    Raises UsageError when ONNX Runtime's quantiser is not installed, BundleError when it fails.
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise UsageError(f"quantise=true needs {error.name}; install: pip install 'fedclaw[export]'") from error

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        """The inputs, batch by batch, as the quantiser wants them."""

        def __init__(self) -> None:
            self.batches = _batches(inputs)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        try:
            with quiet():
                quant_pre_process(exact, scratch / ONNX)
                quantize_static(scratch / ONNX, scratch / QUANTISED, Batches(), quant_format=QuantFormat.QDQ)
        except Exception as error:  # the quantiser raises whatever it meets
            raise BundleError(f"the model cannot be quantised: {' '.join(str(error).split())[:300]}") from error
        shutil.copyfile(scratch / QUANTISED, target)
    return _measure(exact, target, inputs, task)


def _batches(inputs: Floats) -> Iterator[dict[str, Any]]:
    for start in range(0, len(inputs), CALIBRATION_BATCH):
        yield {INPUT: inputs[start : start + CALIBRATION_BATCH]}


def _measure(exact: Path, quantised: Path, inputs: Floats, task: Task) -> QuantisedFigures:
    expected = run_session(open_session(exact.read_bytes(), ONNX, "export"), inputs)[1]
    given = run_session(open_session(quantised.read_bytes(), QUANTISED, "export"), inputs)[1]
    if not task.labels:
        return QuantisedFigures(max_abs_diff_value=float(np.abs(expected - given).max()), examples=len(inputs))
    return QuantisedFigures(
        max_abs_diff_probability=float(np.abs(expected - given).max()),
        same_label=float((expected.argmax(1) == given.argmax(1)).mean()),
        examples=len(inputs),
    )
