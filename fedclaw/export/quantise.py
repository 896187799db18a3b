"""8-bit and 16-bit forms of an ONNX model: made, measured beside the exact one, and recommended only where they win.

int8: weights and activations are quantised statically, weights by output channel. Their ranges are those of the
calibration inputs, and stay in the file: its smallest and largest activations are published. So calibration looks at
inputs made from the schema, or at a public file, and never at real inputs that were given for another purpose.

float16: computed in half precision; takes and gives float32. A CPU without such kernels converts the weights and
computes in float32, which is no faster: that is measured. Hardware that has them overflows at 65,504: no such form is
recommended of a model with larger values inside.

Agreement is measured on other inputs than those of calibration, and never on rows of a reported test. A label that
stays cannot become wrong, so the accuracy of any data like those inputs falls by no more than agreement lacks.

Legend: N examples, K outputs of the model, D input shape without the batch.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedclaw.compress.intervals import of_proportion
from fedclaw.compress.latency import LATENCY_BATCHES, median_milliseconds
from fedclaw.compress.record import Precision, StepInputs
from fedclaw.errors import BundleError, UsageError
from fedclaw.export.graph import quiet, require_exporter, save_onnx, trace
from fedclaw.export.layout import FORMS, HALF, INPUT, ONNX, QUANTISED, FormFigures, Forms
from fedclaw.export.runtime import open_session, run_session
from fedclaw.files import sha256_file
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import decide
from fedclaw.learning.workload import Floats, Schema, Table

BATCH = 64
CALIBRATION_INPUTS, MEASURED_INPUTS = 512, 2048
"""Synthetic ones, where there is no public file."""
FEWEST_INPUTS = 20
REPEATS, SECONDS = 50, 2.0
"""Timed rounds of a batch size, and the seconds after which no further one begins."""
WORTH = 0.9
"""Of the exact model's bytes or milliseconds: a form that is not below it in either does not win."""
SLOWER = 1.1
"""Of the exact model's milliseconds: a form above it at any batch size is not recommended; less is noise of timing."""
RESAMPLES = 200
LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Samples:
    """What quantisation may look at: nothing that a site holds."""

    calibration: Floats
    """(N, *D)."""
    measurement: Floats
    """(M, *D), others."""
    looked_at: tuple[StepInputs, StepInputs]


def synthetic_samples(schema: Schema, seed: int) -> Samples:
    """Inputs made from the schema alone."""
    generator = np.random.default_rng((seed, 1))
    made = schema.synthetic_inputs(CALIBRATION_INPUTS + MEASURED_INPUTS, generator)
    return _split(made, CALIBRATION_INPUTS, lambda _: {"origin": "synthetic", "description": "made from the schema"})


def public_samples(schema: Schema, path: Path, seed: int) -> Samples:
    """The inputs of a public file, in a random order: half to calibrate with, half to measure on.

    The coordinator vouches that no site holds them. Raises BundleError when there are too few, DataError.
    """
    if schema.data_dependent:
        raise UsageError("calibration= needs inputs that are the same everywhere; the schema standardises by site")
    inputs = schema.read_inputs(path)
    if len(inputs) < FEWEST_INPUTS:
        raise BundleError(f"{path} holds {len(inputs)} inputs; calibration and its check need {FEWEST_INPUTS}")
    shuffled = inputs[np.random.default_rng((seed, 1)).permutation(len(inputs))]
    digest = sha256_file(path) if path.is_file() else None
    return _split(
        shuffled,
        len(inputs) // 2,
        lambda half: {"origin": "public", "description": f"the {half} half of {path.name}, shuffled", "sha256": digest},
    )


def _split(inputs: Floats, first: int, about: Any) -> Samples:
    looked_at = (
        StepInputs(step="calibration", examples=first, **about("first")),
        StepInputs(step="measurement", examples=len(inputs) - first, **about("second")),
    )
    return Samples(inputs[:first], inputs[first:], looked_at)


def to_int8(exact: Path, target: Path, calibration: Floats) -> None:
    """Write the 8-bit form of `exact` to `target`, with the ranges of `calibration` (N, *D).

    Raises UsageError when ONNX Runtime's quantiser is not installed, BundleError when it fails.
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise _not_installed(error) from error

    starts = iter(range(0, len(calibration), BATCH))

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        """The inputs in batches, in the form that the quantiser reads."""

        def get_next(self) -> dict[str, Any] | None:
            return next(({INPUT: calibration[start : start + BATCH]} for start in starts), None)

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        try:
            with quiet():
                quant_pre_process(exact, scratch / ONNX)
                quantize_static(
                    scratch / ONNX, scratch / QUANTISED, Batches(), quant_format=QuantFormat.QDQ, per_channel=True
                )
        except Exception as error:  # the quantiser raises whatever it meets
            raise BundleError(f"the model cannot be quantised to 8 bits: {_short(error)}") from error
        shutil.copyfile(scratch / QUANTISED, target)


def to_float16(exact: Path, target: Path) -> None:
    """Write the half-precision form of `exact` to `target`; its inputs and outputs stay float32.

    Raises UsageError when ONNX Runtime's converter is not installed, BundleError when it fails.
    """
    onnx = require_exporter()
    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ImportError as error:
        raise _not_installed(error) from error
    try:
        with quiet():
            half = convert_float_to_float16(onnx.load_model_from_string(exact.read_bytes()), keep_io_types=True)
            content = half.SerializeToString(deterministic=True)
    except Exception as error:  # the converter raises whatever it meets
        raise BundleError(f"the model cannot be converted to float16: {_short(error)}") from error
    target.write_bytes(content)


def _not_installed(error: ImportError) -> UsageError:
    return UsageError(f"quantise=true needs {error.name}; install: pip install 'fedclaw[export]'")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def measure(
    files: Mapping[str, bytes],
    inputs: Floats,
    task: Task,
    threshold: float | None = None,
    labelled: Table | None = None,
) -> dict[str, FormFigures]:
    """The figures of each form, by file name; the first one is the exact one that the others are compared with.

    Args:
        files: content by name.
        inputs: (M, *D) to compare outputs on, and to time with.
        task: what the outputs mean.
        threshold: the probability from which the second of two classes is the answer, where the bundle has one.
        labelled: public examples with targets, for accuracies.
    """
    sessions = {name: open_session(content, name, "export", threads=1) for name, content in files.items()}
    timed = _latencies(list(sessions.values()), inputs)
    outputs = {name: _outputs(session, inputs) for name, session in sessions.items()}
    exact = outputs[next(iter(files))]
    figures = {}
    for (name, content), latency in zip(files.items(), timed, strict=True):
        fits = name != HALF or _largest_value(files[next(iter(files))], inputs) <= LARGEST_HALF
        found: dict[str, Any] = _agreement(outputs[name], exact, task, threshold) if fits else {}
        if labelled is not None and task.labels:
            decided = decide(_outputs(sessions[name], labelled.inputs)[1], threshold)
            found["accuracy"] = float((decided == labelled.targets).mean())
        figures[name] = FormFigures(file_bytes=len(content), latency_ms=latency, **found)
    return figures


def _latencies(sessions: Sequence[Any], inputs: Floats) -> list[dict[str, float]]:
    rows = np.resize(inputs, (max(LATENCY_BATCHES), *inputs.shape[1:]))
    timed = {
        size: median_milliseconds(
            [partial(run_session, session, rows[:size]) for session in sessions], REPEATS, SECONDS
        )
        for size in LATENCY_BATCHES
    }
    return [{str(size): round(found[at], 5) for size, found in timed.items()} for at in range(len(sessions))]


def _outputs(session: Any, inputs: Floats) -> tuple[Floats, Floats]:
    """Both outputs, (N, K) each: as the model gives them, and what they mean."""
    parts = [run_session(session, inputs[start : start + BATCH]) for start in range(0, len(inputs), BATCH)]
    raw, linked = (np.concatenate(column) for column in zip(*parts, strict=True))
    return raw, linked


def _largest_value(exact: bytes, inputs: Floats) -> float:
    """The largest absolute value in the exact graph: of a constant, of an input (N, *D), or of what becomes of it."""
    onnx = require_exporter()
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(exact))
    constants = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(value for value in model.graph.value_info if value.name not in known)
    session = open_session(model.SerializeToString(), "the model with its inner values", "export", threads=1)
    found = [np.abs(array).max() for array in (*constants, inputs) if array.dtype == np.float32 and array.size]
    for start in range(0, len(inputs), BATCH):
        values = run_session(session, inputs[start : start + BATCH])
        found += [np.abs(array).max() for array in values if array.dtype == np.float32 and array.size]
    return float(max(found))


def _agreement(
    form: tuple[Floats, Floats], exact: tuple[Floats, Floats], task: Task, threshold: float | None
) -> dict[str, float]:
    """The fields of `FormFigures` about agreement; none where an output is not finite."""
    if not all(np.isfinite(values).all() for values in form):
        return {}
    if task.labels:
        same = decide(form[1], threshold) == decide(exact[1], threshold)
        share = float(same.mean())
        low = of_proportion(int(same.sum()), len(same)).low
    else:
        share, low = _resampled(form[0], exact[0], task)
    return {"agreement": share, "agreement_low": low, "max_abs_diff": float(np.abs(form[1] - exact[1]).max())}


def _resampled(form: Floats, exact: Floats, task: Task) -> tuple[float, float]:
    """The task's agreement of two outputs (N, K), and the 2.5% quantile of it over resampled rows."""
    import torch

    generator = np.random.default_rng(0)

    def agreement(rows: Any) -> float:
        return task.agreement(torch.from_numpy(form[rows]), torch.from_numpy(exact[rows]))

    drawn = [agreement(generator.integers(0, len(form), len(form))) for _ in range(RESAMPLES)]
    return agreement(slice(None)), float(np.quantile(drawn, 0.025))


def choose(files: Mapping[str, FormFigures], loss: float) -> tuple[str, str]:
    """The recommended file and why: the smallest form that wins, else the exact one (the first)."""
    exact = next(iter(files))
    objections = {name: _objection(figures, files[exact], loss) for name, figures in files.items() if name != exact}
    winners = [name for name, objection in objections.items() if objection is None]
    if not winners:
        return exact, "; ".join(f"{name} {objection}" for name, objection in objections.items())
    best = min(winners, key=lambda name: files[name].file_bytes)
    found = files[best]
    assert found.agreement is not None
    assert found.agreement_low is not None
    return best, (
        f"it has {_ratio(found.file_bytes, files[exact].file_bytes)} of the exact model's bytes and takes "
        + ", ".join(f"{share:.0%} of its time at batch {batch}" for batch, share in _times(found, files[exact]).items())
        + f"; agreement {found.agreement:.4f}, at least {found.agreement_low:.4f}"
    )


def _objection(form: FormFigures, exact: FormFigures, loss: float) -> str | None:
    """What speaks against a form, as a clause about it; None if nothing does."""
    if form.agreement is None or form.agreement_low is None:
        return "has values that are not finite or beyond its range"
    if form.agreement_low < 1 - loss:
        return f"agrees by {form.agreement:.4f}, perhaps only {form.agreement_low:.4f}; asked for is {1 - loss:g}"
    times = _times(form, exact)
    for batch, share in times.items():
        if share > SLOWER:
            return f"takes {share:.0%} of the time at batch {batch}"
    if form.file_bytes > WORTH * exact.file_bytes and min(times.values()) > WORTH:
        return "is neither smaller nor faster by a tenth"
    return None


def _times(form: FormFigures, exact: FormFigures) -> dict[str, float]:
    return {batch: took / exact.latency_ms[batch] for batch, took in form.latency_ms.items()}


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.0%}"


def add_forms(
    directory: Path,
    task: Task,
    samples: Samples,
    loss: float,
    threshold: float | None = None,
    labelled: Table | None = None,
) -> Forms:
    """Write both forms of the model.onnx in `directory` beside it, measure all three, and recommend one.

    Raises UsageError when the export extra is not installed, BundleError when a form cannot be made.
    """
    exact = directory / ONNX
    to_int8(exact, directory / QUANTISED, samples.calibration)
    to_float16(exact, directory / HALF)
    files = {name: (directory / name).read_bytes() for name in (ONNX, QUANTISED, HALF)}
    figures = measure(files, samples.measurement, task, threshold, labelled)
    chosen, why = choose(figures, loss)
    calibration, measurement = samples.looked_at
    return Forms.model_validate(
        {
            "chosen": chosen,
            "why": why,
            "loss": loss,
            "calibration": calibration,
            "measurement": measurement,
            "files": figures,
        }
    )


class OnnxForms:
    """The forms of any model of a run, as a search compares them: its `Runtime` (fedclaw.compress.search)."""

    def __init__(self, schema: Schema, seed: int) -> None:
        self._task, self._shape = schema.task, schema.input_shape
        self._samples = synthetic_samples(schema, seed)

    @property
    def calibration(self) -> StepInputs:
        """What the ranges of int8 are taken from, as in an export that names no file."""
        return self._samples.looked_at[0]

    def forms(self, model: nn.Module, precisions: Sequence[Precision]) -> dict[Precision, bytes]:
        """The ONNX file of each precision; float16 only where no value in the model is beyond its range."""
        with tempfile.TemporaryDirectory() as name:
            paths = {precision: Path(name) / file for precision, file in FORMS.items()}
            save_onnx(trace(model, self._task, self._shape), self._task, self._shape, paths["float32"])
            exact = paths["float32"].read_bytes()
            if "int8" in precisions:
                to_int8(paths["float32"], paths["int8"], self._samples.calibration)
            if "float16" in precisions and _largest_value(exact, self._samples.calibration) <= LARGEST_HALF:
                to_float16(paths["float32"], paths["float16"])
            return {
                precision: path.read_bytes()
                for precision, path in paths.items()
                if precision in precisions and path.is_file()
            }

    def outputs(self, content: bytes, inputs: Floats) -> Floats:
        """Inputs (N, *D) to the raw outputs (N, K)."""
        return _outputs(open_session(content, "the candidate", "export"), inputs)[0]

    def milliseconds(self, contents: Sequence[bytes], inputs: Floats) -> list[dict[str, float]]:
        """The median latency of each by batch size, timed in turns on one thread of the CPU."""
        return _latencies([open_session(content, "a candidate", "export", threads=1) for content in contents], inputs)
