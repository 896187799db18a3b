"""Norm bounding: no update is longer than a bound.

Sun, Kairouz, Suresh, McMahan 2019, "Can You Really Backdoor Federated Learning?", section 4, "norm thresholding of
updates" (https://arxiv.org/abs/1911.07963).
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.protocol.arrays import Arrays
from fedclaw.strategies.robust import RobustStrategy, Updates, columns, weighted_sum


class NormBounding(RobustStrategy):
    """The plain mean of the updates, each scaled down to the L2 norm M if it is longer.

    A site moves the model by M / n in a round and no further, in a direction of its choice, every round: it takes the
    force from scaled updates (model replacement) and leaves patient ones alone. Examples are not weighed.

    The server clips, each update by itself, so it has to see them: a hostile site would not clip its own, and within
    secure aggregation nobody could tell.
    """

    name: ClassVar[str] = "norm_bounding"

    bound: float | None = Field(default=None, gt=0)
    """M; null: the median of the round's norms, which less than half of the sites cannot push beyond honest ones."""

    @property
    def fewest(self) -> int:
        """Three, for a median; one, where the bound is given."""
        return 3 if self.bound is None else 1

    def robust_aggregate(self, updates: Updates, weights: NDArray[np.float64], state: Mapping[str, Arrays]) -> Updates:
        """See Strategy; `weights` are not looked at."""
        self.check_number(updates)
        norms = np.sqrt(sum(np.square(updates[:, part], dtype=np.float64).sum(axis=1) for part in columns(updates)))
        return weighted_sum(updates, within(norms, self.bound) / len(updates))


def within(norms: NDArray[np.float64], bound: float | None) -> NDArray[np.float64]:
    """Factors (n,) that bring vectors of these norms within `bound`, or else within their median norm."""
    limit = float(np.median(norms)) if bound is None else bound
    factors = np.ones_like(norms)
    np.divide(limit, norms, out=factors, where=norms > limit)
    return factors
