"""A site's journal as a whole: its budget, its privacy ledger, its outbound log, and the mark that a ledger was begun.

The ledger's own chain shows any change but one: entries cut off its end, or an older copy put back. What left the site
shows that. Each answer that carried a privacy receipt is a line of the outbound log, under the name that its charge has
in the ledger, and its receipt names the ledger's head of that moment. Who puts back both files at once is found by a
head that is kept elsewhere: the coordinator's run directory and the privacy statement of each bundle hold them.

The mark lies outside of `state/`: a budget must not begin again because a folder is gone. `ledger.json` in the site's
directory, beside `keys/`, holds the ledger's identity and the head it had when it was last charged. It is written
before the first charge and after every one, each time before anything is trained; so it never knows of more than the
ledger does, unless the ledger was lost, cut, or replaced by an older copy. Then the site does not start until the
newest copy is back, or the operator says in so many words that it begins again (`fedclaw.site.directory`).

Where these files are in a site's directory stands here too.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import Field, ValidationError

from fedclaw.errors import LedgerError, UsageError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.site.journal.history import Budget, Entry, Index, read_ledger
from fedclaw.site.journal.outbound import OutboundEntry, OutboundLog
from fedclaw.site.journal.spending import Spending, spending_of
from fedclaw.site.settings import SiteSettings, load_site_settings


def state_directory(root: Path) -> Path:
    """Where the client keeps what must survive it."""
    return root / "state"


def ledger_file(root: Path) -> Path:
    """The privacy ledger."""
    return state_directory(root) / "ledger.sqlite"


def outbound_file(root: Path) -> Path:
    """The outbound log."""
    return state_directory(root) / "outbound.jsonl"


def outbox_directory(root: Path) -> Path:
    """Replies that wait, or may be asked for again."""
    return state_directory(root) / "outbox"


def constants_file(root: Path) -> Path:
    """The site's own constants of preprocessing, for a schema that says standardise: site."""
    return state_directory(root) / "preprocessing.json"


def answers_directory(root: Path) -> Path:
    """The same on Flower's runtimes."""
    return state_directory(root) / "answers"


def mark_file(root: Path) -> Path:
    """What says, outside of the state, that a ledger was begun."""
    return root / "ledger.json"


def strategy_directory(root: Path) -> Path:
    """What strategies remember of each run."""
    return state_directory(root) / "strategy"


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


@dataclass(frozen=True)
class SiteJournal:
    """Ledger and outbound log of the site at `root`, each verified by its own chain, and its settings."""

    root: Path
    settings: SiteSettings
    entries: tuple[Entry, ...]
    index: Index
    outbound: tuple[OutboundEntry, ...]
    mark: LedgerMark | None
    """What was known of the ledger before it was read; None: nothing, or it cannot be read."""

    def spending(self) -> Spending:
        """What was spent, and what is left by the site's policy. Lists the site's present data set even uncharged."""
        return spending_of(self.entries, self.index, self.budget, [self.settings.data_set])

    def budget(self, data_set: str) -> Budget:
        """The budget of a data set by the site's policy."""
        budget = self.settings.policy.budget_of(data_set)
        return Budget(epsilon=budget.epsilon, delta=budget.delta)


def open_journal(root: Path) -> SiteJournal:
    """Read a site's journal. A client may be running.

    Raises UsageError if `root` is no site directory, and LedgerError if there is no ledger, or naming the first bad
    entry of it or line of the outbound log.
    """
    if not root.is_dir():
        raise UsageError(f"the site directory {root} does not exist")
    settings = load_site_settings(root)
    # The log and the mark first: what left, or was charged, before they were read is in the ledger.
    outbound, mark = _read_outbound(outbound_file(root)), None
    with suppress(LedgerError):
        mark = read_mark(root)
    if not ledger_file(root).exists():
        check_mark(root, None)
    entries, index = read_ledger(ledger_file(root))
    return SiteJournal(root, settings, entries, index, outbound, mark)


def site_spending(root: Path) -> Spending:
    """What the ledger of the site at `root` says was spent, and what is left. Raises as `open_journal` does."""
    return open_journal(root).spending()


def losses(index: Index) -> list[str]:
    """In sentences: that, and when, entries were lost and the site went on at its operator's word."""
    return [
        f"on {loss.time} the ledger was begun again after a loss, by the operator's word: {loss.reason}; what "
        f"{'an unknown number of' if loss.entries is None else f'the {loss.entries}'} entries had counted until then "
        "and are not in it was spent all the same, and no figure here has it"
        for loss in index.losses
    ]


def agreements(index: Index, now: datetime | None = None) -> list[str]:
    """In sentences: which unfinished runs are agreed to, so that what they have still to be charged is kept free."""
    now = now or datetime.now(UTC)
    return [
        f"data set {data_set}: run {run} of federation {federation} is agreed to{f' ({purpose})' if purpose else ''}: "
        f"up to {min(agreement.charges, agreement.rounds)} more round(s), kept free of others until "
        f"{agreement.renewed + timedelta(days=agreement.days):%Y-%m-%d %H:%M} UTC"
        for (data_set, federation, run, purpose), agreement in index.agreements.items()
        if agreement.holds(now)
    ]


def check_journal(journal: SiteJournal) -> None:
    """Raise LedgerError unless the ledger has all that left, and is the one that was begun here (`check_mark`)."""
    check(journal.index, journal.outbound)
    if journal.mark is None:
        read_mark(journal.root)
    check_known(journal.root, journal.mark, journal.index)


def check_site(root: Path) -> None:
    """Raise LedgerError if the ledger of the site at `root` lacks what its outbound log shows to have left."""
    check(read_ledger(ledger_file(root))[1], _read_outbound(outbound_file(root)))


def check(index: Index, outbound: Sequence[OutboundEntry]) -> None:
    """Raise LedgerError, naming the line of the outbound log, unless the ledger has all that left.

    Each line with a receipt needs its ledger head in the chain, and each answer a settled charge of its own under its
    message's name; the same answer sent again, which has the same digest, needs no other.
    """
    settled = Counter(reservation.key for reservation in index.reservations.values())
    for (_, key), waiting in index.open.items():
        settled[key] -= len(waiting)
    left: defaultdict[str, set[str]] = defaultdict(set)
    for line in outbound:
        if line.receipt is None:
            continue
        head = line.receipt.get("ledger_head")
        if head is not None and head not in index.heads:
            raise LedgerError(
                f"{_named(line)} says that the privacy ledger's head was {head}, which is not in this ledger of "
                f"{index.sequence} entries: later ones were cut off, or an old copy was put back; do not train on "
                "until it is explained or the newest backup is restored"
            )
        left[line.message_id].add(line.digest)
        if len(left[line.message_id]) > settled[line.message_id]:
            raise LedgerError(
                f"{_named(line)} left under the name {line.message_id!r}, for which this privacy ledger has "
                f"{settled[line.message_id]} settled charge(s); do not train on until it is explained"
            )


def _named(line: OutboundEntry) -> str:
    return f"line {line.sequence} of the outbound log (run {line.run}, round {line.round}, {line.time})"


def _read_outbound(path: Path) -> tuple[OutboundEntry, ...]:
    if not path.exists():
        return ()
    with OutboundLog(path, read_only=True) as log:
        return log.entries()


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
