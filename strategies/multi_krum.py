"""Multi-Krum: the mean of the updates that have the most company.

Blanchard, El Mhamdi, Guerraoui, Stainer 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", section 6 (https://papers.nips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html). That a mean
of as many as n - f - 2 still withstands f hostile sites: Damaskinos, El Mhamdi, Guerraoui, Guirguis, Rouault 2019,
"AggregaThor: Byzantine Machine Learning via Robust Gradient Aggregation", section 2.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.protocol.arrays import Arrays
from fedclaw.strategies.krum import scores
from fedclaw.strategies.robust import HostileCount, Updates, mean_of, squared_distances


class MultiKrum(HostileCount):
    """The plain mean of the m updates with the best of Krum's scores; of equals the first.

    Between Krum (keep: 1) and the mean (keep: n, which withstands nothing). Examples are not weighed.
    """

    name: ClassVar[str] = "multi_krum"

    keep: int | None = Field(default=None, ge=1)
    """m: updates that are averaged, fewer where fewer come; null: n - f - 2."""

    @property
    def fewest(self) -> int:
        """2 f + 3, as for Krum."""
        return 2 * self.hostile + 3

    def robust_aggregate(self, updates: Updates, weights: NDArray[np.float64], state: Mapping[str, Arrays]) -> Updates:
        """See Strategy; `weights` are not looked at."""
        self.check_number(updates)
        keep = self.keep or len(updates) - self.hostile - 2
        best = np.argsort(scores(squared_distances(updates), self.hostile), kind="stable")
        return mean_of(updates, best[:keep].tolist())
