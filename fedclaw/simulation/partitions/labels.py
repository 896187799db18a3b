"""Clients that differ in their labels: by a Dirichlet draw, or by shards of the sorted data."""

import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from fedclaw.errors import Setting, UsageError
from fedclaw.simulation.partitions.base import Hand, Indices, PartitionMethod, apportion
from fedclaw.simulation.partitions.transforms import Transform

DRAWS = 100
"""How often a hand is drawn before rows are moved instead: a small alpha may never deal every client enough."""
PATIENCE = 10_000
"""Draws times clients, at most: the more clients, the less likely is it that another draw gives each its minimum."""


class Dirichlet(PartitionMethod):
    """Each label is dealt out by its own Dirichlet(alpha) draw over the clients.

    The label-wise form of Hsu, Qi, Brown 2019, "Measuring the effects of non-identical data distribution for
    federated visual classification", section 3: they draw each client's mixture of labels, of equal sizes; here, as
    is usual since, each label's mixture of clients is drawn, so that all rows are dealt and sizes differ too.

    Every client gets the minimum by drawing again, and, when that has failed often enough, by moving rows of the
    last draw from the largest clients to the smallest.
    """

    name: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(default=1.0, gt=0)
    """Concentration: smaller means more different clients."""

    def assign(self, hand: Hand) -> tuple[Sequence[Indices], Transform | None]:
        """One draw for each label, then the minimum."""
        by_label = [np.flatnonzero(hand.targets == label) for label in np.unique(hand.targets)]
        for _ in range(max(1, min(DRAWS, PATIENCE // hand.clients))):
            order, owners = self._draw(by_label, hand)
            sizes = np.bincount(owners, minlength=hand.clients)
            if sizes.min() >= hand.fewest:
                break
        rows = order[np.argsort(owners, kind="stable")]
        shares = np.split(rows, np.cumsum(sizes)[:-1])
        return fill_up(shares, hand.fewest), None

    def _draw(self, by_label: list[Indices], hand: Hand) -> tuple[Indices, Indices]:
        """The rows, label after label, and who gets each."""
        order, owners = [], []
        for label_rows in by_label:
            rows = hand.generator.permutation(label_rows)
            shares = hand.generator.dirichlet(np.full(hand.clients, self.alpha))
            cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(int)
            order.append(rows)
            owners.append(np.searchsorted(cuts, np.arange(len(rows)), side="right"))
        return np.concatenate(order), np.concatenate(owners)


class Shards(PartitionMethod):
    """The data sorted by label is cut in clients x shards pieces of about equal size, and each client gets `shards`.

    McMahan, Moore, Ramage, Hampson, Agüera y Arcas 2017, "Communication-efficient learning of deep networks from
    decentralized data", section 3 (200 shards of MNIST's 60,000 images, two for each of 100 clients). Theirs are
    exactly equal, so that a shard may lie across two labels; here, where there are at least as many shards as labels,
    cuts fall on the labels' borders: a client then has at most `shards` labels. No row is moved to reach the minimum,
    which is 1 where it is null.
    """

    name: Literal["shards"] = "shards"
    shards: int = Field(default=2, ge=1)
    """Shards for each client."""

    def fewest(self, examples: int, clients: int) -> int:
        """`minimum`, or 1."""
        return self.minimum or 1

    def assign(self, hand: Hand) -> tuple[Sequence[Indices], Transform | None]:
        """Sort, cut, and deal the pieces at random."""
        pieces = hand.clients * self.shards
        if pieces > len(hand.targets):
            raise UsageError(
                Setting("partition.shards"),
                f": {self.shards} for each of {hand.clients} clients are {pieces} shards of "
                f"{len(hand.targets)} examples; have fewer clients or shards",
            )
        order = hand.generator.permutation(len(hand.targets))
        rows = order[np.argsort(hand.targets[order], kind="stable")]
        cuts = np.cumsum(self._piece_sizes(hand, pieces))[:-1]
        shards = np.split(rows, cuts)
        dealt = hand.generator.permutation(pieces).reshape(hand.clients, self.shards)
        shares = [np.concatenate([shards[piece] for piece in mine]) for mine in dealt]
        hand.require_minimum(shares, "a shard is small where its label is rare: have fewer shards or a smaller minimum")
        return shares, None

    def _piece_sizes(self, hand: Hand, pieces: int) -> Indices:
        counts = np.unique(hand.targets, return_counts=True)[1]
        if pieces < len(counts):
            return apportion(np.ones(pieces), len(hand.targets), 1)
        # Quotas of largest remainder never exceed a label's rows: there are no more pieces than rows.
        sizes = [
            apportion(np.ones(number), count, 1) for number, count in zip(_pieces(counts, pieces), counts, strict=True)
        ]
        return np.concatenate(sizes)


def _pieces(counts: Indices, pieces: int) -> Indices:
    """In how many pieces each label is cut."""
    return apportion(counts.astype(float), pieces, 1)


def fill_up(shares: Sequence[Indices], fewest: int) -> list[Indices]:
    """`shares` after single rows went from the largest to the smallest, the first of equals, until each has `fewest`.

    Nobody is both: there are rows enough, so that a giver has more than `fewest`.
    """
    smallest = [(len(share), client) for client, share in enumerate(shares) if len(share) < fewest]
    if not smallest:
        return list(shares)
    largest = [(-len(share), client) for client, share in enumerate(shares)]
    heapq.heapify(smallest)
    heapq.heapify(largest)
    changed: dict[int, list[int]] = {}
    while smallest:
        size, poor = heapq.heappop(smallest)
        negative, rich = largest[0]
        taken = changed.setdefault(rich, shares[rich].tolist()).pop()
        changed.setdefault(poor, shares[poor].tolist()).append(taken)
        heapq.heapreplace(largest, (negative + 1, rich))
        if size + 1 < fewest:
            heapq.heappush(smallest, (size + 1, poor))
    return [np.array(changed[client], np.int64) if client in changed else share for client, share in enumerate(shares)]
