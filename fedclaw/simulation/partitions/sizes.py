"""Clients that differ in nothing, or in how much they have."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.simulation.partitions.base import USUAL_MINIMUM, Hand, Indices, PartitionMethod, apportion
from fedclaw.simulation.partitions.transforms import Transform


class Iid(PartitionMethod):
    """Shuffled and dealt evenly: sizes differ by at most one."""

    name: Literal["iid"] = "iid"

    def assign(self, hand: Hand) -> tuple[Sequence[Indices], Transform | None]:
        """A permutation, cut evenly."""
        return hand.even(hand.generator.permutation(len(hand.targets))), None


class Quantity(PartitionMethod):
    """Sizes differ by a law, labels do not: the rows are shuffled, then cut.

    Quantity skew of Li, Diao, Chen, He 2022, "Federated learning on non-IID data silos", section 3, whose law is the
    Dirichlet one; power-law sizes as in Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith 2020, "Federated optimization in
    heterogeneous networks" (FedProx), section 5. So that the law can be seen, the minimum, where it is null, is a tenth
    of an even split, or 20 where that is less.
    """

    name: Literal["quantity"] = "quantity"
    law: Literal["power", "lognormal", "dirichlet"] = "lognormal"
    """power: a size is proportional to a Pareto number with the tail exponent 1 / spread; lognormal: to
    exp(spread x a standard normal number); dirichlet: sizes are shares of a Dirichlet(1 / spread) draw."""
    spread: float = Field(default=1.0, gt=0, le=100)
    """Larger means more unequal sizes, whatever the law."""

    def fewest(self, examples: int, clients: int) -> int:
        """`minimum`, or what null stands for."""
        return self.minimum or max(1, min(USUAL_MINIMUM, examples // (10 * clients)))

    def assign(self, hand: Hand) -> tuple[Sequence[Indices], Transform | None]:
        """Draw the sizes, shuffle, cut."""
        sizes = apportion(self._weights(hand), len(hand.targets), hand.fewest)
        rows = hand.generator.permutation(len(hand.targets))
        return np.split(rows, np.cumsum(sizes)[:-1]), None

    def _weights(self, hand: Hand) -> NDArray[np.float64]:
        """(K,) positive, the largest 1. Worked out as logarithms: a wide law's own numbers are beyond a double's."""
        if self.law == "dirichlet":
            # Gamma(a) is Gamma(a + 1) x U^(1/a) (Marsaglia and Tsang 2000, section 6), which a small a does not
            # bring to zero.
            shape = 1 / self.spread
            uniform = np.log1p(-hand.generator.random(hand.clients))
            logarithms = np.log(hand.generator.standard_gamma(shape + 1, hand.clients)) + uniform / shape
        elif self.law == "power":
            logarithms = self.spread * hand.generator.standard_exponential(hand.clients)
        else:
            logarithms = self.spread * hand.generator.standard_normal(hand.clients)
        weights: NDArray[np.float64] = np.exp(np.maximum(logarithms - logarithms.max(), -700.0))
        return weights
