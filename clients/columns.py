"""The kinds of table columns and how each becomes numbers.

    kind         features   encoding                                   missing
    numeric      1          (value - center) / scale                   0, which is the center
    boolean      1          0 for false, 1 for true                    0.5
    categorical  L          one-hot over the L levels, in their order  all zeros

A value that is no level is a bad cell (`unseen: refuse_row`), missing (`missing`), or the level 'other', which is added
behind the others if it is not among them (`other`): in training as in prediction.

When two cells are the same value is in `values`. A cell that a column does not allow is told to `Faults`, and
stands for a missing one until whoever reads the table has looked at them.

Legend: N rows of a block, F features of a column, L levels, K numeric columns.
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from fedclaw.clients.definitions import Text, distinct, sized
from fedclaw.clients.tables import Faults, TableRows
from fedclaw.clients.values import Cell, DecimalMark, Declared, Markers
from fedclaw.learning.tasks.base import LARGEST
from fedclaw.privacy.statistics import StatisticColumn
from fedclaw.protocol.frozen import Frozen

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

TRUTHS = {"true": 1, "t": 1, "yes": 1, "y": 1, "1": 1, "false": 0, "f": 0, "no": 0, "n": 0, "0": 0}
Unseen = Literal["refuse_row", "missing", "other"]
"""What a value that is no level stands for: it is a bad cell, it is missing, or it is the level 'other'."""
OTHER = "other"
UNKNOWN = -2
"""In place of a code: no declared value, and not missing."""


NOTHING_DECLARED = Declared({})


class Rules:
    """How a column's cells are told apart: what means 'not known', and the values that are declared."""

    def __init__(self, markers: Markers, declared: Declared | None = None) -> None:
        self.markers = markers
        self.declared = declared or NOTHING_DECLARED


class Column(Frozen):
    """One input column of a table."""

    name: Text = Field(min_length=1)
    missing: tuple[Text, ...] | None = None
    """Cells that mean 'not known' in this column; None: those of the schema."""

    @property
    @abstractmethod
    def features(self) -> tuple[str, ...]:
        """Names of the F features."""

    @abstractmethod
    def rules(self, markers: Markers) -> Rules:
        """How cells are told apart, made once for all blocks; `markers` are the schema's."""

    @abstractmethod
    def read(self, block: TableRows, rules: Rules) -> tuple[Doubles, Flags]:
        """The cells (N,) as numbers, or numbers of levels, NaN where missing or bad; and which are bad."""

    @abstractmethod
    def encode(self, values: Doubles) -> Doubles:
        """What `read` gave, (N,), as (N, F)."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """What a cell may be, for a message about one that is not."""

    @abstractmethod
    def synthetic(self, count: int, generator: np.random.Generator) -> Doubles:
        """(count, F) drawn from what the schema says of the column, none of it missing."""

    @abstractmethod
    def statistic(self) -> StatisticColumn:
        """The column as statistics know it: with its declared bounds, if it has any, or its levels."""

    def values(self, block: TableRows, rules: Rules, faults: Faults) -> Doubles:
        """What `read` gives, (N,), bad cells told to `faults`."""
        values, bad = self.read(block, rules)
        faults.mark(block, self.name, bad, self.expected)
        return values

    def _markers(self, markers: Markers) -> Markers:
        return markers if self.missing is None else Markers(self.missing)


class Numeric(Column):
    """A number. `center` and `scale` are public constants of the federation, never computed from one site's data."""

    kind: Literal["numeric"]
    center: float | None = None
    """Subtracted; 0 if not stated."""
    scale: float | None = Field(default=None, gt=0)
    """Divided by; 1 if not stated."""
    range: tuple[float, float] | None = None
    """Smallest and largest value allowed, both included."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range must go from a smaller to a larger number, got {list(self.range)}")
        return self

    @property
    def features(self) -> tuple[str, ...]:
        """The column's own name."""
        return (self.name,)

    @property
    def constants(self) -> tuple[float, float]:
        """Center and scale as they are applied."""
        return (self.center or 0.0, self.scale or 1.0)

    def rules(self, markers: Markers) -> Rules:
        """Only what is missing."""
        return Rules(self._markers(markers))

    def statistic(self) -> StatisticColumn:
        """Numbers within `range`."""
        return StatisticColumn(self.name, bounds=self.range)

    def read(self, block: TableRows, rules: Rules) -> tuple[Doubles, Flags]:
        """The raw numbers, (N,)."""
        values, bad = numbers(block.columns[self.name], rules.markers, block.mark)
        low, high = self.range or (-LARGEST, LARGEST)
        return bounded(values, bad, np.float64(low), np.float64(high))

    def encode(self, values: Doubles) -> Doubles:
        """(N, 1); missing values become 0."""
        center, scale = self.constants
        encoded = (values - center) / scale
        return np.where(np.isnan(encoded), 0.0, encoded)[:, None]

    @property
    def expected(self) -> str:
        """A finite number, within the range if there is one."""
        if self.range is None:
            return "a finite number"
        return f"a number from {self.range[0]:g} to {self.range[1]:g}"

    def synthetic(self, count: int, generator: np.random.Generator) -> Doubles:
        """Normal with the stated center and scale, cut to the range; without them uniform in the range.

        With neither, standard normal.
        """
        center, scale = self.constants
        if self.range is not None and self.center is None and self.scale is None:
            values = generator.uniform(*self.range, count)
        else:
            values = generator.normal(center, scale, count)
            values = np.clip(values, *self.range) if self.range is not None else values
        return ((values - center) / scale)[:, None]


class Boolean(Column):
    """True or false, spelt true/false, t/f, yes/no, y/n or 1/0 in any case."""

    kind: Literal["boolean"]

    @property
    def features(self) -> tuple[str, ...]:
        """The column's own name."""
        return (self.name,)

    def rules(self, markers: Markers) -> Rules:
        """The ten spellings."""
        return Rules(self._markers(markers), _TRUTHS)

    def read(self, block: TableRows, rules: Rules) -> tuple[Doubles, Flags]:
        """(N,) of 0, 1 and NaN."""

        def value(cell: Cell) -> float:
            if rules.markers.holds(cell, block.mark):
                return -1
            code = rules.declared.find(cell.lower() if isinstance(cell, str) else cell, block.mark)
            return UNKNOWN if code is None else code

        return _known(_looked_up(block.columns[self.name], value))

    def encode(self, values: Doubles) -> Doubles:
        """(N, 1) of 0, 1 and 0.5 for missing."""
        return np.where(np.isnan(values), 0.5, values)[:, None]

    @property
    def expected(self) -> str:
        """The spellings."""
        return "true or false (t/f, yes/no, y/n, 1/0)"

    def statistic(self) -> StatisticColumn:
        """The levels false and true."""
        return StatisticColumn(self.name, levels=("false", "true"))

    def synthetic(self, count: int, generator: np.random.Generator) -> Doubles:
        """A fair coin."""
        return generator.integers(0, 2, (count, 1)).astype(np.float64)


class Categorical(Column):
    """One of a fixed list of levels."""

    kind: Literal["categorical"]
    levels: Annotated[tuple[Text, ...], AfterValidator(sized(1, 10_000)), AfterValidator(distinct)]
    unseen: Unseen | None = None
    """What a value that is no level stands for; None: as the schema says."""

    @property
    def coded(self) -> tuple[str, ...]:
        """The levels, and with `unseen: other` the level 'other' after them, unless it is one of them already."""
        added = self.unseen == "other" and OTHER not in self.levels
        return (*self.levels, OTHER) if added else self.levels

    @property
    def features(self) -> tuple[str, ...]:
        """`name=level`, a level each."""
        return tuple(f"{self.name}={level}" for level in self.coded)

    def statistic(self) -> StatisticColumn:
        """Its levels."""
        return StatisticColumn(self.name, levels=self.coded)

    def rules(self, markers: Markers) -> Rules:
        """The levels by value; a marker that is declared as a level is a level."""
        return Rules(self._markers(markers), Declared({level: i for i, level in enumerate(self.levels)}))

    def read(self, block: TableRows, rules: Rules) -> tuple[Doubles, Flags]:
        """(N,) numbers of levels; what is no level by the column's rule."""
        found = codes(block, self.name, rules.declared, rules.markers)
        if self.unseen == "other":
            found[found == UNKNOWN] = self.coded.index(OTHER)
        elif self.unseen == "missing":
            found[found == UNKNOWN] = -1
        return _known(found)

    def encode(self, values: Doubles) -> Doubles:
        """(N, L), one-hot."""
        encoded = np.zeros((len(values), len(self.features)))
        known = np.flatnonzero(~np.isnan(values))
        encoded[known, values[known].astype(np.int64)] = 1.0
        return encoded

    @property
    def expected(self) -> str:
        """One of the levels."""
        return one_of(self.levels)

    def synthetic(self, count: int, generator: np.random.Generator) -> Doubles:
        """Every level as likely as the others."""
        encoded = np.zeros((count, len(self.features)))
        encoded[np.arange(count), generator.integers(0, len(self.features), count)] = 1.0
        return encoded


AnyColumn = Annotated[Numeric | Boolean | Categorical, Field(discriminator="kind")]

_TRUTHS = Declared(TRUTHS)


class NumericColumns:
    """Columns of numbers, read all at once: one by one they cost more than their cells where they are many."""

    def __init__(self, columns: Sequence[Numeric], markers: Markers) -> None:
        self.columns = tuple(columns)
        self._markers = markers
        ranges = [column.range or (-LARGEST, LARGEST) for column in columns]
        self._low, self._high = np.array(ranges).reshape(-1, 2).T
        self._center, self._scale = np.array([column.constants for column in columns]).reshape(-1, 2).T

    def read(self, block: TableRows) -> tuple[Doubles, Flags]:
        """The raw numbers, (N, K), NaN where missing or bad; and which are bad."""
        cells = list(chain.from_iterable(block.columns[column.name] for column in self.columns))
        values, bad = numbers(cells, self._markers, block.mark)
        shape = (len(self.columns), block.rows)
        return bounded(values.reshape(shape).T, bad.reshape(shape).T, self._low, self._high)

    def encode(self, values: Doubles) -> Doubles:
        """Raw numbers (N, K) as features (N, K): missing ones become 0, those that float32 cannot hold infinite."""
        with np.errstate(over="ignore"):
            encoded: Doubles = (values - self._center) / self._scale
        encoded[np.isnan(encoded)] = 0.0
        encoded[np.abs(encoded) > LARGEST] = np.inf
        return encoded


def codes(block: TableRows, name: str, declared: Declared, markers: Markers | None) -> NDArray[np.float64]:
    """The code of each cell of a column, (N,): -1 where missing, UNKNOWN where it is no declared value.

    A declared value comes before a missing marker, so that "NA" can be a level. With `markers` None, no cell may miss.
    """

    def code(cell: Cell) -> float:
        found = declared.find(cell, block.mark)
        if found is not None:
            return found
        return -1 if markers is not None and markers.holds(cell, block.mark) else UNKNOWN

    return _looked_up(block.columns[name], code)


def _looked_up(cells: Sequence[Cell], code: Any) -> NDArray[np.float64]:
    """`code` of each cell, worked out once for equal ones."""
    found = {cell: code(cell) for cell in set(cells)}
    return np.array([found[cell] for cell in cells], np.float64)


def _known(found: NDArray[np.float64]) -> tuple[Doubles, Flags]:
    return np.where(found < 0, np.nan, found), found == UNKNOWN


def numbers(cells: Sequence[Cell], markers: Markers, mark: DecimalMark) -> tuple[Doubles, Flags]:
    """The cells (N,) as numbers, NaN where missing or bad; and which are bad: no finite number."""
    absent = np.zeros(len(cells), np.bool_)
    if not markers.texts.isdisjoint(cells):
        absent = np.array([cell in markers.texts for cell in cells], np.bool_)
    values = None if mark == "," or _underscored(cells) else _all_numbers(cells, absent)
    if values is None:
        parsed = [None if gone else _number(cell, mark) for cell, gone in zip(cells, absent, strict=True)]
        for index, number in enumerate(parsed):
            if number is None and not absent[index]:
                absent[index] = markers.holds(cells[index], mark)
        values = np.array([np.nan if number is None else number for number in parsed], np.float64)
    for number in markers.numbers:
        absent |= values == number
    bad = ~(np.isfinite(values) | absent)
    return np.where(absent | bad, np.nan, values), bad


def bounded(values: Doubles, bad: Flags, low: Any, high: Any) -> tuple[Doubles, Flags]:
    """Numbers out of [low, high] are bad too."""
    with np.errstate(invalid="ignore"):
        bad = bad | (values < low) | (values > high)
    return np.where(bad, np.nan, values), bad


def describe(column: Column, first_feature: int) -> dict[str, Any]:
    """A JSON-able account of a column: its place in the input tensor and its constants."""
    account: dict[str, Any] = {
        "name": column.name,
        "first_feature": first_feature,
        "features": len(column.features),
        **column.model_dump(mode="json", exclude_none=True, exclude={"name"}),
    }
    if isinstance(column, Numeric):
        account["center"], account["scale"] = column.constants
    return account


def one_of(values: Sequence[str], most: int = 8) -> str:
    """'one of' the values, the first few of them."""
    listed = ", ".join(repr(value) for value in values[:most])
    return f"one of {listed}" + (f" and {len(values) - most} more" if len(values) > most else "")


def _all_numbers(cells: Sequence[Cell], absent: Flags) -> Doubles | None:
    """All cells that are not absent as numbers; None if one is none."""
    known: Any = cells
    if absent.any():
        known = [np.nan if gone else cell for cell, gone in zip(cells, absent, strict=True)]
    try:
        return np.array(list(map(float, known)), np.float64)
    except ValueError:
        return None


def _underscored(cells: Sequence[Cell]) -> bool:
    """Whether some text has an underscore: float() would read Python's 1_000."""
    texts: Any = cells
    try:
        return "_" in "".join(texts)
    except TypeError:
        return "_" in "".join(cell for cell in cells if isinstance(cell, str))


def _number(cell: Cell, mark: DecimalMark) -> float | None:
    if cell is None:
        return None
    if isinstance(cell, str):
        if "_" in cell or (mark == "," and "." in cell):
            return None
        cell = cell.replace(",", ".") if mark == "," else cell
    try:
        return float(cell)
    except ValueError:
        return None
