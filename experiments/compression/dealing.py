"""A data set in folds: each is tested once; of the rest some rows are public, the others are dealt to the sites."""

from dataclasses import dataclass

import numpy as np
import yaml

from experiments.compression.settings import TaskSettings
from experiments.sources import load_source, schema_of, standardised
from fedclaw.learning.registry import schema_class
from fedclaw.learning.workload import Floats, Indices, Labels, Schema, Table


@dataclass(frozen=True, eq=False)
class Fold:
    """Who has what in one fold. No row is in two places."""

    schema: Schema
    """Its constants are those of the public rows."""
    sites: dict[str, Table]
    public: Table
    """The coordinator's. Its targets stay unused."""
    test: Table
    rows: Indices
    """(N,) which of all rows `test` has."""

    @property
    def inputs(self) -> Floats:
        """(N, *D): the public rows without their targets."""
        return self.public.inputs


def fold_of(labels: Labels, folds: int, seed: int) -> Indices:
    """(N,) the fold that each row is tested in, with the labels spread evenly over the folds."""
    random = np.random.default_rng(seed)
    found = np.empty(len(labels), np.int64)
    begin = 0
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        found[rows] = (begin + np.arange(len(rows))) % folds
        begin += len(rows)
    return found


def deal_fold(task: TaskSettings, folds: int, fold: int, seed: int) -> Fold:
    """The fold of that number, from 0."""
    source = load_source(task.dataset)
    where = fold_of(source.targets, folds, seed)
    rows, rest = np.flatnonzero(where == fold), np.flatnonzero(where != fold)
    rest = np.random.default_rng([seed, fold]).permutation(rest)
    public, dealt = np.sort(rest[: task.public]), rest[task.public :]
    definition = schema_of(source, public)
    schema = schema_class(source.workload).parse(yaml.safe_dump(definition), task.dataset.name)

    def table(of: Indices) -> Table:
        return Table(standardised(source, definition, source.inputs[of]), source.targets[of])

    parts = np.array_split(dealt, task.dataset.sites)
    names = [f"site-{number + 1}" for number in range(len(parts))]
    sites = {name: table(part) for name, part in zip(names, parts, strict=True)}
    return Fold(schema, sites, table(public), table(rows), rows)
