"""What the methods share whose form of an update is each site's own.

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
from fedclaw.protocol.arrays import Arrays, Form, Shapes, Wire


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
