"""What the strategies share that hold against sites which send whatever they like: they see every update by itself.

All of them ignore example weights but RFA (`rfa`), and that one knows none but those that the run caps:
nobody can check how many examples a site really has, and a weight that a site may choose would give it any share of a
weighted result.

Legend: n updates, d numbers in one, f updates that may be anything.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.errors import Reason, Setting, UpdateError
from fedclaw.learning.strategy import Strategy

if TYPE_CHECKING:
    import torch

    from fedclaw.protocol.terms import RoundRules

_CHUNK = 1 << 20
"""Numbers that are worked on at a time: 8 MiB in float64, whatever n and d are."""

Floats = NDArray[np.float64]
Updates = NDArray[np.float32]


class RobustStrategy(Strategy):
    """Combines single updates and takes the result as FedAvg takes the mean: w <- w + server_learning_rate * result."""

    needs_single_updates: ClassVar[bool] = True

    server_learning_rate: float = Field(default=1.0, gt=0)
    """Part of the combined update that is taken, as in FedAvg."""

    @property
    @abstractmethod
    def fewest(self) -> int:
        """Updates below which the strategy promises nothing; a round with fewer does not count."""

    def byzantine_tolerance(self, sites: int) -> int:
        """Less than half of the sites, where there are enough of them."""
        return (sites - 1) // 2 if sites >= self.fewest else 0

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """The same as FedAvg's: the whole difference is in what takes the mean's place."""
        import torch

        return torch.optim.SGD(parameters, lr=self.server_learning_rate)

    def refuse_rules(self, rules: "RoundRules") -> str | None:
        """A round that may count with fewer updates than `fewest`."""
        if rules.minimum >= self.fewest:
            return None
        return Reason(
            f"{self._demand()}, and a round of this run counts with {rules.minimum}: set ",
            Setting("sites.minimum"),
            f" to {self.fewest} or more, or expect fewer hostile sites",
        )

    def check_number(self, updates: Updates) -> None:
        """Raise UpdateError when there are too few of them."""
        if len(updates) < self.fewest:
            raise UpdateError(f"strategy {self.name!r} {self._demand()}, and {len(updates)} came")

    def _demand(self) -> str:
        return f"needs the updates of at least {self.fewest} sites"


class HostileCount(RobustStrategy):
    """A robust strategy that is told how many sites may be hostile."""

    hostile: int = Field(default=1, ge=0)
    """f: sites that may send anything at all and work together. More of them, and nothing is promised."""

    def byzantine_tolerance(self, sites: int) -> int:
        """As many as it was told to expect."""
        return self.hostile if sites >= self.fewest else 0

    def _demand(self) -> str:
        return f"with hostile: {self.hostile} needs the updates of at least {self.fewest} sites"


def columns(updates: Updates) -> Iterator[slice]:
    """Parts of the d coordinates that are small enough to be worked on at once."""
    size = max(1, _CHUNK // max(1, len(updates)))
    return (slice(start, start + size) for start in range(0, updates.shape[1], size))


def gram(updates: Updates, origin: Updates | None = None) -> Floats:
    """Inner products (n, n) of the updates in float64, in which a product of two float32 numbers is exact.

    With `origin` (d,), of what the updates are away from it.
    """
    products = np.zeros((len(updates), len(updates)))
    for part in columns(updates):
        block = updates[:, part].astype(np.float64)
        if origin is not None:
            block -= origin[part]
        products += block @ block.T
    return products


def distances_to(coefficients: Floats, products: Floats) -> Floats:
    """|u_k - sum_i coefficients_i u_i|, (n,), from the inner products (n, n) of the u."""
    along = products @ coefficients
    squares: Floats = coefficients @ along - 2 * along + np.diag(products)
    return np.sqrt(np.maximum(squares, 0.0))


def squared_distances(updates: Updates) -> Floats:
    """|u_i - u_j|^2, (n, n), never below 0 and 0 on the diagonal."""
    products = gram(updates)
    squares = np.diag(products)
    distances: Floats = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0)
    np.fill_diagonal(distances, 0.0)
    return distances


def weighted_sum(updates: Updates, coefficients: Floats) -> Updates:
    """sum_k coefficients_k u_k, (d,), added up in float64."""
    total = np.empty(updates.shape[1], np.float32)
    for part in columns(updates):
        total[part] = coefficients @ updates[:, part].astype(np.float64)
    return total


def mean_of(updates: Updates, chosen: Sequence[int]) -> Updates:
    """The plain mean (d,) of the chosen updates."""
    coefficients = np.zeros(len(updates))
    coefficients[list(chosen)] = 1 / len(chosen)
    return weighted_sum(updates, coefficients)
