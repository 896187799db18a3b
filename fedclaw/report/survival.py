"""Survival curves for people: tables for a terminal, and a picture."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedclaw.files import write_atomic
from fedclaw.privacy.survival_estimates import SMALLEST_P, Curve
from fedclaw.report.tables import Figures
from fedclaw.server.statistics_release import SurvivalCurves

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
# Of Okabe and Ito's, which the colour-blind can tell apart.
_TOLD = 5
"""Times of a curve that the terminal and the picture have numbers of."""
_ROW = 0.16
# Height of a line of numbers at risk, as a share of the panel's.


def survival_tables(curves: SurvivalCurves) -> Iterator[Figures]:
    """Median and log-rank test; and how many are at risk, and what share is without the event, at some times."""
    yield _medians(curves)
    yield _shares(curves)


def log_rank_words(curves: SurvivalCurves) -> str:
    """What the log-rank test says, in a sentence without a full stop."""
    if len(curves.groups) < 2:
        return "one group: nothing to compare"
    if (found := curves.log_rank) is None:
        return "log-rank: too few are at risk to compare"
    until = curves.ends[found.bins - 1]
    relation = "at most" if found.p_value <= SMALLEST_P else "="
    return f"log-rank test of all groups, up to {until:g}: p {relation} {found.p_value:.3g}"


def _medians(curves: SurvivalCurves) -> Figures:
    title = f"Survival by {curves.question.group}" if curves.question.group else "Survival"
    table = Figures(
        ("group", "followed", "median", f"{curves.level:.0%} band", "reaches"),
        title=title,
        caption=log_rank_words(curves),
    )
    for name, curve in curves.groups.items():
        median, low, high = curve.median(curves.ends)
        table.add_row(
            name,
            f"{curve.at_risk[0]:.0f}" if curve.at_risk else "too few",
            _time(median),
            f"{_time(low)} to {_time(high)}",
            f"{curves.ends[len(curve.survival) - 1]:g}" if curve.survival else "nothing",
        )
    return table


def _shares(curves: SurvivalCurves) -> Figures:
    table = Figures(
        ("group", curves.question.time, "at risk", "survival", f"{curves.level:.0%} band"),
        title="Survival to the end of a bin, and how many were at risk at its beginning",
    )
    for name, curve in curves.groups.items():
        for place in told(len(curve.survival)):
            table.add_row(
                name,
                f"{curves.ends[place]:g}",
                f"{curve.at_risk[place]:.0f}",
                f"{curve.survival[place]:.1%}",
                f"{curve.low[place]:.1%} to {curve.high[place]:.1%}",
            )
    return table


def told(bins: int) -> list[int]:
    """Of so many bins, those that have their numbers told: evenly spread, the last one among them."""
    count = min(bins, _TOLD)
    return [(number + 1) * bins // count - 1 for number in range(count)]


def _time(value: float | None) -> str:
    return "not reached" if value is None else f"{value:g}"


def draw(curves: SurvivalCurves, path: Path) -> None:
    """Write the curves with their bands, and the noised numbers at risk below them, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5 + 0.25 * len(curves.groups)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = (1, _ROW * (1 + 0.4 * len(curves.groups)))
    panel, numbers = figure.subplots(2, 1, height_ratios=heights, sharex=True)
    for place, (name, curve) in enumerate(curves.groups.items()):
        draw_curve(panel, curves.ends, curve, _COLOURS[place % len(_COLOURS)], _plain(name))
    panel.set_ylim(0, 1.02)
    panel.set_ylabel("share without the event")
    panel.set_title(log_rank_words(curves), fontsize=9)
    panel.grid(alpha=0.3)
    if len(curves.groups) > 1:
        panel.legend(title=_plain(curves.question.group or ""), frameon=False)
    _numbers_at_risk(numbers, curves)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, content.getvalue())


def _plain(text: str) -> str:
    """A name as it is: between dollars matplotlib would look for a formula, and find a wrong one an error."""
    return text.replace("$", r"\$")


def draw_curve(panel: Any, ends: Sequence[float], curve: Curve, colour: str, label: str | None) -> None:
    """Draw a step curve from 1 at the first bin's beginning, and its band, into matplotlib's `panel`."""
    times = [start_of(ends), *ends[: len(curve.survival)]]
    panel.step(times, [1.0, *curve.survival], where="post", color=colour, label=label)
    panel.fill_between(times, [1.0, *curve.low], [1.0, *curve.high], step="post", color=colour, alpha=0.15, linewidth=0)


def start_of(ends: Sequence[float]) -> float:
    """Where a picture begins: 0, or a bin's width before the first end where that is not after it."""
    if ends[0] > 0:
        return 0.0
    return 2 * ends[0] - ends[1] if len(ends) > 1 else ends[0] - 1


def _numbers_at_risk(panel: Any, curves: SurvivalCurves) -> None:
    names = list(map(_plain, curves.groups))
    longest = max(len(curve.at_risk) for curve in curves.groups.values())
    for row, curve in enumerate(curves.groups.values()):
        for place in sorted({longest * number // _TOLD for number in range(_TOLD)}):
            begins = start_of(curves.ends) if place == 0 else curves.ends[place - 1]
            if place < len(curve.at_risk):
                panel.text(begins, row, f"{curve.at_risk[place]:.0f}", ha="center", va="center", fontsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_title("at risk, noised", fontsize=8, loc="left")
    panel.set_xlabel(_plain(curves.question.time))
    panel.tick_params(left=False)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
