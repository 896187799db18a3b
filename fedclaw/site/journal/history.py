"""What the entries of a ledger say when they are read in order: reservations, and what they cost together.

And the ledger as a file: made private, watched for foreign hands, and read without writing to it.
"""

import json
import logging
import math
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

from fedclaw.errors import LedgerError, PrivacyError
from fedclaw.files import PRIVATE_MODE
from fedclaw.privacy.accounting import Family, NoiseEvent, epsilon_of, event_from_json
from fedclaw.protocol.chain import GENESIS, link
from fedclaw.protocol.terms import DataUnit

log = logging.getLogger(__name__)

BUSY_SECONDS = 60.0
"""How long a process waits for its turn at the file."""
LEDGER_VERSION = 1


@dataclass(frozen=True)
class Budget:
    """The most that may ever be spent on a data set, at `delta`; epsilon None: no limit."""

    epsilon: float | None
    delta: float


@dataclass(frozen=True)
class Reservation:
    """One charge. `attempt` counts the charges under one key, from 1; `mechanism` None: without privacy.

    `fingerprint` says which content the data set had then, for information; `content` is the SHA-256 of the question
    that it was reserved for; None: not noted. `hash` is the entry's own, a name that no other charge has.
    """

    sequence: int
    data_set: str
    key: str
    attempt: int
    federation: str
    run: str
    round: int
    mechanism: NoiseEvent | None
    fingerprint: str | None = None
    content: str | None = None
    hash: str = ""
    public_examples: int | None = None
    """How many units the data set had by declaration; None: they were counted."""
    unit: DataUnit = "example"
    """What was charged for: the mechanism is that of one of these, there or not."""


@dataclass(frozen=True)
class Remaining:
    """What a run has still to be charged when a charge of it is asked for: the whole run is agreed to, or refused."""

    charges: int
    """This one, and all that come after it, of the same mechanism."""
    last: int
    """The number of the run's last round."""
    days: float
    """The agreement holds for so long after each of its charges."""
    partly: bool = False
    """Whether the run may begin though it cannot be paid to its end; then nothing is agreed to."""
    purpose: str = ""
    """What of the run it is; each purpose is agreed to apart."""


@dataclass
class Agreement:
    """That a run will be paid to its end. It charges nothing by itself; what is left of it is not for others to spend.

    It came with the run's first charge, is renewed by each, and ends with its last round, or when it expires.
    """

    mechanism: NoiseEvent
    charges: int
    """Still to come."""
    rounds: int
    """Still to come, by the number of the last charge's round; fewer if the run has passed this site over."""
    last: int
    days: float
    renewed: datetime

    @property
    def outstanding(self) -> NoiseEvent | None:
        """What is still to be charged; None: nothing."""
        count = min(self.charges, self.rounds)
        return replace(self.mechanism, steps=self.mechanism.steps * count) if count > 0 else None

    def holds(self, now: datetime) -> bool:
        """Whether it is good for another charge. By a clock that was set back by more than a day it is not."""
        return self.charges > 0 and -timedelta(days=1) <= now - self.renewed <= timedelta(days=self.days)

    def charge(self, round: int, mechanism: NoiseEvent | None, now: datetime) -> None:
        """Take one charge off. Another mechanism is not what was agreed to: it ends the agreement."""
        self.charges = self.charges - 1 if mechanism == self.mechanism else 0
        self.rounds = max(0, self.last - round)
        self.renewed = now


@dataclass(frozen=True)
class Entry:
    """A line of the ledger as it is stored; `body` has `kind` open, reserve or settle, and what belongs to it."""

    sequence: int
    body: Mapping[str, Any]
    hash: str


@dataclass(frozen=True)
class Loss:
    """That entries were lost, or the whole ledger, and that the site went on at its operator's word."""

    time: str
    reason: str
    """The operator's."""
    problem: str
    """What kept the site from starting."""
    entries: int | None
    """How many entries there had been; None: not known."""
    head: str | None
    """The last head that was known of them."""


@dataclass
class History:
    """The composition of many charges: steps by (sample rate, noise multiplier, family), and if one had no privacy."""

    steps: Counter[tuple[float, float, Family]] = field(default_factory=Counter)
    charges: int = 0
    unbounded: bool = False

    def add(self, mechanism: NoiseEvent | None) -> None:
        """Take up one more charge."""
        self.charges += 1
        if mechanism is None:
            self.unbounded = True
        else:
            self.steps[mechanism.sample_rate, mechanism.noise_multiplier, mechanism.family] += mechanism.steps

    def include(self, other: "History") -> None:
        """Take up all of another history's charges."""
        self.steps.update(other.steps)
        self.charges += other.charges
        self.unbounded |= other.unbounded

    def epsilon(self, delta: float, also: tuple[NoiseEvent | None, ...] = ()) -> float:
        """Epsilon at `delta` of all charges, and of `also`; infinite if one of them had no privacy."""
        further = [mechanism for mechanism in also if mechanism is not None]
        if self.unbounded or len(further) < len(also):
            return math.inf
        return epsilon_of([*self._mechanisms(), *further], delta)

    def _mechanisms(self) -> Iterator[NoiseEvent]:
        return (NoiseEvent(rate, noise, steps, family) for (rate, noise, family), steps in self.steps.items())


def _unit_of(plain: Mapping[str, Any]) -> DataUnit:
    """What an entry charges for; those that do not say it are of an example. Raises ValueError for what is no unit."""
    unit: DataUnit = plain.get("unit", "example")
    if unit not in get_args(DataUnit):
        raise ValueError(f"the unit {unit!r:.40} is not known here")
    return unit


class Index:
    """What the entries say, in memory: follows the chain entry by entry and refuses one that does not fit."""

    def __init__(self) -> None:
        self.sequence = 0
        self.head = GENESIS
        self.identity = ""
        """What the ledger was given when it was begun."""
        self.losses: list[Loss] = []
        self.heads: set[str] = set()
        self.reservations: dict[int, Reservation] = {}
        self.charges: dict[str, int] = {}
        """By a reservation's hash, its sequence."""
        self.open: dict[tuple[str, str], list[int]] = {}
        """Unsettled reservations by data set and key, oldest first; an empty list if all are settled."""
        self.attempts: Counter[tuple[str, str]] = Counter()
        self.lifetimes: dict[str, History] = {}
        self.runs: dict[tuple[str, str, str], History] = {}
        """By data set, federation and run."""
        self.contents: dict[str, str] = {}
        """Fingerprint of each data set when it was last charged."""
        self.declared: dict[str, int | None] = {}
        """How many units each data set that was charged has by declaration; None: they were counted."""
        self.units: dict[str, DataUnit] = {}
        """What each data set was charged for, with noise: all of its charges for the same (`Ledger.check_unit`)."""
        self.owners: dict[str, str] = {}
        """By fingerprint, the data set that was charged for this content."""
        self.times: dict[str, list[str]] = {}
        """When each data set was charged (ISO 8601), each time no earlier than those before it."""
        self.agreements: dict[tuple[str, str, str, str], Agreement] = {}
        """By data set, federation, run and purpose, of runs that were agreed to."""
        self._readers = {"open": self._open, "reserve": self._reserve, "settle": self._settle, "again": self._again}

    def follow(self, sequence: int, body: str, digest: str) -> Entry:
        """Take up the next entry. Raises LedgerError naming it if it is not what the chain demands."""
        if sequence != self.sequence + 1:
            raise LedgerError(f"entry {self.sequence + 1} is missing: the next one has the number {sequence}")
        try:
            if link(self.head, body) != digest:
                raise LedgerError(f"entry {sequence} has been changed: its hash does not match its content")
            plain = json.loads(body)
            if plain["sequence"] != sequence:
                raise LedgerError(f"entry {sequence} says that it is entry {plain['sequence']}")
            self._readers[plain["kind"]](plain, digest)
        except (ValueError, KeyError, TypeError, PrivacyError) as error:
            raise LedgerError(f"entry {sequence} cannot be read: {error}") from error
        self.sequence, self.head = sequence, digest
        self.heads.add(digest)
        return Entry(sequence, plain, digest)

    def _open(self, plain: Mapping[str, Any], _digest: str) -> None:
        if plain["sequence"] != 1 or plain["version"] != LEDGER_VERSION:
            raise ValueError(f"version {plain['version']} is not known here (this is {LEDGER_VERSION})")
        self.identity = str(plain.get("ledger", ""))

    def _again(self, plain: Mapping[str, Any], _digest: str) -> None:
        lost = plain["lost"] or {}
        self.losses.append(
            Loss(plain["time"], plain["reason"], plain["problem"], lost.get("entries"), lost.get("head"))
        )

    def _reserve(self, plain: Mapping[str, Any], digest: str) -> None:
        reservation = Reservation(
            sequence=plain["sequence"],
            data_set=plain["data_set"],
            key=plain["key"],
            attempt=plain["attempt"],
            federation=plain["federation"],
            run=plain["run"],
            round=plain["round"],
            mechanism=event_from_json(plain["mechanism"]),
            fingerprint=plain.get("fingerprint"),
            content=plain.get("content"),
            hash=digest,
            public_examples=plain.get("public_examples"),
            unit=_unit_of(plain),
        )
        self.declared.setdefault(reservation.data_set, reservation.public_examples)
        if reservation.mechanism is not None:
            self.units.setdefault(reservation.data_set, reservation.unit)
        if reservation.fingerprint is not None:
            self.contents[reservation.data_set] = reservation.fingerprint
            self.owners[reservation.fingerprint] = reservation.data_set
        times = self.times.setdefault(reservation.data_set, [])
        times.append(max([str(plain["time"]), *times[-1:]]))
        name = (reservation.data_set, reservation.key)
        self.reservations[reservation.sequence] = reservation
        self.charges[digest] = reservation.sequence
        self.open.setdefault(name, []).append(reservation.sequence)
        self.attempts[name] += 1
        self.lifetimes.setdefault(reservation.data_set, History()).add(reservation.mechanism)
        run = (reservation.data_set, reservation.federation, reservation.run)
        self.runs.setdefault(run, History()).add(reservation.mechanism)
        purpose = (*run, str(plain.get("purpose", "")))
        self._agreed(purpose, reservation, datetime.fromisoformat(plain["time"]), plain.get("agreed"))

    def _agreed(
        self, run: tuple[str, str, str, str], charge: Reservation, now: datetime, terms: Mapping[str, Any] | None
    ) -> None:
        """Take up an agreement that came with `charge`, and take the charge off the one that its run has."""
        if terms is not None and charge.mechanism is not None:
            self.agreements[run] = Agreement(
                charge.mechanism, int(terms["charges"]), 0, int(terms["last"]), float(terms["days"]), now
            )
        if (agreement := self.agreements.get(run)) is not None:
            agreement.charge(charge.round, charge.mechanism, now)
            if agreement.outstanding is None:
                del self.agreements[run]

    def promised(self, data_set: str, now: datetime, *, but: tuple[str, str, str]) -> list[NoiseEvent]:
        """What was agreed to on a data set, but for that federation, run and purpose, and has still to be charged."""
        return [
            outstanding
            for (name, *run), agreement in self.agreements.items()
            if name == data_set and tuple(run) != but and agreement.holds(now)
            if (outstanding := agreement.outstanding) is not None
        ]

    def _settle(self, plain: Mapping[str, Any], _digest: str) -> None:
        settled = self.reservations[plain["reserve"]]
        self.open[settled.data_set, settled.key].remove(settled.sequence)


_KNOWN: dict[tuple[int, ...], tuple[int, ...]] = {}
# By device and inode: what one ledger of this process writes is no foreign hand to another.


def read_ledger(path: Path) -> tuple[tuple[Entry, ...], Index]:
    """All entries of the ledger at `path` and what they say, verified, without writing to it.

    Holds SQLite's shared lock for one read, so a client may be running. Only a write that a crash has cut off is
    undone first, by SQLite, which needs the right to write. Raises LedgerError if there is no ledger, or naming the
    first bad entry.
    """
    where = f"privacy ledger {path}"
    if not path.is_file():
        raise LedgerError(f"{where} does not exist: the site's client makes it when it first starts")
    try:
        with closing(connect_to_read(path)) as connection:
            return follow_all(connection)
    except LedgerError as error:
        raise LedgerError(blocking(where, error)) from error
    except sqlite3.Error as error:
        raise LedgerError(f"{where}: {error}") from error


def blocking(where: str, error: LedgerError) -> str:
    """The error's text, once with `where` before it and what to do behind it."""
    text = str(error)
    if text.startswith(where):
        return text
    return f"{where}: {text}; do not train on until it is explained or a backup is restored"


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A new connection, which sees the file as it is now; read-only unless a cut-off write has to be undone."""
    try:
        return _connect(path, "ro")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
    return _connect(path, "rw")


def follow_all(connection: sqlite3.Connection) -> tuple[tuple[Entry, ...], Index]:
    """Read and check every entry. Raises LedgerError naming the first bad one."""
    # One statement, so that both are of the same moment.
    rows = connection.execute(
        "SELECT sequence, body, hash, (SELECT seq FROM sqlite_sequence WHERE name = 'entries') "
        "FROM entries ORDER BY sequence"
    ).fetchall()
    index = Index()
    entries = tuple(index.follow(*row[:3]) for row in rows)
    if not rows or rows[-1][3] != index.sequence:
        raise LedgerError(f"entries after {index.sequence} were removed from its end")
    return entries, index


def make_private(path: Path) -> None:
    """Create `path` with mode 0600, or take everybody else's rights away. SQLite's journal inherits the mode.

    Raises LedgerError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, PRIVATE_MODE))
        if path.stat().st_mode & 0o077:
            log.warning("privacy ledger %s was open to others; its mode is now 0600", path)
            path.chmod(PRIVATE_MODE)
    except OSError as error:
        raise LedgerError(f"privacy ledger {path} cannot be written: {error.strerror}") from error


class FileWatch:
    """Tells whether somebody else has touched a file. SQLite alone goes on with one that was renamed or removed."""

    def __init__(self, path: Path) -> None:
        """Begin with the file that is at `path` now. Raises LedgerError if there is none."""
        self._path = path
        self._file = self._status()[:2]
        self.known = self.look()

    @property
    def known(self) -> tuple[int, ...]:
        """What `look` returned when the file was last read or written by this process, through whichever watch."""
        return _KNOWN[self._file]

    @known.setter
    def known(self, seen: tuple[int, ...]) -> None:
        _KNOWN[self._file] = seen

    def look(self) -> tuple[int, ...]:
        """The file's size and times. Raises LedgerError if it is gone, or another file has its name."""
        device, inode, *touched = self._status()
        if (device, inode) != self._file:
            raise LedgerError("another file was put in its place while it was in use")
        return tuple(touched)

    def _status(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise LedgerError(f"the file cannot be found any more: {error.strerror}") from error
        # The change time cannot be set by hand, as the modification time can.
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None
    )
    try:
        # Undoes a cut-off write, if there is one, or says that it may not.
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except UnicodeDecodeError as error:
        # SQLite's message of a damaged schema quotes bytes of it, which Python takes for text.
        connection.close()
        raise sqlite3.DatabaseError("malformed database schema") from error
    except BaseException:
        connection.close()
        raise
    return connection
