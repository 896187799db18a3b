"""Compressors: the methods whose form of an update is each site's own.

A compressor knows the arrays that travel (names, types, shapes) from the shapes of an update alone. The server
holds an answer to exactly those before it opens it, so that opening one takes the memory of one model, whatever a site
sends.

Legend: d numbers in all, n x m a matrix, k numbers that are sent.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import Arrays, Form, Shapes, Wire, flattened, unflattened


@dataclass(frozen=True)
class Encoded:
    """An update in the form that travels, and what the compressor wants to find again at the next one."""

    wire: Wire
    warm: Arrays


class Compressor(ABC):
    """One method with its settings. The arrays of an update are float32 and finite."""

    @abstractmethod
    def layout(self, shapes: Shapes) -> dict[str, Form]:
        """The arrays that travel for an update of these `shapes`, by name."""

    @abstractmethod
    def encode(self, arrays: Arrays, source: GaussianSource, warm: Arrays) -> Encoded:
        """The form that travels, of the layout of the arrays' shapes. `warm` is what the last update left."""

    @abstractmethod
    def decode(self, wire: Wire, shapes: Shapes) -> Arrays:
        """The update that `wire`, which has the layout of `shapes`, stands for. Raises UpdateError if it is none."""


def finite(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """`values`. Raises UpdateError, naming the array, if one of them is NaN or infinite."""
    if not np.isfinite(values).all():
        raise UpdateError(f"array {name!r} holds NaN or infinite values")
    return values


def broken(layout: Mapping[str, Form]) -> Wire:
    """What leaves in the place of an update that is not finite: it says so, and the server declines it."""
    return {
        name: np.full(form.shape, np.nan if form.dtype.kind == "f" else 0, form.dtype) for name, form in layout.items()
    }


def size(shape: tuple[int, ...]) -> int:
    """Numbers in an array of that shape."""
    return math.prod(shape)


def kept(fraction: float, numbers: int) -> int:
    """How many of so many numbers are sent: at least one, unless there are none."""
    return min(numbers, max(1, math.ceil(fraction * numbers)))


_EXPONENT = ":exponent"
_TOP = 15
# 2^15 is the largest power of two that half precision holds.
_LARGEST = 300
# Beyond every exponent of a float32.


class Fp16(Compressor):
    """Half precision: ten bits of mantissa a number, under one power of two for each tensor.

    Without the common exponent a weighted update could overflow half precision (65504), or its small numbers vanish.
    With it, which puts the tensor's largest number between 2^14 and 2^15, the error of a number is at most 2^-11 of it,
    or 2^-39 of the largest where that is more: rounding is to the nearest, so it is no unbiased estimate, but closer
    than any.

    On the wire: `w` float16 of the tensor's shape, and `w:exponent` float32 (1,).
    """

    def layout(self, shapes: Shapes) -> dict[str, Form]:
        """See Compressor."""
        values = {name: Form(np.dtype(np.float16), shape) for name, shape in shapes.items()}
        return values | {name + _EXPONENT: Form(np.dtype(np.float32), (1,)) for name in shapes}

    def encode(self, arrays: Arrays, source: GaussianSource, warm: Arrays) -> Encoded:
        """See Compressor; nothing is random and nothing is remembered."""
        wire: Wire = {}
        for name, array in arrays.items():
            exponent = int(np.frexp(np.abs(array).max(initial=0))[1]) - _TOP
            wire[name] = np.ldexp(array, -exponent).astype(np.float16)
            wire[name + _EXPONENT] = np.array([exponent], np.float32)
        return Encoded(wire, {})

    def decode(self, wire: Wire, shapes: Shapes) -> Arrays:
        """See Compressor."""
        arrays: Arrays = {}
        for name in shapes:
            exponent = float(finite(name + _EXPONENT, wire[name + _EXPONENT])[0])
            values = finite(name, wire[name]).astype(np.float32)
            with np.errstate(over="ignore"):
                arrays[name] = np.ldexp(values, int(np.clip(exponent, -_LARGEST, _LARGEST)))
        return arrays


_CODES, _SCALES = ":codes", ":scales"
_ZERO = 8
_LEVELS = {8: 127, 4: 7}


@dataclass(frozen=True)
class Stochastic(Compressor):
    """Stochastic quantisation (QSGD: Alistarh, Grubic, Li, Tomioka, Vojnovic 2017, section 3.1), to 8 or 4 bits a
    number.

    A block of consecutive numbers shares a scale s, the largest magnitude in it (section 4 of the paper: buckets,
    scaled by the maximum), and is rounded to multiples of s / L, L = 127 or 7, up or down at random so that the mean is
    the number itself. The error is below s / L, its variance at most (s / L)^2 / 4.

    Four bits: codes -7 .. 7 are stored as 1 .. 15, two to a byte, the earlier one in the lower half; an odd number of
    codes is filled up with 8, the code of zero.

    On the wire: `w:codes` int8 (d,), or uint8 ((d + 1) / 2,), and `w:scales` float32 (blocks,).
    """

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


_VALUES, _POSITIONS = "values", "positions"


@dataclass(frozen=True)
class LargestK(Compressor):
    """Top-k: the k numbers of an update with the largest magnitude (Stich, Cordonnier, Jaggi 2018, definition 2.1).

    It is biased: used by itself it may stop away from the optimum. With what was not sent added to the next update
    (error feedback: Karimireddy, Rebjock, Stich, Jaggi 2019, algorithm 1) nothing is lost, only late.

    On the wire: `values` float32 (k,) and their `positions` among all d numbers of the update, tensor after tensor by
    name.
    """

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
    """How `count` positions among `numbers` travel: as a list or as a map of bits, whichever is shorter.

    A list has two bytes a position up to d = 65536 and four beyond; a map has d / 8 bytes, and is shorter where more
    than one number in 16, or in 32, is sent.
    """
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


_LEFT, _RIGHT = ":left", ":right"
_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class LowRank(Compressor):
    """PowerSGD (Vogels, Karimireddy, Jaggi 2019, algorithm 1): each matrix as the product of two thin ones.

    One step of power iteration an update, from where the last one ended (warm start, section 4.2): P = M Q, made
    orthonormal, then Q = M^T P; P Q^T is what M becomes. Every site iterates by itself and sends both factors: the
    paper adds up P over the workers before it goes on, in two exchanges, where all have to be there for both.

    A tensor of more than two dimensions is a matrix of its first by all others; a vector, and a matrix that the factors
    are no smaller than, travels as it is.

    On the wire: `w:left` float32 (n, r) with orthonormal columns and `w:right` float32 (m, r); or `w` as it is.
    """

    rank: int

    def layout(self, shapes: Shapes) -> dict[str, Form]:
        """See Compressor."""
        forms = {}
        for name, shape in shapes.items():
            if rank := self._rank(shape):
                rows, columns = _sides(shape)
                forms[name + _LEFT] = Form(_FLOAT, (rows, rank))
                forms[name + _RIGHT] = Form(_FLOAT, (columns, rank))
            else:
                forms[name] = Form(_FLOAT, shape)
        return forms

    def encode(self, arrays: Arrays, source: GaussianSource, warm: Arrays) -> Encoded:
        """See Compressor; what is remembered is each matrix's right factor, random the first time."""
        wire: Wire = {}
        factors: Arrays = {}
        for name, array in arrays.items():
            rank = self._rank(array.shape)
            if not rank:
                wire[name] = array.copy()
                continue
            matrix = array.reshape(_sides(array.shape))
            start = warm.get(name)
            if start is None or start.shape != (matrix.shape[1], rank):
                start = source.standard(matrix.shape[1] * rank).numpy().reshape(-1, rank).astype(np.float32)
            left = np.linalg.qr(matrix @ start)[0]
            factors[name] = matrix.T @ left
            wire[name + _LEFT], wire[name + _RIGHT] = left, factors[name]
        return Encoded(wire, factors)

    def decode(self, wire: Wire, shapes: Shapes) -> Arrays:
        """See Compressor."""
        return {name: self._array(wire, name, shape) for name, shape in shapes.items()}

    def _array(self, wire: Wire, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if not self._rank(shape):
            return np.array(finite(name, wire[name]))
        left, right = (finite(name + side, wire[name + side]) for side in (_LEFT, _RIGHT))
        with np.errstate(over="ignore", invalid="ignore"):
            product: NDArray[np.float32] = left @ right.T
        return product.reshape(shape)

    def _rank(self, shape: tuple[int, ...]) -> int:
        """Columns of the factors; 0: it travels as it is."""
        if len(shape) < 2:
            return 0
        rows, columns = _sides(shape)
        rank = min(self.rank, rows, columns)
        return rank if rank * (rows + columns) < size(shape) else 0


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], size(shape[1:])
