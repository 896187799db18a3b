"""Top-k: the k numbers of an update with the largest magnitude (Stich, Cordonnier, Jaggi 2018, definition 2.1).

It is biased: used by itself it may stop away from the optimum. With what was not sent added to the next update (error
feedback: Karimireddy, Rebjock, Stich, Jaggi 2019, algorithm 1; `feedback`) nothing is lost, only late.
"""

from dataclasses import dataclass

import numpy as np

from fedclaw.learning.compression import positions
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
            _POSITIONS: positions.form(count, numbers),
        }

    def encode(self, arrays: Arrays, source: GaussianSource, warm: Arrays) -> Encoded:
        """See Compressor; nothing is random."""
        flat = flattened(arrays)
        count = kept(self.fraction, flat.size)
        chosen = np.sort(np.argpartition(np.abs(flat), flat.size - count)[flat.size - count :])
        return Encoded({_VALUES: flat[chosen], _POSITIONS: positions.coded(chosen, flat.size)}, {})

    def decode(self, wire: Wire, shapes: Shapes) -> Arrays:
        """See Compressor."""
        flat = np.zeros(sum(size(shape) for shape in shapes.values()), np.float32)
        values = finite(_VALUES, wire[_VALUES])
        flat[positions.read(wire[_POSITIONS], len(values), flat.size)] = values
        return unflattened(flat, shapes)
