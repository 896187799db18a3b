"""When two cells are the same value, however each is written.

    text      equal after Unicode normalisation (NFC) and without white space around it; case counts
    number    equal as decimals: 1, 1.0, +1, 01 and 1e0
    boolean   true and false in any case, as text or from Parquet
    time      an ISO 8601 date or time: 2024-01-31, 2024-01-31 00:00:00 and 2024-01-31T00:00

A declared value is found first as it is written, so that the codes 001 and 1 can both be declared; a cell that is
written as neither is then found as a number. Where it could be several declared values, it is none of them.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, time
from decimal import Decimal, InvalidOperation
from typing import Literal

from fedclaw.learning.unicode_text import composed

Cell = str | float | int | None
"""Text, or a number where a file has numbers, or None where it has none (NaN included)."""

DecimalMark = Literal[".", ","]
Key = tuple[str, Decimal | bool | datetime | time]

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:[.,][0-9]*)?|[.,][0-9]+)(?:[eE][+-]?[0-9]{1,5})?", re.ASCII)
_DATE = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,9})?)?(?:Z|[+-][0-9]{2}:?[0-9]{2})?)?",
    re.ASCII,
)
_TIME = re.compile(r"[0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,9})?)?", re.ASCII)
_TRUTH = {"true": True, "false": False}
LONGEST = 64
"""A longer text is no number, date or time that anybody declares."""


def normal(text: str) -> str:
    """The text as it is compared: in NFC if it is not very long, without white space around it."""
    return composed(text).strip()


def number_of(text: str, mark: DecimalMark = ".") -> Decimal | None:
    """The number that a text spells, None if it spells none. With mark ',' a point is no part of a number."""
    if len(text) > LONGEST or not _NUMBER.fullmatch(text) or (("," if mark == "." else ".") in text):
        return None
    try:
        return Decimal(text.replace(",", "."))
    except InvalidOperation:
        return None


def key_of(cell: Cell, mark: DecimalMark = ".") -> Key | None:
    """What a cell stands for beyond its text: a number, a truth or a time; None for text that is nothing more."""
    if cell is None:
        return None
    if not isinstance(cell, str):
        return ("number", Decimal(cell) if isinstance(cell, int) else Decimal(repr(float(cell))))
    if (number := number_of(cell, mark)) is not None:
        return ("number", number)
    if cell.lower() in _TRUTH:
        return ("truth", _TRUTH[cell.lower()])
    moment = _moment(cell)
    return None if moment is None else ("time", moment)


def _moment(text: str) -> datetime | time | None:
    if len(text) > LONGEST:
        return None
    try:
        if _DATE.fullmatch(text):
            moment = datetime.fromisoformat(text)
            return moment if moment.tzinfo is None else moment.astimezone(UTC)
        return time.fromisoformat(text) if _TIME.fullmatch(text) else None
    except (ValueError, OverflowError):
        return None


def shown_cell(cell: Cell) -> str:
    """A cell as text that is handed on: whole numbers without a decimal point, '' for none."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    return str(int(cell)) if float(cell).is_integer() else repr(cell)


class Declared:
    """The codes of declared values, found by value."""

    def __init__(self, codes: Mapping[str, int]) -> None:
        self.listed = tuple(codes)
        self._written = {normal(text): code for text, code in codes.items()}
        self._meant: dict[Key, set[int]] = {}
        for text, code in codes.items():
            if (key := key_of(normal(text))) is not None:
                self._meant.setdefault(key, set()).add(code)

    def find(self, cell: Cell, mark: DecimalMark = ".") -> int | None:
        """The code of the declared value that `cell` is; None if it is none, or could be several."""
        if cell is None or isinstance(cell, str):
            # A null of Parquet is an empty cell of CSV.
            cell = normal(cell or "")
            if (code := self._written.get(cell)) is not None:
                return code
        key = key_of(cell, mark)
        found = self._meant.get(key, ()) if key is not None else ()
        return next(iter(found)) if len(found) == 1 else None


class Markers:
    """Cells that mean 'not known': None, the empty cell and Python's nan, and what the schema declares, by value."""

    ALWAYS = ("", "NaN", "nan")

    def __init__(self, declared: Iterable[str]) -> None:
        self.texts: frozenset[Cell] = frozenset({None, *self.ALWAYS, *map(normal, declared)})
        self._keys = frozenset(key for text in self.texts if isinstance(text, str) and (key := key_of(text)))
        numbers = [float(key[1]) for key in self._keys if isinstance(key[1], Decimal)]
        self.numbers: tuple[float, ...] = tuple(number for number in numbers if math.isfinite(number))
        """The numbers among them, for columns of numbers."""

    def holds(self, cell: Cell, mark: DecimalMark = ".") -> bool:
        """Whether a cell is one of them."""
        if cell in self.texts or (isinstance(cell, str) and normal(cell) in self.texts):
            return True
        return bool(self._keys) and (key := key_of(cell, mark)) is not None and key in self._keys


def repeated(values: Iterable[str]) -> list[str]:
    """The values that are more than once in `values`, compared as text; sorted."""
    counts = Counter(map(normal, values))
    return sorted(value for value, count in counts.items() if count > 1)
