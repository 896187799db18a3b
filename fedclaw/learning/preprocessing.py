"""Preprocessing as a part of a graph: how typed columns become a model's inputs, for a bundle's pipeline.onnx.

A `Schema` reads files: it parses dates and decimal commas, knows encodings and delimiters, and finds a level however it
is written. None of that can be written in ONNX. What comes after can: a number is standardised, a level becomes
one-hot, a value that is out of range costs its row the answer. A schema's `Preprocessing` writes this second half as
nodes of a graph, says what the columns are that it begins with, and turns a file into them.

Both halves together give what the schema gives. What a schema refuses, the graph refuses too: a row by itself, never
the batch, and never with an answer to something else than was asked.

Neither onnx nor torch is imported here: a schema is read where neither is installed.

Legend: N rows, D input shape without the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.learning.sources import Source
from fedclaw.protocol.frozen import Frozen

LABEL, REFUSED = "label", "refused"
"""Outputs of a pipeline beside the task's own: the class, (N, 1) of text, '' for a refused row; and which rows are
refused, (N, 1)."""

ColumnType = Literal["float32", "float64", "string", "uint8"]
Columns = Mapping[str, NDArray[Any]]
"""By the name of a graph's input: (N, ...) of the column's type, text as Python's str in an array of objects."""


class TypedColumn(Frozen):
    """One input of a pipeline."""

    name: str = Field(min_length=1)
    """Of the graph's input."""
    column: str
    """Of the table's column, or of the archive's array."""
    dtype: ColumnType
    shape: tuple[int | str, ...]
    meaning: str
    """What the values are, and which of them are answered."""
    missing: str | None = None
    """What stands for 'not known': NaN, or a text; None: a value may not miss."""


@dataclass(frozen=True)
class TypedRows:
    """A file's rows as typed columns. A refused row has values that the graph refuses too, where there are such."""

    columns: Columns
    refused: Mapping[int, str] = field(default_factory=dict)
    """Why a row gets no answer, by its number from 0."""
    identifiers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What the file says of which row is which, by column, (N,) each."""


class GraphWriter(Protocol):
    """The graph that nodes are added to. Values are known by their names."""

    def add(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output, whose name is returned. Operators and attributes are ONNX's (opset 18)."""

    def constant(self, value: NDArray[Any]) -> str:
        """The name of a value that is always this."""


@dataclass(frozen=True)
class PreparedInputs:
    """Values in a graph: the model's inputs, and which rows are refused; of a refused row, the inputs are finite."""

    inputs: str
    """(N, *D) float32."""
    refused: str
    """(N, 1) bool."""


class Preprocessing(ABC):
    """From typed columns to the model's inputs: once as nodes of a graph, once in numpy as the schema's reader does."""

    columns: tuple[TypedColumn, ...]
    """The graph's inputs, in their order."""
    outside: tuple[str, ...]
    """What is not done in the graph, a sentence each."""

    @abstractmethod
    def write(self, graph: GraphWriter) -> PreparedInputs:
        """Add the nodes; the graph's inputs are there, by the names of `columns`."""

    @abstractmethod
    def read(self, path: Source, identifiers: Sequence[str] = ()) -> TypedRows:
        """Read a file to predict, as `Schema.read_rows` does. Raises DataError."""

    @abstractmethod
    def prepare(self, columns: Columns) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """What the schema's reader makes of the columns: inputs (N, *D) and which rows are refused (N,)."""

    def column_values(self, columns: Columns) -> Mapping[str, NDArray[np.float64]]:
        """By the name of a column that statistics can be asked about (`Schema.statistic_columns`), what typed columns
        hold: (N,) numbers, or numbers of levels; NaN where missing, infinite where the row is refused for it.

        None of a schema without such columns.
        """
        return {}

    @abstractmethod
    def synthetic(self, count: int, generator: np.random.Generator) -> Columns:
        """`count` rows made from the schema alone, some with missing values and some that are refused."""


def free_names(wanted: Sequence[str], taken: Sequence[str]) -> tuple[str, ...]:
    """The names, in their order, longer ones in the place of those that are `taken`; no two are the same."""
    found = list[str]()
    for name in wanted:
        own = name
        while own in taken or own in found or (own != name and own in wanted):
            own = f"input_{own}"
        found.append(own)
    return tuple(found)
