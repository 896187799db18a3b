"""The table as a picture: accuracy against what each site has sent, a line a method, a panel a task."""

import io
from pathlib import Path
from typing import Any

from experiments.compression_table.results import Row
from experiments.compression_table.settings import TableSettings
from fedclaw.files import write_atomic
from fedclaw.protocol.terms import Compression, TopK

_COLOURS = {
    None: "#000000",
    "fp16": "#999999",
    "int8": "#0072b2",
    "int4": "#56b4e9",
    "topk": "#d55e00",
    "randk": "#009e73",
    "powersgd": "#cc79a7",
}
_FEWER = "#e69f00"
# Okabe and Ito's, which the colour-blind can tell apart; the last one is for the smaller of two top-k.
_LOWEST = 0.6
# Accuracies below are left to the bottom edge: every method begins there.


def draw(rows: list[Row], settings: TableSettings, path: Path) -> None:
    """Write the plot as a PNG. A method without its error feedback has a dashed line; the end of each is marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(settings.tasks), 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(settings.tasks), squeeze=False)[0]
    for panel, (task, described) in zip(panels, settings.tasks.items(), strict=True):
        mine = [row for row in rows if row.task == task]
        for row in mine:
            _line(panel, row, settings.methods[row.method], _colour(settings, row.method))
        panel.axhline(100 * described.target, color="black", linewidth=0.6, alpha=0.4)
        panel.set_xscale("log")
        panel.set_ylim(bottom=100 * max(_LOWEST, min(y for row in mine for _, y in row.curve)))
        panel.set_xlabel("sent by each site, kB")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_ylabel("accuracy, %")
        panel.set_title(task.replace("_", " "))
        panel.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, content.getvalue())


def _colour(settings: TableSettings, method: str) -> str:
    compression = settings.methods[method]
    most = max((other.fraction for other in settings.methods.values() if isinstance(other, TopK)), default=1.0)
    if isinstance(compression, TopK) and compression.fraction < most:
        return _FEWER
    return _COLOURS[compression.method if compression else None]


def _line(panel: Any, row: Row, compression: Compression | None, colour: str) -> None:
    controlled = getattr(compression, "feedback", True)
    sent, accuracy = zip(*row.curve, strict=True)
    panel.plot(
        [1e3 * megabytes for megabytes in sent],
        [100 * value for value in accuracy],
        label=row.method,
        color=colour,
        linestyle="-" if controlled else (0, (4, 2)),
        linewidth=1.4,
        marker="o" if controlled else "s",
        markevery=[len(sent) - 1],
        markersize=5,
        markerfacecolor=colour if controlled else "white",
    )
