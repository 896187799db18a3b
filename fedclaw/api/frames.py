"""Data frames as tables of the tabular workload: a file of the same columns then means the same.

Legend: N rows of a frame, D inputs of the model.
"""

from collections.abc import Hashable, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from fedclaw.clients.arrays import SHOWN, inputs_of, rows_in_words
from fedclaw.clients.columns import AnyColumn, Boolean, Categorical, Numeric
from fedclaw.clients.table_definition import ClassTarget, NumberColumn, TableDefinition
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.clients.values import repeated
from fedclaw.errors import DataError, UsageError
from fedclaw.learning.tasks.regression import NumberTarget
from fedclaw.learning.workload import Floats
from fedclaw.protocol.frozen import explain

_MOST_LEVELS = 1000
_FEW_ROWS = 20
# Of fewer rows half may well have values of their own, and the column be a category.


class FrameReader:
    """Columns of data frames as inputs: numbers as they are, yes/no as 1 and 0, everything else one-hot by its levels.

    Levels are those that any of the frames has, in order: so all clients have the same inputs.
    """

    def __init__(self, frames: Sequence[Any], target: str, leave_out: Sequence[str] = ()) -> None:
        """Raises DataError for frames that do not have the same columns, or lack the target, or identify rows."""
        names = [str(column) for column in frames[0].columns]
        if twice := repeated(names):
            raise DataError(f"the frame has the column {twice[0]!r} more than once")
        if target in leave_out:
            raise UsageError(f"target= and by= or person= are the same column, {target!r}")
        for name in (target, *leave_out):
            if name not in names:
                raise DataError(f"there is no column {name!r}; there are: {', '.join(names)}")
        for number, frame in enumerate(frames):
            if odd := sorted({str(column) for column in frame.columns} ^ set(names)):
                raise DataError(f"frame {number} has other columns than frame 0: {', '.join(odd[:SHOWN])}")
        features = [name for name in names if name not in {target, *leave_out}]
        if not features:
            raise DataError(f"the frames have no column besides {', '.join([target, *leave_out])}")
        self._target = target
        self._columns = tuple(_column(frames, name) for name in features)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the D inputs: the column, or column=level."""
        return tuple(name for column in self._columns for name in column.features)

    def inputs(self, frame: Any, which: str) -> Floats:
        """(N, D) float32. Raises DataError naming column and row of a missing or unknown value."""
        return np.concatenate([_encoded(frame[column.name], column, which) for column in self._columns], axis=1)

    def schema(
        self, target: tuple[str, ...] | NumberTarget, person: str | None = None, rows_per_person: int | None = None
    ) -> TabularSchema:
        """What the frames' columns are, and the target: names of classes, or a number; `person`, the column that says
        whose a row is. Raises DataError.

        A file may have further columns, such as the one that says which client a row is from.
        """
        wanted: dict[str, Any] = {"labels": target}
        if isinstance(target, NumberTarget):
            wanted = target.model_dump(exclude={"name"})
        kind = NumberColumn if isinstance(target, NumberTarget) else ClassTarget
        try:
            predicted = kind(name=self._target, **wanted)
            definition = TableDefinition(
                columns=self._columns,
                target=predicted,
                extra="ignore",
                person=person,
                rows_per_person=rows_per_person,
            )
            return TabularSchema(definition)
        except ValidationError as error:
            raise DataError(f"the frame's columns cannot be a table's: {explain(error)}") from error


def is_frame(value: object) -> bool:
    """Whether it is a data frame, pandas' or one that works alike; pandas is not imported for it."""
    return all(hasattr(value, name) for name in ("columns", "iloc", "to_numpy"))


def named(frame: Any) -> Any:
    """The frame with the names of its columns as text."""
    return frame.rename(columns=str)


def as_list(frames: Mapping[str, Any] | Sequence[Any]) -> tuple[list[Any], list[str] | None]:
    """The frames one after another, and their names if they have any. Raises UsageError."""
    named = isinstance(frames, Mapping)
    items = list(frames.values()) if isinstance(frames, Mapping) else list(frames)
    if not items or not all(map(is_frame, items)):
        raise UsageError("frames: one data frame a client is needed, in a list, or by name in a dict")
    return items, [str(name) for name in frames] if named else None


def _column(frames: Sequence[Any], name: str) -> AnyColumn:
    """The kind of a column by its values. Raises DataError for one that has none, or identifies its rows."""
    kinds = {getattr(frame[name].dtype, "kind", "O") for frame in frames}
    if kinds & set("mMc"):
        raise DataError(
            f"column {name!r} holds times or complex numbers: make numbers of it, such as days since a date"
        )
    try:
        if kinds == {"b"}:
            return Boolean(name=name, kind="boolean")
        if kinds <= set("biuf"):
            return Numeric(name=name, kind="numeric")
        return Categorical(name=name, kind="categorical", levels=_levels(frames, name))
    except ValidationError as error:
        raise DataError(f"column {name!r} cannot be one of a table: {explain(error)}") from error


def _levels(frames: Sequence[Any], name: str) -> tuple[str, ...]:
    """The values of a column of categories, as text. Raises DataError for one that is no such column."""
    values = {value for frame in frames for value in frame[name].dropna() if _is_category(value, name)}
    declared = all(str(frame[name].dtype) == "category" for frame in frames)
    if not declared and any(isinstance(value, Number) and not isinstance(value, bool) for value in values):
        raise DataError(f"column {name!r} holds numbers as objects: make numbers of it, frame[{name!r}].astype(float)")
    levels, rows = sorted(set(map(str, values))), sum(len(frame) for frame in frames)
    if not levels:
        raise DataError(f"column {name!r} has no value at all in {rows} rows: leave it out")
    if len(levels) > _MOST_LEVELS or (not declared and rows >= _FEW_ROWS and 2 * len(levels) > rows):
        raise DataError(
            f"column {name!r} has {len(levels)} different values in {rows} rows, and each would be an input: leave an "
            "identifier out, make numbers of text, or, if they are categories, say so: "
            f"frame[{name!r}].astype('category')"
        )
    return tuple(levels)


def _is_category(value: object, name: str) -> bool:
    if not isinstance(value, Hashable):
        raise DataError(f"column {name!r} holds a {type(value).__name__} in a row, and a single value is needed")
    return True


def _encoded(values: Any, column: AnyColumn, which: str) -> NDArray[np.float32]:
    where = f"column {column.name!r} of {which}"
    if missing := np.flatnonzero(values.isna().to_numpy()).tolist():
        raise DataError(
            f"{where} has no value in {rows_in_words(missing)}: fill such cells in, or leave the examples out"
        )
    if not isinstance(column, Categorical):
        return inputs_of(values.to_numpy(np.float64)[:, None], where)
    text = values.astype(str).to_numpy(object)
    places = {level: place for place, level in enumerate(column.levels)}
    if strange := sorted(set(text) - places.keys()):
        raise DataError(f"{where} has levels that the training data has not: {', '.join(strange[:SHOWN])}")
    return column.encode(np.array([places[level] for level in text], np.float64)).astype(np.float32)
