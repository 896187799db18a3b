"""The privacy statement of a site: one HTML page on what its ledger says, for people who are no engineers.

The page is whole in itself: it asks for nothing from anywhere, and its content security policy forbids it to. It is
well-formed XML too. All that comes from a ledger, a log or a setting is escaped (`fedclaw.report.pages`).
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fedclaw import __version__
from fedclaw.report import ledger_chart, ledger_words, pages
from fedclaw.site.journal.reconciliation import SiteJournal, check_journal, losses
from fedclaw.site.journal.spending import DataSetSpending, Spending, epsilon_over_time
from fedclaw.site.layout import ledger_file

_CHART_POINTS = 40

Receipts = Mapping[tuple[str, str, str], Mapping[str, Any]]
"""The last receipt that left, by data set, federation and run."""


def render(journal: SiteJournal) -> str:
    """The page on this journal as HTML. Raises LedgerError if ledger and outbound log do not fit together."""
    check_journal(journal)
    spending = journal.spending()
    receipts = _receipts(journal)
    return pages.render(
        "ledger_page.html",
        words=ledger_words,
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
    trusted = {str(receipt.get("trust")) for (name, _, _), receipt in receipts.items() if name == item.name}
    return {
        "spending": item,
        "meaning": ledger_words.meaning(item),
        "provided": ledger_words.provided(trusted),
        "chart": _chart(number, item, journal) if item.charges else "",
    }


def _chart(number: int, item: DataSetSpending, journal: SiteJournal) -> str:
    points = epsilon_over_time(journal.entries, journal.index, item.name, item.budget.delta, _CHART_POINTS)
    if math.isinf(points[0].epsilon):
        return ""
    return ledger_chart.draw(points, item.budget.epsilon, f"chart-{number}")


def _is_discrete(spending: Spending) -> bool:
    """Whether any charge was for discrete noise."""
    runs = (run for item in spending.data_sets for run in item.runs)
    return any(mechanism.family == "discrete" for run in runs for mechanism in run.mechanisms if mechanism)
