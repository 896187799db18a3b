"""A search as a table and as a plot: score by size and by latency, the front, and the one that was chosen."""

import io
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from fedclaw.compress.search_record import BATCH_OF_ONE, FrontPoint, PrecisionForm, SearchResult
from fedclaw.progress import quieter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = {"float32": "o", "int8": "s", "float16": "^"}
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
SHOWN = 0.2
"""Of the score below the uncompressed model's that the plot shows, at least."""
WIDE = 3
"""Times the smallest: from there on an axis is logarithmic."""
_FRONT, _TEACHER = "#444444", "#d62728"


def table(result: SearchResult) -> Table:
    """The front, the smallest first, below the uncompressed model; the chosen one is marked."""
    made = Table(title=f"Search over compressions of run {result.run}: the Pareto front", title_justify="left")
    for heading in ("", "fraction", "recovery", "precision"):
        made.add_column(heading)
    for heading in ("bytes", "latency", f"{result.score} (95%)", "difference (95%)", "epsilon"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_row("", "1", "whole model", *_cells(result.teacher), "")
    made.add_section()
    for point in sorted((point for point in result.points if point.on_front), key=lambda point: point.costs):
        made.add_row(
            "chosen" if point.chosen else "",
            f"{point.fraction:g}",
            "+".join(point.mode),
            *_cells(point.form),
            epsilon_words(point.epsilon),
            style="bold" if point.chosen else None,
        )
    return made


def _cells(form: PrecisionForm) -> tuple[str, ...]:
    ratio = " / ".join(f"{share:.2f}" for share in form.latency_ratio.values())
    interval = f" ({form.interval})" if form.interval is not None else ""
    between = f" ({form.difference.interval})" if form.difference.interval is not None else ""
    return (
        form.precision,
        f"{form.file_bytes:,}",
        ratio,
        f"{form.score:.3f}{interval}",
        f"{form.difference.value:+.3f}{between}",
    )


def selected(result: SearchResult) -> list[str]:
    """Notes below the table: what was chosen and on what, and what could not be made."""
    chosen = result.chosen
    looked_at, doing = result.selection, "Compared" if chosen is None else "Chosen"
    notes = [
        f"{doing} by {result.measure}, on {looked_at.examples:,} {looked_at.origin} examples that no reported "
        "figure is of. Latency is by that of the uncompressed model, at batch "
        f"{' / '.join(result.teacher.latency_ratio)}."
    ]
    if chosen is not None:
        notes.insert(
            0,
            f"Chosen: fraction {chosen.fraction:g}, {'+'.join(chosen.mode)}, {chosen.form.precision}: the smallest of "
            f"{len(result.points)} within a loss of {result.loss:g}; the uncompressed model has "
            f"{result.teacher.file_bytes / chosen.form.file_bytes:.1f} times its bytes.",
        )
        if chosen.form.precision != "float32":
            notes.append(f"An export of it adds the {chosen.form.precision} form, as quantise=true does.")
    return notes + [f"Left out: {name}: {why}" for name, why in result.failed.items()]


def epsilon_words(epsilon: float | None) -> str:
    """What a site paid beyond the run."""
    if epsilon is None:
        return "no bound"
    return f"{epsilon:.2f}" if epsilon else "0"


def plot(result: SearchResult) -> bytes:
    """A PNG: score by bytes, and by latency at batch 1; error bars are 95% intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(12, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    size, latency = figure.subplots(1, 2, sharey=True)
    modes = list(dict.fromkeys((point.mode, point.epsilon) for point in result.points))
    colours = {mode: COLOURS[number % len(COLOURS)] for number, mode in enumerate(dict.fromkeys(m for m, _ in modes))}
    _draw(size, result, colours, lambda form: form.file_bytes / 1000)
    _draw(latency, result, colours, lambda form: form.latency_ratio[BATCH_OF_ONE])
    size.set_xlabel("size of the ONNX file, kB")
    latency.set_xlabel("latency at batch 1, by that of the uncompressed model")
    size.set_ylabel(f"{result.score}: {result.measure}")
    floor = result.teacher.score - max(SHOWN, 5 * result.loss)
    below = sum(point.form.score < floor for point in result.points)
    if below:
        size.set_ylim(bottom=floor)
    figure.suptitle(
        f"Compressions of run {result.run}" + (f" ({below} of {len(result.points)} lie below)" if below else "")
    )
    spent = {mode: [point.epsilon for point in result.points if point.mode == mode] for mode in colours}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=f"{'+'.join(mode)}, {_range(spent[mode])}")
        for mode, colour in colours.items()
    ]
    used = {point.form.precision for point in result.points}
    handles += [
        Line2D([], [], marker=marker, linestyle="", color="grey", label=precision)
        for precision, marker in MARKERS.items()
        if precision in used
    ]
    handles += [
        Line2D([], [], marker="*", markersize=13, linestyle="", color=_TEACHER, label="uncompressed"),
        Line2D([], [], color=_TEACHER, linestyle="--", label=f"loss of {result.loss:g} allowed"),
        Line2D(
            [],
            [],
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=_FRONT,
            linestyle="",
            label="on the front",
        ),
        Line2D(
            [],
            [],
            marker="o",
            markersize=15,
            markerfacecolor="none",
            markeredgecolor="black",
            markeredgewidth=2,
            linestyle="",
            label="chosen",
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    content = io.BytesIO()
    with quieter(logging.ERROR, "matplotlib.font_manager"):
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _range(spent: Sequence[float | None]) -> str:
    known = [value for value in spent if value is not None]
    if len(known) < len(spent):
        return "no bound on epsilon"
    low, high = min(known), max(known)
    return f"epsilon {epsilon_words(low)}" if low == high else f"epsilon {epsilon_words(low)} to {epsilon_words(high)}"


def _draw(
    axes: "Axes", result: SearchResult, colours: dict[tuple[str, ...], str], place: Callable[[PrecisionForm], float]
) -> None:
    """One panel: every form at its place, with its interval."""
    from matplotlib.ticker import FuncFormatter

    for point in result.points:
        _dot(axes, point, colours[point.mode], place(point.form))
    teacher = result.teacher
    axes.plot(place(teacher), teacher.score, marker="*", markersize=15, color=_TEACHER, linestyle="", zorder=4)
    axes.axhline(teacher.score - result.loss, color=_TEACHER, linestyle="--", linewidth=1)
    places = [place(form) for form in (teacher, *(point.form for point in result.points))]
    axes.set_xscale("log" if max(places) > WIDE * min(places) else "linear")
    for of in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        of(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.grid(visible=True, which="major", alpha=0.3)


def _dot(axes: "Axes", point: FrontPoint, colour: str, x: float) -> None:
    form = point.form
    if form.interval is not None:
        axes.plot([x, x], [form.interval.low, form.interval.high], color=colour, linewidth=1, alpha=0.5)
    axes.plot(x, form.score, marker=MARKERS[form.precision], color=colour, markersize=6, linestyle="", zorder=3)
    if point.on_front:
        axes.plot(x, form.score, marker="o", markersize=10, markerfacecolor="none", markeredgecolor=_FRONT, zorder=2)
    if point.chosen:
        axes.plot(
            x, form.score, marker="o", markersize=16, markerfacecolor="none", markeredgecolor="black",
            markeredgewidth=2, zorder=5,
        )  # fmt: skip
