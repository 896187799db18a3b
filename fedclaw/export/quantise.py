"""An 8-bit copy of the ONNX model: smaller, often faster on a CPU, and not exactly the same function.

Static quantisation of weights and activations. The ranges are those of the parity inputs and are stored in the file: if
the inputs are real, their smallest and largest activations are published.
"""

import shutil
import tempfile
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

    starts = iter(range(0, len(inputs), CALIBRATION_BATCH))

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        """The inputs in batches, in the form that the quantiser reads."""

        def get_next(self) -> dict[str, Any] | None:
            return next(({INPUT: inputs[start : start + CALIBRATION_BATCH]} for start in starts), None)

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
