"""Tables: CSV or Parquet files and the schema file that says what their columns mean.

A schema file, which all sites of a federation share:

    columns:
      - {name: age, kind: numeric, center: 50, scale: 20, range: [0, 120]}
      - {name: smoker, kind: boolean}
      - {name: ward, kind: categorical, levels: [surgery, medicine]}
    target: {name: outcome, labels: [benign, malignant]}     # or labels: {"0": benign, "1": malignant}
    missing: ["", NA, "?"]                                   # cells that mean 'not known'
    standardise: schema                                      # or site, or federated
    extra: refuse                                            # or ignore: columns with other names, the same or none
    delimiter: ","
    unseen: refuse_row                                       # or missing, or other: values that are no level
    identifiers: [visit]                                     # no inputs; written beside a prediction
    person: patient                                          # no input; whose a row is, see below
    rows_per_person: 1                                       # of which statistics and metrics are made

`target` takes `weights: {malignant: 10}` too: how much an example counts in the loss, by label, 1 if not stated. A
number is predicted by `target: {name: dose, kind: numeric, range: [0, 40], loss: squared}` (or huber, or poisson), see
`fedclaw.learning.tasks.regression`.

How each kind of column becomes numbers, missing cells included, is in `columns`. The target may not be missing.
`missing` can be given to one column, and then holds there alone.

A value means the same however it is written (`values`): 1, 1.0 and Parquet's integer 1 are one level, text is
compared after Unicode normalisation, an empty cell and Parquet's null are one thing. YAML's numbers are the text that
they were written as (`fedclaw.yaml_text`): the level 001 is called 001.

How a site's own files are written (`fedclaw.learning.workload.FileFormat`) is said in its site.yaml and is no part of
the schema:

    data: {train: train.csv, test: test.csv, delimiter: ";", decimal: ",", encoding: latin-1, title_lines: 1}

Persons. With `person`, a guarantee is for each person, all of whose rows have the same value in that column
(`fedclaw.clients.persons`), not for each row. Training uses all rows. Statistics, metrics and histograms use a
person's first `rows_per_person` rows in the order of the file: which they are depends on nobody else's rows, nor on
what a server asks.

Standardisation. With `schema`, every numeric column's `center` and `scale` are constants in this file: public,
equal at all sites and in the bundle, and independent of anybody's data. With `site`, they are the site's own
training mean and deviation, which the site computes once, keeps in a file of its own and uses for training,
testing and predicting:

    fitted = schema.fit(train_csv)                # reads the training data; nothing leaves the site
    write_atomic(file, fitted.constants_json().encode(), PRIVATE_MODE)
    fitted = schema.with_constants(file.read_text(), str(file))      # later, to test or to predict

Only the fitted schema reads data then; `to_json`, and with it the digest that sites compare, stays the agreed one.
Such constants depend on every training example, and no accountant counts them: with `site` the epsilon of a
DP-SGD run does not cover the standardisation, and the constants must stay at the site. `data_dependent` says
so, for whoever has to refuse it.

With `federated`, they are the mean and deviation over all sites, from a differentially private release of statistics
(`python -m fedclaw.statistics`) that every site's ledger was charged for; what is done with them costs nothing more.
They need a `range` in every numeric column, within which the release counted. The server sends them with each plan, and
`with_constants` makes of this schema and them one that says `standardise: schema`, which goes into the bundle.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field

from fedclaw.clients.columns import UNKNOWN, Column, Doubles, Flags, Numeric, codes, describe, one_of
from fedclaw.clients.definitions import canonical_json, parse_chosen, parse_definition, shown, weights_of
from fedclaw.clients.moments import Moments
from fedclaw.clients.persons import USUAL_ROWS, LikelyPersons, Persons
from fedclaw.clients.table_definition import ClassTarget, NumberColumn, TableDefinition, table_of
from fedclaw.clients.table_graph import MAX_COLUMNS, TablePreprocessing
from fedclaw.clients.table_reading import MissingCells, RowEncoder, Seen, Values
from fedclaw.clients.tables import Content, Faults, TableRows, Wanted, read_blocks
from fedclaw.clients.values import Declared, Markers, shown_cell
from fedclaw.errors import DataError, NotInGraph
from fedclaw.learning.marginals import draw
from fedclaw.learning.preprocessing import LABEL, REFUSED
from fedclaw.learning.sources import Source
from fedclaw.learning.tasks.base import Targets, Task
from fedclaw.learning.workload import FileFormat, Floats, Indices, Rows, Schema, Table
from fedclaw.privacy.statistics import ColumnStatistics, Records, StatisticColumn, Statistics
from fedclaw.protocol.frozen import Frozen

SMALLEST_SCALE = 1e-6
"""Least deviation of the federation's constants, in halves of a column's range."""
ROUNDING = 1e-12
"""Relative: far above that of a mean in double precision, far below that of any measurement."""


class ColumnConstants(Frozen):
    """Mean and deviation of a numeric column's known training values; 0 and 1 if there are none, 1 if all are equal."""

    mean: float
    deviation: float = Field(gt=0)


class Constants(Frozen):
    """What numbers are standardised by: a site's own (`standardise: site`, never sent), or the federation's."""

    schema_digest: str
    columns: dict[str, ColumnConstants]


class TabularSchema(Schema):
    """Columns to features: (N, D) with D the sum of the columns' features, in the order of the schema file."""

    name: ClassVar[str] = "tabular"
    modality = "table"

    def __init__(self, definition: TableDefinition) -> None:
        self.definition = definition
        self._constants: Constants | None = None
        self._columns: tuple[Column, ...] = definition.resolved
        self._format = FileFormat(delimiter=definition.delimiter)

    @classmethod
    def parse(cls, text: str, origin: str) -> Self:
        """Read a schema file. Raises DataError that names `origin` and the field."""
        return cls(parse_chosen(text, origin, table_of))

    def to_json(self) -> str:
        """The agreed schema, without a site's constants."""
        return canonical_json(self.definition)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (sum(len(column.features) for column in self._columns),)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; none of a number."""
        target = self.definition.target
        return target.classes if isinstance(target, ClassTarget) else ()

    @property
    def target_name(self) -> str:
        """The target column's name."""
        return self.definition.target.name

    @property
    def class_weights(self) -> tuple[float, ...] | None:
        """As the schema file states them."""
        target = self.definition.target
        return weights_of(self.labels, target.weights) if isinstance(target, ClassTarget) else None

    @property
    def task(self) -> Task:
        """Classification or regression, as the target is of classes or a number."""
        target = self.definition.target
        return super().task if isinstance(target, ClassTarget) else target.task

    @property
    def rows_per_person(self) -> int | None:
        """See Schema."""
        return None if self.definition.person is None else self.definition.rows_per_person or USUAL_ROWS

    @property
    def data_dependent(self) -> bool:
        """True if the inputs depend on other examples than their own, which no privacy accountant covers."""
        return self.definition.standardise == "site"

    def read_examples(self, path: Path) -> Table:
        """Read labelled rows. Raises DataError; a table without the target, or with a row without it, is one."""
        self._require_constants(path)
        encoder = self._encoder()
        return self._table(path, encoder, encoder.encode)

    def read_inputs(self, path: Path) -> Floats:
        """Read rows to predict, (N, D); the target column may be there and is not looked at. Raises DataError."""
        self._require_constants(path)
        encoder, faults = self._encoder(), Faults(path)
        parts = [
            encoder.encode(block, encoder.read(block, faults), faults)
            for block in self._blocks(path, faults, target_required=False)
        ]
        faults.check()
        return np.concatenate(parts)

    def read_rows(self, path: Source, identifiers: Sequence[str] = ()) -> Rows:
        """Read rows to predict; a row with a bad cell, or with the wrong number of cells, is refused alone."""
        parts = list[Floats]()
        refused, handed = self._by_row(path, identifiers, lambda _values, inputs: parts.append(inputs))
        return Rows(np.concatenate(parts), refused, handed)

    def preprocessing(self) -> TablePreprocessing:
        """See Schema. Raises NotInGraph for constants of a site's, and for a table that is too wide."""
        if self.data_dependent:
            raise NotInGraph(
                "numbers are standardised by each site's own constants, which never leave it: inputs are prepared by "
                "FedClaw's reader (constants=FILE) and go to model.onnx"
            )
        self._require_constants(Path("pipeline.onnx"))
        if len(self._columns) > MAX_COLUMNS:
            raise NotInGraph(
                f"the table has {len(self._columns)} columns, and a graph with an input for each is made for at most "
                f"{MAX_COLUMNS}"
            )
        outputs = (LABEL, self.task.head[1], REFUSED)
        return TablePreprocessing(self._columns, self.definition.missing, outputs, self._by_row)

    def _by_row(
        self, path: Source, identifiers: Sequence[str], take: Callable[[Values, Floats], None]
    ) -> tuple[Mapping[int, str], Mapping[str, Sequence[str]]]:
        """Give `take` the rows of a file to predict, a block after the other, as cells and as inputs.

        Which rows are refused, and what the file says of which row is which. Raises DataError.
        """
        self._require_constants(path)
        encoder, faults, rows = self._encoder(), Faults(path, by_row=True), 0
        declared = self.definition.identifiers or ()
        names = tuple(dict.fromkeys((*declared, *identifiers)))
        handed = {name: list[str]() for name in names}
        for block in self._blocks(path, faults, target_required=False, identifiers=names):
            values = encoder.read(block, faults)
            take(values, encoder.encode(block, values, faults))
            for name in names:
                handed[name] += map(shown_cell, block.columns.get(name, ()))
            rows += block.rows
        absent = [name for name in identifiers if len(handed[name]) < rows]
        if absent:
            raise DataError(f"{path}: the column {shown(absent[0])}, which identifiers= names, is missing")
        return faults.rows, {name: cells for name, cells in handed.items() if len(cells) == rows}

    def statistic_columns(self) -> tuple[StatisticColumn, ...]:
        """All columns, in the order of the schema file, and the target where it is a number."""
        target = self.definition.target
        columns = tuple(column.statistic() for column in self.definition.resolved)
        return columns if isinstance(target, ClassTarget) else (*columns, target.column.statistic())

    def records(self, path: Path, most: int | None = None) -> Iterator[Records]:
        """See Schema: the rows as they are, a block at a time. Raises DataError, at the end if not before."""
        target, faults, persons = self._target(), Faults(path), Persons(self.definition.missing)
        rules = self._encoder().rules
        for block in self._blocks(path, faults, target_required=True):
            values = {column.name: column.values(block, rules[column.name], faults) for column in self._columns}
            labels = found = target(block, faults)
            if not np.issubdtype(found.dtype, np.integer):
                values[self.definition.target.name] = found.astype(np.float64)
                labels = np.zeros(len(found), np.int64)
            used = self._used(block, persons, faults, most)
            yield Records({name: column[used] for name, column in values.items()}, labels[used])
        faults.check()

    def _used(self, block: TableRows, persons: Persons, faults: Faults, most: int | None) -> Flags | slice:
        """Which rows of a block statistics use: the first `most` of each person, or as many as the schema says."""
        if self.definition.person is None or self.rows_per_person is None:
            return slice(None)
        return persons.first(persons.read(block, self.definition.person, faults), most or self.rows_per_person)

    def missing(self, path: Path) -> MissingCells:
        """How many cells of the input columns are missing, and in how many rows.

        Counted as `read_examples` takes them, in one pass and bounded memory, without a target, constants or any look
        at the other cells. Raises DataError.
        """
        encoder, seen = self._encoder(), Seen(self._columns)
        for block in self._blocks(path, Faults(path), target_required=False):
            seen.add(encoder.read(block, Faults(path)))
        return seen.missing()

    def notes(self, table: Table) -> tuple[str, ...]:
        """What was seen while reading, and how many rows are equal to an earlier one."""
        rows = {
            hashlib.blake2b(row.tobytes() + target.tobytes(), digest_size=16).digest()
            for row, target in zip(table.inputs, table.targets, strict=True)
        }
        twice = len(table) - len(rows)
        same = [f"{twice} of {len(table)} rows are the same as an earlier one"] if twice else []
        return (*super().notes(table), *same)

    def written_as(self, written: FileFormat) -> Self:
        """This schema for files with another delimiter, decimal mark or encoding than most."""
        other = copy.copy(self)
        other._format = written.model_copy(update={"delimiter": written.delimiter or self.definition.delimiter})
        return other

    def fit(self, path: Path) -> Self:
        """This schema with the constants of the training data in `path`; itself if it standardises by the schema.

        One pass over the file in bounded memory. Raises DataError.
        """
        if not self.data_dependent:
            return self
        encoder, faults = self._encoder(), Faults(path)
        moments = [Moments() for _ in encoder.numeric]
        for block in self._blocks(path, faults, target_required=False):
            encoder.add_moments(encoder.read(block, faults), moments)
        faults.check()
        return self._fitted_by(encoder, moments)

    def fit_examples(self, path: Path) -> tuple[Self, Table]:
        """`fit` and `read_examples` in one pass over the file. Raises DataError."""
        if not self.data_dependent:
            return super().fit_examples(path)
        encoder = self._encoder()
        moments = [Moments() for _ in encoder.numeric]
        raw = list[Doubles]()

        def keep(_block: TableRows, values: Values, _faults: Faults) -> Floats:
            encoder.add_moments(values, moments)
            raw.append(encoder.raw_numbers(values))
            return encoder.encode_others(values)

        table = self._table(path, encoder, keep)
        fitted = self._fitted_by(encoder, moments)
        fitted._encoder().fill(path, table.inputs, raw)
        return fitted, table

    @property
    def needs_constants(self) -> bool:
        """True if the federation's constants are still to come."""
        return self.definition.standardise == "federated"

    def shared_constants(self, moments: Mapping[str, tuple[float, float]]) -> str:
        """The federation's constants from mean and variance by column; a column without them goes by its range.

        A deviation is at least SMALLEST_SCALE of half the range. Raises DataError if this schema takes none.
        """
        if not self.needs_constants:
            raise DataError(f"the schema says standardise: {self.definition.standardise}; it takes no statistics")
        found = {}
        for column in self.definition.columns:
            if isinstance(column, Numeric):
                bounds = column.statistic()
                mean, variance = moments.get(column.name, (bounds.middle, bounds.half**2 / 3))
                deviation = max(math.sqrt(max(variance, 0.0)), SMALLEST_SCALE * bounds.half)
                found[column.name] = ColumnConstants(mean=mean, deviation=deviation)
        return canonical_json(Constants(schema_digest=self._digest(), columns=found))

    def provisional(self) -> Self:
        """With `standardise: federated`, this schema with the ranges scaled to [-1, 1]; else itself."""
        if not self.needs_constants:
            return self
        columns = [column.statistic() for column in self.definition.columns if isinstance(column, Numeric)]
        return self._scaled({c.name: ColumnConstants(mean=c.middle, deviation=c.half) for c in columns})

    def constants_json(self) -> str | None:
        """The site's constants, which never leave it; None if the schema is not fitted or needs none."""
        return canonical_json(self._constants) if self._constants else None

    def with_constants(self, text: str, origin: str) -> Self:
        """This schema with the constants of `constants_json`, read from `origin`.

        Raises DataError if they are damaged or were made with another schema. Whether it is raised does not depend on
        any data, and with `standardise: federated` every number in range can be standardised by what is accepted.
        """
        constants = parse_definition(text, origin, Constants)
        wanted = {column.name for column in self.definition.columns if isinstance(column, Numeric)}
        if constants.schema_digest != self._digest() or set(constants.columns) != wanted:
            raise DataError(f"{origin}: these standardisation constants belong to another schema; compute them anew")
        if not self.needs_constants:
            return self._fitted(constants)
        for column in self.definition.columns:
            if isinstance(column, Numeric) and not _fits(column.statistic(), constants.columns[column.name]):
                raise DataError(f"{origin}: the standardisation constants of column {column.name!r} leave its range")
        return self._scaled(constants.columns)

    def describe_inputs(self) -> Mapping[str, Any]:
        """The input tensor, each column's place in it, and the rules; never a site's constants."""
        columns, first = [], 0
        for column in self.definition.resolved:
            columns.append(describe(column, first))
            first += len(column.features)
        return {
            "dtype": "float32",
            "shape": ["batch", first],
            "columns": columns,
            "features": [feature for column in self.definition.resolved for feature in column.features],
            "standardise": self.definition.standardise,
            "encoding": {
                "numeric": "(value - center) / scale; missing: 0",
                "boolean": "0 or 1; missing: 0.5",
                "categorical": "one-hot over the levels; missing: all zeros",
                "missing": list(self.definition.missing),
            },
        }

    def sampled_inputs(self, statistics: Statistics, count: int, generator: np.random.Generator) -> Floats:
        """See Schema; with `standardise: site` numbers are standardised by the release's own mean and deviation."""
        known = {column.name for column in self.statistic_columns()}
        if unknown := sorted(set(statistics.columns) - known):
            raise DataError(f"the schema has no column {unknown[0]!r:.100}")
        parts = [
            self._sampled(column, statistics.columns.get(column.name), count, generator)
            for column in self.definition.resolved
        ]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _sampled(
        self, column: Column, told: ColumnStatistics | None, count: int, generator: np.random.Generator
    ) -> Doubles:
        """(count, F)."""
        values = None if told is None else draw(column.statistic(), told, count, generator)
        if values is None:
            return self._synthetic(column, count, generator)
        if self.data_dependent and isinstance(column, Numeric):
            known = values[~np.isnan(values)] if np.isfinite(values).any() else np.zeros(1)
            standardised: Doubles = np.nan_to_num((values - known.mean()) / (known.std() or 1.0))
            return standardised[:, None]
        return column.encode(values)

    def synthetic_inputs(self, count: int, generator: np.random.Generator) -> Floats:
        """Each column drawn by itself from what the schema says of it; with `standardise: site` numbers are N(0, 1)."""
        parts = [self._synthetic(column, count, generator) for column in self.definition.resolved]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _synthetic(self, column: Column, count: int, generator: np.random.Generator) -> Doubles:
        """(count, F)."""
        if self.data_dependent and isinstance(column, Numeric):
            return generator.normal(size=(count, 1))
        return column.synthetic(count, generator)

    def _fitted_by(self, encoder: RowEncoder, moments: list[Moments]) -> Self:
        found = {
            column.name: ColumnConstants(mean=own.mean, deviation=_divisor(own))
            for column, own in zip(encoder.numeric, moments, strict=True)
        }
        return self._fitted(Constants(schema_digest=self._digest(), columns=found))

    def _fitted(self, constants: Constants) -> Self:
        fitted = copy.copy(self)
        fitted._constants = constants
        fitted._columns = tuple(_standardised(column, constants.columns) for column in self.definition.resolved)
        return fitted

    def _scaled(self, constants: Mapping[str, ColumnConstants]) -> Self:
        """A schema of its own with these constants written into it."""
        columns = tuple(_standardised(column, constants) for column in self.definition.columns)
        definition = self.definition.model_copy(update={"columns": columns, "standardise": "schema"})
        return type(self)(definition).written_as(self._format)

    def _encoder(self) -> RowEncoder:
        return RowEncoder(self._columns, self.definition.missing)

    def _table(self, path: Path, encoder: RowEncoder, encode: Callable[[TableRows, Values, Faults], Floats]) -> Table:
        """The labelled rows in one pass, `encode` giving the inputs of each block. Raises DataError."""
        target, faults, content, seen = self._target(), Faults(path), Content(), Seen(self._columns)
        inputs, targets = [], []
        person, persons, owners = self.definition.person, Persons(self.definition.missing), list[Indices]()
        likely = LikelyPersons(self.definition.identifiers or () if person is None else (), self.definition.missing)
        for block in self._blocks(path, faults, target_required=True, content=content, identifiers=likely.columns):
            likely.add(block)
            values = encoder.read(block, faults)
            seen.add(values)
            inputs.append(encode(block, values, faults))
            targets.append(target(block, faults))
            if person is not None:
                owners.append(persons.read(block, person, faults))
        faults.check()
        notes = seen.notes(in_own_units=self.definition.standardise == "schema")
        notes = (*notes, *likely.notes())
        table = Table(np.concatenate(inputs), np.concatenate(targets), content.hexdigest(), notes)
        return table if person is None else table.owned_by(np.concatenate(owners), persons.names)

    def _target(self) -> Callable[[TableRows, Faults], Targets]:
        """How the target's cells become class indices, or numbers, (N,); bad ones are told to the faults."""
        target = self.definition.target
        return _classes(target) if isinstance(target, ClassTarget) else _numbers(target)

    def _blocks(
        self,
        path: Source,
        faults: Faults,
        *,
        target_required: bool,
        content: Content | None = None,
        identifiers: Sequence[str] = (),
    ) -> Iterator[TableRows]:
        target = self.definition.target.name
        names = tuple(column.name for column in self._columns)
        persons = () if self.definition.person is None else (self.definition.person,)
        wanted = Wanted(
            required=(*names, target, *persons) if target_required else names,
            optional=tuple(name for name in identifiers if name not in names),
            unread=frozenset({target, *persons, *(self.definition.identifiers or ())}),
            ignore_others=self.definition.extra == "ignore",
        )
        for block in read_blocks(path, self._format, wanted, content or Content()):
            faults.begin(block)
            yield block

    def _require_constants(self, path: Source) -> None:
        if self.data_dependent and self._constants is None:
            raise DataError(
                f"{path}: the schema standardises by site, so it is read with a site's own constants: the file "
                "state/preprocessing.json that the site's client keeps (constants=FILE)"
            )
        if self.needs_constants:
            raise DataError(
                f"{path}: the schema standardises by statistics of the federation, which are not in it; a run's bundle "
                "has the schema with them"
            )

    def _digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _fits(column: StatisticColumn, constants: ColumnConstants) -> bool:
    """Whether the constants are such as statistics of numbers within the column's bounds can be."""
    return abs(constants.mean - column.middle) <= column.half * (1 + ROUNDING) and (
        SMALLEST_SCALE / 2 * column.half <= constants.deviation <= 2 * column.half
    )


def _divisor(moments: Moments) -> float:
    """The deviation, or 1 where it is 0 but for the rounding of the mean."""
    return moments.deviation if moments.deviation > ROUNDING * abs(moments.mean) else 1.0


def _standardised(column: Column, constants: Mapping[str, ColumnConstants]) -> Column:
    if not isinstance(column, Numeric):
        return column
    own = constants[column.name]
    return column.model_copy(update={"center": own.mean, "scale": own.deviation})


def _classes(target: ClassTarget) -> Callable[[TableRows, Faults], Targets]:
    name, known = target.name, target.codes
    declared, expected = Declared(known), one_of(list(known))

    def read(block: TableRows, faults: Faults) -> Targets:
        found = codes(block, name, declared, markers=None)
        faults.mark(block, name, found == UNKNOWN, expected)
        return np.maximum(found, 0).astype(np.int64)

    return read


def _numbers(target: NumberColumn) -> Callable[[TableRows, Faults], Targets]:
    """No cell may miss: what means 'not known' elsewhere is no number either."""
    column, rules = target.column, target.column.rules(Markers(()))

    def read(block: TableRows, faults: Faults) -> Targets:
        values, bad = column.read(block, rules)
        faults.mark(block, target.name, bad | np.isnan(values), column.expected)
        return np.where(np.isnan(values), target.range[0], values).astype(np.float32)

    return read
