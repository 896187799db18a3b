"""Encodes a message's content as bytes and decodes it: a small header, then the data of the arrays unchanged.

Encoding copies no array: the result is a list of buffers. Decoding trusts nothing: every length, count, type and
.npy header is checked before a record is made. Nothing here can run code: no pickle, no dtype that holds objects.
"""

import io
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, Error, MetricRecord, RecordDict
from google.protobuf.message import DecodeError
from numpy.lib import format as npy

from fedclaw.errors import TransportError
from fedclaw.protocol.buffers import JoinedBuffers
from fedclaw.protocol.records import MessageRecords, ViewedArray, array_record, serialised
from fedclaw.transport.grpc.frames import read_varint
from fedclaw.transport.grpc.protocol import link_pb2 as pb

Content = RecordDict | Error

MAGIC = b"FCM1"
ALIGNMENT = 64
"""Header and arrays each begin at a multiple of this: numpy would copy an unaligned array before computing with it."""
_ZEROS = bytes(ALIGNMENT)
_PREFIX = len(MAGIC) + 4
_MAX_HEADER = 16 << 20
MAX_ITEMS = 1 << 14
"""Records, arrays and values of one message."""
MAX_NUMBERS = 1 << 16
"""Of all lists in a message's values."""
_MAX_DIMENSIONS = 32
_NPY = "numpy.ndarray"
_DTYPES = frozenset(
    ["bool", "float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
_SINT64 = range(-(1 << 63), 1 << 63)
_UINT64 = range(1 << 64)

Plain = bool | int | float | str | bytes
V = TypeVar("V")


def encode(content: Content, *, arrays: bool = True) -> JoinedBuffers:
    """Encode `content`, without array records if `arrays` is false. Raises TransportError for what cannot travel."""
    header = pb.Content()
    data: list[bytes | memoryview] = []
    if isinstance(content, Error):
        reason = content.reason
        header.failure.CopyFrom(pb.Failure(code=content.code, has_reason=reason is not None, reason=reason or ""))
    else:
        header.records.SetInParent()
        for name, record in content.items():
            if not arrays and isinstance(record, ArrayRecord):
                continue
            _encode_record(header.records.items.add(name=name), record, data)
    raw = header.SerializeToString()
    check_items(raw)
    if len(raw) > _MAX_HEADER:
        raise TransportError(f"the message's records other than arrays take {len(raw)} bytes, limit {_MAX_HEADER}")
    parts = (MAGIC + len(raw).to_bytes(4, "big") + raw + _padding(_PREFIX + len(raw)), *data)
    return JoinedBuffers(parts)


def decode(buffer: bytes | bytearray | memoryview) -> Content:
    """The content in `buffer`; its arrays are views, so `buffer` must not change any more.

    Raises TransportError for anything not exactly well-formed.
    """
    header, body = _split(memoryview(buffer).cast("B"))
    kind = header.WhichOneof("body")
    if kind == "failure":
        if len(body):
            raise _malformed("an error reply carries array data")
        failure = header.failure
        return Error(failure.code, failure.reason if failure.has_reason else None)
    if kind != "records":
        raise _malformed("the message has no content")
    return _decode_records(header.records, body)


_HOLDS: Mapping[str, Mapping[int, tuple[str, bool]]] = {
    "Content": {1: ("Records", False)},
    "Records": {1: ("Record", True)},
    "Record": {2: ("ArrayItems", False), 3: ("ValueItems", False), 4: ("ValueItems", False)},
    "ArrayItems": {1: ("", True)},
    "ValueItems": {1: ("ValueItem", True)},
    "ValueItem": {3: ("ScalarList", False)},
    "ScalarList": {1: ("", False)},
}
"""By message and field number: the message inside (empty where nothing below counts), and whether it is an item."""
_ITEM_TAG = b"\x0a"
_NOTHING = ("", False)
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_LONG = 0x80
"""A varint's byte of at least this value is followed by another."""


def check_items(header: bytes) -> None:
    """Raises TransportError for a header with too many items, without building any of them.

    Every item, and every number of a list, begins with the same byte, so few such bytes mean few items. Only a header
    with many is walked, and no further than to the limit.
    """
    if header.count(_ITEM_TAG) <= MAX_ITEMS:
        return
    items, fields, at = 0, 0, 0
    # The messages that the present position lies in, outermost first, with their ends.
    inside = [("Content", len(header))]
    while inside:
        message, end = inside[-1]
        if at >= end:
            inside.pop()
            continue
        fields += 1
        tag, at = (header[at], at + 1) if header[at] < _LONG else read_varint(header, at)
        if tag & 7 == _LENGTH:
            size, at = (header[at], at + 1) if at < end and header[at] < _LONG else read_varint(header, at)
            inner, is_item = _HOLDS[message].get(tag >> 3, _NOTHING)
        else:
            size, at = _extent(header, tag & 7, at)
            inner, is_item = _NOTHING
        items += is_item
        if inner:
            inside.append((inner, min(at + size, end)))
        else:
            at += size
        if items > MAX_ITEMS or fields > MAX_NUMBERS + 4 * MAX_ITEMS:
            raise TransportError(
                f"the message has too many parts; the limits are {MAX_ITEMS} records, arrays and values, and "
                f"{MAX_NUMBERS} numbers in lists"
            )


def _extent(raw: bytes, wire_type: int, at: int) -> tuple[int, int]:
    """Size of a number's value in bytes, and its position. Raises TransportError for an unknown wire type."""
    if wire_type == _VARINT:
        return 0, read_varint(raw, at)[1]
    sizes = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}
    if wire_type not in sizes:
        raise _malformed("its header holds a field of no known form")
    return sizes[wire_type], at


def is_error(buffer: bytes) -> bool:
    """Whether a message is an error reply. Raises TransportError if it has no header."""
    return bool(_split(memoryview(buffer))[0].WhichOneof("body") == "failure")


def _split(view: memoryview) -> tuple[pb.Content, memoryview]:
    """A message's header, and the arrays' data after it. Raises TransportError."""
    if len(view) < _PREFIX or view[: len(MAGIC)] != MAGIC:
        raise TransportError("the message is not a FedClaw message")
    length = int.from_bytes(view[len(MAGIC) : _PREFIX], "big")
    if length > min(_MAX_HEADER, len(view) - _PREFIX):
        raise TransportError(f"the message's header claims {length} bytes of {len(view)}")
    raw = bytes(view[_PREFIX : _PREFIX + length])
    check_items(raw)
    try:
        header = pb.Content.FromString(raw)
    except DecodeError as error:
        raise TransportError("the message's header is malformed") from error
    return header, _after_padding(view, _PREFIX + length)


def _encode_record(
    target: pb.Record, record: ArrayRecord | MetricRecord | ConfigRecord, data: list[bytes | memoryview]
) -> None:
    if isinstance(record, ArrayRecord):
        target.arrays.SetInParent()
        items = target.arrays.items
        for name, array in record.items():
            parts = serialised(array)
            size = sum(map(len, parts))
            _check_array(name, array.dtype, tuple(array.shape), array.stype, parts[0], size)
            items.add(name=name, dtype=array.dtype, shape=array.shape, stype=array.stype, length=size)
            data += parts
            if size % ALIGNMENT:
                data.append(_padding(size))
        return
    values = target.metrics if isinstance(record, MetricRecord) else target.configs
    values.SetInParent()
    plain = cast(Mapping[str, Plain | list[Plain]], record)
    for name, value in plain.items():
        item = values.items.add(name=name)
        if isinstance(value, list):
            item.list.SetInParent()
            item.list.items.extend(_scalar(name, one) for one in value)
        else:
            item.scalar.CopyFrom(_scalar(name, value))


def _scalar(name: str, value: Plain) -> pb.Scalar:
    if isinstance(value, bool):
        return pb.Scalar(flag=value)
    if isinstance(value, int):
        if value in _SINT64:
            return pb.Scalar(integer=value)
        if value in _UINT64:
            return pb.Scalar(large=value)
        raise TransportError(f"the integer under {name!r} does not fit 64 bits")
    if isinstance(value, float):
        return pb.Scalar(number=value)
    if isinstance(value, str):
        return pb.Scalar(text=value)
    return pb.Scalar(data=value)


def _decode_records(records: pb.Records, body: memoryview) -> RecordDict:
    content = MessageRecords()
    for record in records.items:
        if record.name in content:
            raise _malformed(f"two records are called {record.name!r}")
        kind = record.WhichOneof("kind")
        if kind == "arrays":
            content[record.name], body = _decode_arrays(record.arrays, body)
        elif kind == "metrics":
            content[record.name] = _decode_values(record.metrics, MetricRecord)
        elif kind != "configs":
            raise _malformed(f"record {record.name!r} has no kind")
        else:
            content[record.name] = _decode_values(record.configs, ConfigRecord)
    if len(body):
        raise _malformed(f"{len(body)} bytes follow the last array")
    return content


def _decode_arrays(items: pb.ArrayItems, body: memoryview) -> tuple[ArrayRecord, memoryview]:
    arrays: dict[str, Array] = {}
    for item in items.items:
        name, dtype, shape, stype, length = item.name, item.dtype, tuple(item.shape), item.stype, item.length
        if name in arrays:
            raise _malformed(f"two arrays are called {name!r}")
        if length > len(body):
            raise _malformed(f"array {name!r} claims {length} bytes, {len(body)} are left")
        if len(shape) > _MAX_DIMENSIONS:
            raise _malformed(f"array {name!r} has {len(shape)} dimensions")
        data = body[:length]
        _check_array(name, dtype, shape, stype, data, length)
        arrays[name] = ViewedArray(dtype, shape, stype, data)
        body = _after_padding(body, length)
    return array_record(arrays), body


def _decode_values(items: pb.ValueItems, make: Callable[[Any], V]) -> V:
    values: dict[str, ConfigRecordValues] = {}
    for item in items.items:
        if item.name in values:
            raise _malformed(f"two values are called {item.name!r}")
        kind = item.WhichOneof("value")
        if kind == "list":
            values[item.name] = cast(ConfigRecordValues, [_plain(item.name, one) for one in item.list.items])
        elif kind != "scalar":
            raise _malformed(f"the value {item.name!r} is missing")
        else:
            values[item.name] = _plain(item.name, item.scalar)
    try:
        return make(values)
    except TypeError as error:
        raise TransportError("a record holds a value of a type that it may not hold") from error


def _plain(name: str, scalar: pb.Scalar) -> Plain:
    kind = scalar.WhichOneof("value")
    if kind is None:
        raise _malformed(f"the value {name!r} is missing")
    return cast(Plain, getattr(scalar, kind))


def _check_array(
    name: str, dtype: str, shape: tuple[int, ...], stype: str, data: bytes | memoryview, size: int
) -> None:
    """Raises TransportError unless `data` begins a .npy file, of so many bytes, of exactly this dtype and shape."""
    if stype != _NPY:
        raise _malformed(f"array {name!r} is serialised as {stype!r}; only {_NPY!r} travels")
    if dtype not in _DTYPES:
        raise _malformed(f"array {name!r} has dtype {dtype!r}, which does not travel")
    header, nbytes = _npy_header(dtype, shape)
    if size != len(header) + nbytes or data[: len(header)] != header:
        _check_unusual_npy(name, dtype, shape, memoryview(data), size)


@lru_cache(maxsize=4096)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, int]:
    """The .npy header that numpy writes for a C-ordered little-endian array, and the size of its data in bytes."""
    out = io.BytesIO()
    descr = npy.dtype_to_descr(np.dtype(dtype))
    npy.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    count = 1
    for extent in shape:
        count *= extent
    return out.getvalue(), count * np.dtype(dtype).itemsize


def _check_unusual_npy(name: str, dtype: str, shape: tuple[int, ...], data: memoryview, size: int) -> None:
    """The same check for a header in another form (Fortran order, other padding)."""
    head = io.BytesIO(data[:4096])
    try:
        version = npy.read_magic(head)
        found_shape, _, found_dtype = npy.read_array_header_1_0(head)
    except Exception as error:
        # numpy's parser meets hostile bytes here, and fails in more ways than it documents (ValueError, TokenError).
        raise TransportError(f"malformed message: array {name!r} is not a .npy file") from error
    if version != (1, 0):
        raise _malformed(f"array {name!r} is a .npy file of version {version}")
    if str(found_dtype) != dtype or found_shape != shape:
        raise _malformed(f"array {name!r} is declared {dtype}{list(shape)} and holds {found_dtype}{list(found_shape)}")
    expected = head.tell() + _npy_header(dtype, shape)[1]
    if size != expected:
        raise _malformed(f"array {name!r} has {size} bytes instead of {expected}")


def _padding(size: int) -> bytes:
    return bytes(-size % ALIGNMENT)


def _after_padding(view: memoryview, size: int) -> memoryview:
    """What follows the first `size` bytes and their padding. Raises TransportError if the padding is wrong."""
    padding = -size % ALIGNMENT
    end = size + padding
    if len(view) < end or view[size:end] != _ZEROS[:padding]:
        raise _malformed("the padding of its parts is not as it should be")
    return view[end:]


def _malformed(problem: str) -> TransportError:
    return TransportError(f"malformed message: {problem}")
