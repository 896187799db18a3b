"""Whose a row is: identifiers of persons, however files write them, as numbers from 0 in the order of the first row.

Identifiers are equal as text after Unicode normalisation (NFC) and without white space around it; case counts. A text
that spells a number is that number: the same 017 of a hospital is 17, 17.0 or 1.7e+1 once a program has read it as one
and written it again. To take two persons for one protects both together; to take one for two would protect neither, and
not see that somebody is in both the training and the test data.

Legend: N rows of a block, P persons.
"""

import re
from collections.abc import Sequence
from decimal import Context, Decimal
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from fedclaw.clients.columns import Flags
from fedclaw.clients.definitions import shown
from fedclaw.clients.tables import Faults, TableRows
from fedclaw.clients.values import LONGEST, Cell, Markers, normal, number_of, shown_cell
from fedclaw.errors import DataError
from fedclaw.learning.workload import Indices, ranks

RowsPerPerson = Annotated[int, Field(ge=1, le=1000)]
"""Of which statistics and metrics are made."""
USUAL_ROWS = 1
"""Of a person, where a schema does not state how many: noise then is as for one row, and nobody counts twice."""
NOBODY = -1
EXPECTED = "whose row it is, text or a whole number (give a row of nobody known an identifier of its own)"

_PERSON = "{person}"
_PEOPLE = re.compile(r"patient|person|subject|participant|customer|member|(^|_)(pid|mrn)($|_)", re.IGNORECASE)
_EXACT = Context(prec=LONGEST)
_LARGEST = 64
"""Powers of ten, up or down, beyond which a text is no number that names somebody."""


def identifier(cell: Cell) -> str | None:
    """A cell as it is compared; None for one that names nobody, or is a number with decimals."""
    if isinstance(cell, float) and not cell.is_integer():
        return None
    text = normal(shown_cell(cell))
    number = number_of(text, "." if "." in text else ",")
    return (text or None) if number is None else _plain(number, text)


def _plain(number: Decimal, text: str) -> str:
    """A number that is written as `text`, as all are that mean the same; -0 is 0."""
    if not number:
        return "0"
    return text if abs(number.adjusted()) > _LARGEST else f"{number.normalize(_EXACT):f}"


class Persons:
    """The persons of one file, block after block."""

    def __init__(self, missing: Sequence[str] = ()) -> None:
        self._markers = Markers(missing)
        self._numbers: dict[str, int] = {}
        self._cells: dict[Cell, int] = {}
        self._rows = np.zeros(0, np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """(P,)."""
        return tuple(self._numbers)

    def read(self, block: TableRows, column: str, faults: Faults) -> Indices:
        """(N,) whose each row is; a cell that names nobody is told to `faults`."""
        found = np.array([self.number(cell) for cell in block.columns[column]], np.int64)
        faults.mark(block, column, found == NOBODY, EXPECTED)
        return np.maximum(found, 0)

    def number(self, cell: Cell) -> int:
        """That person's number, or NOBODY."""
        if (known := self._cells.get(cell)) is None:
            name = None if self._markers.holds(cell) else identifier(cell)
            known = NOBODY if name is None else self._numbers.setdefault(name, len(self._numbers))
            self._cells[cell] = known
        return known

    def first(self, persons: Indices, most: int) -> Flags:
        """(N,) which of a block's rows are among the first `most` of their person in the file; blocks in order."""
        room = max(len(self._rows), int(persons.max(initial=-1)) + 1)
        before = np.pad(self._rows, (0, room - len(self._rows)))
        self._rows = before + np.bincount(persons, minlength=room)
        chosen: Flags = before[persons] + ranks(persons) < most
        return chosen


class LikelyPersons:
    """Looks at the columns that say which row is which, of a schema without `person:`: is one called as people are, and
    has it fewer values than rows, then rows are protected, and those people are not."""

    def __init__(self, columns: Sequence[str], missing: Sequence[str]) -> None:
        self._seen = {name: Persons(missing) for name in columns if _PEOPLE.search(name)}
        self._rows = dict.fromkeys(self._seen, 0)

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that are looked at."""
        return tuple(self._seen)

    def add(self, block: TableRows) -> None:
        """Take in a block."""
        for name, seen in self._seen.items():
            known = [seen.number(cell) != NOBODY for cell in block.columns.get(name, ())]
            self._rows[name] += sum(known)

    def notes(self) -> tuple[str, ...]:
        """Sentences for the operator."""
        return tuple(
            f"column {shown(name)} has {len(seen.names)} values in {rows} rows: if it says whose a row is, "
            f"person: {name} in the schema protects each of these people, and without it each row alone is protected"
            for (name, seen), rows in zip(self._seen.items(), self._rows.values(), strict=True)
            if len(seen.names) < rows
        )


def numbered(names: Sequence[str]) -> tuple[Indices, tuple[str, ...]]:
    """Which of them each of N names is, (N,), and the different ones, (P,)."""
    known: dict[str, int] = {}
    found = np.array([known.setdefault(name, len(known)) for name in names], np.int64)
    return found, tuple(known)


class FilePattern:
    """Whose a file is, by its path below a folder: {person} once, * for anything but a slash."""

    def __init__(self, pattern: str) -> None:
        """Raises ValueError for none."""
        if pattern.count(_PERSON) != 1 or pattern.startswith("/") or "//" in pattern:
            raise ValueError(
                f"a pattern of files' paths below their label's folder has {_PERSON} once, and * for anything but a "
                f'slash, such as "{_PERSON}_*" or "{_PERSON}/*"; this is {shown(pattern)}'
            )
        self.text = pattern
        self.levels = pattern.count("/")
        """Folders on the way to a file."""
        parts = [re.escape(part).replace(r"\*", "[^/]*") for part in normal(pattern).split(_PERSON)]
        self._files = re.compile("([^/]+?)".join(parts))

    @classmethod
    def checked(cls, pattern: str) -> str:
        """The pattern. Raises ValueError for none."""
        return cls(pattern).text

    def person(self, file: Path, folder: Path) -> str:
        """Whose `file` is, from its path below `folder`. Raises DataError for one that does not fit."""
        path = normal(file.relative_to(folder).as_posix())
        found = self._files.fullmatch(path)
        name = None if found is None else identifier(found[1])
        if name is None:
            raise DataError(f"{file}: does not say whose it is; the schema has person: {self.text}")
        return name


def require_rows_of_persons(rows_per_person: int | None, person: object) -> None:
    """Raise ValueError for a number of rows a person where nothing says whose a row is."""
    if rows_per_person is not None and person is None:
        raise ValueError(
            "rows_per_person is set, and nothing says whose a row is: name that column, person: COLUMN, or leave it out"
        )
