"""That a ledger was begun at a site, kept outside of `state/`: a budget must not begin again because a folder is gone.

`ledger.json` in the site's directory, beside `keys/`, holds the ledger's identity and the head it had when it was last
charged. It is written before the first charge and after every one, each time before anything is trained; so it never
knows of more than the ledger does, unless the ledger was lost, cut, or replaced by an older copy. Then the site does
not start until the newest copy is back, or the operator says in so many words that it begins again
(`fedclaw.site.begin_again`). Who puts back the mark as well is found by a head that is kept elsewhere: the
coordinator's run directory and the privacy statement of each bundle hold them.
"""

from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from fedclaw.errors import LedgerError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.site.journal.history import Index
from fedclaw.site.layout import ledger_file, mark_file


class LedgerMark(Frozen):
    """What is known of a site's ledger without it."""

    ledger: str = Field(max_length=64)
    """The identity that it was given when it was begun."""
    head: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Its newest head, when it was last charged or opened."""
    entries: int = Field(ge=1)
    """How many entries it had then."""
    time: str
    """UTC, ISO 8601; for people."""


def read_mark(root: Path) -> LedgerMark | None:
    """The mark of the site at `root`; None if there is none. Raises LedgerError for one that cannot be read."""
    path = mark_file(root)
    try:
        return LedgerMark.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else error.strerror
        raise LedgerError(
            f"{path}, which says that a privacy ledger was begun here, cannot be read ({reason}); restore it from a "
            f"backup, or {advice(root)}"
        ) from error


def write_mark(root: Path, index: Index) -> None:
    """Say that the ledger at `root` is `index`. Durable on return. Raises LedgerError if it cannot be written."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    mark = LedgerMark(ledger=index.identity, head=index.head, entries=index.sequence, time=now)
    path = mark_file(root)
    try:
        write_atomic(path, mark.model_dump_json().encode() + b"\n", PRIVATE_MODE)
    except OSError as error:
        raise LedgerError(f"{path} cannot be written: {error.strerror}; nothing is trained without it") from error


def check_mark(root: Path, index: Index | None) -> None:
    """Raise LedgerError unless `index`, the site's ledger (None: there is none), is the one that was begun here, and no
    older than when it was last charged. A site that never began one passes, and so does one from before there were
    marks."""
    check_known(root, read_mark(root), index)


def check_known(root: Path, mark: LedgerMark | None, index: Index | None) -> None:
    """The same for a mark that was read before the ledger was: where a client runs, both have moved on since."""
    if mark is None:
        return
    path = ledger_file(root)
    known = f"it had {mark.entries} entries on {mark.time}"
    if index is None:
        problem = f"the privacy ledger {path}, which was begun here, is gone ({known})"
    elif index.identity != mark.ledger:
        problem = f"the privacy ledger {path} is not the one that was begun here ({known})"
    elif mark.head not in index.heads:
        problem = (
            f"the privacy ledger {path} has {index.sequence} entries and lacks what was charged since: {known}, so an "
            "old copy was put back, or the last ones were cut off"
        )
    else:
        return
    raise LedgerError(f"{problem}; nothing is trained until the newest backup is restored, or: {advice(root)}")


def advice(root: Path) -> str:
    """What to do about a ledger that is lost for good."""
    return f'if it is lost for good, run: python -m fedclaw.ledger begin-again site={root} reason="what happened"'
