"""Top-k: the k numbers of an update with the largest magnitude (Stich, Cordonnier, Jaggi 2018, definition 2.1).

It is biased: used by itself it may stop away from the optimum. With what was not sent added to the next update (error
feedback: Karimireddy, Rebjock, Stich, Jaggi 2019, algorithm 1; `feedback`) nothing is lost, only late.

The k positions travel in as few bytes as a list or a map of bits takes, whichever is shorter.

A list has two bytes a position up to d = 65536 and four beyond; a map has d / 8 bytes, and is shorter where more than
one number in 16, or in 32, is sent.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.learning.compression.compressor import Compressor, Encoded, finite, kept, size
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import Arrays, Form, Shapes, Wire, flattened, unflattened

_VALUES, _POSITIONS = "values", "positions"


@dataclass(frozen=True)
class LargestK(Compressor):
    """`values` float32 (k,) and their `positions` among all d numbers of the update, tensor after tensor by name."""

    fraction: float

    def layout(self, shapes: Shapes) -> dict[str, Form]:
        """See Compressor."""
        numbers = sum(size(shape) for shape in shapes.values())
        count = kept(self.fraction, numbers)
        return {
            _VALUES: Form(np.dtype(np.float32), (count,)),
            _POSITIONS: position_form(count, numbers),
        }

    def encode(self, arrays: Arrays, source: GaussianSource, warm: Arrays) -> Encoded:
        """See Compressor; nothing is random."""
        flat = flattened(arrays)
        count = kept(self.fraction, flat.size)
        chosen = np.sort(np.argpartition(np.abs(flat), flat.size - count)[flat.size - count :])
        return Encoded({_VALUES: flat[chosen], _POSITIONS: encoded_positions(chosen, flat.size)}, {})

    def decode(self, wire: Wire, shapes: Shapes) -> Arrays:
        """See Compressor."""
        flat = np.zeros(sum(size(shape) for shape in shapes.values()), np.float32)
        values = finite(_VALUES, wire[_VALUES])
        flat[read_positions(wire[_POSITIONS], len(values), flat.size)] = values
        return unflattened(flat, shapes)


def position_form(count: int, numbers: int) -> Form:
    """How `count` positions among `numbers` travel."""
    index = np.dtype(np.uint16 if numbers <= 1 << 16 else np.uint32)
    bits = (numbers + 7) // 8
    if count * index.itemsize > bits:
        return Form(np.dtype(np.uint8), (bits,))
    return Form(index, (count,))


def encoded_positions(chosen: NDArray[np.int64], numbers: int) -> NDArray[Any]:
    """Ascending positions (k,) below `numbers`, in the form that `position_form` says."""
    wanted = position_form(len(chosen), numbers)
    if wanted.dtype != np.uint8:
        return chosen.astype(wanted.dtype)
    marks = np.zeros(numbers, bool)
    marks[chosen] = True
    return np.packbits(marks, bitorder="little")


def read_positions(found: NDArray[Any], count: int, numbers: int) -> NDArray[np.int64]:
    """The positions (k,) that `encoded_positions` wrote. Raises UpdateError if they are not `count` different ones."""
    if found.dtype == np.uint8:
        marks = np.unpackbits(found, bitorder="little")
        chosen = np.flatnonzero(marks)
        if len(chosen) != count:
            raise UpdateError(f"{len(chosen)} positions are marked, expected {count}")
    else:
        chosen = found.astype(np.int64)
        if (np.diff(chosen) <= 0).any():
            raise UpdateError("positions do not ascend, or one is there twice")
    if count and chosen[-1] >= numbers:
        raise UpdateError(f"position {chosen[-1]} is beyond the update's {numbers} numbers")
    return chosen
