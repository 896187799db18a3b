"""The table as a picture: accuracy, strategy by attack, and the backdoor's success beside it."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from experiments.attack_table.results import Results
from fedclaw.files import write_atomic


def draw(results: Results, path: Path) -> None:
    """Write the heat map as a PNG: means over the seeds, in percent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = results.columns
    doors = [column for column in columns if results.find(_strategies(results)[0], *column).backdoor is not None]
    width = 0.62 * (len(columns) + len(doors)) + 3.4
    figure = Figure(figsize=(width, 0.44 * len(_strategies(results)) + 2.1), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True, width_ratios=[len(columns), max(1, len(doors))])
    accuracy = [
        [100 * results.find(strategy, *column).accuracy[0] for column in columns] for strategy in _strategies(results)
    ]
    success = [
        [100 * (results.find(strategy, *column).backdoor or (0.0, 0.0))[0] for column in doors]
        for strategy in _strategies(results)
    ]
    _panel(panels[0], accuracy, columns, "accuracy, % (higher is better)", "viridis")
    _panel(panels[1], success, doors, "backdoor, %\n(lower is better)", "viridis_r")
    panels[0].set_yticks(range(len(accuracy)), [name.replace("_", " ") for name in _strategies(results)], fontsize=10)
    panels[1].tick_params(axis="y", left=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, content.getvalue())


def _strategies(results: Results) -> list[str]:
    return list(dict.fromkeys(entry.strategy for entry in results.entries))


def _panel(panel: Any, values: list[list[float]], columns: Any, title: str, colours: str) -> None:
    """One heat map: a number in each field, a white line between attacks, their names below groups of columns."""
    image = panel.imshow(np.array(values), cmap=colours, vmin=0, vmax=100, aspect="auto")
    for row, numbers in enumerate(values):
        for column, value in enumerate(numbers):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            ink = "white" if dark else "black"
            panel.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=9)
    labels = ["0" if attack == "none" else str(number) for attack, number in columns]
    panel.set_xticks(range(len(columns)), labels, fontsize=9)
    panel.tick_params(axis="x", length=0)
    for name in dict.fromkeys(attack for attack, _ in columns):
        at = [number for number, (attack, _) in enumerate(columns) if attack == name]
        words = "nobody" if name == "none" else name.replace("_", "\n", 1).replace("_", " ")
        transform = panel.get_xaxis_transform()
        panel.text(sum(at) / len(at), -0.065, words, ha="center", va="top", fontsize=9, transform=transform)
        if at[0] > 0:
            panel.axvline(at[0] - 0.5, color="white", linewidth=2.5)
    panel.set_title(title, fontsize=10)
    for edge in panel.spines.values():
        edge.set_visible(False)
