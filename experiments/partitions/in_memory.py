"""A data set dealt to any number of clients without a file: what simulations train on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from experiments.partitions.dealing import Dealt, deal_out
from experiments.partitions.description import Description
from experiments.sources import DatasetSettings, Source, schema_of, standardised
from fedclaw.learning.registry import schema_class
from fedclaw.learning.workload import Floats, Schema, Table
from fedclaw.simulation.partitions.base import Indices
from fedclaw.simulation.partitions.settings import PartitionSettings

_BLOCK = 4096
"""Rows that are standardised at a time, so that no second copy of the data is made on the way."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """All clients' data, held once. What `experiments.datasets.write_sites` writes, and sites read, is the same.

    `table` has every private example once, client after client, ready for a model: client k's rows are consecutive,
    so `table.inputs[shares[k][0] : shares[k][-1] + 1]` is a view of its training inputs. A client's instruments
    (partition=feature_shift) have been at work on them.
    """

    workload: str
    """The workload's name: tabular or vision."""
    schema: Schema
    """What all clients share: the shape of the inputs and the labels."""
    table: Table
    shares: tuple[Indices, ...]
    """By client, the rows of `table` that it trains on, rising by one; at least one each."""
    tests: tuple[Indices, ...]
    """By client, the rows of `table` that it holds out for testing; none with dataset.test=0."""
    public: Table
    """The coordinator's labelled reference set, dataset.public of the data: the test set of the global model."""
    description: Description
    """For the run's record."""


def in_memory(dataset: DatasetSettings, partition: PartitionSettings, clients: int) -> InMemory:
    """Deal `dataset` to `clients` by `partition`; `dataset.sites` is not looked at, and there is no limit of 100.

    The same settings give the same arrays. Example, the 100 clients of the simulation benchmark:
    `in_memory(DatasetSettings(name="digits", public=0.2, test=0), Dirichlet(alpha=0.5, minimum=4), 100)`.
    Raises UsageError naming the setting that the data cannot bear.
    """
    dealt = deal_out(dataset, partition, clients)
    source, hand = dealt.source, dealt.partition
    definition = schema_of(source, dealt.public)
    schema = schema_class(source.workload).parse(yaml.safe_dump(definition), dataset.name)
    held_out = [dealt.held_out(client) for client in range(hand.clients)]
    spans = list(zip(hand.bounds[:-1].tolist(), held_out, hand.bounds[1:].tolist(), strict=True))
    public = standardised(source, definition, source.inputs[dealt.public])
    return InMemory(
        workload=source.workload,
        schema=schema,
        table=_owned(Table(_inputs(dealt, definition), _targets(source, dealt.private[hand.rows])), dealt),
        shares=tuple(np.arange(start + held, end) for start, held, end in spans),
        tests=tuple(np.arange(start, start + held) for start, held, _ in spans),
        public=Table(public, _targets(source, dealt.public)),
        description=dealt.describe(),
    )


def _owned(table: Table, dealt: Dealt) -> Table:
    """The table of all clients with its persons, if the data says whose a row is."""
    owners = [dealt.owners(client) for client in range(dealt.partition.clients)]
    said = [owner for owner in owners if owner is not None]
    if not said:
        return table
    numbers = np.concatenate(said)
    return table.owned_by(numbers, list(map(str, range(int(numbers.max()) + 1))))


def _targets(source: Source, rows: Indices) -> NDArray[Any]:
    """(len(rows),) as a schema reads them."""
    return source.targets[rows] if source.range is None else source.targets[rows].astype(np.float32)


def _inputs(dealt: Dealt, definition: dict[str, object]) -> Floats:
    """(N, *D), client after client."""
    source, hand = dealt.source, dealt.partition
    rows = dealt.private[hand.rows]
    empty = standardised(source, definition, source.inputs[:0])
    inputs = np.empty((len(rows), *empty.shape[1:]), np.float32)
    if hand.transform is None:
        for start in range(0, len(rows), _BLOCK):
            part = slice(start, start + _BLOCK)
            inputs[part] = standardised(source, definition, source.inputs[rows[part]])
        return inputs
    for client in range(hand.clients):
        part = slice(hand.bounds[client], hand.bounds[client + 1])
        inputs[part] = standardised(source, definition, dealt.inputs(client))
    return inputs
