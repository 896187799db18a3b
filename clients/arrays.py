"""Examples from arrays, checked: a model never sees a NaN, a label that is a float, or ragged rows.

Legend: N examples, D shape of one input, C classes.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedclaw.clients.persons import EXPECTED, identifier, numbered
from fedclaw.errors import DataError
from fedclaw.learning.sources import MemoryFile, MemoryTable, Source
from fedclaw.learning.tasks.base import Targets
from fedclaw.learning.tasks.regression import NumberTarget
from fedclaw.learning.workload import Floats, Indices, Labels

SHOWN = 5
_ENCODE = "encode text and categories first, or give a data frame to Federation.from_frame, which does"


PERSONS = "persons"
"""The array of an archive that says whose each example is."""
MAX_ARCHIVE_BYTES = 64 * 2**30


@dataclass(frozen=True)
class ClassReader:
    """Reads labels: (N,) which of `classes` (C,) each is."""

    classes: NDArray[Any]

    @property
    def target(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(map(str, self.classes))

    def read(self, y: ArrayLike, name: str) -> Targets:
        """(N,) int64. Raises DataError for what is no label, or none of the classes."""
        return indices_among(labels_of(y, name), self.classes, name)


@dataclass(frozen=True)
class NumberReader:
    """Reads numbers to predict."""

    target: NumberTarget

    def read(self, y: ArrayLike, name: str) -> Targets:
        """(N,) float32. Raises DataError for what is no number in range."""
        return numbers_of(y, self.target, name)


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
            raise DataError(f"{name} has no label in {rows_in_words(missing)}: leave such examples out")
        whole = bool(np.all(np.isfinite(array)) and np.all(array == np.floor(array)))
        remedy = f"{name}.astype(int) for classes" if whole else "name the classes"
        raise DataError(
            f"{name} holds {array.dtype}, and class labels are no such numbers: {remedy}; to predict the numbers "
            "themselves give value_range=(smallest, largest)"
        )
    if array.dtype.kind == "O":
        if missing := [row for row, label in enumerate(array) if label is None or label != label]:
            raise DataError(f"{name} has no label in {rows_in_words(missing)}: leave such examples out")
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
        where, first = rows_in_words(outside), outside[0]
        raise DataError(
            f"{name} is not within value_range=({low:g}, {high:g}) in {where}: {name}[{first}] is {array[first]:g}; "
            "leave such examples out, or declare another range"
        )
    return numbers


def indices_among(labels: NDArray[Any], classes: NDArray[Any], name: str) -> Labels:
    """(N,) which class each label is, compared as text. Raises DataError for one that training never saw."""
    found, which = np.unique(labels, return_inverse=True)
    places = {str(label): place for place, label in enumerate(classes)}
    if strange := [str(label) for label in found if str(label) not in places]:
        raise DataError(f"{name} has labels that the training data has not: {', '.join(strange[:SHOWN])}")
    return np.array([places[str(label)] for label in found], np.int64)[which]


def require_pairs(x: Floats, y: NDArray[Any], names: str) -> None:
    """Raise DataError unless there is one label an example, and an example at all."""
    if len(x) != len(y):
        raise DataError(f"{names}: {len(x)} examples and {len(y)} labels; each example has one label")


def persons_of(persons: ArrayLike, count: int, name: str = "persons") -> tuple[Indices, tuple[str, ...]]:
    """Whose each of `count` examples is, (N,), and what those P are called. Raises DataError naming the row."""
    array = _array(persons, name)
    if array.shape != (count,):
        raise DataError(f"{name} has the shape {array.shape}; expected ({count},), one identifier an example")
    if array.dtype.kind not in "iufUSO":
        raise DataError(f"{name} holds {array.dtype}; persons are told apart by text or whole numbers")
    cells = (array.astype(str) if array.dtype.kind == "S" else array).tolist()
    # An array of Python's objects may hold numpy's numbers.
    plain = [cell.item() if isinstance(cell, np.generic) else cell for cell in cells]
    names = [identifier(cell) if isinstance(cell, str | int | float) else None for cell in plain]
    if missing := [row for row, found in enumerate(names) if found is None]:
        raise DataError(f"{name} does not say in {rows_in_words(missing)} {EXPECTED}")
    return numbered([found for found in names if found is not None])


def persons_in(path: Path, arrays: Mapping[str, NDArray[Any]], count: int) -> tuple[Indices, tuple[str, ...]]:
    """The same of the array `persons` of an .npz file."""
    if PERSONS not in arrays:
        raise DataError(f"{path}: has no array {PERSONS!r}, which says whose each example is, as the schema has it")
    return persons_of(arrays[PERSONS], count, f"{path}: {PERSONS!r}")


def read_archive(path: Source, needed: str, *others: str) -> dict[str, NDArray[Any]]:
    """The array `needed` of an .npz file, and those of `others` that are there. Raises DataError; never unpickles."""
    if isinstance(path, MemoryTable):
        raise DataError(f"{path}: an .npz archive of arrays is needed")
    if not path.is_file():
        raise DataError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    most = path.max_unpacked if isinstance(path, MemoryFile) else MAX_ARCHIVE_BYTES
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > most:
            raise DataError(f"{path}: would unpack to {size} bytes; at most {most} are read")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if needed not in arrays.files:
                raise DataError(f"{path}: has no array {needed!r}; it has {', '.join(arrays.files) or 'none'}")
            found = {name: arrays[name] for name in (needed, *others) if name in arrays.files}
            if not all(isinstance(array, np.ndarray) for array in found.values()):
                raise ValueError("a member is not in numpy's format")
            if isinstance(path, MemoryFile) and found[needed].ndim and len(found[needed]) > path.max_rows:
                raise DataError(f"{path}: more than {path.max_rows} rows; send it in parts")
            return found
    except (ValueError, EOFError, OSError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a readable .npz archive of plain arrays: {error}") from error


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


def rows_in_words(rows: Sequence[int]) -> str:
    """Which rows, the first few of them."""
    shown = ", ".join(map(str, rows[:SHOWN]))
    return f"row {shown}" if len(rows) == 1 else f"{len(rows)} rows ({shown}{', …' if len(rows) > SHOWN else ''})"
