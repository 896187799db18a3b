"""The curves as a picture: each region by itself and all together, and the groups through the noise."""

import io
from pathlib import Path
from typing import Any

from experiments.survival_curves.cells import StudyResult
from experiments.survival_curves.results import Results
from experiments.survival_curves.settings import Cell, StudyName
from fedclaw.files import write_atomic
from fedclaw.privacy.survival_estimates import Curve
from fedclaw.report.survival import draw_curve

_YEAR = 365.25
_COLOURS = ("#0072b2", "#d55e00")
# Of Okabe and Ito's, which the colour-blind can tell apart.
_SITES = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#8c564b")
_SHOWN = 1.0
"""The epsilon whose release is drawn, in a secure sum."""


def draw(results: Results, path: Path) -> None:
    """Write the picture as a PNG, its panels below each other so that a narrow screen shows them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(results.studies)
    figure = Figure(figsize=(5.4, 3.4 * (len(names) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(len(names) + 1, 1))
    first = results.studies[names[0]]
    _by_site(panels[0], first)
    for panel, name in zip(panels[1:], names, strict=True):
        _through_noise(panel, results, name)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, content.getvalue())


def _by_site(panel: Any, study: StudyResult) -> None:
    ends = _years(study)
    for (name, curve), colour in zip(study.by_site.items(), _SITES * 11, strict=False):
        _line(panel, ends, curve, colour, name, linewidth=1)
    _line(panel, ends, study.everybody, "black", "pooled = federated", linewidth=2)
    _finish(panel, f"{study.title}:\neach by itself, and all together, without noise")


def _through_noise(panel: Any, results: Results, name: StudyName) -> None:
    study, ends = results.studies[name], _years(results.studies[name])
    shown = _SHOWN if _SHOWN in results.settings.epsilons else results.settings.epsilons[-1]
    released = results.find(Cell(study=name, placement="shares", epsilon=shown))
    for group, curve, colour in zip(study.groups, study.pooled, _COLOURS, strict=False):
        _line(panel, ends, curve, colour, f"{group}, pooled", linewidth=1, linestyle="--")
    if released is not None:
        for group, curve, colour in zip(study.groups, released.released, _COLOURS, strict=False):
            draw_curve(panel, ends, curve, colour, f"{group}, epsilon {shown:g}")
    _finish(panel, f"{study.title},\nby {study.group}: one release in a secure sum, with its 95% bands")


def _years(study: StudyResult) -> list[float]:
    return [end / _YEAR for end in study.ends]


def _line(panel: Any, ends: list[float], curve: Curve, colour: str, label: str, **style: Any) -> None:
    times = [0.0, *ends[: len(curve.survival)]]
    panel.step(times, [1.0, *curve.survival], where="post", color=colour, label=label, **style)


def _finish(panel: Any, title: str) -> None:
    panel.set_ylim(0, 1.03)
    panel.set_xlabel("years")
    panel.set_ylabel("without the event")
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9, frameon=False, loc="lower left", ncols=2)
