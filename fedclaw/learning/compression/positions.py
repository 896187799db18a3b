"""k positions among d, in as few bytes as a list or a map of bits takes, whichever is shorter.

A list has two bytes a position up to d = 65536 and four beyond; a map has d / 8 bytes, and is shorter where more than
one number in 16, or in 32, is sent.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.protocol.arrays import Form


def form(count: int, numbers: int) -> Form:
    """How `count` positions among `numbers` travel."""
    index = np.dtype(np.uint16 if numbers <= 1 << 16 else np.uint32)
    bits = (numbers + 7) // 8
    if count * index.itemsize > bits:
        return Form(np.dtype(np.uint8), (bits,))
    return Form(index, (count,))


def coded(chosen: NDArray[np.int64], numbers: int) -> NDArray[Any]:
    """Ascending positions (k,) below `numbers`, in the form that `form` says."""
    wanted = form(len(chosen), numbers)
    if wanted.dtype != np.uint8:
        return chosen.astype(wanted.dtype)
    marks = np.zeros(numbers, bool)
    marks[chosen] = True
    return np.packbits(marks, bitorder="little")


def read(found: NDArray[Any], count: int, numbers: int) -> NDArray[np.int64]:
    """The positions (k,) that `coded` wrote. Raises UpdateError if they are not `count` different ones."""
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
