"""Tensors of the Open Inference Protocol as the columns that a model takes, and what it gives as tensors again.

A column has one type, and a client may send another where no value changes by it:

    column    taken
    float32   FP32; FP16 and BF16; FP64, rounded to float32 as FedClaw's reader rounds a file's numbers; whole numbers
    float64   FP64, FP32, FP16, BF16; whole numbers
    uint8     UINT8; other numbers that are whole and from 0 to 255
    string    BYTES (UTF-8); whole numbers in decimal; BOOL as true and false

A whole number that the column's type does not hold exactly is refused, never rounded: it may be a code. Texts are
brought to Unicode NFC, the form in which a schema's levels are compared. A value that is not known is NaN; in JSON,
which has none, it is null. For a column of texts, null is the text that the schema has for 'not known'.

Legend: N rows.
"""

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedclaw.learning.preprocessing import TypedColumn
from fedclaw.learning.unicode_text import composed
from fedclaw.serve.refusals import ServeRefusal

Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
]
OF_COLUMN: dict[str, Datatype] = {
    "float32": "FP32",
    "float64": "FP64",
    "uint8": "UINT8",
    "string": "BYTES",
    "bool": "BOOL",
}
"""What a column or an output is called in the protocol."""
NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),  # its bits are the upper half of a float32's
}
"""How the values of a type lie in raw bytes; BYTES is a length of 4 bytes before each value."""
LITTLE = sys.byteorder == "little"
SIZE = struct.Struct("<I")
LARGEST = 2**40
"""Number of rows that a shape may speak of."""
TRUTHS = ("false", "true")
"""Of a BOOL for a column of texts."""


@dataclass(frozen=True)
class ColumnTensor:
    """One column of a model as what the tensor of a request has to be."""

    column: TypedColumn

    @cached_property
    def datatype(self) -> Datatype:
        """The type that it is best sent as."""
        return OF_COLUMN[self.column.dtype]

    @cached_property
    def inner(self) -> list[int]:
        """The shape of one row."""
        return [size for size in self.column.shape[1:] if isinstance(size, int)]

    @cached_property
    def width(self) -> int:
        """How many values a row has."""
        return prod(self.inner)

    def rows_of(self, shape: Any) -> int:
        """N of the declared `shape`; (N,) is as good as (N, 1). Raises ServeRefusal."""
        if type(shape) is list and shape and (shape[1:] == self.inner or (len(shape) == 1 and self.inner == [1])):
            rows = shape[0]
            if type(rows) is int and 0 < rows <= LARGEST:
                return rows
        named = ", ".join(map(str, ("N", *self.inner)))
        raise self.refusal(f"its shape must be [{named}], and N at least 1")

    def of_values(self, datatype: Any, rows: int, data: Any) -> NDArray[Any]:
        """The column, (N, ...), from JSON's values, nested by the shape or not at all. Raises ServeRefusal."""
        if type(data) is not list:
            raise self.refusal("its data is not a list")
        if data and type(data[0]) is list:
            data = self._flat(data, rows)
        if len(data) != rows * self.width:
            raise self.refusal(f"its shape is of {rows * self.width} values, and {len(data)} are there")
        convert = FROM_JSON.get((datatype, self.column.dtype)) if type(datatype) is str else None
        if convert is None:
            raise self._wrong_type(datatype)
        return convert(self, datatype, data).reshape(rows, *self.inner)

    def of_bytes(self, datatype: Any, rows: int, raw: memoryview) -> NDArray[Any]:
        """The column, (N, ...), from the protocol's raw bytes (little-endian, rows first). Raises ServeRefusal."""
        count = rows * self.width
        if datatype == "BYTES":
            return self.of_values(datatype, rows, self._texts(raw, count))
        own = NUMPY.get(datatype) if type(datatype) is str else None
        if own is None:
            raise self._wrong_type(datatype)
        if len(raw) != count * own.itemsize:
            raise self.refusal(f"its shape is of {count * own.itemsize} bytes, and {len(raw)} are there")
        values = np.frombuffer(raw, own)
        if datatype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        elif datatype == self.datatype:
            return values.reshape(rows, *self.inner)
        return self.converted(values).reshape(rows, *self.inner)

    def converted(self, values: NDArray[Any]) -> NDArray[Any]:
        """Numbers or truths (n,) as the column's type. Raises ServeRefusal where a value would change by it."""
        wanted, kind = self.column.dtype, values.dtype.kind
        if kind == "b" and values.dtype.itemsize:
            # Any byte but 0 is true for numpy, and 2 is no truth.
            if (values.view(np.uint8) > 1).any():
                raise self.refusal("a BOOL is a byte that is 0 or 1")
            if wanted == "string":
                return np.array([TRUTHS[value] for value in values.tolist()], object)
        if kind == "b" or (wanted == "string" and kind not in "iu"):
            raise self._wrong_type(None)
        if wanted == "string":
            return np.array([str(value) for value in values.tolist()], object)
        if values.dtype == wanted:
            return values
        with np.errstate(over="ignore", invalid="ignore"):
            found = values.astype(wanted)
        if (kind in "iu" or wanted == "uint8") and not _same(found, values):
            raise self.refusal(f"a number in it is none that {self.datatype} holds exactly")
        return found

    def refusal(self, reason: str) -> ServeRefusal:
        """`reason` as what is wrong with this input; never with a value in it."""
        return ServeRefusal("bad_request", f"input {self.column.name!r}: {reason}")

    def _wrong_type(self, datatype: Any) -> ServeRefusal:
        named = f", not {datatype}" if type(datatype) is str and datatype in {*NUMPY, "BYTES"} else ""
        return self.refusal(f"its datatype must be {self.datatype}{named}")

    def _flat(self, data: list[Any], rows: int) -> list[Any]:
        """Nested lists without the nesting, which has to be that of the shape."""
        whole = len(data) == rows
        for within in self.inner:
            kinds = set(map(type, data))
            if not whole or list not in kinds:
                break
            whole = kinds == {list} and set(map(len, data)) == {within}
            data = list(chain.from_iterable(data)) if whole else data
        if not whole:
            raise self.refusal("its data is not nested as its shape says")
        return data

    def _texts(self, raw: memoryview, count: int) -> list[str]:
        found, place, end = list[str](), 0, len(raw)
        if end < 4 * count:
            raise self.refusal(f"its bytes do not hold {count} values")
        try:
            for _ in range(count):
                (size,) = SIZE.unpack_from(raw, place)
                place += 4 + size
                if place > end:
                    raise self.refusal("a length in its bytes goes beyond their end")
                found.append(str(raw[place - size : place], "utf-8"))
        except (struct.error, UnicodeDecodeError) as error:
            raise self.refusal("its bytes are not UTF-8 texts, each after a length of 4 bytes") from error
        if place != end:
            raise self.refusal("there are bytes after its last value")
        return found


Convert = Callable[[ColumnTensor, str, list[Any]], NDArray[Any]]
_NUMBERS, _WHOLE, _NULL = {int, float}, {int}, {type(None)}


def _floats(own: ColumnTensor, datatype: str, data: list[Any]) -> NDArray[Any]:
    """Numbers declared as floating point, null for NaN."""
    known = set(map(type, data))
    if own.column.missing is not None:
        known -= _NULL
    if not known <= _NUMBERS:
        null = ", with null for what is not known" if own.column.missing is not None else ""
        raise own.refusal(f"its data is not of numbers{null}")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and its row is refused
        values = np.array(data, _FLOATS[datatype])
    return values if values.dtype == own.column.dtype else own.converted(values)


def _integers(own: ColumnTensor, datatype: str, data: list[Any]) -> NDArray[Any]:
    """Whole numbers."""
    if set(map(type, data)) != _WHOLE:
        raise own.refusal("its data is not of whole numbers")
    try:
        values = np.array(data, NUMPY[datatype])
    except OverflowError as error:
        raise own.refusal(f"a number in it is none of {datatype}") from error
    return own.converted(values)


def _bytes(own: ColumnTensor, _datatype: str, data: list[Any]) -> NDArray[Any]:
    """Whole numbers from 0 to 255."""
    if set(map(type, data)) != _WHOLE:
        raise own.refusal("its data is not of whole numbers")
    try:
        return np.frombuffer(bytes(data), np.uint8)
    except ValueError as error:
        raise own.refusal("a number in it is not from 0 to 255") from error


def _truths(own: ColumnTensor, _datatype: str, data: list[Any]) -> NDArray[Any]:
    """Truths for a column of texts."""
    if set(map(type, data)) != {bool}:
        raise own.refusal("its data is not of true and false")
    return np.array([TRUTHS[value] for value in data], object)


def _texts(own: ColumnTensor, _datatype: str, data: list[Any]) -> NDArray[Any]:
    """Texts, null for the one that means 'not known'."""
    kinds, missing = set(map(type, data)), own.column.missing
    if type(None) in kinds and missing is not None:
        kinds.remove(type(None))
        data = [missing if text is None else text for text in data]
    if not kinds <= {str}:
        raise own.refusal("its data is not of texts" + (", with null for what is not known" if missing else ""))
    found = np.empty(len(data), object)
    found[:] = list(map(composed, data))
    return found


_FLOATS = {"FP16": NUMPY["FP16"], "BF16": NUMPY["FP32"], "FP32": NUMPY["FP32"], "FP64": NUMPY["FP64"]}
FROM_JSON: dict[tuple[str, str], Convert] = {
    **{(datatype, wanted): _floats for datatype in _FLOATS for wanted in ("float32", "float64", "uint8")},
    **{
        (datatype, wanted): _integers
        for datatype in NUMPY
        if "INT" in datatype
        for wanted in ("float32", "float64", "uint8", "string")
    },
    ("UINT8", "uint8"): _bytes,
    ("BYTES", "string"): _texts,
    ("BOOL", "string"): _truths,
}
"""By declared type and column's type: how a flat list of JSON's values becomes the column. The rest is refused."""


def as_bytes(values: NDArray[Any]) -> bytes:
    """An output as the protocol's raw bytes."""
    if values.dtype.kind != "O":
        return (values if LITTLE else values.byteswap()).tobytes()
    texts = [str(text).encode() for text in values.ravel().tolist()]
    return b"".join(chain.from_iterable((SIZE.pack(len(text)), text) for text in texts))


OF_OUTPUT: dict[str, Datatype] = {"O": "BYTES", "f": "FP32", "d": "FP64", "?": "BOOL", "B": "UINT8"}
"""By numpy's character of a type: what an output's is called in the protocol."""


def _same(found: NDArray[Any], given: NDArray[Any]) -> bool:
    """Whether two arrays hold the same numbers, by exact comparison."""
    if given.dtype.kind == "f":
        return bool((found.astype(given.dtype) == given).all())
    if found.dtype.kind != "f":
        return bool((found == given).all())
    # numpy compares int64 and float64 as float64, in which 2**53 + 1 is 2**53; Python compares them as they are.
    return given.itemsize < 4 or found.tolist() == given.tolist()
