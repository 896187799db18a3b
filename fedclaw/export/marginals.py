"""marginals.json: how each column was distributed over the sites' training rows, by a charged question, with noise.

For whoever serves the model: drift of its inputs is told against it. It is made from a release of statistics
(`python -m fedclaw.statistics`), which the sites' ledgers were charged for and privacy.json names under `marginals`;
what is done with a release costs nothing more. A column of which the release says next to nothing, for noise, is left
out, and so are numbers that were asked about without a histogram.

Legend: B bins, L levels.
"""

import logging
import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from fedclaw.errors import BundleError, FedClawError
from fedclaw.learning.workload import Schema, schema_digest
from fedclaw.privacy.statistics import ENOUGH, ColumnStatistics, Estimate, StatisticColumn, bin_edges
from fedclaw.protocol.frozen import Frozen
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.statistics_release import STATISTICS_FILE, Release, read_release

log = logging.getLogger(__name__)


class ColumnMarginal(Frozen):
    """One column: numbers have `edges`, the others `levels`."""

    edges: tuple[float, ...] = Field(default=(), max_length=65537)
    """Where the equal bins begin and end, (B + 1,); a number at an edge is in the bin above it. None of levels."""
    levels: tuple[str, ...] = Field(default=(), max_length=10001)
    """(L,); none of numbers."""
    shares: tuple[float, ...]
    """Of the known values, by bin or level; they sum to 1, and noise may have put some below 0."""
    error: float = Field(ge=0)
    """Standard error of each share, of the noise alone and before they were made to sum to 1."""
    missing: Estimate | None
    """Share of rows without a value; None: too few rows to say."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        cells = len(self.levels) or len(self.edges) - 1
        if bool(self.levels) == bool(self.edges) or cells != len(self.shares):
            raise ValueError("a column has a share for each of its bins, or for each of its levels")
        if any(not low < high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("the edges of a column's bins do not rise")
        if len(set(self.levels)) < len(self.levels):
            raise ValueError("a level is there twice")
        return self


class Marginals(Frozen):
    """marginals.json."""

    format_version: Literal[1] = 1
    release: str
    """The name under which the sites charged it, as privacy.json has it."""
    examples: Estimate
    """How many rows, or of persons their first ones, it is of."""
    columns: dict[str, ColumnMarginal]
    """By the column's name in the schema."""


def marginals_of(release: Release, record: RunRecord, schema: Schema) -> Marginals:
    """What `release` says of the columns of a run's schema.

    Raises BundleError for a release of another federation or schema, or one that is not of columns.
    """
    if release.federation != record.federation:
        raise BundleError(
            f"the statistics {release.run} are of federation {release.federation!r}, and {record.run} is a run of "
            f"{record.federation!r}"
        )
    if release.schema_digest != schema_digest(record.schema_text):
        raise BundleError(f"the statistics {release.run} were made with another schema than {record.run}")
    if release.scores is not None or release.survival is not None:
        raise BundleError(f"the statistics {release.run} say nothing of the schema's columns")
    columns = {column.name: column for column in schema.statistic_columns() if column.name != schema.target_name}
    found = {
        name: marginal
        for name, told in release.statistics.columns.items()
        if name in columns and (marginal := _marginal(columns[name], told)) is not None
    }
    if not found:
        raise BundleError(
            f"the statistics {release.run} say too little of any input column: ask with bins= and a larger epsilon"
        )
    return Marginals(release=release.run, examples=release.statistics.count, columns=found)


def _marginal(column: StatisticColumn, told: ColumnStatistics) -> ColumnMarginal | None:
    counts, error = _counts(column, told)
    total = sum(counts)
    if not counts or total <= ENOUGH * math.sqrt(len(counts)) * error:
        return None
    return ColumnMarginal(
        edges=() if column.levels else tuple(bin_edges(column, len(counts)).tolist()),
        levels=column.levels,
        shares=tuple(count / total for count in counts),
        error=error / total,
        missing=told.missing_rate,
    )


def _counts(column: StatisticColumn, told: ColumnStatistics) -> tuple[list[float], float]:
    """Noised numbers of rows by bin or level, and the standard error of each."""
    if not column.levels:
        return ([], 0.0) if told.histogram is None else ([*told.histogram.counts], told.histogram.error)
    found = [told.levels[level] for level in column.levels if level in told.levels]
    if len(found) < len(column.levels):
        return [], 0.0
    return [one.value for one in found], max(one.error for one in found)


def release_at_hand(run: RunDirectory, schema: Schema) -> Release | None:
    """The release that the run's preprocessing comes from, if its statistics.json still lies beside the run, where
    `python -m fedclaw.statistics` put it, and says enough. Another file of that name is none."""
    used = run.record().statistics
    if used is None or Path(used.run).name != used.run:
        return None
    path = run.root.absolute().parent / used.run / STATISTICS_FILE
    if not path.is_file():
        return None
    try:
        release = read_release(path)
        marginals_of(release, run.record(), schema)
    except FedClawError as error:
        log.info("no marginals go into the bundle: %s", error)
        return None
    return release if release.use == used else None
