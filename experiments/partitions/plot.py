"""A partition as a picture: who has how many examples of which label.

Up to fifty clients and ten labels are drawn one by one, as stacked bars; more labels as a map of clients by labels;
more clients as a map of their shares, sorted by what they have most of, beside histograms of what they have.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.partitions.description import Description, label_distances
from fedclaw.files import write_atomic

INDIVIDUALLY = 50
"""Clients, at most, that are drawn one by one."""
_COLOURS = 10
"""Labels, at most, that are told apart by colour."""
_CALLED = 7
"""Clients, at most, that are called by their names."""
_NAMED = 30
"""Labels, at most, whose names stand at a map's axis."""
_PIXELS = 800
"""Columns of a map, at most."""
_BARS = 40
"""Of a histogram, at most."""
_UNEVEN = 10
"""Where the largest client has so many times the median, counts are shown apart from labels, by powers of ten."""
_SHARE = "share of the client's examples"
_DARK, _LIGHT, _LINE = "#3f4c6b", "#a8b3cc", "#d55e00"


def draw(description: Description, path: Path) -> None:
    """Write the plot as a PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    few = description.clients <= INDIVIDUALLY
    figure = Figure(figsize=(9.6, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    (_few if few else _many)(figure, description)
    figure.suptitle(_title(description), x=0.01, ha="left", fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    write_atomic(path, content.getvalue())


def _title(description: Description) -> str:
    data = f"{description.dataset}, " if description.dataset else ""
    seed = "" if description.seed is None else f", seed {description.seed}"
    sizes, distance = description.sizes, description.total_variation
    return (
        f"{data}{description.clients:,} clients by {description.label}{seed}\n"
        f"{description.examples:,} examples, {sizes['0']:,.0f} to {sizes['1']:,.0f} a client (median "
        f"{sizes['0.5']:,.0f}); labels' total variation {distance['mean']:.2f} on average, "
        f"{distance['if_iid']:.2f} by chance alone"
    )


def _few(figure: Any, description: Description) -> None:
    counts = np.array(description.label_counts)
    sizes = counts.sum(axis=1)
    uneven = sizes.max() > _UNEVEN * np.median(sizes)
    panels = list(figure.subplots(2 + uneven, 1, sharex=True, height_ratios=[1, 2, 1] if uneven else [3, 1]))
    if uneven:
        _sizes(panels[0], sizes)
    main, lower = panels[-2:]
    if len(description.labels) <= _COLOURS:
        _bars(main, counts / sizes[:, None] if uneven else counts, description.labels)
        main.set_ylabel("share of examples" if uneven else "examples")
    else:
        _map(figure, main, counts / sizes[:, None], description.labels)
    _by_client(lower, description)
    if description.names is not None and description.clients <= _CALLED:
        lower.set_xticks(range(description.clients), [_short(name) for name in description.names])
    else:
        lower.set_xticks(range(0, description.clients, 1 if description.clients <= 25 else 5))
    lower.set_xlim(-0.6, description.clients - 0.4)
    lower.set_xlabel("client")


def _sizes(panel: Any, sizes: NDArray[np.int64]) -> None:
    panel.bar(range(len(sizes)), sizes, 0.8, color=_LIGHT, edgecolor=_DARK, linewidth=0.8)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.yaxis.set_minor_formatter("")
    # From a power of ten to one, so that two ticks at least have numbers.
    panel.set_ylim(10.0 ** np.floor(np.log10(sizes.min())), 10.0 ** np.ceil(np.log10(sizes.max() + 1)))
    panel.set_ylabel("examples")
    _grid(panel)


def _bars(panel: Any, values: NDArray[Any], labels: tuple[str, ...]) -> None:
    """(K, labels) stacked, a bar for each client, the first label at the bottom."""
    from matplotlib import color_sequences

    colours = color_sequences["petroff10"]
    bottom = np.zeros(len(values))
    for label, name in enumerate(labels):
        seen = {"color": colours[label], "edgecolor": "white", "linewidth": 0.4, "label": _short(name)}
        panel.bar(range(len(values)), values[:, label], 0.8, bottom, **seen)
        bottom += values[:, label]
    panel.set_ylim(0, 1.05 * bottom.max())
    handles, names = panel.get_legend_handles_labels()
    panel.legend(handles[::-1], names[::-1], title="label", loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False)
    _grid(panel)


def _by_client(panel: Any, description: Description) -> None:
    """Below the labels: what the instruments do or, if nothing, how far the labels are from everybody's."""
    clients = range(description.clients)
    if description.inputs is not None:
        panel.bar(clients, description.inputs.levels, 0.8, color=_DARK)
        panel.set_ylabel(_wrapped(description.inputs.unit))
    else:
        panel.bar(clients, label_distances(description), 0.8, color=_DARK)
        chance = description.total_variation["if_iid"]
        panel.axhline(chance, color=_LINE, linestyle="--", linewidth=1.2)
        place = panel.get_yaxis_transform()
        panel.text(1.01, chance, "by chance", color=_LINE, fontsize=9, va="center", transform=place)
        panel.set_ylim(0, 1)
        panel.set_ylabel("total\nvariation")
    _grid(panel)


def _many(figure: Any, description: Description) -> None:
    upper, lower = figure.subfigures(2, 1, height_ratios=[3, 2])
    counts = np.array(description.label_counts)
    shares = counts / counts.sum(axis=1, keepdims=True)
    panel = upper.subplots()
    _map(upper, panel, _narrowed(shares[_sorted(shares)]), description.labels)
    panel.set_xlabel("clients, sorted by the label that they have most of")
    panel.set_xticks([])
    panels = lower.subplots(1, 2 if description.inputs is None else 3)
    _histogram(panels[0], counts.sum(axis=1), "examples of a client")
    _histogram(panels[1], (counts > 0).sum(axis=1), "different labels of a client")
    panels[0].set_ylabel("clients")
    if description.inputs is not None:
        panels[2].plot(description.inputs.levels, color=_DARK, linewidth=2)
        panels[2].set_xlabel("client")
        panels[2].set_ylabel(description.inputs.unit)
        _grid(panels[2])


def _map(figure: Any, panel: Any, shares: NDArray[np.float64], labels: tuple[str, ...]) -> None:
    """Clients from left to right, labels from below."""
    image = panel.imshow(
        shares.T, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1, interpolation="nearest"
    )
    figure.colorbar(image, ax=panel, label=_SHARE, pad=0.01)
    panel.set_ylabel("label")
    if len(labels) <= _NAMED:
        size = 9 if len(labels) <= 15 else 7
        panel.set_yticks(range(len(labels)), [_short(label) for label in labels], fontsize=size)


def _sorted(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Clients by the label that they have most of, then by how much of it."""
    order: NDArray[np.int64] = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
    return order


def _narrowed(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most as many columns as the picture has pixels for: the means of neighbouring clients."""
    if len(shares) <= _PIXELS:
        return shares
    starts = np.linspace(0, len(shares), _PIXELS, endpoint=False).astype(int)
    widths = np.diff(np.append(starts, len(shares)))
    narrowed: NDArray[np.float64] = np.add.reduceat(shares, starts) / widths[:, None]
    return narrowed


def _histogram(panel: Any, numbers: NDArray[np.int64], meaning: str) -> None:
    """Of whole numbers: each bar stands for as many of them as any other."""
    low, high = int(numbers.min()), int(numbers.max())
    width = -(-(high - low + 1) // _BARS)
    edges = np.arange(low, high + width + 1, width) - 0.5
    panel.hist(numbers, bins=edges, color=_LIGHT, edgecolor=_DARK, linewidth=0.8)
    median = float(np.median(numbers))
    panel.axvline(median, color=_LINE, linestyle="--", linewidth=1.2)
    panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    panel.set_xlim(min(edges[0], max(low - 2, 0)), max(edges[-1], high + 2))
    panel.yaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel(f"{meaning} (median {median:,g})")
    _grid(panel)


def _grid(panel: Any) -> None:
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _wrapped(text: str) -> str:
    """In two lines, for the axis of a low panel."""
    head, _, tail = text.rpartition(" ")
    return f"{head}\n{tail}"
