"""The privacy statement of a site: one HTML page on what its ledger says, for people who are no engineers.

The page is whole in itself: it asks for nothing from anywhere, and its content security policy forbids it to. It is
well-formed XML too. The templates lie beside this file; Jinja2 escapes all that comes from a ledger, a log or a
setting. Epsilon over time is one SVG picture: a staircase, and the budget as a broken line.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclaw import __version__
from fedclaw.privacy.claims import Claim, claim_in, relation_of
from fedclaw.report import ledger_words
from fedclaw.site.journal.reconciliation import SiteJournal, check_journal, ledger_file, losses
from fedclaw.site.journal.spending import DataSetSpending, Point, Spending, epsilon_over_time

if TYPE_CHECKING:
    from jinja2 import Environment

_CHART_POINTS = 40
_WIDTH, _HEIGHT = 480.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 12.0, 24.0, 34.0
_DAYS_SHOWN_AS_DATES = timedelta(days=3)

Receipts = Mapping[tuple[str, str, str], Mapping[str, Any]]
"""The last receipt that left, by data set, federation and run."""


def render(journal: SiteJournal) -> str:
    """The page on this journal as HTML. Raises LedgerError if ledger and outbound log do not fit together."""
    check_journal(journal)
    spending = journal.spending()
    receipts = _receipts(journal)
    return _filled(
        "ledger_page.html",
        words=ledger_words,
        not_covered=_not_covered(receipts, journal),
        infinite=math.inf,
        site=journal.settings.name,
        root=journal.root,
        ledger=ledger_file(journal.root),
        now=datetime.now(UTC).isoformat(timespec="minutes"),
        version=__version__,
        accountant=version("dp-accounting"),
        spending=spending,
        discrete=_is_discrete(spending),
        losses=losses(journal.index),
        receipts=receipts,
        answers=sum(line.receipt is not None for line in journal.outbound),
        data_sets=[_data_set(number, item, journal, receipts) for number, item in enumerate(spending.data_sets, 1)],
    )


def _receipts(journal: SiteJournal) -> Receipts:
    charged = {reservation.key: reservation.data_set for reservation in journal.index.reservations.values()}
    return {
        (charged[line.message_id], line.federation, line.run): line.receipt for line in journal.outbound if line.receipt
    }


def _data_set(number: int, item: DataSetSpending, journal: SiteJournal, receipts: Receipts) -> dict[str, Any]:
    own = [receipt for (name, _, _), receipt in receipts.items() if name == item.name]
    claims = [claim_in(receipt) for receipt in own]
    whole = [claim for receipt in own for claim in ledger_words.whole_site(receipt)]
    charged = _charged_for(item.name, journal)
    promises = [sentence for claim in (*claims, *whole) for sentence in (claim.protects, claim.against)]
    if not promises and item.charges and math.isfinite(item.epsilon):
        # No answer has left that would say who added the noise.
        promises = [charged.protects]
    return {
        "spending": item,
        "meaning": ledger_words.meaning(item, charged.unit),
        "promises": list(dict.fromkeys(promises)),
        "chart": _chart(number, item, journal) if item.charges else "",
    }


def _charged_for(data_set: str, journal: SiteJournal) -> Claim:
    """Unit and relation of a data set's charges, by the ledger itself."""
    index = journal.index
    return Claim(index.units.get(data_set, "example"), relation_of(index.declared.get(data_set)))


def _not_covered(receipts: Receipts, journal: SiteJournal) -> list[str]:
    """Of all claims that receipts make, and that charges do whose answers never left; else of the usual one."""
    charged = [_charged_for(name, journal) for name in journal.index.units]
    claims = [*(claim_in(receipt) for receipt in receipts.values()), *charged] or [Claim()]
    return list(dict.fromkeys(sentence for claim in claims for sentence in claim.not_covered))


def _chart(number: int, item: DataSetSpending, journal: SiteJournal) -> str:
    points = epsilon_over_time(journal.entries, journal.index, item.name, item.budget.delta, _CHART_POINTS)
    if math.isinf(points[0].epsilon):
        return ""
    return draw(points, item.budget.epsilon, f"chart-{number}")


def _is_discrete(spending: Spending) -> bool:
    """Whether any charge was for discrete noise."""
    runs = (run for item in spending.data_sets for run in item.runs)
    return any(mechanism.family == "discrete" for run in runs for mechanism in run.mechanisms if mechanism)


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

    return _filled(
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


def _filled(template: str, **values: Any) -> str:
    """The template of that name, filled in."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"moment": _moment, "epsilon": _epsilon}
    return environment


def _moment(text: str) -> str | None:
    """A time of the ledger without its seconds; None if it is no time."""
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M}"
    except ValueError:
        return None


def _epsilon(epsilon: float) -> str:
    return "no bound" if math.isinf(epsilon) else ledger_words.rounded(epsilon)
