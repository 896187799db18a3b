"""Epsilon over time as one SVG picture inside an HTML page: a staircase, and the budget as a broken line."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from fedclaw.report import pages
from fedclaw.site.journal.spending import Point

_WIDTH, _HEIGHT = 480.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 12.0, 24.0, 34.0
_DAYS_SHOWN_AS_DATES = timedelta(days=3)


def draw(points: Sequence[Point], budget: float | None, identity: str) -> str:
    """The chart of at least one point as an <svg> element; `identity` tells its ids apart within a page.

    Epsilons are drawn up to the first that is infinite. Where a clock was set back the line stays where it was.
    """
    finite = [point for point in points if math.isfinite(point.epsilon)]
    times = _never_back([point.time for point in finite])
    highest = max([point.epsilon for point in finite] + [budget or 0.0, 1e-9])
    ticks = _ticks(highest)
    top = max(highest, ticks[-1])

    def y(epsilon: float) -> float:
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * epsilon / top, 1)

    return pages.render(
        "ledger_chart.svg",
        identity=identity,
        says=_says(points, finite, budget),
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        ticks=[(y(tick), f"{tick:g}") for tick in ticks],
        line=_line(times, [y(point.epsilon) for point in finite]) if finite else None,
        budget=None if budget is None else {"y": y(budget), "text": f"{budget:g}"},
    )


def _line(times: Sequence[datetime], heights: Sequence[float]) -> dict[str, Any]:
    """The staircase, its end, and the first and the last time: as dates, or with the time of day when they are close.

    The first is None if no time passes.
    """
    positions = _positions(times)
    shape = "%Y-%m-%d" if times[-1] - times[0] > _DAYS_SHOWN_AS_DATES else "%Y-%m-%d %H:%M"
    return {
        "path": _staircase(positions, heights),
        "x": f"{positions[-1]:.1f}",
        "y": heights[-1],
        "first": None if times[0] == times[-1] else times[0].strftime(shape),
        "last": times[-1].strftime(shape),
    }


def _says(points: Sequence[Point], finite: Sequence[Point], budget: float | None) -> str:
    limit = "no budget is set" if budget is None else f"the budget is {budget:g}"
    if not finite:
        return f"Epsilon is unbounded from the first charge on; {limit}."
    ends = "then unbounded" if len(finite) < len(points) else "the latest"
    first, last = finite[0], finite[-1]
    return (
        f"Epsilon was {first.epsilon:.3g} after charge {first.charges} ({first.time}) and {last.epsilon:.3g} after "
        f"charge {last.charges} ({last.time}), {ends}; {limit}."
    )


def _never_back(texts: Sequence[str]) -> list[datetime]:
    times: list[datetime] = []
    for text in texts:
        time = datetime.fromisoformat(text)
        times.append(max(time, times[-1]) if times else time)
    return times


def _positions(times: Sequence[datetime]) -> list[float]:
    """Horizontal positions; all at the right end if no time passes."""
    span = (times[-1] - times[0]).total_seconds()
    width = _WIDTH - _LEFT - _RIGHT
    return [_LEFT + width * ((time - times[0]).total_seconds() / span if span else 1.0) for time in times]


def _staircase(positions: Sequence[float], heights: Sequence[float]) -> str:
    """From zero, level until the next charge, then straight up."""
    floor = _HEIGHT - _BOTTOM
    path = [f"M{_LEFT:g} {floor:g}"]
    for position, height in zip(positions, heights, strict=True):
        path.append(f"H{position:.1f}V{height:.1f}")
    return "".join(path)


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to at least `highest`, four to six of them."""
    rough = highest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(highest / step - 1e-9) + 1)]
