"""The coordinate-wise median.

Yin, Chen, Ramchandran, Bartlett 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
Definition 1 and Algorithm 1, option I (https://arxiv.org/abs/1803.01498).
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedclaw.protocol.arrays import Arrays
from fedclaw.strategies.robust import RobustStrategy, Updates, columns


class Median(RobustStrategy):
    """In each coordinate the median of the sites' updates; of an even number the mean of the two in the middle.

    While less than half of the sites are hostile, every coordinate lies between two honest values. Needs no guess of
    their number. Examples are not weighed. Where honest sites differ a lot, the median of a coordinate is no mean of
    theirs, and what a few sites alone have to say is lost.
    """

    name: ClassVar[str] = "median"

    @property
    def fewest(self) -> int:
        """Three: the median of one or two is their mean."""
        return 3

    def robust_aggregate(self, updates: Updates, weights: NDArray[np.float64], state: Mapping[str, Arrays]) -> Updates:
        """See Strategy; `weights` are not looked at."""
        self.check_number(updates)
        low, high = (len(updates) - 1) // 2, len(updates) // 2
        result = np.empty(updates.shape[1], np.float32)
        for part in columns(updates):
            rows = np.partition(updates[:, part], (low, high), axis=0)
            result[part] = (rows[low].astype(np.float64) + rows[high]) / 2
        return result
