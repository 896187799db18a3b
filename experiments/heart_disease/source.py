"""The four files of UCI Heart Disease, read from a directory that the user gives; the project does not ship them.

Janosi, Steinbrunn, Pfisterer, Detrano 1988, "Heart Disease", UCI Machine Learning Repository, CC BY 4.0,
https://doi.org/10.24432/C52P4X. One file a hospital, comma-separated, without a header: 14 columns, '?' is missing.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import DataError

COLUMNS = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"),
)
MISSING = "?"
WHERE = (
    "get processed.cleveland.data, processed.hungarian.data, processed.switzerland.data and processed.va.data of UCI "
    "Heart Disease (https://doi.org/10.24432/C52P4X) and give the directory that has them as data=DIRECTORY"
)

Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Centre:
    """One hospital: the site's name, its file, and the SHA-256 of the file that the published figures are from."""

    name: str
    sha256: str

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"processed.{self.name}.data"


CENTRES = (
    Centre("cleveland", "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8"),
    Centre("hungarian", "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796"),
    Centre("switzerland", "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314"),
    Centre("va", "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f"),
)
NAMES = tuple(centre.name for centre in CENTRES)


def read_centres(directory: Path, *, verify: bool) -> dict[str, Rows]:
    """Each centre's rows (N, 14), NaN where a cell is missing; `verify` holds the files to their SHA-256.

    Raises DataError that names the file, the line, and where the data is to be had.
    """
    return {centre.name: _read(directory / centre.file, centre, verify) for centre in CENTRES}


def _read(path: Path, centre: Centre, verify: bool) -> Rows:
    try:
        content = path.read_bytes().replace(b"\r\n", b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {WHERE}") from error
    if verify and hashlib.sha256(content).hexdigest() != centre.sha256:
        raise DataError(
            f"{path} is not the file that the published figures were made with (its SHA-256 is another); {WHERE}, or "
            "say verify=false to go on with this one"
        )
    try:
        lines = content.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in ASCII (byte {error.start}); {WHERE}") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} is empty; {WHERE}")
    return np.array(rows, np.float64)


def _row(path: Path, number: int, line: str) -> list[float]:
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(COLUMNS):
        raise DataError(f"{path}, line {number}: {len(cells)} cells, and there are {len(COLUMNS)} columns; {WHERE}")
    return [_number(path, number, name, cell) for name, cell in zip(COLUMNS, cells, strict=True)]


def _number(path: Path, number: int, column: str, cell: str) -> float:
    if cell == MISSING:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise DataError(f"{path}, line {number}, column {column}: neither a number nor {MISSING!r}; {WHERE}")
    return value
