"""The table as a picture: accuracy against epsilon, a line for each placement of noise, a panel for each data set.

Where a data set is there by row and by person, lines by person are broken and their markers hollow.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.privacy_table.results import Results, Row
from experiments.privacy_table.settings import Placement
from fedclaw.files import write_atomic
from fedclaw.protocol.terms import DataUnit

_STYLES: dict[Placement, tuple[str, str, str]] = {
    "central": ("noise by the server, on the sum", "#0072b2", "o"),
    "distributed": ("noise by all sites, in shares", "#009e73", "s"),
    "local": ("noise at each site by itself", "#d55e00", "^"),
}
# Label, colour (of Okabe and Ito's, which the colour-blind can tell apart) and marker. Whole sites as the unit are not
# drawn: another promise, and so far below that nothing else could be told apart.
_UNITS: dict[DataUnit, str] = {"example": "for rows", "person": "for persons"}
_SHIFT = 0.02
# Neighbouring lines' error bars stand this far apart, as a share of epsilon.


def draw(results: Results, path: Path) -> None:
    """Write the plot as a PNG. Bars, and the band, are one standard deviation over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data_sets = results.settings.data_sets
    figure = Figure(figsize=(5.2 * len(data_sets), 5.4 if results.compares_units else 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(data_sets), squeeze=False)[0]
    for panel, (name, tasks) in zip(panels, data_sets.items(), strict=True):
        _panel(panel, results, name, tasks)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 1 if len(data_sets) == 1 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, content.getvalue())


def _panel(panel: Any, results: Results, name: str, tasks: Sequence[str]) -> None:
    mine = [row for row in results.rows if row.task in tasks]
    _no_privacy(panel, next((row for row in mine if row.placement == "none"), None))
    lines = {
        (task, placement): [row for row in mine if (row.task, row.placement) == (task, placement)]
        for task in tasks
        for placement in _STYLES
    }
    drawn = {key: rows for key, rows in lines.items() if rows}
    for number, ((task, placement), rows) in enumerate(drawn.items()):
        shift = 1 + _SHIFT * (number - (len(drawn) - 1) / 2)
        unit = results.settings.tasks[task].unit
        _line(panel, rows, placement, shift, unit if len(tasks) > 1 else None)
    epsilons = sorted({row.epsilon for row in mine if row.epsilon is not None})
    panel.set_xscale("log")
    panel.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    panel.minorticks_off()
    panel.set_xlabel("epsilon")
    panel.set_ylabel("accuracy, %")
    panel.set_title(name.replace("_", " "))
    panel.grid(axis="y", alpha=0.3)


def _no_privacy(panel: Any, row: Row | None) -> None:
    """Of two units the first: without noise they differ in their batches alone."""
    if row is None:
        return
    panel.axhline(100 * row.mean, color="black", linestyle=":", linewidth=1, label="no privacy")
    low, high = 100 * (row.mean - row.deviation), 100 * (row.mean + row.deviation)
    panel.axhspan(low, high, color="black", alpha=0.07, linewidth=0)


def _line(panel: Any, rows: list[Row], placement: Placement, shift: float, unit: DataUnit | None) -> None:
    label, colour, marker = _STYLES[placement]
    by_person = unit == "person"
    panel.errorbar(
        [row.epsilon * shift for row in rows if row.epsilon is not None],
        [100 * row.mean for row in rows if row.epsilon is not None],
        yerr=[100 * row.deviation for row in rows if row.epsilon is not None],
        label=label if unit is None else f"{label}: {_UNITS[unit]}",
        color=colour,
        marker=marker,
        linestyle="--" if by_person else "-",
        markerfacecolor="white" if by_person else colour,
        markersize=5,
        linewidth=1.5,
        capsize=3,
    )
