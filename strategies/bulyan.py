"""Bulyan: Krum chooses updates, and each coordinate is then taken from the middle of what was chosen.

El Mhamdi, Guerraoui, Rouault 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium", section 4
(https://arxiv.org/abs/1802.07927).
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedclaw.protocol.arrays import Arrays
from fedclaw.strategies.krum import scores
from fedclaw.strategies.robust import Floats, HostileCount, Updates, columns, squared_distances


class Bulyan(HostileCount):
    """Krum's choice is set aside n - 2f times; in each coordinate, the mean of the n - 4f values nearest their median.

    Against what distance alone does not see: an update that is close to the others by its norm and far off in a few
    coordinates. Dear in sites: one hostile site in seven, two in eleven, three in fifteen. Examples are not weighed.

    When fewer are left to choose from than Krum needs, its score is of the nearest one alone. Of two values that are
    equally far from the median the smaller one is taken.
    """

    name: ClassVar[str] = "bulyan"

    @property
    def fewest(self) -> int:
        """4 f + 3 (section 4)."""
        return 4 * self.hostile + 3

    def robust_aggregate(self, updates: Updates, weights: NDArray[np.float64], state: Mapping[str, Arrays]) -> Updates:
        """See Strategy; `weights` are not looked at."""
        self.check_number(updates)
        chosen = selection(squared_distances(updates), self.hostile)
        result = np.empty(updates.shape[1], np.float32)
        for part in columns(updates):
            rows = np.sort(updates[chosen, part], axis=0).astype(np.float64)
            result[part] = _middle_mean(rows, len(rows) - 2 * self.hostile)
        return result


def selection(distances: Floats, hostile: int) -> list[int]:
    """The n - 2 hostile updates that Krum names one after another, each time among those that are left."""
    left, chosen = list(range(len(distances))), []
    for _ in range(len(distances) - 2 * hostile):
        best = int(np.argmin(scores(distances[np.ix_(left, left)], hostile)))
        chosen.append(left.pop(best))
    return chosen


def _middle_mean(rows: Floats, count: int) -> Floats:
    """In each column of `rows`, which are sorted, the mean of the `count` values nearest to the column's median."""
    number, width = rows.shape
    middle = (rows[(number - 1) // 2] + rows[number // 2]) / 2
    # What is nearest to a point is a run of sorted values: the farther end is given up until the run is short enough.
    first, every = np.zeros(width, np.intp), np.arange(width)
    for length in range(number, count, -1):
        last = first + length - 1
        first += middle - rows[first, every] > rows[last, every] - middle
    position = np.arange(number)[:, None]
    inside = (position >= first) & (position < first + count)
    total: Floats = np.where(inside, rows, 0.0).sum(axis=0)
    return total / count
