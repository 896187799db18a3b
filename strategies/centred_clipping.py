"""Centred clipping: updates are clipped around the last round's result.

Karimireddy, He, Jaggi 2021, "Learning from History for Byzantine Robust Optimization", section 4 and Algorithm 2
(https://arxiv.org/abs/2012.10333).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.terms import RandomK
from fedclaw.strategies.norm_bounding import within
from fedclaw.strategies.robust import RobustStrategy, Updates, distances_to, gram, weighted_sum

if TYPE_CHECKING:
    import torch

    from fedclaw.learning.strategy import Participation
    from fedclaw.protocol.terms import Terms

CENTRE = "centre"
"""The kind of the server's state: the last round's combined update."""


class CentredClipping(RobustStrategy):
    """v <- v + mean_k (u_k - v) min(1, radius / |u_k - v|), v being what the last round came to (at first 0).

    What has been agreed on so far is the measure, not this round's majority, which a small shift in every round can
    fool. Examples are not weighed. The paper has the sites send momentum, so that honest updates differ little from
    round to round; here they send their deltas, whose noise many local steps have averaged already.
    """

    name: ClassVar[str] = "centred_clipping"

    radius: float | None = Field(default=None, gt=0)
    """tau; null: the median distance from the centre, which less than half of the sites cannot push beyond honest
    ones."""
    iterations: int = Field(default=1, ge=1)
    """L: how often the result is taken as the centre anew within a round."""

    @property
    def fewest(self) -> int:
        """Three, for a median; one, where the radius is given."""
        return 3 if self.radius is None else 1

    def refuse(self, terms: "Terms", model: "torch.nn.Module") -> str | None:
        """Positions that change from round to round leave nothing to measure from."""
        if isinstance(terms.compression, RandomK):
            return (
                "measures from the last round's result, and compression=randk sends other positions in each round; "
                "take another compression"
            )
        return super().refuse(terms, model)

    def server_state(self, parameters: Mapping[str, NDArray[np.float32]]) -> dict[str, Arrays]:
        """The centre: at first an unchanged model."""
        return {CENTRE: {name: np.zeros_like(array) for name, array in parameters.items()}}

    def robust_aggregate(self, updates: Updates, weights: NDArray[np.float64], state: Mapping[str, Arrays]) -> Updates:
        """See Strategy; `weights` are not looked at."""
        self.check_number(updates)
        centre: Updates = np.concatenate([array.reshape(-1) for array in state[CENTRE].values()])
        products, at = gram(updates, centre), np.zeros(len(updates))
        for _ in range(self.iterations):
            # `at` says where v is: the centre plus so much of each update's way from it.
            pull = within(distances_to(at, products), self.radius) / len(updates)
            at = at * (1 - pull.sum()) + pull
        combined: Updates = weighted_sum(updates, at) + centre * np.float32(1 - at.sum())
        return combined

    def aggregate(self, mean: Arrays, state: dict[str, Arrays], participation: "Participation") -> Arrays:
        """Remember what the round came to as the next one's centre."""
        state[CENTRE] = {name: array.copy() for name, array in mean.items()}
        return mean
