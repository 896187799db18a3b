"""What a node and its models say of themselves in the Open Inference Protocol, and which of its calls they have not."""

import re
from typing import Any

from fedclaw import __version__
from fedclaw.export.layout import TensorSpec
from fedclaw.learning.preprocessing import TypedColumn
from fedclaw.serve.inference.description import ModelDescription
from fedclaw.serve.inference.tensors import OF_COLUMN
from fedclaw.serve.refusals import ServeRefusal

EXTENSIONS = ("binary_tensor_data", "null_data")
"""`null_data`: in JSON, null stands for a value that is not known, and for NaN."""
PLATFORM = "onnxruntime_onnx"
ANY_SIZE = -1
_MODEL = r"/v2/models/[^/]+(?:/versions/[^/]+)?"
_NOT_SUPPORTED = {
    r"/v2/repository(?:/.*)?": "the model repository extension is not supported: models are published by an "
    "administrator, from signed bundles",
    rf"(?:/v2/models|{_MODEL})/stats": "the statistics extension is not supported: metrics are at the admin port",
    r"/v2/(?:system|cuda)sharedmemory(?:/.*)?": "the shared-memory extensions are not supported",
    rf"(?:/v2|{_MODEL})/trace/setting": "the trace extension is not supported",
    r"/v2/logging": "the logging extension is not supported",
    rf"{_MODEL}/config": "the model configuration extension is not supported: the metadata has inputs and outputs",
    rf"{_MODEL}/generate(?:_stream)?": "the generate extension is not supported",
}
_CALLS = [(re.compile(path), reason) for path, reason in _NOT_SUPPORTED.items()]


def server_metadata() -> dict[str, Any]:
    """Name, version, and the extensions of the protocol that there are."""
    return {"name": "fedclaw", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(model: ModelDescription) -> dict[str, Any]:
    """Versions, inputs and outputs."""
    return {
        "name": model.name,
        "versions": list(model.versions),
        "platform": PLATFORM,
        "inputs": [_tensor(column) for column in model.columns],
        "outputs": [_tensor(output) for output in model.outputs],
    }


def not_supported(path: str) -> ServeRefusal | None:
    """The answer to a call of the protocol that this node has not; None for any other path."""
    for call, reason in _CALLS:
        if call.fullmatch(path):
            return ServeRefusal("not_supported", reason)
    return None


def _tensor(spec: TypedColumn | TensorSpec) -> dict[str, Any]:
    shape = [ANY_SIZE if isinstance(size, str) else size for size in spec.shape]
    return {"name": spec.name, "datatype": OF_COLUMN[spec.dtype], "shape": shape}
