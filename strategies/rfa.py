"""Robust federated averaging: the geometric median.

Pillutla, Kakade, Harchaoui 2022, "Robust Aggregation for Federated Learning", section 3 and Algorithm 2, the smoothed
Weiszfeld algorithm (https://arxiv.org/abs/1912.13445).
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.protocol.arrays import Arrays
from fedclaw.strategies.robust import Floats, RobustStrategy, Updates, distances_to, gram, weighted_sum


class Rfa(RobustStrategy):
    """The point with the smallest weighted mean distance from the sites' updates, smoothed within `smoothing` of one.

    The same under rotation, so it suits models better than medians of coordinates, and like them it needs no guess of
    how many sites are hostile. It withstands those that have less than half of the *weight*: every site weighs
    the same, unless the run says weighting=capped, when examples are weighed, as in the paper, up to its cap.

    The paper takes few iterations, as each is an exchange with the sites there, and starts at the mean. Here all
    updates are at hand: it goes on until nothing moves, and begins at the unchanged model, which no site can shift.
    """

    name: ClassVar[str] = "rfa"

    smoothing: float = Field(default=1e-6, gt=0)
    """nu: a site nearer than this counts as if it were this far away."""
    iterations: int = Field(default=1000, ge=1)
    """At most so many; one costs n^2 operations, however large the model is."""
    tolerance: float = Field(default=1e-7, ge=0)
    """It ends when a step is shorter than this times the distance gone."""

    @property
    def fewest(self) -> int:
        """Three: any point between two is as good as another."""
        return 3

    def robust_aggregate(self, updates: Updates, weights: NDArray[np.float64], state: Mapping[str, Arrays]) -> Updates:
        """See Strategy."""
        self.check_number(updates)
        return weighted_sum(updates, self._coefficients(gram(updates), weights / weights.sum()))

    def _coefficients(self, products: Floats, shares: Floats) -> Floats:
        """The geometric median as coefficients (n,) of the updates, from their inner products (n, n).

        Every iterate is a linear combination of the updates, so that its distances follow from the products.
        """
        at = np.zeros(len(products))
        for _ in range(self.iterations):
            pull = shares / np.maximum(distances_to(at, products), self.smoothing)
            before, at = at, pull / pull.sum()
            step = at - before
            if step @ products @ step <= self.tolerance**2 * (at @ products @ at):
                break
        return at
