"""What a node is asked, as counts: for each feature, how many sampled rows lay in which cell.

The cells of a feature come from the bundle alone: equal bins between the bounds that the schema declares, as in a
statistics question to the sites, or its levels. Two more are for what is missing and for what its row is refused for.
No value of a row is kept, only that it was counted.

    features = InputFeatures.of(schema, columns)        # once for a version; versions of one schema share it
    sample = InputSample(features, share)               # in a worker
    sample.offer(columns, rows)                         # hot path: 0.1 us for a request that is not sampled
    sample.take()                                       # in another thread, every few seconds

Legend: N rows, B cells of a feature without the two more.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from fedclaw.errors import NotInGraph
from fedclaw.learning.preprocessing import Columns, TypedColumn
from fedclaw.learning.workload import Schema
from fedclaw.privacy.statistics import StatisticColumn, bins_of

BINS = 64
"""Of numbers; those of a charged question may be others."""
MOST_FEATURES = 256
REACH = 4.0
"""Scales to both sides of the center that bins span where a schema declares no bounds."""
ROWS_OF_A_REQUEST = 8
"""That are counted, evenly spread: the rows of one request are more alike than those of many."""
MOST_BYTES, MOST_WAITING = 8 << 20, 4096
"""Of sampled rows that wait to be counted, and requests that they are of; what comes beyond is not sampled."""
MISSING, REFUSED = -2, -1
"""The places of the last two cells."""

Doubles = NDArray[np.float64]
Counts = NDArray[np.int64]


class _Reader(Protocol):
    def __call__(self, columns: Columns, /) -> Mapping[str, Doubles]:
        """By feature (N,): numbers or numbers of levels; NaN is missing, infinite is refused."""


@dataclass(frozen=True)
class InputFeature:
    """One feature and its cells."""

    column: StatisticColumn
    bins: int
    """B of numbers; 0 of levels."""

    @property
    def name(self) -> str:
        """The column's."""
        return self.column.name

    @property
    def cells(self) -> int:
        """B."""
        return len(self.column.levels) or self.bins

    def count(self, values: Doubles) -> Counts:
        """(B + 2,) how many of the values (N,) are in which cell."""
        missing, refused = np.isnan(values), np.isinf(values)
        known = values[~(missing | refused)]
        places = known.astype(np.int64) if self.column.levels else bins_of(self.column, known, self.bins)
        counts = np.bincount(places, minlength=self.cells + 2)
        counts[MISSING], counts[REFUSED] = missing.sum(), refused.sum()
        return counts


class InputFeatures:
    """The features of a schema's inputs, in their order."""

    def __init__(self, features: Sequence[InputFeature], read: _Reader) -> None:
        self.features = tuple(features[:MOST_FEATURES])
        self._read = read
        described = [[one.name, one.column.bounds, one.column.levels, one.bins] for one in self.features]
        self.digest = hashlib.sha256(orjson.dumps(described)).hexdigest()[:12]
        """The same for versions whose counts can be added up."""

    @classmethod
    def of(
        cls, schema: Schema, columns: Sequence[TypedColumn], bins: Mapping[str, int] | None = None
    ) -> "InputFeatures":
        """Those of a served model, which takes `columns`; `bins` are a charged question's, by column.

        A table's columns are features. Of anything else, a narrow tensor's entries are, and of a wide one or an image
        the mean and the deviation of each example.
        """
        found = _of_table(schema, bins or {})
        return _of_tensor(schema, columns[0]) if found is None else found

    def count(self, columns: Columns) -> "InputCounts":
        """The counts of N rows."""
        values = self._read(columns)
        counts = {one.name: one.count(values[one.name]) for one in self.features}
        refused = np.any([np.isinf(values[one.name]) for one in self.features], axis=0)
        return InputCounts(len(refused), int(refused.sum()), counts)


@dataclass
class InputCounts:
    """Counts of rows that add up."""

    rows: int = 0
    refused: int = 0
    """Rows with a value that the schema does not take."""
    features: dict[str, Counts] = field(default_factory=dict)
    """By feature, (B + 2,)."""

    def add(self, other: "InputCounts") -> None:
        """Add the other's counts to these."""
        self.rows += other.rows
        self.refused += other.refused
        for name, counts in other.features.items():
            own = self.features.get(name)
            self.features[name] = counts.copy() if own is None else own + counts

    def to_document(self) -> dict[str, Any]:
        """As JSON: counts by the number of their cell, without those that are 0."""
        features = {
            name: {str(cell): int(counts[cell]) for cell in np.flatnonzero(counts)}
            for name, counts in self.features.items()
        }
        return {"rows": self.rows, "refused": self.refused, "features": features}

    @classmethod
    def from_document(cls, document: Mapping[str, Any], features: Sequence[InputFeature]) -> "InputCounts":
        """What `to_document` gave of these features."""
        found = cls(int(document["rows"]), int(document["refused"]))
        for one in features:
            counts = np.zeros(one.cells + 2, np.int64)
            for cell, count in document["features"].get(one.name, {}).items():
                counts[int(cell)] = int(count)
            found.features[one.name] = counts
        return found


class InputSample:
    """Sampled rows of one worker that wait to be counted. One thread offers, another takes."""

    def __init__(self, features: InputFeatures, share: float, chance: Callable[[], float] = random.random) -> None:
        """`share` of the requests are looked at."""
        self.features = features
        self._share, self._chance = share, chance
        self._waiting: deque[tuple[int, Columns]] = deque()
        self._offered = self._taken = 0
        """Bytes; each is written by one thread alone."""

    def offer(self, columns: Columns, rows: int) -> None:
        """A request's N rows; nothing is computed here."""
        if self._chance() >= self._share:
            return
        if rows > ROWS_OF_A_REQUEST:
            places = np.linspace(0, rows - 1, ROWS_OF_A_REQUEST).astype(np.int64)
            columns = {name: values[places] for name, values in columns.items()}
        size = sum(values.nbytes for values in columns.values())
        if self._offered - self._taken + size <= MOST_BYTES and len(self._waiting) < MOST_WAITING:
            self._offered += size
            self._waiting.append((size, columns))

    def take(self) -> InputCounts:
        """Count what waits, and forget it."""
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not taken:
            return InputCounts()
        self._taken += sum(size for size, _ in taken)
        return self.features.count(
            {name: np.concatenate([columns[name] for _, columns in taken]) for name in taken[0][1]}
        )


def _of_table(schema: Schema, bins: Mapping[str, int]) -> InputFeatures | None:
    try:
        preprocessing = schema.preprocessing()
    except NotInGraph:
        return None
    nothing = {column.name: _nothing(column) for column in preprocessing.columns}
    named = preprocessing.column_values(nothing)
    columns = [column for column in schema.statistic_columns() if column.name in named]
    if not columns:
        return None
    reach = _reach(schema)
    features = []
    for column in columns:
        if column.levels:
            features.append(InputFeature(column, 0))
        else:
            bounded = (
                column if column.bounds else StatisticColumn(column.name, bounds=reach.get(column.name, (-4.0, 4.0)))
            )
            features.append(InputFeature(bounded, bins.get(column.name, BINS)))
    return InputFeatures(features, preprocessing.column_values)


def _nothing(column: TypedColumn) -> NDArray[Any]:
    """No rows of a column."""
    tail = [size for size in column.shape[1:] if isinstance(size, int)]
    return np.zeros((0, *tail), object if column.dtype == "string" else column.dtype)


def _reach(schema: Schema) -> dict[str, tuple[float, float]]:
    """By column of numbers the span around its declared center."""
    found = {}
    for told in schema.describe_inputs().get("columns", ()):
        if isinstance(told.get("scale"), int | float):
            center, scale = float(told.get("center") or 0.0), float(told["scale"])
            found[told["name"]] = (center - REACH * scale, center + REACH * scale)
    return found


def _of_tensor(schema: Schema, column: TypedColumn) -> InputFeatures:
    width = column.shape[1] if len(column.shape) == 2 else None
    whole = column.dtype == "uint8"
    if isinstance(width, int) and width <= MOST_FEATURES:
        told = schema.describe_inputs().get("features") or [f"{column.name}[{number}]" for number in range(width)]
        names = [str(name) for name in told]
        features = [InputFeature(StatisticColumn(name, bounds=(-REACH, REACH)), BINS) for name in names]

        def entries(columns: Columns) -> Mapping[str, Doubles]:
            values = columns[column.name].astype(np.float64)
            return dict(zip(names, values.T, strict=True))

        return InputFeatures(features, entries)

    middle, spread = ((0.0, 255.0), (0.0, 128.0)) if whole else ((-REACH, REACH), (0.0, REACH))
    summaries = [
        InputFeature(StatisticColumn(name, bounds=ends), BINS)
        for name, ends in (("mean", middle), ("deviation", spread))
    ]

    def summary(columns: Columns) -> Mapping[str, Doubles]:
        flat = columns[column.name].reshape(len(columns[column.name]), -1).astype(np.float64)
        return {"mean": flat.mean(axis=1), "deviation": flat.std(axis=1)}

    return InputFeatures(summaries, summary)
