"""The one place that opens ONNX Runtime: errors only, no telemetry, and a clear error for what is not a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedclaw.errors import BundleError, UsageError

Device = Literal["auto", "cpu", "cuda"]
ERRORS_ONLY = 3
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_WITHOUT_TF32 = {"use_tf32": "0"}
"""float32 as on the CPU: with TF32, the provider's default, products have 10 bits behind the point."""


def open_session(model: bytes | Path, origin: str, extra: str, device: Device = "cpu", threads: int = 0) -> Any:
    """An `onnxruntime.InferenceSession` for the bytes of an ONNX file; `auto` takes CUDA where ONNX Runtime can.

    A path is for a file that this process wrote itself: it needs one copy of the weights less, and nothing says that
    what is read is what somebody verified.

    `threads` is how many it computes with; 0: as many as ONNX Runtime finds right.

    Raises UsageError naming the `extra` to install when ONNX Runtime is missing, or when `cuda` is wanted and cannot be
    had, BundleError naming `origin` when the bytes are not a model that it runs.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"onnxruntime is not installed; install it with: pip install 'fedclaw[{extra}]'") from error
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads
    has_cuda = _CUDA in onnxruntime.get_available_providers()
    if device == "cuda" and not has_cuda:
        raise UsageError(
            "the device cuda is asked for, but ONNX Runtime has no CUDA provider here: install onnxruntime-gpu in the "
            "place of onnxruntime, or use auto or cpu"
        )
    wanted = [(_CUDA, _WITHOUT_TF32), _CPU] if has_cuda and device != "cpu" else [_CPU]
    try:
        session = onnxruntime.InferenceSession(
            str(model) if isinstance(model, Path) else model, options, providers=wanted
        )
    except Exception as error:  # ONNX Runtime's exceptions have no public common base
        raise BundleError(f"{origin} is not a model that ONNX Runtime can load: {_short(error)}") from error
    if device == "cuda" and _CUDA not in session.get_providers():
        # It goes on without a provider that it cannot start, and says so in its log alone.
        raise UsageError(
            "the device cuda is asked for, and ONNX Runtime cannot start its CUDA provider: no card, or CUDA libraries "
            "of another version; use auto or cpu"
        )
    return session


def run_session(session: Any, inputs: Any) -> list[Any]:
    """All outputs of `session` for one batch. Raises BundleError when the model fails on it."""
    try:
        return list(session.run(None, {session.get_inputs()[0].name: inputs}))
    except Exception as error:  # as above
        raise BundleError(f"the model failed on a batch of shape {tuple(inputs.shape)}: {_short(error)}") from error


def run_columns(session: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    """All outputs by name, of a graph that takes typed columns. Raises BundleError when it fails on them."""
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(columns)), strict=True))
    except Exception as error:  # as above
        raise BundleError(f"the pipeline failed on a batch of typed columns: {_short(error)}") from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
