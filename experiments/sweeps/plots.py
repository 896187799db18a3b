"""A sweep as pictures: accuracy by round, by epsilon, and bytes by accuracy; each only where its axis varies."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.sweeps.comparison import SCORE, Comparison, Row, Spread
from experiments.sweeps.labels import label_of
from fedclaw.files import write_atomic

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
"""Of Okabe and Ito's, which the colour-blind can tell apart; a line has a marker and a dash of its own besides."""
_MARKERS = "os^Dv<>P"
_DASHES = ("-", "--", "-.", ":")
_MOST = len(_COLOURS)
"""Rows with a colour: the best ones. The others are drawn thin and grey."""
_WIDE = 20.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))

Curve = list[tuple[float, Spread]]
"""(x, accuracy over the seeds), in the order of x."""


def draw(comparison: Comparison, root: Path) -> list[Path]:
    """Write the plots that this sweep has into `root`, and remove those that it has no longer."""
    rows = [row for row in comparison.rows if row.spread(SCORE) is not None]
    pictures: dict[str, Callable[[Any, Comparison, list[Row]], bool]] = {
        "accuracy_by_round.png": _by_round,
        "accuracy_by_epsilon.png": _by_epsilon,
        "bytes_by_accuracy.png": _by_bytes,
    }
    written = []
    for name, picture in pictures.items():
        content = _picture(comparison, rows, picture)
        (root / name).unlink(missing_ok=True)
        if content is not None:
            write_atomic(root / name, content)
            written.append(root / name)
    return written


def _picture(
    comparison: Comparison, rows: list[Row], draw_on: Callable[[Any, Comparison, list[Row]], bool]
) -> bytes | None:
    """One plot as PNG; None if there is nothing to see in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    if not draw_on(panel, comparison, rows):
        return None
    panel.set_ylabel("accuracy, %")
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    _legend(figure, panel)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140, metadata={"Software": None})
    return content.getvalue()


def _legend(figure: Any, panel: Any) -> None:
    """Below the panel, where it covers no data; the figure grows by its lines."""
    # Lines with bars first: matplotlib has them last.
    entries = sorted(
        zip(*panel.get_legend_handles_labels(), strict=True), key=lambda entry: not hasattr(entry[0], "lines")
    )
    entries = [(handle, label) for handle, label in entries if label]
    if not entries:
        return
    handles, labels = zip(*entries, strict=True)
    columns = max(1, min(4, 88 // (max(map(len, labels)) + 7)))
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _by_round(panel: Any, comparison: Comparison, rows: list[Row]) -> bool:
    curves = [(row, _over_rounds(row, lambda point: float(point.round))) for row in rows]
    if not any(len(curve) > 1 for _, curve in curves):
        return False
    from matplotlib.ticker import MaxNLocator

    _draw_curves(panel, comparison, curves)
    panel.set_xlabel("round")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return True


def _by_bytes(panel: Any, comparison: Comparison, rows: list[Row]) -> bool:
    totals = {run.bytes_up for row in rows for run in row.finished}
    if len(totals) < 2:
        return False
    size, unit = next((size, unit) for size, unit in _UNITS if max(totals) >= size or size == 1)
    curves = [(row, _over_rounds(row, lambda point: point.bytes_up / size)) for row in rows]
    _draw_curves(panel, comparison, curves)
    panel.set_xlabel(f"bytes sent by the sites, all rounds so far, {unit}")
    _scale(panel, min(totals) / size, max(totals) / size)
    return True


def _by_epsilon(panel: Any, comparison: Comparison, rows: list[Row]) -> bool:
    asked = sorted({epsilon for row in rows if (epsilon := row.runs[0].asked_epsilon) is not None})
    if len(asked) < 2:
        return False
    others = tuple(key for key in comparison.varied if key.rpartition(".")[2] != "epsilon")
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault(tuple(row.settings[key] for key in others), []).append(row)
    if all(len(mine) == 1 for mine in lines.values()):
        _dots(panel, rows)
    else:
        for number, mine in enumerate(lines.values()):
            _epsilon_line(panel, mine, label_of(mine[0].settings, others), number, len(lines))
    panel.set_xlabel("epsilon that was asked for")
    if len(asked) > _MOST:
        _scale(panel, asked[0], asked[-1])
    else:
        panel.set_xscale("log")
        panel.set_xticks(asked, [f"{epsilon:g}" for epsilon in asked])
        panel.minorticks_off()
    return True


def _scale(panel: Any, low: float, high: float) -> None:
    """A logarithmic axis, with numbers in full, where its ends are far apart."""
    if high > _WIDE * low:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())


def _dots(panel: Any, rows: list[Row]) -> None:
    """Rows that differ in more than epsilon, each by itself: no line could join them."""
    points = [(row.runs[0].asked_epsilon, 100 * spread.mean) for row, spread in _scores(rows)]
    known = [point for point in points if point[0] is not None]
    panel.scatter(*zip(*known, strict=True), color=_COLOURS[0], s=22, alpha=0.8)


def _epsilon_line(panel: Any, rows: list[Row], label: str, number: int, lines: int) -> None:
    style = _style(number) if lines <= _MOST else {"color": _COLOURS[-1], "linewidth": 0.8}
    private = [(row.runs[0].asked_epsilon, spread) for row, spread in _scores(rows) if row.runs[0].asked_epsilon]
    for row, spread in _scores(rows):
        if row.runs[0].asked_epsilon is None:
            mean, deviation = 100 * spread.mean, 100 * (spread.deviation or 0.0)
            named = f"{label}, no privacy" if label else "no privacy"
            panel.axhline(mean, color=style["color"], linestyle=":", linewidth=1.2, label=named)
            panel.axhspan(mean - deviation, mean + deviation, color=style["color"], alpha=0.08, linewidth=0)
    if not private:
        return
    private.sort(key=lambda item: item[0])
    epsilons = [epsilon for epsilon, _ in private]
    seeds = any(spread.deviation for _, spread in private)
    # Neighbouring lines' bars stand a little apart.
    shifted = [epsilon * (1 + 0.02 * (number - (lines - 1) / 2)) for epsilon in epsilons]
    panel.errorbar(
        shifted,
        [100 * spread.mean for _, spread in private],
        yerr=[100 * (spread.deviation or 0.0) for _, spread in private] if seeds else None,
        capsize=3,
        label=label if lines <= _MOST else None,
        **style,
    )


def _draw_curves(panel: Any, comparison: Comparison, curves: Sequence[tuple[Row, Curve]]) -> None:
    """A line for each row with a band of one deviation, the best last accuracy first; in colour the first of them."""
    ranked = sorted(curves, key=lambda item: item[1][-1][1].mean, reverse=True)
    for number, (row, curve) in enumerate(ranked[:_MOST]):
        style = _style(number)
        xs, means = _means(curve)
        label = label_of(row.settings, comparison.varied)
        panel.plot(xs, means, markevery=_markers_at(len(xs)), label=label, zorder=3, **style)
        if any(spread.deviation for _, spread in curve):
            low, high = zip(*_edges(curve), strict=True)
            panel.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=2)
    for number, (_, curve) in enumerate(ranked[_MOST:]):
        rest = None if number else f"{len(ranked) - _MOST} others"
        panel.plot(*_means(curve), color="0.75", linewidth=0.8, zorder=1, label=rest)


def _style(number: int) -> dict[str, Any]:
    place = number % _MOST
    return {
        "color": _COLOURS[place],
        "marker": _MARKERS[place],
        "linestyle": _DASHES[place % len(_DASHES)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def _markers_at(points: int) -> list[int]:
    """About ten markers a line, however many rounds, and one at its end."""
    return list(range(points - 1, -1, -max(1, points // 10)))


def _over_rounds(row: Row, place: Callable[[Any], float]) -> Curve:
    """The accuracy over the seeds at each round that all of them have, and where `place` puts it, on average."""
    by_round = [{point.round: point for point in run.points if SCORE in point.metrics} for run in row.finished]
    shared = sorted(set.intersection(*(set(points) for points in by_round)))
    curve: Curve = []
    for number in shared:
        points = [mine[number] for mine in by_round]
        spread = Spread.of(point.metrics[SCORE] for point in points)
        if spread is not None:
            curve.append((sum(map(place, points)) / len(points), spread))
    return curve


def _means(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [100 * spread.mean for _, spread in curve]


def _edges(curve: Curve) -> Iterator[tuple[float, float]]:
    for _, spread in curve:
        deviation = spread.deviation or 0.0
        yield 100 * (spread.mean - deviation), 100 * (spread.mean + deviation)


def _scores(rows: list[Row]) -> Iterator[tuple[Row, Spread]]:
    for row in rows:
        if (spread := row.spread(SCORE)) is not None:
            yield row, spread
