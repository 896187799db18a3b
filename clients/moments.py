"""Mean and deviation of a stream of blocks, in one pass."""

import numpy as np
from numpy.typing import NDArray


class Moments:
    """Chan, Golub, LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Take in the values (n,) that are not NaN."""
        known = values[~np.isnan(values)]
        if not known.size:
            return
        mean = float(known.mean())
        total = self.count + known.size
        shift = mean - self.mean
        self._squares += float(np.square(known - mean).sum()) + shift**2 * self.count * known.size / total
        self.mean += shift * known.size / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Population standard deviation; 0 for fewer than two different values."""
        return float(np.sqrt(self._squares / self.count)) if self.count else 0.0
