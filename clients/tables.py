"""CSV and Parquet files as blocks of columns, so that a file of any length or width is read in bounded memory.

A cell is text, or a number where Parquet has one, or None where Parquet has a null (or a floating-point NaN, which
is how many writers store one). White space around text is removed. Only columns that are wanted are kept: what the
others hold, and what they are called, does not matter where the schema ignores them.

An error says where as a person finds it: in CSV the line of the file that an editor shows, the header, empty lines and
line breaks within quotes counted; in Parquet, which has no lines, the row, from 1.
"""

import csv
import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from fedclaw.clients.definitions import shown
from fedclaw.clients.values import Cell, DecimalMark, normal, number_of, repeated
from fedclaw.errors import DataError, NoExamples
from fedclaw.learning.sources import MAX_COLUMNS, MemoryFile, MemoryTable, Source
from fedclaw.learning.workload import FileFormat

BLOCK_ROWS = 16_384
BLOCK_CELLS = 2**21
"""A block of a wide table has fewer rows: about this many cells."""
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
CODECS = {"utf-8": "utf-8-sig", "utf-16": "utf-16", "latin-1": "latin-1", "windows-1252": "cp1252"}
NAMES = {"utf-8": "UTF-8", "utf-16": "UTF-16", "latin-1": "Latin-1", "windows-1252": "Windows-1252"}
HEAD_CHARACTERS, HEAD_RECORDS = 2**22, 10
"""How much of a file is looked at for what its header should have been."""
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Wanted:
    """Which columns of a file are read."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Read where they are there."""
    unread: frozenset[str] = frozenset()
    """May be there, and are not looked at."""
    ignore_others: bool = False
    """Whether a file may have columns of other names, of the same name or of none."""


@dataclass(frozen=True)
class TableRows:
    """Consecutive rows of a table by column: `columns[name][i]` is at `places[i]`."""

    path: Source
    unit: Literal["line", "row"]
    places: Sequence[int]
    """Where each row is in the file: the line at which it begins, or its number; both from 1."""
    columns: Mapping[str, Sequence[Cell]]
    first: int = 0
    """Number of rows before this block."""
    mark: DecimalMark = "."
    """What text has before the decimals of a number."""
    ragged: Mapping[int, str] = field(default_factory=dict)
    """Rows with the wrong number of cells, and what is wrong; their cells are None."""

    @property
    def rows(self) -> int:
        """How many rows the block has."""
        return len(self.places)

    def place(self, index: int) -> str:
        """Where the row at `index` is."""
        return f"{self.unit} {self.places[index]}"

    def fault(self, index: int, column: str, expected: str) -> str:
        """What is wrong with the cell at `index`, in one sentence that begins with its place."""
        value = self.columns[column][index]
        what = "an empty cell" if value is None or value == "" else shown(value)
        other, hint = _OTHER[self.mark], ""
        if isinstance(value, str) and "number" in expected and _other_mark(value, self.mark):
            hint = f' (is the file written with decimal: "{other}"? then say so {_where_told(self.path)})'
        return f"{self.place(index)}, column {shown(column)}: {what}; expected {expected}{hint}"


_OTHER: dict[DecimalMark, DecimalMark] = {".": ",", ",": "."}


def _other_mark(text: str, mark: DecimalMark) -> bool:
    """Whether a text is a number by the other decimal mark alone."""
    return number_of(text, mark) is None and number_of(text, _OTHER[mark]) is not None


class Faults:
    """What is wrong with a table: every bad cell counted, the first `SHOWN` in the order of the file kept.

    With `by_row`, the first fault of each row is kept too, for whoever goes on without the row.
    """

    SHOWN = 10

    def __init__(self, path: Source, *, by_row: bool = False) -> None:
        self.path = path
        self.count = 0
        self.rows: dict[int, str] = {}
        """What is wrong with a row, by its number from 0; empty unless `by_row`."""
        self._by_row = by_row
        self._first: list[tuple[int, int, str]] = []
        self._order: dict[str, int] = {}

    def begin(self, block: TableRows) -> None:
        """Take in the block's rows of the wrong length."""
        for index, sentence in block.ragged.items():
            self._add(block.first + index, -1, sentence)
        self.count += len(block.ragged)

    def mark(self, block: TableRows, column: str, bad: "np.ndarray[Any, np.dtype[np.bool_]]", expected: str) -> None:
        """The cells `bad` (N,) of a column are not `expected`."""
        if not bad.any():
            return
        order = self._order.setdefault(column, len(self._order))
        indices = [int(index) for index in np.flatnonzero(bad) if int(index) not in block.ragged]
        self.count += len(indices)
        for index in indices if self._by_row else indices[: self.SHOWN]:
            self._add(block.first + index, order, block.fault(index, column, expected))

    def check(self) -> None:
        """Raise DataError if anything was wrong."""
        if not self.count:
            return
        sentences = "; ".join(sentence for _, _, sentence in self._first)
        more = self.count - len(self._first)
        total = f"; and {more} more" if more else ""
        total += f"; {self.count} bad cells or rows in all" if self.count > 1 else ""
        raise DataError(f"{self.path}: {sentences}{total}")

    def _add(self, row: int, order: int, sentence: str) -> None:
        if self._by_row:
            self.rows.setdefault(row, sentence)
        self._first.append((row, order, sentence))
        self._first.sort()
        del self._first[self.SHOWN :]


class Content:
    """The SHA-256 of a file, worked out while it is read, so that what is charged is what was read."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, data: bytes | memoryview) -> None:
        """Take in the next bytes."""
        self._digest.update(data)

    def hexdigest(self) -> str:
        """The digest of all bytes of the file, once its blocks have come to an end."""
        return self._digest.hexdigest()


def read_blocks(
    path: Source, written: FileFormat, wanted: Wanted, content: Content, rows: int = BLOCK_ROWS
) -> Iterator[TableRows]:
    """The wanted columns of the table in `path`, at most `rows` rows at a time; the file is opened and read once.

    Parquet if its name ends in .parquet or .pq and else CSV, gzipped or not. The columns of all blocks are the same, in
    the order in which they are wanted. At least one block comes. Raises DataError for a file that is missing, empty,
    has no data rows, not the wanted columns, or is no text of the encoding; and for what a client sent in Parquet,
    whose reader ends the process on files that are made to, or with more rows or columns than it may.
    """
    if isinstance(path, MemoryTable):
        yield from _memory_blocks(path, written, wanted, rows)
        return
    if not path.is_file():
        raise DataError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            if is_parquet(path):
                if isinstance(path, MemoryFile):
                    raise DataError(f"{path}: Parquet is read from a site's own files alone; send CSV")
                yield from _parquet_blocks(path, file, written, wanted, content, rows)
            else:
                yield from _csv_blocks(path, file, written, wanted, content, rows)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: a damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _memory_blocks(path: MemoryTable, written: FileFormat, wanted: Wanted, rows: int) -> Iterator[TableRows]:
    names = list(path.columns)
    chosen = _chosen(path, names, wanted, lambda: "")
    count = max(map(len, path.columns.values()), default=0)
    if not count:
        raise NoExamples(f"{path}: no rows")
    for first in range(0, count, rows):
        end = min(first + rows, count)
        given = {name: path.columns[names[place]][first:end] for name, place in chosen.items()}
        columns = {name: list(map(_stripped, cells)) for name, cells in given.items()}
        wrong = {row - first: f"row {row + 1}: {path.wrong[row]}" for row in range(first, end) if row in path.wrong}
        yield TableRows(path, "row", range(first + 1, end + 1), columns, first, written.decimal, wrong)


def _stripped(cell: Cell) -> Cell:
    return cell.strip() if isinstance(cell, str) else cell


def read_header(path: Path, written: FileFormat) -> list[str]:
    """The names in the header of a CSV file, '' for a column without. Raises DataError for what is no text."""
    try:
        with path.open("rb") as file:
            lines = _text(_Hashed(file, Content()), written)
            for _ in range(written.title_lines):
                next(lines, None)
            _, header = next(_Records(lines, written.delimiter or ","), (0, []))
    except (UnicodeError, csv.Error, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path}: the header cannot be read: {error}") from error
    return [normal(name) for name in header]


def is_parquet(path: Path | MemoryFile) -> bool:
    """Whether `path` is read as Parquet."""
    return path.suffix.lower() in {".parquet", ".pq"}


class _Hashed(io.RawIOBase):
    """A binary file that tells `content` each byte that is read from it."""

    def __init__(self, file: BinaryIO, content: Content) -> None:
        self._file = file
        self._content = content

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._content.add(memoryview(buffer)[:count])
        return int(count)

    def drain(self) -> None:
        """Take in what nobody has read: what comes after the end of a gzip stream."""
        while chunk := self._file.read(2**20):
            self._content.add(chunk)


class _Records:
    """The records of a CSV file, each with the line of the file at which it begins; empty lines are none."""

    def __init__(self, lines: Iterable[str], delimiter: str, before: int = 0) -> None:
        self._reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        self._before = before
        self.begins = 1 + before
        """Where the record that was read last, or could not be read, begins."""

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        return self

    def __next__(self) -> tuple[int, list[str]]:
        cells: list[str] = []
        while not cells:
            self.begins = self._reader.line_num + 1 + self._before
            cells = next(self._reader)
        return self.begins, cells


def _csv_blocks(
    path: Path | MemoryFile, file: BinaryIO, written: FileFormat, wanted: Wanted, content: Content, rows: int
) -> Iterator[TableRows]:
    hashed = _Hashed(file, content)
    if isinstance(path, MemoryFile) and path.content.startswith(GZIP):
        raise DataError(f"{path}: it is gzipped; send it as it is")
    lines, records = _text(hashed, written), None
    try:
        for _ in range(written.title_lines):
            next(lines, None)
        records = _Records(lines, written.delimiter or ",", written.title_lines)
        _, header = next(records, (0, None))
        if header is None:
            raise DataError(f"{path}: the file is empty; expected a header row with column names")
        if isinstance(path, MemoryFile) and len(header) > MAX_COLUMNS:
            raise DataError(f"{path}: the header has {len(header)} columns; at most {MAX_COLUMNS} are read")
        chosen = _chosen(path, header, wanted, lambda: _what_it_is(path, written, wanted))
        yield from _gathered(path, header, chosen, records, written, rows)
        hashed.drain()
    except UnicodeError as error:
        line = records.begins if records else 1
        name = NAMES[written.encoding]
        raise DataError(
            f"{path}: near line {line}: not {name} text; save the file as UTF-8, or say which encoding it has "
            f"({', '.join(CODECS)}) {_where_told(path)}"
        ) from error
    except csv.Error as error:
        raise DataError(f"{path}: line {records.begins if records else 1}: not CSV: {error}") from error


def _text(file: io.RawIOBase, written: FileFormat) -> io.TextIOWrapper:
    buffered: Any = io.BufferedReader(file, 2**18)
    if buffered.peek(2)[:2] == GZIP:
        buffered = gzip.GzipFile(fileobj=buffered)
    return io.TextIOWrapper(buffered, encoding=CODECS[written.encoding], newline="")


def _gathered(
    path: Source,
    header: list[str],
    chosen: Mapping[str, int],
    records: Iterator[tuple[int, list[str]]],
    written: FileFormat,
    rows: int,
) -> Iterator[TableRows]:
    width, first = len(header), 0
    most = max(1, min(rows, BLOCK_CELLS // width))
    places, pending, ragged = list[int](), list[Sequence[str]](), dict[int, str]()
    pick = _picker(list(chosen.values()), width)

    def block() -> TableRows:
        columns = zip(chosen, zip(*pending, strict=True), strict=True)
        stripped = {name: [cell and cell.strip() for cell in cells] for name, cells in columns}
        return TableRows(path, "line", places, stripped, first, written.decimal, ragged)

    nothing: Any = (None,) * len(chosen)
    for line, cells in records:
        if len(cells) != width:
            ragged[len(places)] = f"line {line}: {len(cells)} cells; expected {width}, as in the header"
            pending.append(nothing)
        else:
            pending.append(pick(cells))
        places.append(line)
        if isinstance(path, MemoryFile) and first + len(places) > path.max_rows:
            raise DataError(f"{path}: more than {path.max_rows} rows; send it in parts")
        if len(places) == most:
            yield block()
            first += len(places)
            places, pending, ragged = [], [], {}
    if places:
        yield block()
    elif not first:
        raise NoExamples(f"{path}: no data rows after the header")


def _picker(indices: list[int], width: int) -> Callable[[list[str]], Sequence[str]]:
    if indices == list(range(width)):
        return lambda cells: cells
    if len(indices) < 2:
        return lambda cells: [cells[index] for index in indices]
    return itemgetter(*indices)


def _chosen(path: Source, header: Sequence[str], wanted: Wanted, remark: Callable[[], str]) -> dict[str, int]:
    """Where each wanted column is; names are compared after Unicode normalisation. Raises DataError."""
    names = [normal(name) for name in header]
    read = {normal(name): name for name in (*wanted.required, *wanted.optional)}
    twice = [name for name in repeated(names) if name and (name in read or not wanted.ignore_others)]
    if twice:
        raise DataError(f"{path}: the header has the column {shown(twice[0])} more than once")
    where = {name: index for index, name in enumerate(names)}
    absent = [name for name in wanted.required if normal(name) not in where]
    if "" in names and not wanted.ignore_others:
        place = names.index("") + 1
        raise DataError(
            f"{path}: column {place} of the header has no name; name it, remove it, or say extra: ignore in the schema"
            f"{remark() if absent else ''}"
        )
    if absent:
        found = shown(", ".join(names))
        raise DataError(f"{path}: the column {shown(absent[0])} is missing; the file has {found}{remark()}")
    if not wanted.ignore_others:
        known = {*read, *map(normal, wanted.unread)}
        extra = next((name for name in names if name not in known), None)
        if extra is not None:
            raise DataError(f"{path}: the schema knows no column {shown(extra)}; remove it, or say extra: ignore")
    return {name: where[text] for text, name in read.items() if text in where}


def _what_it_is(path: Path | MemoryFile, written: FileFormat, wanted: Wanted) -> str:
    """What a CSV file without the wanted header may be: one with another separator, or with a title above it."""
    required = set(map(normal, wanted.required))
    own = written.delimiter or ","
    with suppress(OSError, EOFError, zlib.error, UnicodeError), path.open("rb") as file:
        head = _text(_Hashed(file, Content()), written).read(HEAD_CHARACTERS).splitlines(keepends=True)
        for delimiter in (own, *(other for other in DELIMITERS if other != own)):
            with suppress(csv.Error):
                for line, cells in islice(_Records(head, delimiter), HEAD_RECORDS):
                    if required <= set(map(normal, cells)):
                        return _remedy(path, delimiter if delimiter != own else None, line - 1, written)
        with suppress(csv.Error):
            _, cells = next(iter(_Records(head, own)))
            likely = [other for other in DELIMITERS if len(cells) == 1 and other in cells[0]]
            if likely:
                return f"; are its columns separated by {DELIMITERS[likely[0]]}? {_say(path, delimiter=likely[0])}"
    return ""


def _remedy(path: Source, delimiter: str | None, titles: int, written: FileFormat) -> str:
    parts, asked = [], dict[str, str | int]()
    if titles != written.title_lines:
        above = {0: "nothing is", 1: "line 1 is a title line"}.get(titles, f"lines 1 to {titles} are title lines")
        parts.append(f"{above} above the header in line {titles + 1}")
        asked["title_lines"] = titles
    if delimiter:
        parts.append(f"the columns are separated by {DELIMITERS[delimiter]}")
        asked["delimiter"] = delimiter
    return f"; {' and '.join(parts)}: {_say(path, **asked)}"


def _say(path: Source, **settings: str | int) -> str:
    said = ", ".join(
        f"{name}: {value}" if isinstance(value, int) else f'{name}: "{value}"'.replace("\t", "\\t")
        for name, value in settings.items()
    )
    return f"say {said} {_where_told(path)}"


def _where_told(path: Source) -> str:
    """Where it is said how a file is written."""
    return "under data in site.yaml" if isinstance(path, Path) else "in the request's query"


def _parquet_blocks(
    path: Path | MemoryFile, file: BinaryIO, written: FileFormat, wanted: Wanted, content: Content, rows: int
) -> Iterator[TableRows]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'fedclaw[data]', or use CSV") from error
    while chunk := file.read(2**20):
        content.add(chunk)
    file.seek(0)
    try:
        with ParquetFile(file) as table:
            names = list(table.schema_arrow.names)
            chosen = _chosen(path, names, wanted, lambda: "")
            first = 0
            read = [names[index] for index in chosen.values()]
            for batch in table.iter_batches(
                batch_size=max(1, min(rows, BLOCK_CELLS // max(1, len(read)))), columns=read
            ):
                if not batch.num_rows:
                    continue
                columns = {
                    name: _cells(path, raw, batch.column(batch.schema.get_field_index(raw)))
                    for name, raw in zip(chosen, read, strict=True)
                }
                yield TableRows(
                    path, "row", range(first + 1, first + 1 + batch.num_rows), columns, first, written.decimal
                )
                first += batch.num_rows
    except ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error
    if not first:
        raise NoExamples(f"{path}: no data rows")


def _cells(path: Source, name: str, column: Any) -> list[Cell]:
    """A Parquet column as cells. Raises DataError for one that holds no single values."""
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if types.is_floating(kind):
        return _numbers(column, narrow=kind.bit_width < 64)
    if types.is_integer(kind) or types.is_null(kind):
        cells: list[Cell] = column.to_pylist()
        return cells
    if types.is_boolean(kind):
        return [None if value is None else "true" if value else "false" for value in column.to_pylist()]
    if types.is_temporal(kind) and not types.is_duration(kind) and not types.is_interval(kind):
        times: list[Cell] = column.cast("string").to_pylist()
        return times
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        try:
            return [None if value is None else value.decode().strip() for value in column.to_pylist()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: column {shown(name)} holds bytes that are no UTF-8 text") from error
    if types.is_nested(kind):
        raise DataError(f"{path}: column {shown(name)} holds {shown(kind)} in each row; expected single values")
    try:
        return [None if value is None else str(value).strip() for value in column.to_pylist()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: column {shown(name)} holds text that is no UTF-8") from error


def _numbers(column: Any, *, narrow: bool) -> list[Cell]:
    """Floating point as Python's; 32 bits or fewer as the shortest decimal that they stand for, as CSV has them."""
    values = column.to_numpy(zero_copy_only=False)
    cells = list(map(float, values.astype(str))) if narrow else values.tolist()
    return [None if cell is None or cell != cell else cell for cell in cells]
