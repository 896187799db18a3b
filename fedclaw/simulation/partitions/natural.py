"""Clients that are the sites which the rows are from."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.errors import Setting, UsageError
from fedclaw.simulation.partitions.base import Hand, Indices, PartitionMethod
from fedclaw.simulation.partitions.transforms import Transform


class Natural(PartitionMethod):
    """One client for each site that the data names, in the order of the sites' names.

    Where a row is from is what the data set says (`sites` of `deal`), or the value in a column of a table. No row
    leaves its site, so that the minimum, 1 where it is null, is asked of the data, not made.
    """

    name: Literal["natural"] = "natural"
    moves_rows: ClassVar[bool] = False
    column: int | None = Field(default=None, ge=0)
    """The column that tells the site, from 0; null: the data set's own sites."""
    merge: bool = False
    """true: where there are more sites than clients, whole sites share a client, the largest ones being placed first
    and each where there is least. false: their numbers must be the same."""

    def _shown(self) -> dict[str, Any]:
        shown = super()._shown()
        if not self.merge:
            del shown["merge"]
        return shown

    def fewest(self, examples: int, clients: int) -> int:
        """`minimum`, or 1."""
        return self.minimum or 1

    def assign(self, hand: Hand) -> tuple[Sequence[Indices], Transform | None]:
        """Whole sites to clients."""
        names, member, counts = np.unique(self._sites(hand), return_inverse=True, return_counts=True)
        if len(names) < hand.clients or (len(names) > hand.clients and not self.merge):
            more = "" if len(names) < hand.clients else ", or set partition.merge=true"
            raise UsageError(
                Setting("dataset.sites"),
                f": the data is from {len(names)} sites, not from {hand.clients}; have as many{more}",
            )
        owners = _spread(counts, hand.clients)[member] if len(names) > hand.clients else member
        rows = np.argsort(owners, kind="stable")
        sizes = np.bincount(owners, minlength=hand.clients)
        shares = np.split(rows, np.cumsum(sizes)[:-1])
        hand.require_minimum(shares, "that is all its sites have; have a smaller minimum, or merge sites")
        return shares, None

    def _sites(self, hand: Hand) -> NDArray[Any]:
        if self.column is None:
            if hand.sites is None:
                raise UsageError(
                    Setting("partition.column"), ": this data set does not say where a row is from; name a column"
                )
            return hand.sites
        if hand.inputs.ndim != 2 or self.column >= hand.inputs.shape[1]:
            have = (
                f"it has {hand.inputs.shape[1]} columns, counted from 0" if hand.inputs.ndim == 2 else "it is no table"
            )
            raise UsageError(Setting("partition.column"), f": the data has no column {self.column}; {have}")
        column: NDArray[Any] = hand.inputs[:, self.column]
        return column


def _spread(counts: Indices, clients: int) -> Indices:
    """The client of each site: the largest site first, each to the client that has least so far."""
    loads = np.zeros(clients, np.int64)
    homes = np.empty(len(counts), np.int64)
    for site in np.argsort(-counts, kind="stable"):
        home = int(loads.argmin())
        homes[site] = home
        loads[home] += counts[site]
    return homes
