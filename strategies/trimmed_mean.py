"""The coordinate-wise trimmed mean.

Yin, Chen, Ramchandran, Bartlett 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
Definition 2 and Algorithm 1, option II (https://arxiv.org/abs/1803.01498).
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedclaw.protocol.arrays import Arrays
from fedclaw.strategies.robust import HostileCount, Updates, columns


class TrimmedMean(HostileCount):
    """In each coordinate the mean of what is left without the f largest and the f smallest values.

    The paper's beta is f / n. Every coordinate lies between two honest values while no more than f sites are hostile.
    Closer to the mean than the median is, so better where sites differ. Examples are not weighed.
    """

    name: ClassVar[str] = "trimmed_mean"

    @property
    def fewest(self) -> int:
        """2 f + 1: one value has to be left."""
        return 2 * self.hostile + 1

    def robust_aggregate(self, updates: Updates, weights: NDArray[np.float64], state: Mapping[str, Arrays]) -> Updates:
        """See Strategy; `weights` are not looked at."""
        self.check_number(updates)
        first, end = self.hostile, len(updates) - self.hostile
        result = np.empty(updates.shape[1], np.float32)
        for part in columns(updates):
            rows = np.partition(updates[:, part], (first, end - 1), axis=0)
            result[part] = rows[first:end].mean(axis=0, dtype=np.float64)
        return result
