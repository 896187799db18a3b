"""Arrays of numbers and their targets: what a notebook's federation is made of, and .npz files of the same.

A file holds `x` (N, *D), and where it is labelled `y` (N,): names of the classes, or numbers within the target's range.
Where the schema has `rows_per_person`, it holds `persons` (N,) too: whose each example is, text or a whole number.
Nothing is scaled or encoded: inputs are what the model takes.

Legend: N examples, D shape of one input, C classes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from fedclaw.clients.arrays import (
    PERSONS,
    ClassReader,
    NumberReader,
    inputs_of,
    persons_in,
    read_archive,
    require_pairs,
)
from fedclaw.clients.persons import RowsPerPerson
from fedclaw.errors import DataError
from fedclaw.learning.preprocessing import Columns, GraphWriter, PreparedInputs, Preprocessing, TypedColumn, TypedRows
from fedclaw.learning.sources import Source
from fedclaw.learning.tasks.base import LARGEST, Task
from fedclaw.learning.tasks.regression import NumberTarget
from fedclaw.learning.workload import Floats, Rows, Schema, Table
from fedclaw.protocol.frozen import Frozen, explain

INPUTS = "inputs"
"""The input of a graph that has the preprocessing in it."""


class _Content(Frozen):
    input_shape: tuple[int, ...] = Field(min_length=1)
    labels: tuple[str, ...] = ()
    """Of the classes; or there is a `target`."""
    target: NumberTarget | None = None
    columns: tuple[str, ...] = ()
    """Names of the inputs, as runs of earlier versions on data frames say them."""
    rows_per_person: RowsPerPerson | None = None
    """How many examples of a person, its first ones, metrics use; None: a guarantee is for each example."""

    @model_serializer(mode="wrap")
    def _as_before(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without persons the schema, and its digest, is what it was before there were any."""
        fields: dict[str, Any] = plain(self)
        if fields["rows_per_person"] is None:
            del fields["rows_per_person"]
        return fields

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if (len(self.labels) < 2) != (self.target is not None):
            raise ValueError("there are labels of two classes or more, or a target")
        return self


class ArraySchema(Schema):
    """Arrays of one shape, and what is predicted of them."""

    name: ClassVar[str] = "arrays"

    def __init__(self, content: _Content) -> None:
        self._content = content

    @classmethod
    def of(
        cls,
        input_shape: tuple[int, ...],
        target: tuple[str, ...] | NumberTarget,
        rows_per_person: int | None = None,
    ) -> Self:
        """The schema of arrays of that shape, whose target is of classes or a number; of persons, or not."""
        if isinstance(target, NumberTarget):
            return cls(_Content(input_shape=input_shape, target=target, rows_per_person=rows_per_person))
        return cls(_Content(input_shape=input_shape, labels=target, rows_per_person=rows_per_person))

    @classmethod
    def parse(cls, text: str, origin: str) -> Self:
        """Read what `to_json` wrote. Raises DataError."""
        try:
            return cls(_Content.model_validate_json(text))
        except ValidationError as error:
            raise DataError(f"{origin}: {explain(error)}") from error

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(self._content.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """D."""
        return self._content.input_shape

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the C classes; none where the target is a number."""
        return self._content.labels

    @property
    def target(self) -> tuple[str, ...] | NumberTarget:
        """What is predicted: one of these classes, or a number."""
        return self._content.target or self.labels

    @property
    def task(self) -> Task:
        """Classification by the labels, or regression to the target."""
        return super().task if self._content.target is None else self._content.target.task

    @property
    def rows_per_person(self) -> int | None:
        """See Schema."""
        return self._content.rows_per_person

    def read_examples(self, path: Path) -> Table:
        """Read `x`, `y` and, with `rows_per_person`, `persons` of an .npz file. Raises DataError."""
        arrays = read_archive(path, "x", "y", PERSONS)
        if "y" not in arrays:
            raise DataError(f"{path}: has no array 'y'")
        inputs, where = self._inputs(path, arrays), f"y of {path}"
        target = self._content.target
        reader = ClassReader(np.array(self.labels)) if target is None else NumberReader(target)
        targets = reader.read(arrays["y"], where)
        require_pairs(inputs, targets, str(path))
        table = Table(inputs, targets)
        return table if self.rows_per_person is None else table.owned_by(*persons_in(path, arrays, len(table)))

    def read_inputs(self, path: Path) -> Floats:
        """Read `x` of an .npz file, (N, *D). Raises DataError."""
        return self._inputs(path, read_archive(path, "x"))

    def read_rows(self, path: Source, identifiers: Sequence[str] = ()) -> Rows:
        """See Schema."""
        if identifiers:
            raise DataError(f"{path}: arrays have no columns to hand through")
        return Rows(self._inputs(path, read_archive(path, "x")), {}, {})

    def preprocessing(self) -> "ArrayPreprocessing":
        """See Schema."""
        return ArrayPreprocessing(self)

    def describe_inputs(self) -> Mapping[str, Any]:
        """The input tensor: its numbers are taken as they are."""
        return {"dtype": "float32", "shape": ["batch", *self.input_shape]}

    def synthetic_inputs(self, count: int, generator: np.random.Generator) -> Floats:
        """(count, *D) standard normal numbers: the schema knows no more of them."""
        return generator.standard_normal((count, *self.input_shape)).astype(np.float32)

    def _inputs(self, path: Source, arrays: Mapping[str, NDArray[Any]]) -> Floats:
        inputs = inputs_of(arrays["x"], f"x of {path}", "encode them as they were for training")
        if inputs.shape[1:] != self.input_shape:
            raise DataError(f"{path}: an example has the shape {inputs.shape[1:]}; expected {self.input_shape}")
        return inputs


class ArrayPreprocessing(Preprocessing):
    """Arrays are taken as they are; an example with a number that is not finite is refused.

    For any schema whose files hold the model's inputs themselves, in an array of that name.
    """

    outside = (
        "an input is the array as the model was trained on: nothing is scaled or encoded, in the graph or before it",
        "files are read before; FedClaw's reader does that: python -m fedclaw.predict",
    )

    def __init__(self, schema: Schema, array: str = "x") -> None:
        self._schema = schema
        self.columns = (
            TypedColumn(
                name=INPUTS,
                column=array,
                dtype="float32",
                shape=("batch", *schema.input_shape),
                meaning="finite numbers; an example with another one is refused",
            ),
        )

    def write(self, graph: GraphWriter) -> PreparedInputs:
        """See Preprocessing."""
        largest, axes = graph.constant(np.array(LARGEST, np.float32)), np.arange(1, 1 + len(self._schema.input_shape))
        finite = graph.add("LessOrEqual", graph.add("Abs", INPUTS), largest)
        whole = graph.add("ReduceMin", graph.add("Cast", finite, to=np.int32), graph.constant(axes), keepdims=0)
        odd = graph.add("Not", graph.add("Cast", whole, to=np.bool_))
        inputs = graph.add("Where", finite, INPUTS, graph.constant(np.array(0, np.float32)))
        return PreparedInputs(inputs, graph.add("Unsqueeze", odd, graph.constant(np.array([1], np.int64))))

    def read(self, path: Source, identifiers: Sequence[str] = ()) -> TypedRows:
        """See Preprocessing."""
        rows = self._schema.read_rows(path, identifiers)
        return TypedRows({INPUTS: rows.inputs}, rows.refused, rows.identifiers)

    def prepare(self, columns: Columns) -> tuple[Floats, NDArray[np.bool_]]:
        """See Preprocessing."""
        given = columns[INPUTS]
        finite = np.isfinite(given)
        odd: NDArray[np.bool_] = np.any(~finite.reshape(len(given), -1), axis=1)
        return np.where(finite, given, np.float32(0)), odd

    def synthetic(self, count: int, generator: np.random.Generator) -> Columns:
        """See Preprocessing; one example of sixteen has a NaN."""
        inputs = self._schema.synthetic_inputs(count, generator)
        inputs.reshape(count, -1)[generator.random(count) < 1 / 16, -1] = np.nan
        return {INPUTS: inputs}
