"""Examples from arrays and data frames, checked: a model never sees a NaN, a label that is a float, or ragged rows.

Legend: N examples, D shape of one input, C classes.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedclaw.errors import DataError, UsageError
from fedclaw.learning.tasks.regression import NumberTarget
from fedclaw.learning.workload import Floats, Labels

_SHOWN = 5
_MOST_LEVELS = 1000


_ENCODE = "encode text and categories first, or give a data frame to Federation.from_frame, which does"


def inputs_of(x: ArrayLike, name: str = "x", remedy: str = _ENCODE) -> Floats:
    """(N, *D) float32. Raises DataError for what is no array of finite numbers, one row an example.

    `remedy` is what to do about text.
    """
    array = _array(x, name)
    if array.dtype.kind == "O" and array.ndim == 0:
        raise DataError(f"{name} is a {type(x).__name__}: an array of numbers is needed, one row an example")
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} holds {array.dtype}, and a model takes numbers: {remedy}")
    if array.ndim < 2:
        raise DataError(
            f"{name} has the shape {array.shape}: one row an example is needed, (examples, features) or (examples, "
            f"channels, height, width); a single feature is {name}.reshape(-1, 1)"
        )
    if not len(array):
        raise DataError(f"{name}: there is no example")
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(array, np.float32)
    _require_finite(numbers, array, name)
    return numbers


def labels_of(y: ArrayLike, name: str = "y") -> NDArray[Any]:
    """(N,) class labels as they are: integers, text or yes/no. Raises DataError."""
    array = _array(y, name)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        more = "; of one-hot rows take y.argmax(axis=1)" if array.ndim == 2 else ""
        raise DataError(f"{name} has the shape {array.shape}: one label an example is needed, (examples,){more}")
    if array.dtype.kind == "f":
        if missing := np.flatnonzero(np.isnan(array)).tolist():
            raise DataError(f"{name} has no label in {_rows(missing)}: leave such examples out")
        whole = bool(np.all(np.isfinite(array)) and np.all(array == np.floor(array)))
        remedy = f"{name}.astype(int) for classes" if whole else "name the classes"
        raise DataError(
            f"{name} holds {array.dtype}, and class labels are no such numbers: {remedy}; to predict the numbers "
            "themselves give value_range=(smallest, largest)"
        )
    if array.dtype.kind == "O":
        if missing := [row for row, label in enumerate(array) if label is None or label != label]:
            raise DataError(f"{name} has no label in {_rows(missing)}: leave such examples out")
        array = array.astype(str)
    if array.dtype.kind not in "biuUS":
        raise DataError(f"{name} holds {array.dtype}; class labels are integers, text or booleans")
    return array


def classes_of(labels: NDArray[Any]) -> NDArray[Any]:
    """The C classes in order. Raises DataError if there is but one."""
    classes = np.unique(labels)
    if len(classes) < 2:
        only = f"only {classes[0]!s}" if len(classes) else "none"
        raise DataError(f"y has two classes or more, and {only} is there")
    return classes


def numbers_of(y: ArrayLike, target: NumberTarget, name: str = "y") -> Floats:
    """(N,) float32 within the target's range. Raises DataError naming the first that is not."""
    array = _array(y, name)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise DataError(
            f"{name} is {array.dtype} of the shape {array.shape}, and value_range= is for numbers, one an example, "
            "(examples,): make numbers of it, or leave value_range out to predict classes"
        )
    numbers = array.astype(np.float32)
    low, high = target.range
    if outside := np.flatnonzero(~((numbers >= low) & (numbers <= high))).tolist():
        raise DataError(
            f"{name} is not within value_range=({low:g}, {high:g}) in {_rows(outside)}: {name}[{outside[0]}] is "
            f"{array[outside[0]]:g}; leave such examples out, or declare another range"
        )
    return numbers


def indices_among(labels: NDArray[Any], classes: NDArray[Any], name: str) -> Labels:
    """(N,) which class each label is. Raises DataError for one that training never saw."""
    if strange := sorted(set(map(str, labels)) - set(map(str, classes))):
        raise DataError(f"{name} has labels that the training data has not: {', '.join(strange[:_SHOWN])}")
    if labels.dtype.kind == classes.dtype.kind:
        return np.searchsorted(classes, labels).astype(np.int64)
    places = {str(label): place for place, label in enumerate(classes)}
    return np.array([places[str(label)] for label in labels], np.int64)


def whole(value: object, name: str, least: int) -> int:
    """The argument of that name, as an integer. Raises UsageError unless it is one, and at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise UsageError(f"{name}={value!r:.60}: a whole number of at least {least} is needed")
    return int(value)


def require_pairs(x: Floats, y: NDArray[Any], names: str) -> None:
    """Raise DataError unless there is one label an example, and an example at all."""
    if len(x) != len(y):
        raise DataError(f"{names}: {len(x)} examples and {len(y)} labels; each example has one label")


class FrameEncoder:
    """Columns of data frames as numbers: numbers as they are, yes/no as 1 and 0, everything else one-hot by its levels.

    Levels are those that any of the frames has, in order: so all clients have the same inputs.
    """

    def __init__(self, frames: Sequence[Any], target: str, leave_out: Sequence[str] = ()) -> None:
        """Raises DataError for frames that do not have the same columns, or lack the target."""
        self._columns = [str(column) for column in frames[0].columns]
        for name in (target, *leave_out):
            if name not in self._columns:
                raise DataError(f"there is no column {name!r}; there are: {', '.join(self._columns)}")
        for number, frame in enumerate(frames):
            if {str(column) for column in frame.columns} != set(self._columns):
                odd = sorted({str(column) for column in frame.columns} ^ set(self._columns))
                raise DataError(f"frame {number} has other columns than frame 0: {', '.join(odd[:_SHOWN])}")
        features = [name for name in self._columns if name not in {target, *leave_out}]
        if not features:
            raise DataError(f"the frames have no column besides {', '.join([target, *leave_out])}")
        self._levels: dict[str, tuple[str, ...] | None] = {name: _levels(frames, name) for name in features}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the D inputs: the column, or column=level."""
        named = [[name] if levels is None else [f"{name}={level}" for level in levels] for name, levels in self._all()]
        return tuple(name for names in named for name in names)

    def inputs(self, frame: Any, which: str) -> Floats:
        """(N, D) float32. Raises DataError naming column and row of a missing or unknown value."""
        parts = [self._encoded(frame, name, levels, which) for name, levels in self._all()]
        return np.concatenate(parts, axis=1)

    def _all(self) -> Sequence[tuple[str, tuple[str, ...] | None]]:
        return list(self._levels.items())

    def _encoded(self, frame: Any, name: str, levels: tuple[str, ...] | None, which: str) -> Floats:
        values = frame[name]
        where = f"column {name!r} of {which}"
        if missing := np.flatnonzero(values.isna().to_numpy()).tolist():
            raise DataError(f"{where} has no value in {_rows(missing)}: fill such cells in, or leave the examples out")
        if levels is None:
            return inputs_of(values.to_numpy(np.float64)[:, None], where)
        text = values.astype(str).to_numpy()
        if strange := sorted(set(text) - set(levels)):
            raise DataError(f"{where} has levels that the training data has not: {', '.join(strange[:_SHOWN])}")
        encoded: Floats = (text[:, None] == np.array(levels)[None, :]).astype(np.float32)
        return encoded


def is_frame(value: object) -> bool:
    """Whether it is a data frame, pandas' or one that works alike; pandas is not imported for it."""
    return all(hasattr(value, name) for name in ("columns", "iloc", "to_numpy"))


def as_list(frames: Mapping[str, Any] | Sequence[Any]) -> tuple[list[Any], list[str] | None]:
    """The frames one after another, and their names if they have any. Raises UsageError."""
    named = isinstance(frames, Mapping)
    items = list(frames.values()) if isinstance(frames, Mapping) else list(frames)
    if not items or not all(map(is_frame, items)):
        raise UsageError("frames: one data frame a client is needed, in a list, or by name in a dict")
    return items, [str(name) for name in frames] if named else None


def _levels(frames: Sequence[Any], name: str) -> tuple[str, ...] | None:
    """The levels of a column that is not all numbers. Raises DataError for one that has no levels."""
    kinds = {getattr(frame[name].dtype, "kind", "O") for frame in frames}
    if kinds <= set("biuf"):
        return None
    if kinds & set("mMc"):
        raise DataError(
            f"column {name!r} holds times or complex numbers: make numbers of it, such as days since a date"
        )
    found = {str(level) for frame in frames for level in frame[name].dropna().unique()}
    if len(found) > _MOST_LEVELS:
        raise DataError(
            f"column {name!r} has {len(found)} different values, and each would be an input: leave an identifier out, "
            "make numbers of text"
        )
    return tuple(sorted(found))


def _array(value: ArrayLike, name: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{name} cannot be read as an array: {error}") from error


def _require_finite(numbers: Floats, given: NDArray[Any], name: str) -> None:
    good = np.isfinite(numbers)
    if good.all():
        return
    places = np.argwhere(~good)
    place = tuple(int(step) for step in places[0])
    value = given[place]
    too_large = " (too large for float32)" if np.isfinite(value) else ""
    raise DataError(
        f"{name} is not a finite number in {len(places)} places, the first is {name}[{', '.join(map(str, place))}] = "
        f"{value}{too_large}: fill such values in, or leave the examples out"
    )


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN]))
    return f"row {shown}" if len(rows) == 1 else f"{len(rows)} rows ({shown}{', …' if len(rows) > _SHOWN else ''})"
