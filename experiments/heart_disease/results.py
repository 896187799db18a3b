"""The tables as data: heart_disease.json, which the page and the plot are made from."""

import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from experiments.heart_disease.cells import CellResult, Spending
from experiments.heart_disease.published import PUBLISHED
from experiments.heart_disease.search import SearchResult
from experiments.heart_disease.settings import Cell, Method, Placement, PrivateMethod
from experiments.results_file import ResultsFile
from fedclaw.protocol.frozen import Frozen

TableName = Literal["published", "shared", "private"]


class Row(Frozen):
    """One row of a table over all seeds; accuracies and deviations in percent."""

    table: TableName
    name: str
    seeds: tuple[int, ...]
    means: tuple[float, ...] = Field(min_length=1)
    """By seed, the mean of the hospitals' accuracies."""
    mean: float
    deviation: float
    """Over the seeds, with n in the denominator, which is how the published ones come out."""
    pooled: float | None
    """Mean over the seeds of the accuracy on all test rows together."""
    pooled_deviation: float | None
    centres: dict[str, float]
    """Mean accuracy by hospital."""
    within: bool | None
    """Whether the mean lies within the published one and its deviation; None: nothing is published under the name."""
    method: Method
    placement: Placement | None = None
    private: PrivateMethod | None = None
    epsilon: float | None = None
    """The whole budget of a private row."""
    delta: float | None = None
    spending: Spending | None = None
    """The largest over the seeds."""


class Results(ResultsFile):
    """All tables."""

    quick: bool
    rows: tuple[Row, ...]
    search: SearchResult | None
    sizes: dict[str, tuple[int, int]]
    """Training and test rows by hospital."""

    def find(self, table: TableName, name: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if (row.table, row.name) == (table, name)), None)

    def of(self, table: TableName) -> tuple[Row, ...]:
        """A table's rows, top to bottom."""
        return tuple(row for row in self.rows if row.table == table)


def row_of(cells: Sequence[Cell], results: Sequence[CellResult]) -> Row:
    """The row of these runs, which differ in their seeds alone."""
    first = cells[0]
    means = [100 * result.mean for result in results]
    mean = statistics.fmean(means)
    pooled = [100 * result.pooled for result in results if result.pooled is not None]
    spendings = [result.spending for result in results if result.spending is not None]
    published = PUBLISHED.get(first.name) if first.table == "published" else None
    return Row(
        table=first.table,
        name=first.name,
        seeds=tuple(cell.seed for cell in cells),
        means=tuple(means),
        mean=mean,
        deviation=statistics.pstdev(means),
        pooled=statistics.fmean(pooled) if pooled else None,
        pooled_deviation=statistics.pstdev(pooled) if pooled else None,
        centres={
            name: 100 * statistics.fmean(result.centres[name] for result in results) for name in results[0].centres
        },
        within=abs(mean - published.mean) <= published.deviation if published else None,
        method=first.method,
        placement=first.budget.placement if first.budget else None,
        private=first.budget.method if first.budget else None,
        epsilon=first.budget.epsilon if first.budget else None,
        delta=first.budget.delta if first.budget else None,
        spending=max(spendings, key=lambda one: one.together) if spendings else None,
    )
