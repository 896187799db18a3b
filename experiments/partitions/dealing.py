"""A data set dealt to clients: the public rows, the private ones, and who has which of them.

On disk (`experiments.datasets.write_sites`) and in memory (`in_memory`) the same settings deal the same hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.partitions.description import Description, describe
from experiments.sources import DatasetSettings, Source, load_source
from fedclaw.privacy.units import Units
from fedclaw.simulation.partitions.base import Indices, Partition
from fedclaw.simulation.partitions.settings import PartitionSettings


@dataclass(frozen=True, eq=False)
class Dealt:
    """Row numbers are the source's, except those in `partition`, which number the rows of `private`."""

    source: Source
    dataset: DatasetSettings
    public: Indices
    """The coordinator's reference set, in random order."""
    private: Indices
    """Everything else, in random order."""
    partition: Partition

    def rows(self, client: int) -> Indices:
        """The client's rows, a person's together: first those that it holds out for testing, see `held_out`."""
        return self.private[self.partition.shares[client]]

    def inputs(self, client: int) -> NDArray[Any]:
        """The client's inputs in the order of `rows`, in the source's units, as its own instruments give them."""
        chosen = self.source.inputs[self.rows(client)]
        transform = self.partition.transform
        return chosen if transform is None else transform.apply(client, chosen)

    def held_out(self, client: int) -> int:
        """How many of the client's rows, the first, it keeps for testing; one at least is left for training.

        Of persons, that many are kept, with all of their rows.
        """
        share = self.dataset.test
        if not share:
            return 0
        sizes = self._unit_sizes(client)
        return int(sizes[: min(max(1, round(share * len(sizes))), len(sizes) - 1)].sum())

    def owners(self, client: int) -> Indices | None:
        """Whose each of the client's rows is, if they are grouped into persons and that is said."""
        owners = self.source.owners
        return owners[self.rows(client)] if owners is not None and self.source.says_whose else None

    def _unit_sizes(self, client: int) -> Indices:
        """How many rows each unit has that is dealt as a whole, in the order of `rows`."""
        if self.source.owners is None:
            return np.ones(self.partition.sizes[client], np.int64)
        owners = self.source.owners[self.rows(client)]
        return np.diff(np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1], [True]])))

    def describe(self, names: Sequence[str] | None = None) -> Description:
        """What was dealt, for the run's record; `names` are the clients'."""
        return describe(
            self.partition,
            self.source.groups[0][self.private],
            seed=self.dataset.seed,
            dataset=self.dataset.name,
            labels=self.source.groups[1],
            names=names,
        )


def deal_out(dataset: DatasetSettings, partition: PartitionSettings, clients: int | None = None) -> Dealt:
    """Deal the data set to `clients`, or to as many as it has sites. Raises UsageError naming the setting at fault."""
    source = load_source(dataset)
    units, groups = _units(source)
    generator = np.random.default_rng(dataset.seed)
    order = generator.permutation(len(units))
    count = round(dataset.public * len(order))
    private = order[count:]
    hand = partition.deal(
        groups[private],
        source.inputs[units.firsts[private]],
        dataset.sites if clients is None else clients,
        generator,
        sites=None if source.sites is None else source.sites[units.firsts[private]],
    )
    rows = units.rows_of(private)
    of_these = Units(np.arange(len(rows)), np.concatenate([[0], np.cumsum(units.sizes[private])]))
    return Dealt(source, dataset, units.rows_of(order[:count]), rows, hand.by_row(of_these))


def _units(source: Source) -> tuple[Units, Indices]:
    """What is dealt as a whole, rows or persons, and by what they are told apart then, (U,): a row's group, or the
    commonest of a person's rows."""
    groups, names = source.groups
    if source.owners is None:
        return Units.of(np.arange(len(groups))), groups
    units = Units.of(source.owners)
    counts = np.zeros((len(units), len(names)), np.int64)
    np.add.at(counts, (source.owners, groups), 1)
    return units, counts.argmax(axis=1)
