"""Half precision: ten bits of mantissa a number, under one power of two for each tensor.

Without the common exponent a weighted update could overflow half precision (65504), or its small numbers vanish. With
it, which puts the tensor's largest number between 2^14 and 2^15, the error of a number is at most 2^-11 of it, or 2^-39
of the largest where that is more: rounding is to the nearest, so it is no unbiased estimate, but closer than any.
"""

import numpy as np

from fedclaw.learning.compression.compressor import Compressor, Encoded, finite
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import Arrays, Form, Shapes, Wire

_EXPONENT = ":exponent"
_TOP = 15
# 2^15 is the largest power of two that half precision holds.
_LARGEST = 300
# Beyond every exponent of a float32.


class Fp16(Compressor):
    """`w` float16 of the tensor's shape, and `w:exponent` float32 (1,)."""

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
