"""An ONNX model whose weights stay where they are until they are written, so that no second copy of them is made.

A `ModelProto` holds the bytes of every weight, and so does each message that it is serialised into. Here the message
holds the nodes and what is small; large weights are values of their own (`onnx_ir`'s tensors, which look at torch's
memory), and `OnnxModel.write` puts them into the file one by one, as protobuf's wire format has it: a field is its
number and kind, its length, and its bytes; fields of a message may come in any order.
https://protobuf.dev/programming-guides/encoding/ and onnx.proto3 give the numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx

from fedclaw.errors import BundleError

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""Fields: of ModelProto, of GraphProto, of TensorProto."""
LENGTH_DELIMITED = 2
SMALL = 4096
"""Bytes up to which a weight stays in the message: shapes and axes, which inference looks at, are smaller."""
PROTOBUF_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class OnnxModel:
    """`message` without its large weights, and those by name."""

    message: Any
    weights: Mapping[str, Any]
    """Tensors of `onnx_ir`."""

    @classmethod
    def of(cls, program: Any) -> "OnnxModel":
        """What torch.onnx.export gave, which loses its weights."""
        import onnx_ir

        weights = {}
        for name, value in program.model.graph.initializers.items():
            if value.const_value is not None and value.const_value.nbytes > SMALL:
                weights[name], value.const_value = value.const_value, None
        return cls(onnx_ir.serde.serialize_model(program.model), weights)

    @property
    def size(self) -> int:
        """Bytes of the file, but for a few for each weight."""
        return int(self.message.ByteSize() + sum(tensor.nbytes for tensor in self.weights.values()))

    def check(self) -> None:
        """Raise what onnx's checker raises. A weight counts as an input, which is all that the checker needs of it."""
        whole = onnx.ModelProto()
        whole.CopyFrom(self.message)
        for name, tensor in self.weights.items():
            shape = tuple(int(size) for size in tensor.shape)
            whole.graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), shape))
        onnx.checker.check_model(whole, full_check=True)

    def write(self, path: Path) -> None:
        """One file with its weights embedded. Raises BundleError if it would be larger than an ONNX file can be."""
        headers = {name: _header(name, tensor) for name, tensor in self.weights.items()}
        graph = self.message.graph.SerializeToString(deterministic=True)
        sizes = {name: len(header) + self.weights[name].nbytes for name, header in headers.items()}
        length = len(graph) + sum(len(_begin(INITIALIZER, size)) + size for size in sizes.values())
        if length > PROTOBUF_LIMIT:
            raise BundleError(f"the model has {length / 2**30:.1f} GiB of weights; an ONNX file holds at most 2 GiB")
        rest = onnx.ModelProto()
        rest.CopyFrom(self.message)
        rest.ClearField("graph")
        with path.open("wb") as file:
            file.write(rest.SerializeToString(deterministic=True))
            file.write(_begin(GRAPH, length))
            file.write(graph)
            for name, header in headers.items():
                file.write(_begin(INITIALIZER, sizes[name]))
                file.write(header)
                _put(file, self.weights[name])


def _header(name: str, tensor: Any) -> bytes:
    """A TensorProto up to the bytes of its values."""
    told = onnx.TensorProto(dims=[int(size) for size in tensor.shape], data_type=int(tensor.dtype), name=name)
    return bytes(told.SerializeToString(deterministic=True)) + _begin(RAW_DATA, tensor.nbytes)


def _put(file: BinaryIO, tensor: Any) -> None:
    before = file.tell()
    tensor.tofile(file)
    if file.tell() - before != tensor.nbytes:
        raise BundleError(f"the weight {tensor.name} cannot be written: it is not {tensor.nbytes} bytes")


def _begin(field: int, length: int) -> bytes:
    """The beginning of a field of that many bytes."""
    return _varint(field << 3 | LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that another one follows."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
