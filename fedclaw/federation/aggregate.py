"""The streaming sum: every answer is added when it arrives and then forgotten."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.federation.arrays import Arrays


class WeightedSum:
    """Sum of `weight x delta` over sites, and of the weights; itself an update of that form.

    Memory: one model, however many sites answer. `add` either adds everything or nothing: an update is checked
    whole before the first element of it is added.
    """

    def __init__(self, template: Mapping[str, NDArray[np.float32]]) -> None:
        self.arrays: Arrays = {name: np.zeros_like(array) for name, array in template.items()}
        self.weight = 0.0
        self.count = 0

    def add(self, arrays: Mapping[str, NDArray[np.float32]], weight: float) -> None:
        """Add one weighted update. Raises UpdateError for wrong names, shapes or weight, NaN or infinity."""
        self._check(arrays, weight)
        for name, total in self.arrays.items():
            with np.errstate(over="ignore"):
                np.add(total, arrays[name], out=total)
        self.weight += weight
        self.count += 1

    def mean(self) -> Arrays:
        """Sum divided by weight, in place: the sum is spent.

        Raises UpdateError when nothing was added, or when finite updates added up to an infinite sum.
        """
        if self.weight <= 0:
            raise UpdateError("no update was added, so there is no mean")
        mean = self.arrays
        for name, array in mean.items():
            np.divide(array, np.float32(self.weight), out=array)
            if not _finite(array):
                raise UpdateError(f"the updates' sum overflowed in parameter {name!r}")
        self.arrays = {}
        return mean

    def _check(self, arrays: Mapping[str, NDArray[np.float32]], weight: float) -> None:
        if not (np.isfinite(weight) and weight > 0):
            raise UpdateError(f"the update's weight is {weight}, expected a positive finite number")
        if arrays.keys() != self.arrays.keys():
            odd = sorted(arrays.keys() ^ self.arrays.keys())
            raise UpdateError(f"the update's parameters are not the model's; missing or unknown: {', '.join(odd)}")
        for name, total in self.arrays.items():
            array = arrays[name]
            if array.shape != total.shape:
                raise UpdateError(f"parameter {name!r} has shape {array.shape}, expected {total.shape}")
            if not _finite(array):
                raise UpdateError(f"parameter {name!r} holds NaN or infinite values")


def _finite(array: NDArray[np.float32]) -> bool:
    """Whether every element is finite; mostly one pass without a temporary.

    A sum of squares is finite only if no element is NaN or infinite; if it is not, an honest overflow is told apart.
    """
    flat = array.reshape(-1)
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.dot(flat, flat)) or np.isfinite(flat).all())
