"""The seam between the framework and a workload (tabular, vision, ...): two abstract classes.

A `Schema` is read from a small file that the federation agrees on; it turns a site's raw files, or the rows that
somebody wants predicted, into arrays, and says what is predicted: its task (`fedclaw.learning.tasks`). It needs numpy
only, so that prediction runs without torch and does exactly what training did. A `Workload` adds the model.

Legend: N examples, P persons, K outputs of the model (the C classes, or one value), D input shape without the batch.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.errors import DataError, NotInGraph
from fedclaw.learning.preprocessing import Preprocessing
from fedclaw.learning.sources import Source
from fedclaw.learning.tasks.base import Targets, Task
from fedclaw.learning.tasks.classification import Classification
from fedclaw.privacy.statistics import Records, StatisticColumn, Statistics
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import DataUnit, ModelSpec

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Indices = NDArray[np.int64]
Delimiter = Literal[",", ";", "\t", "|"]


@dataclass(frozen=True)
class Table:
    """Examples ready for a model: inputs (N, *D) float32 and targets (N,) of the task's dtype."""

    inputs: Floats
    targets: Targets
    content: str | None = None
    """SHA-256 of the one file that this was read from, of the very bytes that were read."""
    notes: tuple[str, ...] = ()
    """What was seen while reading that the site's operator should know; it may count, so it never leaves the site."""
    persons: Indices | None = None
    """Whose example each is, (N,), numbered from 0 in the order of their first example; None: of no known person."""
    person_names: tuple[str, ...] = field(default=(), repr=False)
    """(P,) what the data calls them, to compare tables by; never to leave the site."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def unit(self) -> DataUnit:
        """What a guarantee for this data protects."""
        return "example" if self.persons is None else "person"

    @property
    def units(self) -> int:
        """How many of those there are."""
        return len(self) if self.persons is None else int(self.persons.max(initial=-1)) + 1

    def take(self, rows: Indices | NDArray[np.bool_] | slice) -> "Table":
        """The examples `rows`, in that order, with persons numbered anew; without the file's digest and notes."""
        part = Table(self.inputs[rows], self.targets[rows])
        return part if self.persons is None else part.owned_by(self.persons[rows], self.person_names)

    def owned_by(self, persons: Indices, names: Sequence[str]) -> "Table":
        """The same examples, each of the person whose place in `names` is in `persons` (N,)."""
        known, first, which = np.unique(persons, return_index=True, return_inverse=True)
        order = np.argsort(first)
        numbers = np.empty(len(known), np.int64)
        numbers[order] = np.arange(len(known))
        return replace(self, persons=numbers[which], person_names=tuple(names[person] for person in known[order]))

    def first_rows(self, most: int) -> Indices:
        """Rows that are among the first `most` of their person, in order; all rows where persons are not known.

        Which they are depends on nobody else's rows.
        """
        if self.persons is None:
            return np.arange(len(self))
        return np.flatnonzero(ranks(self.persons) < most)

    def evenly(self, count: int) -> Indices:
        """`count` rows of each person, one person after another: the first, over again in turn where there are fewer.

        So their number is that of the persons times `count`, whatever a person has. All rows where persons are not
        known.
        """
        return np.arange(len(self)) if self.persons is None else evenly(self.persons, count)


def evenly(persons: Indices, count: int) -> Indices:
    """`count` rows of each of `persons` (N,); see `Table.evenly`."""
    order = np.argsort(persons, kind="stable")
    _, begins, sizes = np.unique(persons[order], return_index=True, return_counts=True)
    places: Indices = begins[:, None] + np.arange(count) % sizes[:, None]
    return order[places.reshape(-1)]


def ranks(persons: Indices) -> Indices:
    """(N,) how many rows before each one are of the same person."""
    order, sizes = np.argsort(persons, kind="stable"), np.bincount(persons)
    found = np.empty(len(persons), np.int64)
    found[order] = np.arange(len(persons)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return found


@dataclass(frozen=True)
class Rows:
    """Inputs to predict, one by one: a bad row costs nobody else an answer."""

    inputs: Floats
    """(N, *D); of a refused row, without meaning."""
    refused: Mapping[int, str]
    """Why a row gets no answer, by its number from 0."""
    identifiers: Mapping[str, Sequence[str]]
    """What the file says of which row is which, by column, (N,) each."""

    @property
    def answered(self) -> NDArray[np.int64]:
        """Numbers of the rows that get an answer, from 0."""
        return np.array([row for row in range(len(self.inputs)) if row not in self.refused], np.int64)


class FileFormat(Frozen):
    """How a site's text files are written: its own affair and no part of what was agreed on.

    None of it changes what is read, so no digest covers it.
    """

    delimiter: Delimiter | None = None
    """Between the cells; None: as the schema says."""
    decimal: Literal[".", ","] = "."
    """Before the decimals of a number. With a comma, a point in a number is refused: it may stand for thousands."""
    encoding: Literal["utf-8", "utf-16", "latin-1", "windows-1252"] = "utf-8"
    title_lines: int = Field(default=0, ge=0, le=100)
    """Lines above the header that are no part of the table."""


class Schema(ABC):
    """What the federation agreed on: inputs, target, and how raw values become numbers. numpy only."""

    name: ClassVar[str]
    """The workload's name, the same as in the plan."""
    modality: ClassVar[Literal["table", "image"] | None] = None
    """What the inputs are, where a model card has a name for it."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str, origin: str) -> Self:
        """Read a schema (YAML, or the JSON of `to_json`). Raises DataError that names `origin` and the field."""

    @abstractmethod
    def to_json(self) -> str:
        """Canonical JSON: the same schema gives the same text. Goes into bundles; sites compare its SHA-256."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """D."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the C classes, in the order of the model's outputs; none where the task has no classes."""
        return ()

    @property
    def target_name(self) -> str:
        """What the target is called among columns."""
        return "label"

    @property
    def class_weights(self) -> tuple[float, ...] | None:
        """How much an example of each of the C classes counts in the loss; None: all the same."""
        return None

    @property
    def task(self) -> Task:
        """What is predicted; classification by `labels` and `class_weights` unless a schema says otherwise."""
        return Classification(self.labels, self.class_weights)

    @property
    def rows_per_person(self) -> int | None:
        """How many rows of a person, the first ones, statistics and metrics use; training uses all.

        None: the data does not say whose a row is, and a guarantee is for each row.
        """
        return None

    @property
    def unit(self) -> DataUnit:
        """What a guarantee for data of this schema protects."""
        return "example" if self.rows_per_person is None else "person"

    @abstractmethod
    def read_examples(self, path: Path) -> Table:
        """Read labelled data, with persons if there are `rows_per_person`.

        Raises DataError naming file, row (1-based, header not counted) and column.
        """

    def no_examples(self) -> Table:
        """Labelled data without a single example."""
        empty = Table(np.zeros((0, *self.input_shape), np.float32), np.zeros(0, self.task.target_dtype))
        return empty if self.rows_per_person is None else empty.owned_by(np.zeros(0, np.int64), ())

    @abstractmethod
    def read_inputs(self, path: Path) -> Floats:
        """Read unlabelled data, (N, *D); a target column, if there is one, is ignored. Raises DataError."""

    def read_rows(self, path: Source, identifiers: Sequence[str] = ()) -> Rows:
        """Read data to predict, row by row: what is wrong with a row is said of that row alone.

        `identifiers` are columns to hand through, beside those that the schema names. Raises DataError for a file that
        cannot be read as a whole.
        """
        if identifiers:
            raise DataError(f"{path}: data of the workload {self.name} has no columns to hand through")
        if not isinstance(path, Path):
            raise DataError(f"{path}: the workload {self.name} reads files, and not what a client sends")
        return Rows(self.read_inputs(path), {}, {})

    def notes(self, table: Table) -> tuple[str, ...]:
        """What the site's operator should know of labelled data, in sentences without a full stop.

        They may count private data, so they are for the site's own eyes, never to be sent.
        """
        return (*table.notes, *_persons_seen(table))

    def written_as(self, written: FileFormat) -> Self:
        """This schema for files that are written like that; what is agreed on, and the digest, stay the same.

        Raises DataError where files have no such form.
        """
        if written != FileFormat():
            raise DataError(
                f"files of the workload {self.name} have no delimiter, decimal mark, encoding or title lines"
            )
        return self

    @abstractmethod
    def describe_inputs(self) -> Mapping[str, Any]:
        """JSON-able description of the model's input tensor and of every preprocessing constant."""

    def preprocessing(self) -> Preprocessing:
        """How typed columns become inputs, for a graph that has the preprocessing in it.

        Raises NotInGraph where that cannot be; a bundle then has no pipeline.onnx and says why.
        """
        raise NotInGraph(f"the workload {self.name} does not say how its preprocessing is written as a graph")

    @property
    def data_dependent(self) -> bool:
        """True if an example's inputs depend on other examples: then epsilon does not cover the preprocessing."""
        return False

    def fit(self, path: Path) -> Self:
        """This schema with the constants that it takes from a site's training data, if any. Raises DataError."""
        return self

    def fit_examples(self, path: Path) -> tuple[Self, Table]:
        """What `fit` and then `provisional` give, and the labelled data as they read it. Raises DataError."""
        fitted = self.fit(path)
        return fitted, fitted.provisional().read_examples(path)

    def constants_json(self) -> str | None:
        """The constants that `fit` found, which never leave the site; None for a schema that takes none."""
        return None

    def with_constants(self, text: str, origin: str) -> Self:
        """This schema with the constants that `constants_json` gave. Raises DataError that names `origin`."""
        raise DataError(f"{origin}: the schema takes no constants of a site's own; leave them out")

    @property
    def needs_constants(self) -> bool:
        """True if constants that the federation agrees on are still to be put in; it reads no data before."""
        return False

    def shared_constants(self, moments: Mapping[str, tuple[float, float]]) -> str:
        """The constants that the federation agrees on, for `with_constants`, from mean and variance by column.

        Raises DataError if this schema takes none.
        """
        raise DataError("the schema takes no constants of the federation's")

    def provisional(self) -> Self:
        """This schema with constants made of itself alone where the federation's are still to come; else itself."""
        return self

    def statistic_columns(self) -> tuple[StatisticColumn, ...]:
        """The columns that statistics can be asked about; none where examples have no columns."""
        return ()

    def records(self, path: Path, most: int | None = None) -> Iterator[Records]:
        """The labelled data in `path`, in parts: every statistic column as it is, and labels.

        Of each person at most `most` rows, the first ones of the file; None: `rows_per_person`. Raises DataError.
        """
        table = self.read_examples(path)
        yield Records({}, table.targets[table.first_rows(most or self.rows_per_person or 1)])

    def sampled_inputs(self, statistics: Statistics, count: int, generator: np.random.Generator) -> Floats:
        """(count, *D) drawn from what a release says of the columns, each by itself; of one it is silent on, from the
        schema. Raises DataError for a release that is not of this schema, and where examples have no columns."""
        raise DataError(f"examples of the workload {self.name} have no columns to draw by")

    @abstractmethod
    def synthetic_inputs(self, count: int, generator: np.random.Generator) -> Floats:
        """(count, *D) made from the schema alone (ranges, levels): never from a site's data."""


class Workload(ABC):
    """Models for one schema, whose task brings loss and metrics: pure functions, no hidden state."""

    name: ClassVar[str]

    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    @property
    def task(self) -> Task:
        """The schema's."""
        return self.schema.task

    @abstractmethod
    def default_model(self) -> ModelSpec:
        """The model used when the configuration names none."""

    @abstractmethod
    def build(self, spec: ModelSpec) -> "torch.nn.Module":
        """A fresh model, (N, *D) -> outputs (N, K), without batch statistics. Raises PluginError for a wrong spec.

        A site builds it under `torch.device("meta")` first, where it must cost no memory, and for real only if
        names and shapes of its parameters are those that arrived.
        """

    @abstractmethod
    def spec_of(self, model: "torch.nn.Module") -> ModelSpec:
        """The spec that builds a model of exactly this model's (possibly pruned) shapes: build(spec_of(m)) fits m."""

    def loss(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """Mean loss over the batch, a scalar; 0 with a zero gradient for an empty batch."""
        return self.task.loss(outputs, targets)

    def evaluate(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> dict[str, float]:
        """The task's metrics of a test set, by name; undefined ones are left out."""
        return self.task.evaluate(doubles(outputs), targets.detach().cpu().numpy())


def _persons_seen(table: Table) -> tuple[str, ...]:
    if table.persons is None:
        return ()
    sizes = np.bincount(table.persons)
    return (f"{len(table)} rows of {len(sizes)} persons, {np.median(sizes):g} in the median and at most {sizes.max()}",)


def load_parameters(model: "torch.nn.Module", arrays: Mapping[str, Floats]) -> None:
    """Put the arrays into the model's parameters of the same names.

    Raises ValueError that shows up to three names whose shape is another here and there, or that are on one side only.
    """
    import torch

    own = dict(model.named_parameters())
    found = {name: array.shape for name, array in arrays.items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in own.items()}
    if odd := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        pairs = [f"{name} {found.get(name, 'nothing')} against {wanted.get(name, 'nothing')}" for name in odd[:3]]
        raise ValueError(", ".join(pairs))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(np.array(arrays[name])))


def doubles(outputs: "torch.Tensor") -> NDArray[np.float64]:
    """A model's outputs for the numpy half of a task."""
    found: NDArray[np.float64] = outputs.detach().cpu().numpy().astype(np.float64)
    return found


def schema_digest(schema_text: str) -> str:
    """SHA-256 (hexadecimal) of a schema's canonical JSON."""
    return hashlib.sha256(schema_text.encode()).hexdigest()
