"""The operator's explicit word that a site goes on though its privacy ledger is lost, or is older than what it spent.

What was spent is not undone by losing the record of it, so the word is kept for ever: as an entry of the ledger that
the site goes on with, which `show`, the statement and every receipt from then on repeat. A ledger that is there and
whole, if only an older copy, is gone on with: what it has counts. All else is set aside, never deleted.
"""

import logging
from datetime import UTC, datetime
from pathlib import Path

from fedclaw.errors import LedgerError, UsageError
from fedclaw.site.directory import only_client
from fedclaw.site.journal.history import Index
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.ledger_file import read_ledger
from fedclaw.site.journal.reconciliation import LedgerMark, check_mark, check_site, read_mark, write_mark
from fedclaw.site.layout import answers_directory, ledger_file, outbound_file, outbox_directory, state_directory
from fedclaw.site.settings import load_site_settings

log = logging.getLogger(__name__)

LONGEST_REASON = 500


def begin_again(root: Path, reason: str) -> str:
    """Have the site at `root` go on, and keep `reason`. Returns what was done, in a sentence.

    Raises UsageError if nothing is lost, no reason is given, or a client is running.
    """
    settings = load_site_settings(root)
    words = " ".join(reason.split())
    if not words or len(words) > LONGEST_REASON or not words.isprintable():
        raise UsageError(
            f'reason="…" is what stays of this in the ledger: one line, at most {LONGEST_REASON} characters'
        )
    with only_client(root):
        if (problem := what_is_lost(root)) is None:
            raise UsageError(
                f"nothing is lost at {root}: its ledger is whole, or none was begun yet; just start the client"
            )
        mark = _mark(root)
        kept = _readable(root)
        aside = _set_aside(root, with_ledger=kept is None)
        with Ledger.open(ledger_file(root), settings.data_set) as ledger:
            ledger.begin_again(words, problem, None if mark is None else mark.model_dump())
            write_mark(root, ledger.index())
    gone_on = "a new ledger was begun" if kept is None else f"the ledger of {kept.sequence} entries is gone on with"
    return f"{gone_on}; what was lost is not counted, which stays written in it; the rest is in {aside}"


def what_is_lost(root: Path) -> str | None:
    """Why the site at `root` does not start on its ledger; None: it does."""
    try:
        if ledger_file(root).exists():
            check_site(root)
            check_mark(root, read_ledger(ledger_file(root))[1])
        else:
            check_mark(root, None)
            if outbound_file(root).exists():
                check_site(root)
    except LedgerError as error:
        return str(error)
    return None


def _mark(root: Path) -> LedgerMark | None:
    try:
        return read_mark(root)
    except LedgerError as error:
        log.warning("%s", error)
        return None


def _readable(root: Path) -> Index | None:
    """The ledger that is there, if its own chain holds."""
    try:
        return read_ledger(ledger_file(root))[1]
    except LedgerError:
        return None


def _set_aside(root: Path, *, with_ledger: bool) -> Path:
    """Move what does not belong to the ledger that is gone on with, answers that wait to be sent again included."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    aside = state_directory(root) / f"before-{stamp}"
    aside.mkdir(mode=0o700)
    ledger = ledger_file(root)
    moved = [outbound_file(root), outbox_directory(root), answers_directory(root)]
    moved += [ledger, ledger.with_name(ledger.name + "-journal")] if with_ledger else []
    for path in moved:
        if path.exists():
            path.replace(aside / path.name)
    return aside
