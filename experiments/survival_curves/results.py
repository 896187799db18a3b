"""What the experiment came to, as a JSON file from which page and picture are made."""

from experiments.results_file import ResultsFile
from experiments.survival_curves.cells import CellResult, StudyResult
from experiments.survival_curves.settings import Cell, CurveSettings, StudyName
from fedclaw.protocol.frozen import Frozen


class Row(Frozen):
    """A cell with its result."""

    cell: Cell
    result: CellResult


class Results(ResultsFile):
    """The whole table."""

    settings: CurveSettings
    studies: dict[StudyName, StudyResult]
    rows: tuple[Row, ...]

    def of(self, study: StudyName) -> tuple[Row, ...]:
        """A study's rows, top to bottom."""
        return tuple(row for row in self.rows if row.cell.study == study)

    def find(self, wanted: Cell) -> CellResult | None:
        """The result of a cell."""
        return next((row.result for row in self.rows if row.cell == wanted), None)
