"""Krum: the one update that has the most company.

Blanchard, El Mhamdi, Guerraoui, Stainer 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", section 4 (https://papers.nips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html).
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedclaw.protocol.arrays import Arrays
from fedclaw.strategies.robust import Floats, HostileCount, Updates, mean_of, squared_distances


class Krum(HostileCount):
    """The update whose n - f - 2 nearest others are nearest to it; of equals the first.

    The result is an update that a site really sent, in full: one site's update a round, so learning is slower than
    with a mean, and what that site alone knows enters the model unaveraged. Examples are not weighed.
    """

    name: ClassVar[str] = "krum"

    @property
    def fewest(self) -> int:
        """2 f + 3 (Proposition 1)."""
        return 2 * self.hostile + 3

    def robust_aggregate(self, updates: Updates, weights: NDArray[np.float64], state: Mapping[str, Arrays]) -> Updates:
        """See Strategy; `weights` are not looked at."""
        self.check_number(updates)
        best = int(np.argmin(scores(squared_distances(updates), self.hostile)))
        return mean_of(updates, [best])


def scores(distances: Floats, hostile: int) -> Floats:
    """For each of n updates the sum of its squared distances (n, n) to the n - hostile - 2 nearest others.

    Of at least one, as Bulyan asks for the best of fewer than Krum needs.
    """
    others = distances + np.diag(np.full(len(distances), np.inf))
    near = max(1, len(distances) - hostile - 2)
    total: Floats = np.partition(others, near - 1, axis=1)[:, :near].sum(axis=1)
    return total
