"""A model repository for NVIDIA Triton: NAME/config.pbtxt and NAME/1/model.onnx, served by its onnxruntime backend.

The configuration is protobuf's text form of inference.ModelConfig (Triton's model_config.proto).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from google.protobuf.text_encoding import CEscape

from fedclaw.export.layout import ONNX, Manifest
from fedclaw.export.layouts.base import Deployable
from fedclaw.files import write_atomic

CONFIG, VERSION = "config.pbtxt", "1"
MAX_BATCH = 64
QUEUE_MICROSECONDS = 500
"""How long Triton may wait for a batch to fill: well below what the network takes."""
_TYPES = {
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "string": "TYPE_STRING",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}


def write_triton(deployable: Deployable, directory: Path) -> None:
    """Fill `directory`, a model repository."""
    model = directory / deployable.name
    write_atomic(model / VERSION / ONNX, deployable.model)
    write_atomic(model / CONFIG, model_config(deployable).encode())
    deployable.write_provenance(model)


def tensors(manifest: Manifest, graph: str) -> "tuple[list[Tensor], list[Tensor]]":
    """Inputs and outputs of the graph: name, type and shape, of which the first dimension is the batch."""
    if graph == ONNX or manifest.pipeline is None:
        return (
            [(tensor.name, tensor.dtype, tensor.shape) for tensor in manifest.inputs],
            [(tensor.name, tensor.dtype, tensor.shape) for tensor in manifest.outputs],
        )
    return (
        [(column.name, column.dtype, column.shape) for column in manifest.pipeline.columns],
        [(tensor.name, tensor.dtype, tensor.shape) for tensor in manifest.pipeline.outputs],
    )


Tensor = tuple[str, str, tuple[int | str, ...]]


def model_config(deployable: Deployable) -> str:
    """config.pbtxt. Names are escaped, so that whatever a column is called stays within its quotes."""
    inputs, outputs = tensors(deployable.verified.manifest, deployable.graph)
    lines = [
        f"name: {_quoted(deployable.name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH}",
        *_tensors("input", inputs),
        *_tensors("output", outputs),
        f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}",
    ]
    for key, value in deployable.provenance.items():
        lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}")
    return "\n".join(lines) + "\n"


def _tensors(kind: str, told: Sequence[Tensor]) -> Iterable[str]:
    for name, dtype, shape in told:
        dimensions = ", ".join(str(size if isinstance(size, int) else -1) for size in shape[1:])
        yield f"{kind} {{ name: {_quoted(name)} data_type: {_TYPES[dtype]} dims: [ {dimensions} ] }}"


def _quoted(text: str) -> str:
    return f'"{CEscape(text.encode(), as_utf8=False)}"'
