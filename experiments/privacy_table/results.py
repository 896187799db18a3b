"""The table as data: table.json, which the page and the plot are made from."""

import statistics

from pydantic import Field

from experiments.privacy_table.cells import AuditResult, CellResult, Store
from experiments.privacy_table.settings import Placement, TableSettings, rows
from experiments.results_file import ResultsFile
from fedclaw.errors import UsageError
from fedclaw.protocol.frozen import Frozen


class Row(Frozen):
    """One configuration over all seeds."""

    task: str
    placement: Placement
    epsilon: float | None
    """What was asked for."""
    cells: tuple[CellResult, ...] = Field(min_length=1)
    audit: AuditResult | None

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.fmean(cell.accuracy for cell in self.cells)

    @property
    def deviation(self) -> float:
        """Standard deviation of the accuracy over the seeds (n - 1); 0 for one seed."""
        values = [cell.accuracy for cell in self.cells]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def accounted(self) -> float | None:
        """The largest epsilon in a site's ledger after a run; None: unbounded."""
        spent = [cell.epsilon for cell in self.cells]
        known = [value for value in spent if value is not None]
        return max(known) if len(known) == len(spent) else None


class Results(ResultsFile):
    """The whole table, and what it was made with."""

    settings: TableSettings
    rows: tuple[Row, ...]

    def find(self, task: str, placement: Placement, epsilon: float | None) -> Row | None:
        """The row of that configuration."""
        wanted = (task, placement, epsilon)
        return next((row for row in self.rows if (row.task, row.placement, row.epsilon) == wanted), None)

    @property
    def seconds(self) -> float:
        """What all cells and audits took, one after the other."""
        audits = sum(row.audit.seconds for row in self.rows if row.audit)
        return audits + sum(cell.seconds for row in self.rows for cell in row.cells)


def collect(settings: TableSettings, store: Store) -> Results:
    """The table from finished cells. Raises UsageError when one is missing."""
    found = []
    for cells in rows(settings):
        results = [store.result(cell) for cell in cells]
        done = tuple(result for result in results if result is not None)
        if len(done) < len(cells):
            raise UsageError(f"{cells[0].label} and its like are not done: {len(done)} of {len(cells)} seeds")
        audit = store.audit(cells[0], settings.audit) if settings.audit else None
        first = cells[0]
        found.append(Row(task=first.task, placement=first.placement, epsilon=first.epsilon, cells=done, audit=audit))
    return Results(settings=settings, rows=tuple(found))
