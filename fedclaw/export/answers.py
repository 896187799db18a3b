"""A model's answers to the rows of a table, in their order, and the CSV of them.

Legend: N rows, A answered ones, K numbers of an answer (the probabilities of the classes, or one value).
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedclaw.learning.tasks.base import Task
from fedclaw.learning.workload import Floats

NO_ANSWER = "the model's answer to it is no finite number"
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a cell begins with that a spreadsheet takes for a formula."""


class ReadRows(Protocol):
    """What a reader says of rows: Rows and TypedRows are such."""

    @property
    def refused(self) -> Mapping[int, str]:
        """Why a row gets no answer, by its number from 0."""

    @property
    def identifiers(self) -> Mapping[str, Sequence[str]]:
        """What the file says of which row is which, by column, (N,) each."""


@dataclass(frozen=True)
class Answers:
    """What the model says of each row; `places[row]` is where that is, -1 for a refused one."""

    task: Task
    refused: Mapping[int, str]
    """Why a row has no answer, by its number from 0."""
    identifiers: Mapping[str, Sequence[str]]
    """What the file says of which row is which, by column, (N,) each."""
    places: NDArray[np.int64]
    """(N,)."""
    given: Floats
    """(A, K) of the answered rows: probabilities, or values."""
    threshold: float | None = None

    @classmethod
    def of(cls, task: Task, count: int, read: ReadRows, given: Floats, threshold: float | None) -> "Answers":
        """Answers to `count` rows, of which `given` is of those that were not refused; what is no finite number is no
        answer either."""
        read_well = np.array([row for row in range(count) if row not in read.refused], np.int64)
        finite = np.isfinite(given).all(axis=1)
        refused = {**read.refused, **dict.fromkeys(read_well[~finite].tolist(), NO_ANSWER)}
        places = np.full(count, -1, np.int64)
        places[read_well[finite]] = np.arange(int(finite.sum()))
        return cls(task, refused, read.identifiers, places, given[finite], threshold)

    def cells(self, place: int, digits: int = 6) -> tuple[str, ...]:
        """The answer there as text, by the task's columns."""
        return self.task.cells(self.given[place], self.threshold, digits)


def as_csv(answers: Answers) -> bytes:
    """CSV: row (1-based), the identifiers, the task's columns, and why a row has no answer.

    What was handed through is somebody else's text: where a spreadsheet would take it for a formula, an apostrophe is
    before it.
    """
    own = ["row", *answers.task.columns, "refused"]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    named = [f"input {name}" if name in own else plain(name) for name in answers.identifiers]
    writer.writerow(["row", *named, *own[1:]])
    for row, place in enumerate(answers.places.tolist()):
        known = [plain(cells[row]) for cells in answers.identifiers.values()]
        if place < 0:
            writer.writerow([row + 1, *known, *([""] * (len(own) - 2)), plain(answers.refused[row])])
            continue
        writer.writerow([row + 1, *known, *answers.cells(place), ""])
    return buffer.getvalue().encode("utf-8")


def plain(text: str) -> str:
    """The text, with an apostrophe before what would be a formula; numbers are none."""
    if not text.startswith(FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
