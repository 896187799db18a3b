"""Where rows to predict come from: a file, or what a client sent, which never touches a disk.

A `MemoryFile` is asked what a `Path` is asked of a file: a reader takes either, and does the same with both.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

MAX_UNPACKED = 2**26
"""Bytes to which what a client sent may unpack."""
MAX_ROWS, MAX_COLUMNS = 2**16, 10_000
"""That what a client sent may have."""

Value = str | float | int | None
"""Of a cell: text, a number, or None where nothing is known."""


@dataclass(frozen=True)
class MemoryFile:
    """A file's content, and the name that messages call it by; what its name ends in is its format."""

    name: str
    content: bytes = field(repr=False)
    max_unpacked: int = MAX_UNPACKED
    max_rows: int = MAX_ROWS

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        """As a path's."""
        return PurePosixPath(self.name).suffix

    def is_file(self) -> bool:
        """True."""
        return True

    def is_dir(self) -> bool:
        """False."""
        return False

    def exists(self) -> bool:
        """True."""
        return True

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The content from its beginning, as a file that is open for reading."""
        return io.BytesIO(self.content)


@dataclass(frozen=True)
class MemoryTable:
    """Rows that came as values by column, with the name that messages call them by."""

    name: str
    columns: Mapping[str, Sequence[Value]] = field(repr=False)
    """(N,) each; None too where a row is in `wrong`."""
    wrong: Mapping[int, str] = field(default_factory=dict)
    """Rows that have no value of some column, by number from 0, and what is wrong with them."""

    def __str__(self) -> str:
        return self.name


Source = Path | MemoryFile | MemoryTable
