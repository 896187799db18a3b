"""The two studies' rows, read from where they are: TCGA-BRCA by region, and GBSG2 dealt among sites."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.survival_curves.settings import CurveSettings, StudyName
from fedclaw.errors import DataError, UsageError

REGIONS = ("Northeast", "South", "West", "Midwest", "Europe", "Canada")
"""By the number in `fold2`, as FLamby has them."""
SHIPPED = (("lifelines", "datasets/gbsg2.csv"), ("sksurv", "datasets/data/GBSG2.arff"))
"""Where two packages have the file; it is read, and the package not imported."""
_GBSG2 = ("horTh", "age", "menostat", "tsize", "tgrade", "pnodes", "progrec", "estrec", "time", "cens")
_OLD = 60


@dataclass(frozen=True)
class Study:
    """N rows: how long each was followed, how that ended, of which group and site it is."""

    name: StudyName
    title: str
    event: str
    """What the event is."""
    group: str
    groups: tuple[str, ...]
    sites: tuple[str, ...]
    days: NDArray[np.float64]
    """(N,)"""
    died: NDArray[np.bool_]
    """(N,)"""
    of_group: NDArray[np.int64]
    of_site: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.days)


def read_studies(settings: CurveSettings) -> tuple[Study, ...]:
    """Those whose data is there. Raises UsageError where there is none, DataError for files of something else."""
    studies = [] if settings.data is None else [read_brca(settings.data)]
    file = settings.gbsg2 or shipped()
    if file is not None:
        studies.append(read_gbsg2(file, settings.sites, settings.seed))
    if not studies:
        raise UsageError(
            "no data: give data=DIRECTORY with brca.csv and train_test_split.csv of TCGA-BRCA, or gbsg2=FILE, or "
            "install lifelines or scikit-survival, which ship GBSG2"
        )
    return tuple(studies)


def shipped() -> Path | None:
    """GBSG2's file in an installed package, if one is there."""
    for package, place in SHIPPED:
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(root) / place).is_file():
                return path
    return None


def read_brca(directory: Path) -> Study:
    """TCGA-BRCA as FLamby has it: training and test rows of six regions. Raises UsageError or DataError."""
    path = directory / "train_test_split.csv"
    region = {row["pid"]: row["fold2"].rpartition("_")[2] for row in _rows(path, ("pid", "fold2"))}
    path = directory / "brca.csv"
    rows = [row for row in _rows(path, ("pid", "T", "E", "age_at_index")) if row["pid"] in region]
    where = [region[row["pid"]] for row in rows]
    if set(where) != {str(number) for number in range(len(REGIONS))}:
        raise DataError(f"{directory}: the rows are not of six regions, which fold2 numbers from 0 to 5")
    ages = _numbers(path, rows, "age_at_index")
    return Study(
        name="brca",
        title="TCGA-BRCA, breast cancer in six regions",
        event="death",
        group="age",
        groups=(f"under {_OLD}", f"{_OLD} and over"),
        sites=REGIONS,
        days=_numbers(path, rows, "T"),
        died=_numbers(path, rows, "E") == 1,
        of_group=(ages >= _OLD).astype(np.int64),
        of_site=np.array(where, np.int64),
    )


def read_gbsg2(path: Path, sites: int, seed: int) -> Study:
    """GBSG2 (CSV of lifelines, or ARFF of scikit-survival), dealt at random among so many sites of the same size."""
    rows = _rows(path, _GBSG2, arff=path.suffix.lower() == ".arff")
    dealt = np.random.default_rng(seed).permutation(len(rows)) % sites
    return Study(
        name="gbsg2",
        title=f"GBSG2, recurrence of breast cancer, dealt among {sites} sites",
        event="recurrence or death",
        group="hormone therapy",
        groups=("no", "yes"),
        sites=tuple(f"site {number + 1}" for number in range(sites)),
        days=_numbers(path, rows, "time"),
        died=_numbers(path, rows, "cens") == 1,
        of_group=np.array([row["horTh"] == "yes" for row in rows], np.int64),
        of_site=dealt.astype(np.int64),
    )


def _rows(path: Path, columns: Sequence[str], *, arff: bool = False) -> list[dict[str, str]]:
    """The rows of a table with these columns. Raises UsageError or DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8") from error
    if arff:
        lower = [line.strip().lower() for line in lines]
        if "@data" not in lower:
            raise DataError(f"{path} has no @data")
        lines = [",".join(columns), *lines[lower.index("@data") + 1 :]]
    rows = list(csv.DictReader(lines, quotechar="'" if arff else '"'))
    if not rows or not set(columns) <= set(rows[0]):
        raise DataError(f"{path} has no rows with the columns {', '.join(columns)}")
    return rows


def _numbers(path: Path, rows: Sequence[dict[str, str]], column: str) -> NDArray[np.float64]:
    try:
        found = np.array([float(row[column]) for row in rows])
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: the column {column} holds something that is no number") from error
    if not np.all(np.isfinite(found) & (found >= 0)):
        raise DataError(f"{path}: the column {column} holds something that is no number from 0 on")
    return found
