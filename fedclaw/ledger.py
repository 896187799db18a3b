"""A site's privacy ledger: what was spent, whether it is whole, and a page about it for everybody.

    python -m fedclaw.ledger show site=sites/hospital-north
    python -m fedclaw.ledger show site=sites/hospital-north entries=true
    python -m fedclaw.ledger verify site=sites/hospital-north
    python -m fedclaw.ledger statement site=sites/hospital-north out=statement.html

show        per data set: budget, spent, left, runs, rounds, open reservations (charged, their result has not left)
verify      walks the whole chain and compares it with what left the site; names the first entry that is wrong
statement   one HTML page that needs no other file and no network, to read, print or hand on
begin-again   the operator's word that a site goes on though its ledger is lost, or only an older copy of it is left;
            its reason="…" stays in the ledger and in every statement of it for ever. Stop the client first

More keys:
  entries=true   show: each entry too
  json=true      show: for machines
  head=HASH      verify: a head that the site has handed out (ledger_head in a bundle's privacy.json) is in the chain
  reason=TEXT    begin-again: what happened
  out=FILE       statement: where to; default privacy-statement.html in the site's directory, readable by you only

Nothing else writes to the ledger, and a client may be running.
Exit code 0: done. 1: the ledger is damaged, tampered with or not there, one line says which entry. 2: wrong use.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.ledger", __doc__)

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedclaw.cli import compose_settings, make_console, run_main, split
from fedclaw.errors import LedgerError, UsageError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.protocol.frozen import Frozen
from fedclaw.report.tables import Figures
from fedclaw.site.journal.ledger import describe
from fedclaw.site.journal.reconciliation import SiteJournal, agreements, check_journal, losses, open_journal
from fedclaw.site.journal.spending import DataSetSpending, Spending

STATEMENT_FILE = "privacy-statement.html"


class LedgerSettings(Frozen):
    """conf/ledger.yaml, checked."""

    site: Path
    entries: bool
    as_json: bool = Field(alias="json")
    head: str | None
    out: Path | None
    reason: str | None


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Run one command. Raises FedClawError."""
    line = split(arguments)
    if len(line.words) != 1 or line.words[0] not in _COMMANDS:
        given = " ".join(line.words) or "none"
        raise UsageError(f"give one command of {', '.join(_COMMANDS)} (given: {given})")
    run, takes = _COMMANDS[line.words[0]]
    given_keys = {override.lstrip("+").partition("=")[0] for override in line.overrides}
    if superfluous := given_keys - takes - {"site"}:
        raise UsageError(f"{line.words[0]} does not take {', '.join(sorted(superfluous))}")
    settings = compose_settings("ledger", [_quoted(override) for override in line.overrides], LedgerSettings)
    run(settings, console or make_console())


def _quoted(override: str) -> str:
    """A reason is a sentence: commas, colons and quotes in it are no grammar."""
    key, _, text = override.partition("=")
    if key.lstrip("+") != "reason" or text[:1] in {"'", '"'}:
        return override
    plain = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{plain}'"


def _show(settings: LedgerSettings, console: Console) -> None:
    journal = open_journal(settings.site)
    spending, problem = journal.spending(), _problem(journal)
    if settings.as_json:
        plain: dict[str, Any] = {
            "ledger": spending.ledger,
            "head": spending.head,
            "entries": spending.entries,
            "data_sets": [_plain_data_set(item) for item in spending.data_sets],
            "problem": problem,
            "losses": [asdict(loss) for loss in journal.index.losses],
        }
        if settings.entries:
            plain["chain"] = [
                {"sequence": entry.sequence, "hash": entry.hash, "body": dict(entry.body)} for entry in journal.entries
            ]
        console.out(json.dumps(plain, indent=2), highlight=False)
        return
    console.print(_overview(journal, spending), soft_wrap=False)
    console.print(f"{spending.entries} entries, head {spending.head}", markup=False)
    if settings.entries:
        console.print(_entry_table(journal), soft_wrap=False)
    for sentence in agreements(journal.index):
        console.print(sentence, markup=False)
    for sentence in losses(journal.index):
        console.print(f"! {sentence}", style="bold red", markup=False)
    if problem is not None:
        console.print(f"! {problem}", style="bold red", markup=False)


def _problem(journal: SiteJournal) -> str | None:
    """Why the figures cannot be trusted, if so: an old copy shows less than was spent."""
    try:
        check_journal(journal)
    except LedgerError as error:
        return str(error)
    return None


def _verify(settings: LedgerSettings, console: Console) -> None:
    journal = open_journal(settings.site)
    head = None if settings.head is None else settings.head.lower()
    if head is not None and not re.fullmatch(r"[0-9a-f]{64}", head):
        raise UsageError(f"head={settings.head}: a ledger head has 64 hexadecimal digits")
    check_journal(journal)
    if head is not None and head not in journal.index.heads:
        raise LedgerError(
            f"the head {head} is not in this ledger of {journal.index.sequence} entries: it is another ledger's, or "
            "entries were cut off this one, or an old copy was put back"
        )
    receipts = sum(line.receipt is not None for line in journal.outbound)
    console.print(
        f"verified: {journal.index.sequence} entries, none changed, removed or inserted; {receipts} answers left with "
        f"a receipt, each has its charge; head {journal.index.head}",
        style="green",
        markup=False,
    )
    if head is not None:
        at = next(entry for entry in journal.entries if entry.hash == head)
        console.print(f"the head given is that of entry {at.sequence}, {at.body['time']}", markup=False)
    else:
        console.print(
            "An older copy of ledger and outbound log together would pass as well: compare with a head kept elsewhere, "
            "head=…",
            style="dim",
            markup=False,
        )


def _statement(settings: LedgerSettings, console: Console) -> None:
    from fedclaw.report.ledger_page import render

    journal = open_journal(settings.site)
    check_journal(journal)
    path = settings.out or settings.site / STATEMENT_FILE
    if path.is_dir():
        raise UsageError(f"out={path} is a directory; name a file")
    # Private like the ledger: rates, steps and fingerprints tell how many examples there are, and which.
    write_atomic(path, render(journal).encode(), PRIVATE_MODE)
    console.print(f"{path} is written, readable by you only; who may see it is your decision.", markup=False)


def _begin_again(settings: LedgerSettings, console: Console) -> None:
    from fedclaw.site.directory import begin_again

    if settings.reason is None:
        raise UsageError('begin-again needs reason="…": what happened to the ledger; it is kept for ever')
    console.print(begin_again(settings.site, settings.reason), markup=False)


_COMMANDS: dict[str, tuple[Callable[[LedgerSettings, Console], None], set[str]]] = {
    "begin-again": (_begin_again, {"reason"}),
    "show": (_show, {"entries", "json"}),
    "verify": (_verify, {"head"}),
    "statement": (_statement, {"out"}),
}


def _overview(journal: SiteJournal, spending: Spending) -> Figures:
    columns = ("data set", "budget", "delta", "spent", "left", "runs", "rounds", "open", "last charge (UTC)", "unit")
    table = Figures(
        columns, title=f"What site {journal.settings.name} has spent", words=frozenset({"last charge (UTC)", "unit"})
    )
    for item in spending.data_sets:
        last = max((run.last for run in item.runs), default="never")
        table.add_row(
            item.name,
            "no limit" if item.budget.epsilon is None else f"{item.budget.epsilon:g}",
            f"{item.budget.delta:g}",
            _figure(item.epsilon),
            _figure(item.left),
            *(str(len(item.runs)), str(item.rounds), str(item.open)),
            _time(last),
            item.unit or "",
        )
    return table


def _entry_table(journal: SiteJournal) -> Table:
    table = Table(title="Entries", title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    for column in ("time (UTC)", "kind", "data set", "federation, run", "round", "what", "hash"):
        table.add_column(column)
    for entry in journal.entries:
        charge = journal.index.reservations.get(entry.sequence)
        what = ("", "", "", f"of entry {entry.body['reserve']}" if "reserve" in entry.body else "")
        if "reason" in entry.body:
            what = ("", "", "", f"begun again: {entry.body['reason']}")
        if charge is not None:
            what = (
                charge.data_set,
                f"{charge.federation}, {charge.run}",
                str(charge.round),
                describe(charge.mechanism),
            )
        row = (str(entry.sequence), _time(entry.body["time"]), entry.body["kind"], *what, entry.hash[:16])
        # Text: what a server calls its run is no markup of ours.
        table.add_row(*(Text(cell) for cell in row))
    return table


def _time(text: str) -> str:
    """Without the zone, which is always UTC."""
    return text.removesuffix("+00:00").replace("T", " ")


def _figure(epsilon: float | None) -> str:
    if epsilon is None:
        return "no limit"
    return "unbounded" if math.isinf(epsilon) else f"{epsilon:.4g}"


def _plain_data_set(item: DataSetSpending) -> dict[str, Any]:
    """For machines: an unbounded epsilon is null, and so is what is left without a limit."""
    return {
        "name": item.name,
        "unit": item.unit,
        "budget": item.budget.epsilon,
        "delta": item.budget.delta,
        "spent": _finite(item.epsilon),
        "bounded": math.isfinite(item.epsilon),
        "left": item.left,
        "rounds": item.rounds,
        "charges": item.charges,
        "open": item.open,
        "runs": [
            {
                "federation": run.federation,
                "run": run.run,
                "spent": _finite(run.epsilon),
                "rounds": run.rounds,
                "charges": run.charges,
                "open": run.open,
                "first": run.first,
                "last": run.last,
            }
            for run in item.runs
        ],
        "contents": [
            {"sha256": use.fingerprint, "charges": use.charges, "first": use.first, "last": use.last}
            for use in item.contents
        ],
    }


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


if __name__ == "__main__":
    run_main("fedclaw.ledger", __doc__ or "", main)
