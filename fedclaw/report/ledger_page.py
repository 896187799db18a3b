"""The privacy statement of a site: one HTML page on what its ledger says, for people who are no engineers.

The page is whole in itself: it asks for nothing from anywhere, and its content security policy forbids it to. It is
well-formed XML too. All that comes from a ledger, a log or a setting is escaped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fedclaw import __version__
from fedclaw.report import ledger_chart
from fedclaw.report.ledger_words import NOT_COVERED, counted, factor, meaning, protection, provided, rounded, work
from fedclaw.site.journal.reconciliation import Books, check_books, losses
from fedclaw.site.journal.spending import DataSetSpending, RunSpending, Spending, epsilon_over_time
from fedclaw.site.layout import ledger_file

_CHART_POINTS = 40
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

Receipts = Mapping[tuple[str, str, str], Mapping[str, Any]]
"""The last receipt that left, by data set, federation and run."""


def render(books: Books) -> str:
    """The page on these books as HTML. Raises LedgerError if ledger and outbound log do not fit together."""
    check_books(books)
    spending = books.spending()
    receipts = _receipts(books)
    now = datetime.now(UTC).isoformat(timespec="minutes")
    title = f"What training has cost in privacy: {books.settings.name}"
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="quiet">From the privacy ledger of this site, on {_time(now)} UTC. One ledger counts all training '
        "on this site's data, of all runs and federations, for ever.</p></header>",
        "<main>",
        *(f'<p class="warn">{escape(sentence[0].upper() + sentence[1:])}.</p>' for sentence in losses(books.index)),
        *(_data_set(number, item, books, receipts) for number, item in enumerate(spending.data_sets, 1)),
        _not_covered(),
        _how_computed(spending),
        _how_to_check(books, spending),
        "</main>",
        f'<footer><p class="quiet">Made by FedClaw {escape(__version__)}.</p></footer>',
    ]
    style = files("fedclaw.report").joinpath("ledger_page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="referrer" content="no-referrer"/>\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n"
        "</html>\n"
    )


def _receipts(books: Books) -> Receipts:
    charged = {reservation.key: reservation.data_set for reservation in books.index.reservations.values()}
    return {
        (charged[line.message_id], line.federation, line.run): line.receipt for line in books.outbound if line.receipt
    }


def _data_set(number: int, item: DataSetSpending, books: Books, receipts: Receipts) -> str:
    parts = [f"<section><h2>Data set {escape(item.name)}</h2>", _figures(item), _bar(item)]
    style = ' class="warn"' if math.isinf(item.epsilon) else ""
    parts += ["<h3>In plain words</h3>", *(f"<p{style}>{escape(sentence)}</p>" for sentence in meaning(item))]
    trusted = {str(receipt.get("trust")) for (name, _, _), receipt in receipts.items() if name == item.name}
    parts += [f'<p class="warn">{escape(sentence)}</p>' for sentence in provided(trusted)]
    if item.charges:
        parts.append(_chart(number, item, books))
        parts.append(_runs(item, receipts))
        parts.append(_contents(item))
    return "\n".join([*parts, "</section>"])


def _figures(item: DataSetSpending) -> str:
    budget = "no limit" if item.budget.epsilon is None else f"{item.budget.epsilon:g}"
    left = "no limit" if item.left is None else rounded(item.left, down=True)
    cards = [("Budget (epsilon)", budget), ("Spent", _epsilon(item.epsilon)), ("Left", left)]
    if math.isfinite(item.epsilon):
        cards.append(("Likelihoods differ by at most a factor of", factor(item.epsilon)))
    return _list("figures", [(f"{escape(name)}", escape(value)) for name, value in cards], wrap="div")


def _bar(item: DataSetSpending) -> str:
    if item.budget.epsilon is None:
        return ""
    share = min(1.0, item.epsilon / item.budget.epsilon)
    return (
        f'<div class="bar" role="img" aria-label="{share:.0%} of the budget is spent">'
        f'<span style="width:{100 * share:.1f}%"></span></div>'
    )


def _chart(number: int, item: DataSetSpending, books: Books) -> str:
    points = epsilon_over_time(books.entries, books.index, item.name, item.budget.delta, _CHART_POINTS)
    if math.isinf(points[0].epsilon):
        return ""
    drawing = ledger_chart.draw(points, item.budget.epsilon, f"chart-{number}")
    caption = f"Epsilon spent on {item.name} over time, at delta {item.budget.delta:g}. It never falls."
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _runs(item: DataSetSpending, receipts: Receipts) -> str:
    rows = [_run(run, receipts.get((item.name, run.federation, run.run))) for run in item.runs]
    which = "1 charge is" if item.open == 1 else f"{item.open} charges are"
    open_ones = f" {which} open: counted as spent, but no result has left for it yet." if item.open else ""
    several = "Several runs together cost at most the sum of their epsilons, and mostly less. " * (len(rows) > 1)
    return "<h3>By which run</h3>" + _table(
        f"{several}Times are UTC.{open_ones}",
        ("Run", "When", "Rounds", "Epsilon alone", "What was done"),
        rows,
        numbers={2, 3},
    )


def _run(run: RunSpending, receipt: Mapping[str, Any] | None) -> tuple[str, ...]:
    note = counted(run)
    done = "".join(f"{escape(work(mechanism))}<br/>" for mechanism in run.mechanisms)
    return (
        f'{escape(run.run)}<br/><span class="quiet">federation {escape(run.federation)}</span>',
        _span(run.first, run.last),
        f"{run.rounds}" + (f'<br/><span class="quiet">{escape(note)}</span>' if note else ""),
        escape(_epsilon(run.epsilon)),
        f'{done}<span class="quiet">{escape(protection(receipt))}</span>',
    )


def _contents(item: DataSetSpending) -> str:
    rows = [
        (
            f'<span class="hash">{escape(use.fingerprint or "not noted")}</span>',
            _span(use.first, use.last),
            str(use.charges),
        )
        for use in item.contents
    ]
    return "<h3>On which content</h3>" + _table(
        "The budget belongs to the data set's name; when its files change, the people in them mostly "
        "stay, and so does what was spent.",
        ("SHA-256 of the data", "Charged", "Charges"),
        rows,
        numbers={2},
    )


def _not_covered() -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in NOT_COVERED)
    return f"<section><h2>What these figures do not cover</h2><ul>{items}</ul></section>"


def _how_computed(spending: Spending) -> str:
    families = {
        mechanism.family
        for item in spending.data_sets
        for run in item.runs
        for mechanism in run.mechanisms
        if mechanism
    }
    discrete = " Discrete noise inside secure aggregation: Renyi divergences." if "discrete" in families else ""
    facts = [
        ("Promise", "(epsilon, delta)-differential privacy, for one record added to the data or removed from it"),
        ("Computed by", f"FedClaw {__version__} with dp-accounting {version('dp-accounting')}, on this machine"),
        ("Method", f"Privacy loss distributions, all charges composed, always rounded up.{discrete}"),
        (
            "Charged",
            "Before the work begins, and kept when it fails: the ledger may count too much, never too little",
        ),
    ]
    return "<section><h2>How it was computed</h2>" + _list("facts", [(a, escape(b)) for a, b in facts]) + "</section>"


def _how_to_check(books: Books, spending: Spending) -> str:
    receipts = sum(line.receipt is not None for line in books.outbound)
    facts = [
        ("Ledger", f"<code>{escape(str(ledger_file(books.root)))}</code>, number {escape(spending.ledger)}"),
        ("Entries", f"{spending.entries}, each bound to all before it"),
        ("Head", f'<span class="hash">{escape(spending.head)}</span>'),
        (
            "Compared with",
            f"the outbound log, when this page was made: {receipts} answers left with a privacy receipt, and each has "
            "its charge in the ledger",
        ),
    ]
    command = f"python -m fedclaw.ledger verify site={books.root} head={spending.head}"
    return (
        "<section><h2>How to check it</h2>"
        + _list("facts", facts)
        + "<p>An entry that is changed, removed or added later is found and named. This command, run at the site, also "
        "proves that what this page was made from is still all there:</p>"
        f"<pre><code>{escape(command)}</code></pre></section>"
    )


def _list(kind: str, facts: Iterable[tuple[str, str]], wrap: str | None = None) -> str:
    """A list of terms (escaped here) and values (HTML)."""
    before, after = (f"<{wrap}>", f"</{wrap}>") if wrap else ("", "")
    items = "".join(f"{before}<dt>{escape(name)}</dt><dd>{value}</dd>{after}" for name, value in facts)
    return f'<dl class="{kind}">{items}</dl>'


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[int]) -> str:
    """A table of HTML cells. The roles say again what the elements are, because narrow screens stack the cells."""
    head = "".join(
        f'<th scope="col" role="columnheader"{_number(place in numbers)}>{escape(name)}</th>'
        for place, name in enumerate(columns)
    )
    body = "".join(f'<tr role="row">{_row(columns, row, numbers)}</tr>' for row in rows)
    return (
        f'<table role="table"><caption>{escape(caption)}</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead><tbody role="rowgroup">{body}</tbody></table>'
    )


def _row(columns: Sequence[str], row: Sequence[str], numbers: set[int]) -> str:
    cells = [f'<th scope="row" role="rowheader">{row[0]}</th>']
    for place, cell in enumerate(row[1:], 1):
        label = escape(columns[place])
        cells.append(f'<td role="cell" data-label="{label}"{_number(place in numbers)}>{cell}</td>')
    return "".join(cells)


def _number(yes: bool) -> str:
    return ' class="number"' if yes else ""


def _span(first: str, last: str) -> str:
    return _time(first) if first == last else f"{_time(first)}<br/>to {_time(last)}"


def _time(text: str) -> str:
    """A time of the ledger, HTML; as it stands if it is none."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return escape(text)
    return f'<time datetime="{escape(text)}">{time:%Y-%m-%d %H:%M}</time>'


def _epsilon(epsilon: float) -> str:
    return "no bound" if math.isinf(epsilon) else rounded(epsilon)
