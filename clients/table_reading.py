"""From blocks of cells to features: in one pass, with what an operator should know of the data seen on the way.

Legend: N rows of a block, C input columns, K numeric ones, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedclaw.clients.columns import Column, Doubles, Flags, Numeric, NumericColumns, Rules
from fedclaw.clients.definitions import shown
from fedclaw.clients.moments import Moments
from fedclaw.clients.tables import Faults, TableRows
from fedclaw.clients.values import Markers
from fedclaw.errors import DataError
from fedclaw.learning.workload import Floats

IN_OWN_UNITS = 10.0
"""A feature that is larger than this and has neither center nor scale was probably never scaled."""
LISTED = 8


@dataclass(frozen=True)
class MissingCells:
    """What is not known in a table. Exact counts of private data: for the site's own eyes, never to be sent."""

    rows: int
    """Rows of the table."""
    incomplete_rows: int
    """Rows with at least one missing cell."""
    columns: Mapping[str, int]
    """Missing cells of each input column, in the order of the schema file; 0 where none is."""

    def __str__(self) -> str:
        """One line for people: '3 of 200 rows have missing cells (age 1, ward 2)'."""
        if not self.incomplete_rows:
            return f"no cells are missing in {self.rows} rows"
        listed = ", ".join(f"{name} {count}" for name, count in self.columns.items() if count)
        return f"{self.incomplete_rows} of {self.rows} rows have missing cells ({listed})"


@dataclass(frozen=True)
class Values:
    """A block's cells as numbers, (N, C) in the order of the schema, NaN where missing or bad; and which are bad."""

    cells: Doubles
    bad: Flags


class RowEncoder:
    """Turns blocks into features, columns of numbers all at once."""

    def __init__(self, columns: Sequence[Column], missing: Sequence[str]) -> None:
        markers = Markers(missing)
        self._columns = tuple(columns)
        self.rules: dict[str, Rules] = {column.name: column.rules(markers) for column in columns}
        """How the cells of each column are told apart."""
        self.numeric = tuple(column for column in columns if isinstance(column, Numeric))
        """The K columns of numbers."""
        firsts = np.cumsum([0, *(len(column.features) for column in columns)])
        self._features = int(firsts[-1])
        self._others = [
            (place, int(firsts[place]), column)
            for place, column in enumerate(columns)
            if not isinstance(column, Numeric)
        ]
        places = [place for place, column in enumerate(columns) if isinstance(column, Numeric)]
        self._places = np.array(places, np.int64)
        self._positions = firsts[self._places]
        self._scaling = NumericColumns(self.numeric, markers) if places else None
        groups: dict[int, list[int]] = {}
        for place in places:
            groups.setdefault(id(markers) if columns[place].missing is None else place, []).append(place)
        self._groups = [
            (
                np.array(group),
                NumericColumns([self._at(place) for place in group], self.rules[columns[group[0]].name].markers),
            )
            for group in groups.values()
        ]

    def _at(self, place: int) -> Numeric:
        column = self._columns[place]
        assert isinstance(column, Numeric)
        return column

    def read(self, block: TableRows, faults: Faults) -> Values:
        """The block's cells as numbers; bad ones are told to `faults`."""
        cells = np.empty((block.rows, len(self._columns)))
        bad = np.zeros(cells.shape, np.bool_)
        for places, columns in self._groups:
            cells[:, places], bad[:, places] = columns.read(block)
        for place, _, column in self._others:
            cells[:, place], bad[:, place] = column.read(block, self.rules[column.name])
        for index in np.flatnonzero(bad.any(axis=0)):
            place = int(index)
            column = self._columns[place]
            faults.mark(block, column.name, bad[:, place], column.expected)
        return Values(cells, bad)

    def encode(self, block: TableRows, values: Values, faults: Faults) -> Floats:
        """Features (N, D) of what `read` gave; numbers too large for them are told to `faults`."""
        inputs = self.encode_others(values)
        if self._scaling is not None:
            features = self._scaling.encode(values.cells[:, self._places])
            large = np.isinf(features)
            for place in np.flatnonzero(large.any(axis=0)):
                faults.mark(block, self.numeric[place].name, large[:, place], "a number that fits after scaling")
            inputs[:, self._positions] = features
        return inputs

    def encode_others(self, values: Values) -> Floats:
        """Features (N, D), those of numbers left at 0."""
        inputs = np.zeros((len(values.cells), self._features), np.float32)
        for place, first, column in self._others:
            inputs[:, first : first + len(column.features)] = column.encode(values.cells[:, place])
        return inputs

    def raw_numbers(self, values: Values) -> Doubles:
        """The numbers (N, K) as they are."""
        return values.cells[:, self._places]

    def add_moments(self, values: Values, moments: Sequence[Moments]) -> None:
        """Take the numbers into the moments of their columns."""
        for column, own in zip(self.raw_numbers(values).T, moments, strict=True):
            own.add(column)

    def fill(self, path: Path, inputs: Floats, raw: Sequence[Doubles]) -> None:
        """Put the features of raw numbers, a block after the other, into `inputs` (rows, D). Raises DataError."""
        first, scaling = 0, self._scaling
        if scaling is None:
            return
        for block in raw:
            features = scaling.encode(block)
            if (large := np.isinf(features).any(axis=0)).any():
                name = self.numeric[int(np.argmax(large))].name
                raise DataError(f"{path}: column {shown(name)}: a number is too large after scaling")
            inputs[first : first + len(block), self._positions] = features
            first += len(block)


class Seen:
    """What was seen of each column: how much is missing, and the smallest and the largest known value."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = tuple(columns)
        self._rows = self._incomplete = 0
        self._absent = np.zeros(len(columns), np.int64)
        self._low, self._high = np.full(len(columns), np.nan), np.full(len(columns), np.nan)

    def add(self, values: Values) -> None:
        """Take in a block."""
        absent = np.isnan(values.cells) & ~values.bad
        self._rows += len(absent)
        self._incomplete += int(absent.any(axis=1).sum())
        self._absent += absent.sum(axis=0)
        self._low = np.fmin(self._low, np.fmin.reduce(values.cells, axis=0))
        self._high = np.fmax(self._high, np.fmax.reduce(values.cells, axis=0))

    def missing(self) -> MissingCells:
        """The counts."""
        counts = {column.name: int(count) for column, count in zip(self._columns, self._absent, strict=True)}
        return MissingCells(self._rows, self._incomplete, counts)

    def notes(self, *, in_own_units: bool) -> tuple[str, ...]:
        """Sentences for the operator; `in_own_units`: also of numbers that the schema does not scale."""
        unknown = np.isnan(self._low)
        constant = (self._low == self._high) & (self._rows > 1)
        large = np.fmax(np.abs(self._low), np.abs(self._high)) > IN_OWN_UNITS
        unscaled = np.array(
            [isinstance(c, Numeric) and c.center is None and c.scale is None for c in self._columns], np.bool_
        )
        found = {
            "nothing is known of {}: every cell is missing": unknown,
            "{} with the same value in every row that has one": constant,
            "{} in raw units, with numbers above 10, and neither center nor scale in the schema: numbers of that size "
            "drown the others, or are not learned from": large & unscaled & in_own_units,
        }
        return (str(self.missing()), *(text.format(self._named(which)) for text, which in found.items() if which.any()))

    def _named(self, which: Flags) -> str:
        names = [shown(self._columns[place].name) for place in np.flatnonzero(which)]
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        return f"column{'s' if len(names) > 1 else ''} {', '.join(names[:LISTED])}{more}"
