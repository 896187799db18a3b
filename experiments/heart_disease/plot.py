"""The tables as a picture: the published rows beside FedClaw's, and what privacy costs."""

import io
from pathlib import Path
from typing import Any

from experiments.heart_disease.published import BEST_FEDERATED, PUBLISHED
from experiments.heart_disease.results import Results, Row
from experiments.heart_disease.settings import Placement
from fedclaw.files import write_atomic

_STYLES: dict[Placement, tuple[str, str, str]] = {
    "distributed": ("noise by all hospitals, in shares", "#009e73", "s"),
    "local": ("noise at each hospital by itself", "#d55e00", "^"),
}
# Label, colour (of Okabe and Ito's, which the colour-blind can tell apart) and marker.
_OURS, _THEIRS, _SHARED = "#0072b2", "#999999", "#cc79a7"


def draw(results: Results, path: Path) -> None:
    """Write the plot as a PNG. Bars are one standard deviation over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _methods(left, results)
    _privacy(right, results)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, content.getvalue())


def _methods(panel: Any, results: Results) -> None:
    rows = [row for row in results.of("published") if row.name in PUBLISHED]
    shared = {row.name: row for row in results.of("shared")}
    for place, row in enumerate(rows):
        known = PUBLISHED[row.name]
        first = place == 0
        panel.errorbar(
            known.mean,
            place - 0.2,
            xerr=known.deviation,
            color=_THEIRS,
            marker="D",
            markersize=5,
            capsize=3,
            label="published" if first else None,
        )
        _point(panel, row, place, _OURS, "o", "FedClaw, the same protocol" if first else None)
    for row in (shared[one.name] for one in rows if one.name in shared):
        label = "FedClaw, one standardisation" if row is next(iter(shared.values())) else None
        _point(panel, row, [one.name for one in rows].index(row.name) + 0.2, _SHARED, "s", label)
    names = [row.name for row in rows]
    if (recipe := shared.get("recipe")) is not None:
        names.append("recipe")
        _point(panel, recipe, len(rows), _SHARED, "s", None)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel("mean accuracy of the four hospitals, %")
    panel.set_title("without privacy")
    panel.grid(axis="x", alpha=0.3)
    _legend(panel)


def _legend(panel: Any) -> None:
    """Below the panel, where no point is."""
    panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def _point(panel: Any, row: Row, place: float, colour: str, marker: str, label: str | None) -> None:
    panel.errorbar(
        row.mean, place, xerr=row.deviation, color=colour, marker=marker, markersize=5, capsize=3, label=label
    )


def _privacy(panel: Any, results: Results) -> None:
    rows = results.of("private")
    for placement, (label, colour, marker) in _STYLES.items():
        mine = [row for row in rows if row.placement == placement and row.epsilon is not None]
        if mine:
            panel.errorbar(
                [row.epsilon * (1.02 if placement == "local" else 0.98) for row in mine if row.epsilon is not None],
                [row.mean for row in mine],
                yerr=[row.deviation for row in mine],
                label=label,
                color=colour,
                marker=marker,
                markersize=5,
                capsize=3,
            )
    if (recipe := results.find("shared", "recipe")) is not None:
        panel.axhline(recipe.mean, color=_SHARED, linestyle="--", linewidth=1, label="no privacy, the recipe")
    panel.axhline(BEST_FEDERATED, color=_THEIRS, linestyle=":", linewidth=1.2, label="best published, no privacy")
    epsilons = sorted({row.epsilon for row in rows if row.epsilon is not None})
    if epsilons:
        panel.set_xscale("log")
        panel.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        panel.minorticks_off()
    panel.set_xlabel("epsilon of each hospital, statistics included")
    panel.set_ylabel("mean accuracy of the four hospitals, %")
    panel.set_title("with differential privacy")
    panel.grid(axis="y", alpha=0.3)
    _legend(panel)
