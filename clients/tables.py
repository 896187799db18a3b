"""CSV and Parquet files as blocks of columns, so that a file of any length is read in bounded memory.

A cell is text, or a number where Parquet has one, or None where Parquet has a null (or a floating-point NaN, which
is how many writers store one). White space around text is removed.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.definitions import shown
from fedclaw.errors import DataError

Cell = str | float | int | None

BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a table by column: `columns[name][i]` is in row `first_row + i`, counted from 1."""

    path: Path
    first_row: int
    rows: int
    columns: dict[str, Sequence[Cell]]

    def error(self, index: int, column: str, value: Cell, expected: str) -> DataError:
        """What to raise for the cell at `index` of this block."""
        what = "an empty cell" if value is None or value == "" else shown(value)
        return DataError(
            f"{self.path}: row {self.first_row + index}, column {shown(column)}: {what}; expected {expected}"
        )


def read_blocks(path: Path, delimiter: str, rows: int = BLOCK_ROWS) -> Iterator[Block]:
    """The table in `path`, Parquet if its name ends in .parquet or .pq and else CSV, `rows` rows at a time.

    The columns of all blocks are the same, in the order of the file. At least one block comes. Raises DataError for
    a file that is missing, empty, has no data rows, a repeated column, a row of the wrong length, or is not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        if path.suffix.lower() in {".parquet", ".pq"}:
            yield from _parquet_blocks(path, rows)
        else:
            yield from _csv_blocks(path, delimiter, rows)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _csv_blocks(path: Path, delimiter: str, rows: int) -> Iterator[Block]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            header = next((line for line in reader if line), None)
            if header is None:
                raise DataError(f"{path}: the file is empty; expected a header row with column names")
            names = _checked_header(path, [name.strip() for name in header])
            yield from _gathered(path, names, reader, rows)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: near line {reader.line_num + 1}: not UTF-8 text; save the file as UTF-8"
            ) from error
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: not CSV: {error}") from error


def _gathered(path: Path, names: list[str], reader: Iterator[list[str]], rows: int) -> Iterator[Block]:
    first, pending = 1, list[list[str]]()
    for line in reader:
        if not line:  # an empty line is no row
            continue
        if len(line) != len(names):
            row = first + len(pending)
            raise DataError(f"{path}: row {row}: {len(line)} cells; expected {len(names)}, as in the header")
        pending.append(line)
        if len(pending) == rows:
            yield _block(path, first, names, pending)
            first, pending = first + rows, []
    if pending:
        yield _block(path, first, names, pending)
    elif first == 1:
        raise DataError(f"{path}: no data rows after the header")


def _block(path: Path, first: int, names: list[str], lines: list[list[str]]) -> Block:
    columns = {
        name: [cell.strip() for cell in cells] for name, cells in zip(names, zip(*lines, strict=True), strict=True)
    }
    return Block(path, first, len(lines), dict(columns))


def _checked_header(path: Path, names: list[str]) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: the header has the column {shown(repeated[0])} more than once")
    if "" in names:
        raise DataError(f"{path}: column {names.index('') + 1} of the header has no name")
    return names


def _parquet_blocks(path: Path, rows: int) -> Iterator[Block]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'fedclaw[data]', or use CSV") from error
    try:
        with ParquetFile(path) as file:
            names = _checked_header(path, list(file.schema_arrow.names))
            first = 1
            for batch in file.iter_batches(batch_size=rows):
                columns = {name: [_cell(value) for value in batch.column(name).to_pylist()] for name in names}
                if batch.num_rows:
                    yield Block(path, first, batch.num_rows, dict(columns))
                first += batch.num_rows
    except ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error
    if first == 1:
        raise DataError(f"{path}: no data rows")


def _cell(value: Any) -> Cell:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, int | float) else str(value).strip()


def text_of(cell: Cell) -> str | None:
    """A cell as the text that a schema would have for it: whole numbers without a decimal point."""
    if cell is None or isinstance(cell, str):
        return cell
    return str(int(cell)) if float(cell).is_integer() else str(cell)
