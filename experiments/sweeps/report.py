"""What a sweep came to, from its runs' directories: shown, and written into the sweep's directory."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments.sweeps.comparison import LOSS, SCORE, Comparison, compare, to_csv, to_json
from experiments.sweeps.directory import SweepDirectory
from experiments.sweeps.plots import draw
from experiments.sweeps.results import read_results
from experiments.sweeps.terminal import make_table
from fedclaw.errors import UsageError
from fedclaw.files import write_atomic


@dataclass(frozen=True)
class Report:
    """What was written."""

    comparison: Comparison
    files: tuple[Path, ...]

    @property
    def runs(self) -> int:
        """Runs of the sweep."""
        return self.comparison.runs

    @property
    def failed(self) -> int:
        """Those that failed."""
        return self.comparison.failed

    @property
    def metrics(self) -> dict[str, float]:
        """The sweep in a few numbers: how many runs, and the best row's figures."""
        best = self.comparison.best
        spreads = {name: best.spread(name) for name in (SCORE, LOSS)} if best else {}
        figures = {f"best_{name}": spread.mean for name, spread in spreads.items() if spread}
        return {"runs": float(self.runs), "failed": float(self.failed), **figures}


def write_report(sweep: SweepDirectory, console: Console) -> Report:
    """Show the table; write comparison.csv, comparison.json and the plots. Raises UsageError for a sweep of no runs."""
    record = sweep.record()
    comparison = compare(read_results(sweep))
    if not comparison.rows:
        raise UsageError(f"{sweep.root} has no runs yet")
    console.print(make_table(comparison, record.name))
    for row in comparison.rows:
        for reason in row.reasons:
            words = " ".join(f"{key}={value}" for key, value in row.settings.items())
            console.print(f"failed: {words}: {reason}", style="red", markup=False)
    table, data = sweep.root / "comparison.csv", sweep.root / "comparison.json"
    write_atomic(table, to_csv(comparison).encode())
    content = {"sweep": record.name, "overrides": list(record.overrides), **to_json(comparison)}
    write_atomic(data, json.dumps(content, indent=2).encode())
    images = draw(comparison, sweep.root)
    for path in (table, data, *images):
        console.print(f"written: {path}", soft_wrap=True, markup=False)
    return Report(comparison, (table, data, *images))
