"""What every way of dealing rows to clients has in common: the settings' base, and the hand that it deals.

Legend: N rows, K clients, D shape of one input.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.errors import Setting, UsageError
from fedclaw.privacy.units import Units
from fedclaw.protocol.frozen import Frozen
from fedclaw.simulation.partitions.transforms import Transform

Indices = NDArray[np.int64]
Inputs = NDArray[Any]
"""(N, *D) of whichever number type the data set has."""

USUAL_MINIMUM = 20
"""A client's fewest examples where `minimum` is null and an even split gives it at least twice as many."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Who has which rows. Client k has `rows[bounds[k]:bounds[k + 1]]`, in random order."""

    method: "PartitionMethod"
    rows: Indices
    """(N,), each row of the data once, client after client."""
    bounds: Indices
    """(K + 1,), from 0 to N, rising."""
    transform: Transform | None = None
    """What each client does to its inputs; None: it has them as they are."""

    @property
    def clients(self) -> int:
        """K."""
        return len(self.bounds) - 1

    @cached_property
    def sizes(self) -> Indices:
        """(K,) examples by client."""
        return np.diff(self.bounds)

    @cached_property
    def shares(self) -> tuple[Indices, ...]:
        """The rows of each client: views, nothing is copied."""
        return tuple(np.split(self.rows, self.bounds[1:-1]))

    @cached_property
    def owners(self) -> Indices:
        """(N,) the client that has each row of the data."""
        owners = np.empty(len(self.rows), np.int64)
        owners[self.rows] = np.repeat(np.arange(self.clients), self.sizes)
        return owners

    def by_row(self, units: Units) -> "Partition":
        """The same of the rows of `units`, which are what was dealt here."""
        bounds = np.concatenate([[0], np.cumsum(units.sizes[self.rows])])[self.bounds]
        return replace(self, rows=units.rows_of(self.rows), bounds=bounds)

    def inputs(self, client: int, inputs: Inputs) -> Inputs:
        """(n, *D): that client's inputs of the data's (N, *D), as its own instruments give them.

        They do not depend on which other clients were looked at, or on how often.
        """
        chosen = inputs[self.shares[client]]
        return chosen if self.transform is None else self.transform.apply(client, chosen)


class PartitionMethod(Frozen, ABC):
    """conf/partition/*.yaml: a way of dealing rows to clients. Pure: the generator's state decides the hand."""

    moves_rows: ClassVar[bool] = True
    """Whether it decides which client has a row, whatever site the row is from."""
    minimum: int | None = Field(default=None, ge=1)
    """Fewest examples of a client. null: 20, or half of an even split where that is less, unless a method says else."""

    @property
    def label(self) -> str:
        """The method and what counts of its settings, in a line."""
        shown = self._shown()
        name = shown.pop("name")
        settings = [
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
        ]
        return ", ".join([name, *settings])

    def _shown(self) -> dict[str, Any]:
        """The settings that count."""
        return self.model_dump(mode="json", exclude={"minimum"}, exclude_none=True)

    def deal(
        self,
        targets: Indices,
        inputs: Inputs,
        clients: int,
        generator: np.random.Generator,
        *,
        sites: NDArray[Any] | None = None,
        persons: Indices | None = None,
    ) -> Partition:
        """Deal rows with `targets` (N,) and `inputs` (N, *D) to `clients`: every row once, and to each its minimum.

        `sites` (N,) says which site a row is from, where the data set knows; `persons` (N,) whose it is, numbered from
        0. Persons are dealt with all of their rows, by what their first row is, and the minimum counts them; but where
        rows stay at the site that they are from, a person may be at several. Raises UsageError naming the setting that
        the data cannot bear.
        """
        if persons is not None and self.moves_rows:
            own = Units.of(persons)
            return self.deal(targets[own.firsts], inputs[own.firsts], clients, generator).by_row(own)
        if clients < 1:
            raise UsageError(f"clients: there must be at least one (given: {clients})")
        hand = Hand(targets, inputs, clients, self.fewest(len(targets), clients), generator, sites)
        if hand.fewest * clients > len(targets):
            raise UsageError(
                Setting("partition.minimum"),
                f": {hand.fewest} examples for each of {clients} clients are "
                f"{hand.fewest * clients}, and there are {len(targets)}; have fewer clients or a smaller minimum",
            )
        shares, transform = self.assign(hand)
        # The first rows of a client may be held out for testing: which they are must not tell what they are.
        rows = np.concatenate([generator.permutation(share) for share in shares])
        bounds = np.concatenate([[0], np.cumsum([len(share) for share in shares])])
        return Partition(self, rows.astype(np.int64, copy=False), bounds.astype(np.int64), transform)

    def fewest(self, examples: int, clients: int) -> int:
        """`minimum`, or what null stands for."""
        if self.minimum is not None:
            return self.minimum
        return max(1, min(USUAL_MINIMUM, examples // (2 * clients)))

    @abstractmethod
    def assign(self, hand: "Hand") -> tuple[Sequence[Indices], Transform | None]:
        """Row indices by client, and what clients do to inputs; `deal` has checked that the minimum can be given."""


@dataclass(frozen=True, eq=False)
class Hand:
    """What is to be dealt, and to how many."""

    targets: Indices
    inputs: Inputs
    clients: int
    fewest: int
    generator: np.random.Generator
    sites: NDArray[Any] | None

    def even(self, order: Indices) -> list[Indices]:
        """`order` cut in K runs whose sizes differ by at most one."""
        return np.array_split(order, self.clients)

    def require_minimum(self, shares: Sequence[Indices], remedy: str) -> None:
        """For methods that move no rows: raise UsageError, which says how to mend it, if a client has too few."""
        smallest = min(range(len(shares)), key=lambda client: len(shares[client]))
        if len(shares[smallest]) < self.fewest:
            raise UsageError(
                Setting("partition.minimum"),
                f": client {smallest} would have {len(shares[smallest])} examples, fewer than {self.fewest}; {remedy}",
            )


def apportion(weights: NDArray[np.float64], total: int, fewest: int) -> Indices:
    """Whole numbers that add up to `total`, as near to proportional to `weights` as `fewest` for each allows.

    Who would get less than `fewest` gets that, the others share the rest in proportion; fractions are rounded by
    largest remainder, the first winning a tie. `total` is at least len(weights) x fewest, and a weight is positive.
    """
    held = np.zeros(len(weights), bool)
    while True:
        left = total - fewest * int(held.sum())
        free = np.where(held, 0.0, weights)
        quota = np.where(held, float(fewest), free / max(free.sum(), np.finfo(float).tiny) * left)
        short = ~held & (quota < fewest)
        if not short.any():
            break
        held |= short
        if held.all():
            quota = np.full(len(weights), total / len(weights))
            break
    whole = np.floor(quota).astype(np.int64)
    after = np.argsort(whole - quota, kind="stable")[: total - int(whole.sum())]
    whole[after] += 1
    return whole
