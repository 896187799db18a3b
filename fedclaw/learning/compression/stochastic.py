"""Stochastic quantisation (QSGD: Alistarh, Grubic, Li, Tomioka, Vojnovic 2017, section 3.1), to 8 or 4 bits a number.

A block of consecutive numbers shares a scale s, the largest magnitude in it (section 4 of the paper: buckets, scaled by
the maximum), and is rounded to multiples of s / L, L = 127 or 7, up or down at random so that the mean is the number
itself. The error is below s / L, its variance at most (s / L)^2 / 4.

Four bits: codes -7 .. 7 are stored as 1 .. 15, two to a byte, the earlier one in the lower half; an odd number of codes
is filled up with 8, the code of zero.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.learning.compression.compressor import Compressor, Encoded, finite, size
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import Arrays, Form, Shapes, Wire

_CODES, _SCALES = ":codes", ":scales"
_ZERO = 8
_LEVELS = {8: 127, 4: 7}


@dataclass(frozen=True)
class Stochastic(Compressor):
    """`w:codes` int8 (d,), or uint8 ((d + 1) / 2,), and `w:scales` float32 (blocks,)."""

    bits: int
    """8 or 4."""
    block: int | None
    """Numbers to a scale; None: the whole tensor."""

    def layout(self, shapes: Shapes) -> dict[str, Form]:
        """See Compressor."""
        forms = {}
        for name, shape in shapes.items():
            codes = np.dtype(np.int8) if self.bits == 8 else np.dtype(np.uint8)
            length = size(shape) if self.bits == 8 else (size(shape) + 1) // 2
            forms[name + _CODES] = Form(codes, (length,))
            forms[name + _SCALES] = Form(np.dtype(np.float32), (self._blocks(size(shape)),))
        return forms

    def encode(self, arrays: Arrays, source: GaussianSource, warm: Arrays) -> Encoded:
        """See Compressor; nothing is remembered."""
        wire: Wire = {}
        for name, array in arrays.items():
            codes, wire[name + _SCALES] = self._quantised(array.reshape(-1), source)
            wire[name + _CODES] = codes if self.bits == 8 else packed(codes)
        return Encoded(wire, {})

    def decode(self, wire: Wire, shapes: Shapes) -> Arrays:
        """See Compressor."""
        arrays: Arrays = {}
        for name, shape in shapes.items():
            scales = finite(name + _SCALES, wire[name + _SCALES])
            if (scales < 0).any():
                raise UpdateError(f"array {name + _SCALES!r} holds a negative scale")
            codes = wire[name + _CODES] if self.bits == 8 else unpacked(name + _CODES, wire[name + _CODES], size(shape))
            if self.bits == 8 and (codes == np.int8(-128)).any():
                raise UpdateError(f"array {name + _CODES!r} holds a code below {-_LEVELS[8]}")
            # Divided first: the product could overflow, and the step of a very small scale be zero.
            read = np.divide(codes, _LEVELS[self.bits], dtype=np.float32)
            read *= self._spread(scales, size(shape))
            arrays[name] = read.reshape(shape)
        return arrays

    def _quantised(
        self, flat: NDArray[np.float32], source: GaussianSource
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Codes (d,) and scales (blocks,)."""
        length = min(self.block or flat.size, flat.size) or 1
        starts = np.arange(0, flat.size, length)
        scales = np.maximum.reduceat(np.abs(flat), starts) if flat.size else np.zeros(0, np.float32)
        # A block of zeros is divided by one. In float64, no number exceeds its own block's maximum.
        divisors = np.where(scales > 0, scales, 1).astype(np.float64)
        wanted = flat / self._spread(divisors, flat.size) * _LEVELS[self.bits]
        return rounded(wanted, source).astype(np.int8), scales

    def _blocks(self, numbers: int) -> int:
        return -(-numbers // (self.block or max(numbers, 1)))

    def _spread(self, values: NDArray[np.floating], numbers: int) -> NDArray[np.floating]:
        """One value a block (blocks,), as one a number (d,)."""
        # The block is the server's number: not one of its repetitions is made that no number needs.
        return np.repeat(values, min(self.block or numbers, max(numbers, 1)))[:numbers]


def rounded(values: NDArray[np.float64], source: GaussianSource) -> NDArray[np.float64]:
    """(d,) whole numbers, each the one below or above with the probability that makes its mean the value (to 2^-32)."""
    words = source.words((values.size + 1) // 2).view(np.uint32)[: values.size]
    return np.floor(values + words * 2.0**-32)


def packed(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Codes -7 .. 7 (d,), two to a byte."""
    halves = np.full(codes.size + codes.size % 2, _ZERO, np.uint8)
    halves[: codes.size] = codes + np.int8(_ZERO)
    lower, upper = halves[0::2], halves[1::2]
    together: NDArray[np.uint8] = lower | (upper << np.uint8(4))
    return together


def unpacked(name: str, together: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    """The `count` codes that `packed` packed. Raises UpdateError, naming the array, for bytes that it makes none of."""
    halves = np.empty(2 * together.size, np.uint8)
    halves[0::2] = together & np.uint8(15)
    halves[1::2] = together >> np.uint8(4)
    if not halves.all():
        raise UpdateError(f"array {name!r} holds a code below {-_LEVELS[4]}")
    if (halves[count:] != _ZERO).any():
        raise UpdateError(f"array {name!r} goes on after its last code")
    return halves[:count].view(np.int8) - np.int8(_ZERO)
