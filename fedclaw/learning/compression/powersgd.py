"""PowerSGD (Vogels, Karimireddy, Jaggi 2019, algorithm 1): each matrix as the product of two thin ones.

One step of power iteration an update, from where the last one ended (warm start, section 4.2): P = M Q, made
orthonormal, then Q = M^T P; P Q^T is what M becomes. Every site iterates by itself and sends both factors: the paper
adds up P over the workers before it goes on, in two exchanges, where all have to be there for both.

A tensor of more than two dimensions is a matrix of its first by all others; a vector, and a matrix that the factors are
no smaller than, travels as it is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedclaw.learning.compression.compressor import Compressor, Encoded, finite, size
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import Arrays, Form, Shapes, Wire

_LEFT, _RIGHT = ":left", ":right"
_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class LowRank(Compressor):
    """`w:left` float32 (n, r) with orthonormal columns and `w:right` float32 (m, r); or `w` as it is."""

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
