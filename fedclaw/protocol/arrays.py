"""Named float arrays on the wire and back, without a copy where none is needed, and the update that they make.

Flower's `Array` holds the bytes of a .npy file. Reading them through `np.load` copies; here they are viewed. In files
arrays are .npz, read without pickle.
"""

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedclaw.errors import CheckpointError, UpdateError

if TYPE_CHECKING:
    from flwr.app import Array, ArrayRecord

    from fedclaw.protocol.records import ViewedArray


Arrays = dict[str, NDArray[np.float32]]
"""Parameters, or anything of their shapes, by state-dict name; float32."""

Wire = dict[str, NDArray[Any]]
"""Arrays in the form in which they travel, by name."""

Shapes = Mapping[str, tuple[int, ...]]
"""Of arrays, by name."""


@dataclass(frozen=True)
class Form:
    """Type and shape of an array that travels."""

    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What its numbers take."""
        return math.prod(self.shape) * self.dtype.itemsize


S = TypeVar("S", bound=np.generic)

_STYPE = "numpy.ndarray"
_VECTOR = "vector"


def pack(arrays: Mapping[str, NDArray[np.float32]]) -> "ArrayRecord":
    """`arrays` as a Flower record, one copy of each."""
    return pack_wire({name: array.astype(np.float32, copy=False) for name, array in arrays.items()})


def pack_wire(arrays: Mapping[str, NDArray[Any]]) -> "ArrayRecord":
    """The same for arrays of any number type."""
    from flwr.app import ArrayRecord

    return ArrayRecord({name: _packed(array) for name, array in arrays.items()})


def pack_leaving(arrays: Mapping[str, NDArray[Any]]) -> "ArrayRecord":
    """The same without a copy, of arrays that nobody changes any more."""
    from flwr.app import ArrayRecord

    record = ArrayRecord()
    # One by one: given a whole dictionary, Flower's class copies what is in it.
    record.update((name, _viewed(array)) for name, array in arrays.items())
    return record


def _packed(array: NDArray[Any]) -> "Array":
    from flwr.app import Array

    viewed = _viewed(array)
    return Array(dtype=viewed.dtype, shape=viewed.shape, stype=viewed.stype, data=viewed.data)


def _viewed(array: NDArray[Any]) -> "ViewedArray":
    from fedclaw.protocol.records import ViewedArray

    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    header = io.BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(contiguous))
    numbers = contiguous.reshape(-1).view(np.uint8).data
    return ViewedArray(str(contiguous.dtype), contiguous.shape, _STYPE, header.getbuffer(), numbers)


def pack_integers(vector: NDArray[np.uint32]) -> "ArrayRecord":
    """A flat vector (d,) of integers, which nobody changes any more, as a Flower record. No copy."""
    return pack_leaving({_VECTOR: vector})


def unpack_integers(record: "ArrayRecord") -> NDArray[np.uint32]:
    """A read-only view of what `pack_integers` packed. Raises UpdateError for anything else."""
    if set(record) != {_VECTOR}:
        raise UpdateError(f"the masked answer holds arrays {', '.join(record)}, expected {_VECTOR}")
    return _view(_VECTOR, record[_VECTOR], np.dtype(np.uint32))


def unpack(record: "ArrayRecord") -> Arrays:
    """Read-only views of a record's arrays. Raises UpdateError for anything but well-formed float32."""
    return {name: _view(name, array, np.dtype(np.float32)) for name, array in record.items()}


def unpack_wire(record: "ArrayRecord", layout: Mapping[str, Form]) -> Wire:
    """Read-only views of a record's arrays. Raises UpdateError unless they are those of `layout`, type and shape."""
    if record.keys() != layout.keys():
        odd = sorted(set(record.keys()) ^ set(layout.keys()))
        raise UpdateError(f"the update's arrays are not those that were asked for; missing or unknown: {_few(odd)}")
    wire = {name: _view(name, array, layout[name].dtype) for name, array in record.items()}
    for name, array in wire.items():
        if array.shape != layout[name].shape:
            raise UpdateError(f"array {name!r} has shape {array.shape}, expected {layout[name].shape}")
    return wire


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def shapes_of(arrays: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    """The shapes of `arrays`, by name."""
    return {name: array.shape for name, array in arrays.items()}


def payload(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Bytes of the arrays' numbers."""
    return sum(array.nbytes for array in arrays.values())


def flat(arrays: Mapping[str, NDArray[np.float32]], names: Iterable[str]) -> NDArray[np.float32]:
    """(d,) the arrays of these names, one after another."""
    return np.concatenate([arrays[name].reshape(-1) for name in names])


def shaped(vector: NDArray[Any], shapes: Shapes) -> Arrays:
    """Views, by name, of what `flat` made of arrays of these names and shapes, in their order."""
    arrays, start = {}, 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        arrays[name] = vector[start:end].reshape(shape)
        start = end
    return arrays


def flattened(arrays: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """All arrays one after the other, in the order of their names: (d,)."""
    return flat(arrays, sorted(arrays))


def unflattened(
    vector: NDArray[np.floating[Any]], shapes: Shapes, precision: type[np.floating[Any]] = np.float32
) -> Arrays:
    """The arrays (of type `precision`) of these names and shapes that `flattened` made `vector` (d,) of."""
    return shaped(vector.astype(precision, copy=False), dict(sorted(shapes.items())))


def _view(name: str, array: "Array", expected: np.dtype[S]) -> NDArray[S]:
    from fedclaw.protocol.records import read_npy

    if array.stype != _STYPE:
        raise UpdateError(f"array {name!r} is serialised as {array.stype!r}, expected {_STYPE!r}")
    try:
        fortran, values = read_npy(array)
        if values.dtype != expected or fortran:
            raise ValueError(f"expected C-ordered {expected}, got {values.dtype}")
        return values
    except ValueError as error:
        raise UpdateError(f"array {name!r} cannot be read: {error}") from error


LARGEST = 2.0**100
"""No number of an update, times its weight, is larger: 2^27 of them still add up to a float32."""


def all_within(array: NDArray[np.float32], largest: float = LARGEST) -> bool:
    """Whether all is finite and at most `largest` (which is above 2^64) in size; mostly one pass without a temporary.

    A sum of squares below infinity in float32 has no element above 2^64.
    """
    flat = array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return True
        size = np.abs(flat)
        return bool(np.isfinite(size).all() and (size <= largest).all())


def all_finite(array: NDArray[np.float32]) -> bool:
    """Whether every element is finite; mostly one pass without a temporary."""
    return all_within(array, math.inf)


@dataclass(frozen=True)
class Update:
    """Parameter deltas by name (float32; float64 while noise on the sum waits to be added), or a sum of them; `weight`
    and `examples` add up as they do.

    `heaviest` is the largest weight of any one site in it, on the scale that the arrays are on.
    """

    arrays: Arrays
    weight: float
    examples: int
    heaviest: float = 1.0
    divisor: float = 1.0
    """At the server: what the arrays have been divided by."""
    clip: float | None = None
    """Where the clipping bound of the next round is to be, if it follows the updates."""
    encoded: Mapping[str, NDArray[Any]] | None = None
    """At a site: the form that travels, where it is another; `arrays` is then what the server will read in it."""
    state: Mapping[str, Arrays] = field(default_factory=dict)
    """At a site: by kind, what it keeps for its next update."""

    @property
    def leaving(self) -> Mapping[str, NDArray[Any]]:
        """What leaves the site."""
        return self.arrays if self.encoded is None else self.encoded

    @property
    def payload(self) -> int:
        """Bytes of the arrays that leave the site."""
        return payload(self.leaving)


def is_extra(name: str) -> bool:
    """Whether an update's array is none of a parameter's, but what a strategy adds (`Strategy.extras`)."""
    return name.startswith("~")


def write_npz(file: IO[bytes] | io.RawIOBase, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `arrays` to `file` as an uncompressed .npz archive, a part of one array after the other."""
    np.savez(file, allow_pickle=False, **arrays)


def arrays_to_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """`arrays` as the bytes of an uncompressed .npz file."""
    buffer = io.BytesIO()
    write_npz(buffer, arrays)
    return buffer.getvalue()


def npz_to_arrays(content: bytes, origin: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file. Raises CheckpointError naming `origin` when it is not one."""
    return read_npz(io.BytesIO(content), origin)


def read_npz(file: IO[bytes] | io.RawIOBase, origin: Path) -> dict[str, NDArray[Any]]:
    """The arrays of the .npz archive in `file`. Raises CheckpointError naming `origin` when it is none."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise CheckpointError(f"{origin} is damaged: {' '.join(str(error).split())}") from error
