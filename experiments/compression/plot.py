"""Accuracy kept against the share of the parameters that is left: a panel for each task and teacher, a line a mode."""

import io
from pathlib import Path

from experiments.compression.results import Results
from fedclaw.files import write_atomic

_COLOURS = {
    "federated": "#0072b2",
    "proxy, federated": "#cc79a7",
    "proxy": "#009e73",
    "synthetic": "#d55e00",
    "none": "#999999",
}
# Okabe and Ito's, which the colour-blind can tell apart.
LOWEST = 50.0
"""Percent: what keeps less lies below the picture."""


def draw(results: Results, path: Path) -> None:
    """Write the plot as a PNG. A mode's better control has a dotted line of its colour; bars are intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = [(item.task, item.kind, item.teacher) for item in results.references]
    figure = Figure(figsize=(4.6 * min(2, len(panels)), 3.9 * -(-len(panels) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False).flat
    for panel, (task, kind, teacher) in zip(axes, panels, strict=False):
        rows = [row for row in results.rows if (row.task, row.kind) == (task, kind)]
        for mode in dict.fromkeys(row.mode for row in rows):
            mine = sorted((row for row in rows if row.mode == mode), key=lambda row: row.fraction)
            shares, kept = [100 * row.fraction for row in mine], [100 * row.recovered.kept for row in mine]
            low = [100 * (row.recovered.accuracy - row.recovered.interval.low) / teacher.accuracy for row in mine]
            high = [100 * (row.recovered.interval.high - row.recovered.accuracy) / teacher.accuracy for row in mine]
            panel.errorbar(
                *(shares, kept),
                yerr=[low, high],
                label=mode,
                color=_COLOURS[mode],
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=1.4,
            )
            better = [row.controls[row.better_control].kept for row in mine if row.better_control]
            if len(better) == len(mine):
                panel.plot(shares, [100 * value for value in better], color=_COLOURS[mode], linestyle=":", linewidth=1)
        panel.axhline(100, color="black", linewidth=0.6, alpha=0.4)
        panel.set_xscale("log")
        panel.set_xticks([100 * fraction for fraction in sorted({row.fraction for row in rows})])
        panel.xaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.set_ylim(LOWEST, 104)
        panel.set_xlabel("parameters left, %")
        panel.set_ylabel("accuracy kept, %")
        panel.set_title(f"{task.replace('_', ' ')}, {'without privacy' if kind == 'plain' else 'with privacy'}")
        panel.grid(alpha=0.25)
    for unused in list(axes):
        unused.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="black", linestyle=":", linewidth=1))
    labels.append("its better control")
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, content.getvalue())
