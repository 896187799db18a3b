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
        """The client's rows: first those that it holds out for testing, see `held_out`."""
        return self.private[self.partition.shares[client]]

    def inputs(self, client: int) -> NDArray[Any]:
        """The client's inputs in the order of `rows`, in the source's units, as its own instruments give them."""
        chosen = self.source.inputs[self.rows(client)]
        transform = self.partition.transform
        return chosen if transform is None else transform.apply(client, chosen)

    def held_out(self, client: int) -> int:
        """How many of the client's rows, the first, it keeps for testing; one at least is left for training."""
        share, size = self.dataset.test, int(self.partition.sizes[client])
        return min(max(1, round(share * size)), size - 1) if share else 0

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
    generator = np.random.default_rng(dataset.seed)
    order = generator.permutation(len(source.targets))
    count = round(dataset.public * len(order))
    public, private = order[:count], order[count:]
    hand = partition.deal(
        source.groups[0][private],
        source.inputs[private],
        dataset.sites if clients is None else clients,
        generator,
        sites=None if source.sites is None else source.sites[private],
    )
    return Dealt(source, dataset, public, private, hand)
