"""The one place that opens ONNX Runtime: errors only, no telemetry, and a clear error for what is not a model."""

from typing import Any

from fedclaw.errors import BundleError, UsageError

ERRORS_ONLY = 3


def open_session(model: bytes, origin: str, extra: str) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU for the bytes of an ONNX file.

    Raises UsageError naming the `extra` to install when ONNX Runtime is missing, BundleError naming `origin` when
    the bytes are not a model that it runs.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"onnxruntime is not installed; install it with: pip install 'fedclaw[{extra}]'") from error
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no public common base
        raise BundleError(f"{origin} is not a model that ONNX Runtime can load: {_short(error)}") from error


def run_session(session: Any, inputs: Any) -> list[Any]:
    """All outputs of `session` for one batch. Raises BundleError when the model fails on it."""
    try:
        return list(session.run(None, {session.get_inputs()[0].name: inputs}))
    except Exception as error:  # as above
        raise BundleError(f"the model failed on a batch of shape {tuple(inputs.shape)}: {_short(error)}") from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
