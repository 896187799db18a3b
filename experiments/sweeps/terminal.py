"""The comparison on the terminal."""

from rich.markup import escape
from rich.table import Table

from experiments.sweeps.comparison import LOSS, SCORE, Comparison, Row, Spread

_NOTHING = "-"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def make_table(comparison: Comparison, name: str) -> Table:
    """A line for each row, the best one marked; reasons of failed runs below."""
    over = f", mean ± deviation over {' and '.join(comparison.seeds)}" if comparison.seeds else ""
    table = Table(title=f"Sweep of {comparison.runs} runs{over}", title_justify="left", caption_justify="left")
    for key in comparison.varied or ("settings",):
        table.add_column(key)
    if comparison.seeds:
        table.add_column("runs", justify="right")
    for column in ("accuracy", "loss", "epsilon", "bytes up", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in comparison.rows:
        table.add_row(*_cells(comparison, row), style="bold" if row.best else None)
    if comparison.best is not None:
        table.caption = f"best by {comparison.score}; epsilon is the largest that a site's ledger holds; {name}"
    return table


def _cells(comparison: Comparison, row: Row) -> list[str]:
    counts = [f"{len(row.finished)}/{len(row.runs)}" if len(row.finished) < len(row.runs) else str(len(row.runs))]
    return [
        *([escape(row.settings[key]) for key in comparison.varied] or ["as set"]),
        *(counts if comparison.seeds else []),
        spread_words(row.spread(SCORE)),
        spread_words(row.spread(LOSS)),
        _epsilon_words(row),
        _NOTHING if row.bytes_up is None else bytes_words(row.bytes_up),
        _NOTHING if row.seconds is None else f"{row.seconds:.1f}",
        " ".join([*(["best"] if row.best else []), *(["[red]failed[/]"] if row.reasons else [])]),
    ]


def spread_words(spread: Spread | None) -> str:
    """0.9312 ± 0.0040."""
    if spread is None:
        return _NOTHING
    return f"{spread.mean:.4f}" if spread.deviation is None else f"{spread.mean:.4f} ± {spread.deviation:.4f}"


def bytes_words(count: float) -> str:
    """1.25 MB."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _epsilon_words(row: Row) -> str:
    if not row.finished:
        return _NOTHING
    return "unbounded" if row.epsilon is None else f"{row.epsilon:.3f}"
