"""A table's preprocessing in a graph: one input a column, numbers and texts, to the features of `columns`.

    kind         input                   in the graph
    numeric      float32, NaN missing    range, (value - center) / scale in float64, 0 where missing
    boolean      text                    0 or 1, 0.5 where missing
    categorical  text                    one-hot, zeros where missing

A number that a column does not allow, and a text that is no level where the schema says `unseen: refuse_row`, refuse
their row. What a text stands for is not worked out in the graph: it holds the texts that the column's own rules give a
meaning (levels, markers of missing values, spellings of true and false; of a number 1 and 1.0, as data frames and JSON
write them), and those are compared exactly.

A float32 has 24 bits. Where the center is far from 0 beside the scale, they are used up by what the center takes away,
and the input is float64 (`is_wide`). A bound or a marker of missing numbers that float32 cannot hold is met by the
float32 nearest to it.

Legend: N rows, K numeric columns, M markers, F features of a column, D of all.
"""

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.clients.columns import TRUTHS, Boolean, Categorical, Column, Doubles, Flags, Numeric, Rules
from fedclaw.clients.table_reading import RowEncoder, Values
from fedclaw.clients.tables import Faults, TableRows
from fedclaw.clients.values import Cell, key_of, normal
from fedclaw.learning.preprocessing import (
    Columns,
    GraphWriter,
    PreparedInputs,
    Preprocessing,
    TypedColumn,
    TypedRows,
    free_names,
)
from fedclaw.learning.sources import Source
from fedclaw.learning.tasks.base import LARGEST
from fedclaw.learning.workload import Floats

MAX_COLUMNS = 1000
"""More inputs than this no server is made for."""
LOST_BITS = 7
"""Of the 24 of a float32, which the subtraction of a center may cost: a feature is then right to 2**-17."""
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
REFUSED, MISSING = -2, -1
SHOWN_TEXTS = 20
LARGEST_WHOLE = 2**53
"""Up to here float64 holds every whole number."""
OUTSIDE = (
    "CSV and Parquet are read, and delimiters, encodings, decimal commas and title lines dealt with, before: the graph "
    "takes numbers and texts",
    "texts are compared exactly: bring them to Unicode NFC without white space around them, and write each level as "
    "the schema does; our reader also finds a level by value (01 or 1e0 for 1, a date in another ISO 8601 form)",
    "a number is given as a number, missing as NaN; the texts that mean 'not known' in a file are no numbers",
    "a float32 input is the number rounded to float32; where that is not enough for a column, its input is float64",
)
READER = "FedClaw's reader does all that: python -m fedclaw.predict, or Predictor.read_columns for the columns alone"
Read = Callable[
    [Source, Sequence[str], Callable[[Values, Floats], None]], tuple[Mapping[int, str], Mapping[str, Sequence[str]]]
]
"""Reads a file's rows as `TabularSchema` does: gives cells and inputs, says what is refused and what rows are called.
"""


class NumberInput:
    """A column of numbers as an input of a graph."""

    def __init__(self, name: str, column: Numeric, rules: Rules) -> None:
        self.name, self.column = name, column
        self.dtype: Any = np.float64 if is_wide(column) else np.float32
        low, high = column.range or (-LARGEST, LARGEST)
        self.low, self.high = self._held(low), self._held(high)
        self._declared = (low, high, *rules.markers.numbers)
        self.markers = tuple(held for number in rules.markers.numbers if np.isfinite(held := self._held(number)))

    def _held(self, number: float) -> float:
        with np.errstate(over="ignore"):
            return float(self.dtype(number))

    def typed(self, values: Doubles, bad: Flags) -> NDArray[Any]:
        """Numbers (N,) as the reader gives them, NaN where missing, as the input (N, 1): infinite where bad."""
        return np.where(bad, np.inf, values).astype(self.dtype)[:, None]

    def cells(self, given: NDArray[Any]) -> list[Cell]:
        """The input (N, 1) as cells."""
        numbers = given[:, 0].astype(np.float64)
        for declared in self._declared:
            numbers[numbers == self._held(declared)] = declared
        return [None if np.isnan(number) else float(number) for number in numbers]

    def values(self, given: NDArray[Any]) -> Doubles:
        """The input (N, 1) as the graph takes it: (N,), NaN where missing, infinite where refused."""
        numbers = given[:, 0].astype(np.float64)
        absent = np.isnan(numbers) | np.isin(numbers, self.markers)
        refused = ~((numbers >= self.low) & (numbers <= self.high))
        return np.where(absent, np.nan, np.where(refused, np.inf, numbers))

    def spec(self) -> TypedColumn:
        """For the manifest."""
        low, high = self.column.range or (None, None)
        within = "any finite number" if low is None else f"a number from {low:.17g} to {high:.17g}"
        center, scale = self.column.constants
        beside = "".join(f", {marker:.9g}" for marker in self.markers)
        return TypedColumn(
            name=self.name,
            column=normal(self.column.name),
            dtype="float64" if self.dtype is np.float64 else "float32",
            shape=("batch", 1),
            meaning=f"{within}; becomes (value - {center:.17g}) / {scale:.17g}; not known: NaN{beside}",
            missing="NaN",
        )

    def synthetic(self, count: int, generator: np.random.Generator) -> NDArray[Any]:
        """(count, 1), a few of them missing."""
        center, scale = self.column.constants
        values = self.column.synthetic(count, generator)[:, 0] * scale + center
        values = np.clip(values, *self.column.range) if self.column.range else values
        values[generator.random(count) < 0.05] = np.nan
        return self.typed(values, np.zeros(count, np.bool_))

    def refused(self) -> Any:
        """A value that costs its row the answer."""
        return np.inf


class TextInput:
    """A boolean or categorical column as an input of a graph: the texts that mean something, and what each means."""

    def __init__(self, name: str, column: Boolean | Categorical, rules: Rules) -> None:
        self.name, self.column = name, column
        markers = sorted(text for text in rules.markers.texts if isinstance(text, str))
        known = _spellings() if isinstance(column, Boolean) else tuple(map(normal, column.levels))
        listed = dict.fromkeys((*known, *markers))
        listed |= dict.fromkeys(spelling for text in (*listed,) for spelling in _as_data_frames_write(text))
        self._unknown = _unlike(listed)
        *codes, self.default = self._codes((*listed, self._unknown), rules)
        self.codes = {text: code for text, code in zip(listed, codes, strict=True) if code != REFUSED}
        """The code of each text that has one: of a level, or MISSING."""
        self._texts: dict[int, str] = {}
        for text, code in self.codes.items():
            self._texts.setdefault(code, text)

    def _codes(self, texts: Sequence[str], rules: Rules) -> list[int]:
        block = TableRows(Path(), "row", range(len(texts)), {self.column.name: texts})
        values, bad = self.column.read(block, rules)
        return [
            REFUSED if wrong else MISSING if np.isnan(value) else int(value)
            for value, wrong in zip(values.tolist(), bad.tolist(), strict=True)
        ]

    def typed(self, values: Doubles, bad: Flags) -> NDArray[Any]:
        """Codes (N,) as the reader gives them, NaN where missing, as the input (N, 1)."""
        codes = np.where(bad, REFUSED, np.where(np.isnan(values), MISSING, values)).astype(np.int64)
        texts = [self._texts.get(code, self._unknown) for code in codes.tolist()]
        return np.array(texts, object).reshape(-1, 1)

    def cells(self, given: NDArray[Any]) -> list[Cell]:
        """The input (N, 1) as cells."""
        return [str(text) for text in given[:, 0]]

    def values(self, given: NDArray[Any]) -> Doubles:
        """The input (N, 1) as the graph takes it: (N,) numbers of levels, NaN where missing, infinite where refused."""
        codes = np.array([self.codes.get(text, self.default) for text in given[:, 0].tolist()], np.float64)
        return np.where(codes == MISSING, np.nan, np.where(codes == REFUSED, np.inf, codes))

    def spec(self) -> TypedColumn:
        """For the manifest."""
        told = [*TRUTHS] if isinstance(self.column, Boolean) else [*map(normal, self.column.levels)]
        listed = ", ".join(map(repr, told[:SHOWN_TEXTS])) + (
            f" and {len(told) - SHOWN_TEXTS} more, see preprocessing" if len(told) > SHOWN_TEXTS else ""
        )
        others = {REFUSED: "refuses the row", MISSING: "counts as missing"}.get(self.default, "counts as 'other'")
        return TypedColumn(
            name=self.name,
            column=normal(self.column.name),
            dtype="string",
            shape=("batch", 1),
            meaning=f"one of {listed}{', in any case' if isinstance(self.column, Boolean) else ''}; any other {others}",
            missing=self._texts.get(MISSING),
        )

    def synthetic(self, count: int, generator: np.random.Generator) -> NDArray[Any]:
        """(count, 1) of the texts, and where that refuses nothing of another one."""
        texts = list(self.codes) + ([] if self.default == REFUSED else [self._unknown])
        return np.array([texts[place] for place in generator.integers(0, len(texts), count)], object).reshape(-1, 1)

    def refused(self) -> Any:
        """A value that costs its row the answer; None where there is none."""
        return self._unknown if self.default == REFUSED else None

    def write(self, graph: GraphWriter) -> tuple[str, str]:
        """Features (N, F) and which rows are refused (N, 1)."""
        code = graph.add(
            "LabelEncoder",
            self.name,
            domain="ai.onnx.ml",
            keys_strings=list(self.codes),
            values_int64s=list(self.codes.values()),
            default_int64=self.default,
        )
        refused = graph.add("Equal", code, graph.constant(np.array(REFUSED, np.int64)))
        if isinstance(self.column, Categorical):
            places = graph.constant(np.arange(len(self.column.features), dtype=np.int64)[None])
            return _as(graph, graph.add("Equal", code, places), np.float32), refused
        unknown = graph.add("Less", code, graph.constant(np.array(0, np.int64)))
        half = graph.constant(np.array(0.5, np.float32))
        return graph.add("Where", unknown, half, _as(graph, code, np.float32)), refused


class TablePreprocessing(Preprocessing):
    """Of the columns of a schema, whose `outputs` are names that no input may have."""

    def __init__(self, columns: Sequence[Column], missing: Sequence[str], outputs: Sequence[str], read: Read) -> None:
        self._encoder, self._table, self._read = RowEncoder(columns, missing), tuple(columns), read
        names = free_names([normal(column.name) or f"column {n}" for n, column in enumerate(columns, 1)], outputs)
        self._inputs = [_input(name, column, self._encoder.rules) for name, column in zip(names, columns, strict=True)]
        self.columns = tuple(own.spec() for own in self._inputs)
        self.outside = (*OUTSIDE, READER)

    def write(self, graph: GraphWriter) -> PreparedInputs:
        """See the file's head. Numbers are dealt with all at once."""
        numbers = [own for own in self._inputs if isinstance(own, NumberInput)]
        parts, refused, order = list[str](), list[str](), list[Column]()
        if numbers:
            numbers.sort(key=lambda own: own.dtype is np.float64)
            features, wrong = _write_numbers(graph, numbers)
            parts, refused, order = [features], [wrong], [own.column for own in numbers]
        for own in self._inputs:
            if isinstance(own, TextInput):
                features, wrong = own.write(graph)
                parts.append(features)
                refused.append(wrong)
                order.append(own.column)
        return PreparedInputs(
            graph.add("Gather", _joined(graph, parts), graph.constant(self._places(order)), axis=1),
            _any(graph, _joined(graph, refused)),
        )

    def _places(self, order: Sequence[Column]) -> NDArray[np.int64]:
        """(D,) where each feature is when the columns come in that `order`."""
        begins, first = dict[str, int](), 0
        for column in order:
            begins[column.name] = first
            first += len(column.features)
        return np.concatenate([begins[column.name] + np.arange(len(column.features)) for column in self._table])

    def read(self, path: Source, identifiers: Sequence[str] = ()) -> TypedRows:
        """See Preprocessing."""
        parts: list[list[NDArray[Any]]] = []

        def keep(values: Values, _inputs: Floats) -> None:
            cells = zip(self._inputs, values.cells.T, values.bad.T, strict=True)
            parts.append([own.typed(numbers, bad) for own, numbers, bad in cells])

        refused, handed = self._read(path, identifiers, keep)
        columns = {own.name: np.concatenate([part[place] for part in parts]) for place, own in enumerate(self._inputs)}
        for own in self._inputs:
            if refused and (value := own.refused()) is not None:
                columns[own.name][list(refused), 0] = value
                break
        return TypedRows(columns, refused, handed)

    def prepare(self, columns: Columns) -> tuple[Floats, Flags]:
        """See Preprocessing."""
        cells = {own.column.name: own.cells(columns[own.name]) for own in self._inputs}
        rows = len(next(iter(cells.values())))
        block, faults = TableRows(Path(), "row", range(rows), cells), Faults(Path(), by_row=True)
        inputs = self._encoder.encode(block, self._encoder.read(block, faults), faults)
        refused = np.zeros(rows, np.bool_)
        refused[list(faults.rows)] = True
        return inputs, refused

    def column_values(self, columns: Columns) -> Mapping[str, Doubles]:
        """See Preprocessing."""
        return {own.column.name: own.values(columns[own.name]) for own in self._inputs}

    def synthetic(self, count: int, generator: np.random.Generator) -> Columns:
        """See Preprocessing; one row of eight has a value that refuses it, where a column has such."""
        columns = {own.name: own.synthetic(count, generator) for own in self._inputs}
        able = [own for own in self._inputs if own.refused() is not None]
        for row in np.flatnonzero(generator.random(count) < 1 / 8) if able else ():
            own = able[int(generator.integers(len(able)))]
            columns[own.name][row, 0] = own.refused()
        return columns


def is_wide(column: Numeric) -> bool:
    """Whether float32 is too narrow for a column: its rounding would show in the feature, or its bounds do not fit."""
    center, scale = column.constants
    bounds = np.abs(column.range or (0.0, 0.0))
    return bool(abs(center) > 2**LOST_BITS * scale or scale < SMALLEST_NORMAL or bounds.max() > LARGEST)


def _input(name: str, column: Column, rules: dict[str, Rules]) -> NumberInput | TextInput:
    if isinstance(column, Numeric):
        return NumberInput(name, column, rules[column.name])
    assert isinstance(column, Boolean | Categorical)
    return TextInput(name, column, rules[column.name])


def _write_numbers(graph: GraphWriter, numbers: Sequence[NumberInput]) -> tuple[str, str]:
    """Features (N, K) of the inputs, those of float32 first, and which are refused (N, K)."""
    parts = []
    for dtype in (np.float32, np.float64):
        if names := [own.name for own in numbers if own.dtype is dtype]:
            parts.append(_as(graph, _joined(graph, names), np.float64))
    given = _joined(graph, parts)
    absent = graph.add("IsNaN", given)
    if markers := max(len(own.markers) for own in numbers):
        listed = np.full((len(numbers), markers), np.nan)
        for row, own in zip(listed, numbers, strict=True):
            row[: len(own.markers)] = own.markers
        last = graph.constant(np.array([2], np.int64))
        equal = graph.add("Equal", graph.add("Unsqueeze", given, last), graph.constant(listed))
        marked = graph.add("ReduceMax", _as(graph, equal, np.int32), last, keepdims=0)
        absent = graph.add("Or", absent, _as(graph, marked, np.bool_))
    low, high = np.array([[own.low, own.high] for own in numbers]).T
    outside = graph.add(
        "Or",
        graph.add("Less", given, graph.constant(low[None])),
        graph.add("Greater", given, graph.constant(high[None])),
    )
    wrong = graph.add("And", outside, graph.add("Not", absent))
    center, scale = np.array([own.column.constants for own in numbers]).T
    scaled = graph.add("Div", graph.add("Sub", given, graph.constant(center[None])), graph.constant(scale[None]))
    nothing = graph.constant(np.array(0.0))
    kept = graph.add("Where", graph.add("Or", absent, wrong), nothing, scaled)
    large = graph.add("Greater", graph.add("Abs", kept), graph.constant(np.array(LARGEST)))
    features = _as(graph, graph.add("Where", large, nothing, kept), np.float32)
    return features, graph.add("Or", wrong, large)


def _any(graph: GraphWriter, flags: str) -> str:
    """(N, M) flags to (N, 1): whether one of a row is set."""
    last = graph.constant(np.array([1], np.int64))
    return _as(graph, graph.add("ReduceMax", _as(graph, flags, np.int32), last, keepdims=1), np.bool_)


def _joined(graph: GraphWriter, parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else graph.add("Concat", *parts, axis=1)


def _as(graph: GraphWriter, value: str, dtype: Any) -> str:
    return graph.add("Cast", value, to=np.dtype(dtype))


def _spellings() -> tuple[str, ...]:
    """Every spelling of true and false, in any case."""
    return tuple(
        "".join(letters)
        for word in TRUTHS
        for letters in product(*(dict.fromkeys((letter, letter.upper())) for letter in word))
    )


def _as_data_frames_write(text: str) -> tuple[str, ...]:
    """The ways in which pandas and JSON write the number or truth that a declared text is; none for other text."""
    key = key_of(text)
    if key is None or key[0] == "time":
        return ()
    if key[0] == "truth":
        return str(key[1]), str(key[1]).lower()
    number = Decimal(str(key[1]))
    if not number.is_finite() or abs(number) >= LARGEST_WHOLE:
        return ()
    whole = (str(int(number)),) if number == int(number) else ()
    return (*whole, repr(float(number))) if Decimal(repr(float(number))) == number else whole


def _unlike(texts: dict[str, None]) -> str:
    """A text that is none of them."""
    unknown = "unknown"
    while unknown in texts:
        unknown += "?"
    return unknown
