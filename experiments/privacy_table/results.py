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
    by_person: AuditResult | None = None
    """What whole persons found who attacked a guarantee for rows; None: they did not."""

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
    def compares_units(self) -> bool:
        """Whether data sets are there with rows and with persons as the unit."""
        return any(len(tasks) > 1 for tasks in self.settings.data_sets.values())

    @property
    def seconds(self) -> float:
        """What all cells and audits took, one after the other."""
        audits = [audit for row in self.rows for audit in (row.audit, row.by_person) if audit is not None]
        return sum(audit.seconds for audit in audits) + sum(cell.seconds for row in self.rows for cell in row.cells)


def collect(settings: TableSettings, store: Store) -> Results:
    """The table from finished cells. Raises UsageError when one is missing."""
    found = []
    for cells in rows(settings):
        results = [store.result(cell) for cell in cells]
        done = tuple(result for result in results if result is not None)
        if len(done) < len(cells):
            raise UsageError(f"{cells[0].label} and its like are not done: {len(done)} of {len(cells)} seeds")
        first, by_person = cells[0], settings.audit_by_persons
        row = Row(
            task=first.task,
            placement=first.placement,
            epsilon=first.epsilon,
            cells=done,
            audit=store.audit(first, settings.audit) if settings.audit else None,
            by_person=store.audit(first, by_person) if by_person and settings.is_attacked_by_persons(first) else None,
        )
        found.append(row)
    return Results(settings=settings, rows=tuple(found))
