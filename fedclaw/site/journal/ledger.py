"""What has been spent on a site's data, over all runs and federations, for ever.

An append-only list of entries in one SQLite file, hash-chained (`fedclaw.protocol.chain`). Before training, the round's
mechanism is *reserved*; when its result leaves, the reservation is *settled*. Open reservations count as spent, so a
crash between the two, at whatever instruction, can only over-count. A reservation is for one question: run, round,
attempt and content. One that is still open when the very same question is asked again is taken up again, because
nothing of it has left the site, nor stays there; any other question is charged, whatever its message is called.

A run is agreed to as a whole, or refused, before its first charge: the agreement is part of that charge's entry, and
what is still to come of it is kept free of others until the run ends or the agreement expires.

Durability. A rollback journal with synchronous=EXTRA: when `reserve` returns, the entry survives a power cut. Not
WAL: it would need shared memory (no network file systems) and leave part of the ledger in a second file that a backup
forgets; a commit a round costs nothing. BEGIN IMMEDIATE serialises processes: the budget is checked under the
same lock under which the entry is written.

Tampering. Every entry that is read is checked against the chain; opening reads all of them (ten thousand entries take
under a second), and so does every use after somebody else has touched the file, past SQLite's cache. A changed,
removed or inserted entry is named. A file that is exchanged under a running process is found by its inode. Entries
cut off the end, or an old copy put back while nobody looks, leave a valid chain: `index().heads` tells whether a head
that was handed out earlier is still in it, and the outbound log keeps every head that left
(`fedclaw.site.journal.reconciliation`).

Reading. `fedclaw.site.journal.history.read_ledger` needs no right to write and holds no lock for longer than one
read, so the ledger of a running client can be looked at.

A data set is a name that the operator gave, not the bytes of a file: a nightly export changes the bytes and keeps
the people. The fingerprint of the content is noted with each charge, so that an auditor sees when it changed, and
the very content that was charged under one name is not opened under another.

How many units a data set has by its operator's declaration (`data.public_examples` in site.yaml) is noted with each
charge, and stays for the data set's life (`check_declared`). So does what it is charged for, an example or a person
(`check_unit`).

Times are written for people; no budget depends on them, only how often a site lets itself be asked
(`fedclaw.site.privacy_budget`), which trusts the entries' order more than their times.
"""

import logging
import math
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import JsonValue

from fedclaw.errors import BudgetExceeded, LedgerError
from fedclaw.privacy.accounting import NoiseEvent, event_to_json
from fedclaw.protocol.chain import GENESIS, canonical, link
from fedclaw.protocol.terms import DataUnit
from fedclaw.site.journal.history import (
    BUSY_SECONDS,
    LEDGER_VERSION,
    Budget,
    Entry,
    FileWatch,
    History,
    Index,
    Remaining,
    Reservation,
    blocking,
    connect_to_read,
    follow_all,
    make_private,
)
from fedclaw.site.policy.policy import TEST

__all__ = ["Budget", "Entry", "Ledger", "Remaining", "Reservation", "describe"]

log = logging.getLogger(__name__)

_MEMORY = ":memory:"
_SCHEMAS: dict[DataUnit, str] = {"example": "without person:", "person": "with person:"}
MOST_AGREEMENTS = 16
"""Unfinished runs that are agreed to on one data set: nobody can fill the ledger with promises."""
_SCHEMA = (
    # AUTOINCREMENT remembers the largest number ever given, which shows a careless cut at the end.
    """CREATE TABLE IF NOT EXISTS entries (
           sequence INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL, hash TEXT NOT NULL) STRICT""",
    """CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entries
           BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entries
           BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
)


Witness = Callable[[Index], None]
"""Keeps, apart from the ledger's file, the head of a ledger that has just been charged, durably. Raises LedgerError."""


class Ledger:
    """The ledger file, seen from one data set. Safe for use by several threads and several processes at once."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path | str,
        data_set: str,
        fingerprint: str | None,
        public_examples: int | None,
    ) -> None:
        """Use `open`."""
        self._connection = connection
        self._path = path
        self._data_set = data_set
        self._fingerprint = fingerprint
        self._public_examples = public_examples
        self._lock = threading.RLock()
        self._index = Index()
        self._committed = (0, GENESIS)
        self._ahead = False
        self._watch: FileWatch | None = None
        """None: not on disk."""
        self.witness: Witness | None = None
        """Is told of every charge."""

    @classmethod
    def open(
        cls, path: Path | str, data_set: str, fingerprint: str | None = None, public_examples: int | None = None
    ) -> Self:
        """Open or begin the ledger at `path` (":memory:" for a simulation) for the data set of that name.

        `fingerprint` is of its present content; that it is another than at the last charge is logged. `public_examples`
        is the declared number of its units, None: they are counted; it is charged beside no other (`check_declared`).
        The file gets mode 0600. Raises LedgerError if it is damaged, tampered with or cannot be written, or if this
        content was charged under another name.
        """
        if str(path) != _MEMORY:
            make_private(Path(path))
        try:
            connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise LedgerError(f"privacy ledger {path}: {error}") from error
        ledger = cls(connection, path, data_set, fingerprint, public_examples)
        try:
            if str(path) != _MEMORY:
                ledger._watch = FileWatch(Path(path))
            ledger._begin_file()
            ledger.verify()
            ledger._compare_content()
        except BaseException:
            connection.close()
            raise
        return ledger

    @classmethod
    def copied(
        cls, path: Path, data_set: str, fingerprint: str | None = None, public_examples: int | None = None
    ) -> Self:
        """The ledger at `path` as it is now, in memory: what is charged to it is charged to the copy alone.

        Raises LedgerError as `open` does.
        """
        connection = sqlite3.connect(_MEMORY, isolation_level=None, check_same_thread=False)
        ledger = cls(connection, path, data_set, fingerprint, public_examples)
        try:
            with closing(connect_to_read(path)) as disk:
                disk.backup(connection)
            ledger.verify()
            ledger._compare_content()
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite3.Error):
                raise LedgerError(f"privacy ledger {path}: {error}") from error
            raise
        return ledger

    @property
    def data_set(self) -> str:
        """The data set that this one is charged for."""
        return self._data_set

    def check_declared(self, data_set: str, public_examples: int | None) -> None:
        """Raise LedgerError if `data_set` was charged beside another number of units than `public_examples`, or beside
        the true one where this is declared, or the other way about.

        From counted to declared, the data set's charges would be called add-or-remove, and the true number left with
        the earlier ones. From declared to counted, it would leave now, and undo what the earlier ones promised. From
        one declared number to another nothing is lost if neither has to do with the data; nobody can see that it has
        not, and what makes an operator think again is mostly that the first one turned out wrong.
        """
        with self._reading():
            self._check_declared(data_set, public_examples)

    def check_unit(self, unit: DataUnit) -> None:
        """Raise LedgerError if the data set was charged for another unit, with noise.

        What was spent on one says nothing of the other. A person with several rows lost more by each charge for a row,
        how much more depends on how many rows there were at the time; and a row that goes, in place of its whole
        person, moves a clipped sum by up to twice the bound. Training without privacy counts as unbounded for either.
        """
        with self._reading():
            self._check_unit(unit)

    def reserve(
        self,
        key: str,
        federation: str,
        run: str,
        round: int,
        mechanism: NoiseEvent | None,
        budget: Budget,
        run_budget: Budget | None = None,
        content: str | None = None,
        remaining: Remaining | None = None,
        unit: DataUnit = "example",
    ) -> Reservation:
        """Charge `mechanism` (None: training without privacy) before any of it is done; durable on return.

        `mechanism` is for one `unit` of the data set. `content` is the SHA-256 of the question. An open reservation
        under the same key for the same question about the same data is taken up again at no cost. A settled key, or
        another run, round, mechanism or content under the same key, is charged anew. Raises BudgetExceeded, with the
        figures, if everything ever charged to the data set and this would together exceed `budget`, or everything
        charged by this run and this exceed `run_budget`; LedgerError if the ledger is damaged, or counts another unit
        of the data set.

        With `remaining`, the whole run is agreed to with its first charge, or refused: what is still to come of it and
        of all other runs that were agreed to has to be within the budget, too. The agreement is part of the charge.
        """
        with self._writing():
            self._check_declared(self._data_set, self._public_examples)
            self._check_unit(unit)
            if (waiting := self._waiting(key, federation, run, round, mechanism, content)) is not None:
                return waiting
            agreed = self._check_budgets(federation, run, mechanism, budget, run_budget, remaining)
            entry = self._append(
                kind="reserve",
                data_set=self._data_set,
                key=key,
                attempt=self._index.attempts[self._data_set, key] + 1,
                federation=federation,
                run=run,
                round=round,
                mechanism=event_to_json(mechanism),
                **({} if self._fingerprint is None else {"fingerprint": self._fingerprint}),
                **({} if content is None else {"content": content}),
                **({} if self._public_examples is None else {"public_examples": self._public_examples}),
                **({} if unit == "example" else {"unit": unit}),
                **({} if agreed is None else {"agreed": agreed}),
                **({"purpose": remaining.purpose} if remaining is not None and remaining.purpose else {}),
            )
            reservation = self._index.reservations[entry.sequence]
        self._tell()
        return reservation

    def begin_again(self, reason: str, problem: str, lost: JsonValue) -> None:
        """Note that the site goes on at its operator's word though entries are lost, and what is known of them."""
        with self._writing():
            self._append(kind="again", reason=reason, problem=problem, lost=lost)
        self._tell()

    def check_budgets(
        self,
        federation: str,
        run: str,
        mechanism: NoiseEvent | None,
        budget: Budget,
        run_budget: Budget | None = None,
        remaining: Remaining | None = None,
    ) -> None:
        """Raise BudgetExceeded where `reserve` would, and write nothing."""
        with self._reading():
            self._check_budgets(federation, run, mechanism, budget, run_budget, remaining)

    def is_waiting(
        self,
        key: str,
        federation: str,
        run: str,
        round: int,
        mechanism: NoiseEvent | None,
        content: str | None = None,
    ) -> bool:
        """Whether `reserve` would take up a reservation that is open for this very question."""
        with self._reading():
            return self._waiting(key, federation, run, round, mechanism, content) is not None

    def settle(self, key: str, charge: str | None = None) -> None:
        """Note, before its result leaves, that a reservation of `key` has been used.

        It is the one whose hash is `charge`; None: the newest open one. Does nothing if it is settled already (the same
        result is sent again). The result may be older than the present content, or than the data set's present name.
        Raises LedgerError if nothing was ever reserved under `key`, or not that.
        """
        with self._writing():
            if charge is not None:
                self._settle(key, charge)
                return
            waiting = self._index.open.get((self._data_set, key))
            if waiting is None:
                waiting = next((found for (_, name), found in self._index.open.items() if name == key), None)
            if waiting:
                self._append(kind="settle", reserve=waiting[-1])
            elif waiting is None:
                raise LedgerError(f"{self._where()}: nothing is reserved under {key!r}, so it cannot be settled")

    def settle_unanswered(self, key: str) -> list[str]:
        """Settle all that is open under `key`, of whatever data set: the site is about to say that it failed.

        That it failed may tell of the data, so the next attempt is charged anew. Returns the hashes of the charges.
        """
        with self._reading():
            if not self._open_under(key):
                return []
        with self._writing():
            found = self._open_under(key)
            for sequence in found:
                self._append(kind="settle", reserve=sequence)
        return [self._index.reservations[sequence].hash for sequence in found]

    def spent(self, delta: float, run: str | None = None, federation: str | None = None) -> float:
        """Epsilon at `delta` of everything charged to this data set, open reservations included; maybe infinite.

        `run` and `federation` narrow it to what they name.
        """
        with self._reading():
            if run is None and federation is None:
                return self._index.lifetimes.get(self._data_set, History()).epsilon(delta)
            total = History()
            for history in self._runs(run, federation):
                total.include(history)
            return total.epsilon(delta)

    def rounds(self, run: str, federation: str | None = None) -> int:
        """Charges to this data set by `run`: one a round, and one more for a round that was released twice."""
        with self._reading():
            return sum(history.charges for history in self._runs(run, federation))

    def charge_times(self, last: int) -> list[str]:
        """When the data set was charged the `last` times, in order, each time no earlier than those before it."""
        with self._reading():
            return self._index.times.get(self._data_set, [])[-last:]

    def head(self) -> str:
        """The hash of the newest entry, of whatever data set."""
        with self._reading():
            return self._index.head

    def index(self) -> Index:
        """What the entries say; the ledger's own, so to be read at once and not changed."""
        with self._reading():
            return self._index

    def losses(self) -> int:
        """How often it was gone on with though entries were lost."""
        with self._reading():
            return len(self._index.losses)

    def entries(self) -> tuple[Entry, ...]:
        """All entries, of all data sets, verified."""
        with self._reading():
            return self._verified()[0]

    def verify(self) -> None:
        """Read the whole file again and walk the chain. Raises LedgerError naming the first bad entry."""
        with self._transaction("BEGIN"):
            self._index = self._verified()[1]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin_file(self) -> None:
        with self._transaction("BEGIN IMMEDIATE", pragmas=True):
            for statement in _SCHEMA:
                self._connection.execute(statement)
            if self._connection.execute("SELECT count(*) FROM entries").fetchone() == (0,):
                self._append(kind="open", version=LEDGER_VERSION, ledger=secrets.token_hex(16))

    def _compare_content(self) -> None:
        """Refuse content that has been charged under another name; say so when the data set's content is new."""
        if self._fingerprint is None:
            return
        owner = self._index.owners.get(self._fingerprint, self._data_set)
        if owner != self._data_set:
            raise LedgerError(
                f"{self._where()}: the training data (SHA-256 {self._fingerprint}) has been charged as the data set "
                f"{owner!r}, so its budget cannot begin again as {self._data_set!r}; write data.name: {owner} into "
                "site.yaml"
            )
        before = self._index.contents.get(self._data_set, self._fingerprint)
        if before != self._fingerprint:
            log.warning(
                "the content of data set %s has changed since it was last charged (SHA-256 %.16s, then %.16s); its "
                "privacy budget goes on. Data on other people needs a data.name of its own in site.yaml",
                *(self._data_set, before, self._fingerprint),
            )

    def _check_declared(self, data_set: str, public_examples: int | None) -> None:
        before = self._index.declared.get(data_set, public_examples)
        if before == public_examples:
            return
        own = "public_test_examples" if data_set.endswith(TEST) else "public_examples"
        now = f"{own}: {public_examples}" if public_examples is not None else f"no {own}"
        if before is None:
            problem, remedy = "their true number, which left with the charges", f"take data.{own} out of site.yaml"
        else:
            problem, remedy = f"{own}: {before}", f"put data.{own}: {before} back into site.yaml"
        raise LedgerError(
            f"{self._where()}: the data set {data_set!r} was charged beside {problem}, and site.yaml has {now}. The "
            "number is fixed for a data set's life: a second one would be chosen by looking at the data, and a number "
            f"that has left cannot be taken back. So {remedy}; only data on other people gets another data.name, with "
            "a budget and a number of its own"
        )

    def _check_unit(self, unit: DataUnit) -> None:
        before = self._index.units.get(self._data_set, unit)
        if before != unit:
            raise LedgerError(
                f"{self._where()}: the data set {self._data_set!r} was charged for each {before}, and by the schema it "
                f"is to be charged for each {unit}: neither says what was spent on the other, so its budget cannot go "
                f"on. Keep to a schema {_SCHEMAS[before]} for this data; only data on other people gets another "
                "data.name in site.yaml, with a budget of its own"
            )

    def _check_budgets(
        self,
        federation: str,
        run: str,
        mechanism: NoiseEvent | None,
        budget: Budget,
        run_budget: Budget | None,
        remaining: Remaining | None,
    ) -> JsonValue:
        """Raise BudgetExceeded if the charge is too much; else what it agrees to, None: nothing new."""
        now = datetime.now(UTC)
        purpose = remaining.purpose if remaining is not None else ""
        promised = self._index.promised(self._data_set, now, but=(federation, run, purpose))
        agreement = self._index.agreements.get((self._data_set, federation, run, purpose))
        is_agreed = agreement is not None and agreement.mechanism == mechanism and agreement.holds(now)
        asked, what, charges = mechanism, "the round", 1
        if remaining is not None and mechanism is not None and not is_agreed and not remaining.partly:
            charges = remaining.charges
            asked = replace(mechanism, steps=mechanism.steps * charges)
            what = f"the whole run, {charges} round(s) from here," if charges > 1 else what
        lifetime = self._index.lifetimes.get(self._data_set, History())
        _check_budget("on this data set", lifetime, what, asked, budget, promised)
        limits = [budget.epsilon]
        if run_budget is not None:
            spent_by_run = self._index.runs.get((self._data_set, federation, run), History())
            _check_budget("by this run", spent_by_run, what, asked, run_budget, [])
            limits.append(run_budget.epsilon)
        if remaining is None or charges == 1 or limits == [None] * len(limits):
            return None
        if len(promised) >= MOST_AGREEMENTS:
            raise BudgetExceeded(
                f"privacy budget: {len(promised)} runs that are not finished are agreed to on this data set; another "
                "waits until one of them ends or its agreement expires"
            )
        return {"charges": charges, "last": remaining.last, "days": remaining.days}

    def _waiting(
        self, key: str, federation: str, run: str, round: int, mechanism: NoiseEvent | None, content: str | None
    ) -> Reservation | None:
        asked = (federation, run, round, mechanism, self._fingerprint, content)
        for sequence in self._index.open.get((self._data_set, key), []):
            one = self._index.reservations[sequence]
            if asked == (one.federation, one.run, one.round, one.mechanism, one.fingerprint, one.content):
                return one
        return None

    def _tell(self) -> None:
        with self._lock:
            # Empty only after a failed write of another thread, whose entry it is to tell.
            if self.witness is not None and self._index.sequence:
                self.witness(self._index)

    def _settle(self, key: str, charge: str) -> None:
        sequence = self._index.charges.get(charge, 0)
        reservation = self._index.reservations.get(sequence)
        if reservation is None or reservation.key != key:
            raise LedgerError(f"{self._where()}: {key!r} was not charged as {charge:.16}, so it cannot be settled")
        if sequence in self._index.open[reservation.data_set, key]:
            self._append(kind="settle", reserve=sequence)

    def _open_under(self, key: str) -> list[int]:
        return [number for (_, name), waiting in self._index.open.items() if name == key for number in waiting]

    def _runs(self, run: str | None, federation: str | None) -> list[History]:
        return [
            history
            for (data_set, of_federation, of_run), history in self._index.runs.items()
            if data_set == self._data_set and run in (None, of_run) and federation in (None, of_federation)
        ]

    def _append(self, **fields: JsonValue) -> Entry:
        """Write the next entry; inside a transaction, with the index caught up."""
        sequence = self._index.sequence + 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        body = canonical({**fields, "sequence": sequence, "time": now})
        digest = link(self._index.head, body)
        self._ahead = True
        self._connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (sequence, body, digest))
        return self._index.follow(sequence, body, digest)

    def _check_file(self) -> None:
        """Read all of it again if somebody else has touched it; inside a transaction."""
        if self._watch is not None and (now := self._watch.look()) != self._watch.known and self._index.sequence:
            self._index = self._verified()[1]
            self._watch.known = now

    def _catch_up(self) -> None:
        """Follow what other processes have written since; inside a transaction."""
        self._check_file()
        rows = self._connection.execute(
            "SELECT sequence, body, hash FROM entries WHERE sequence >= ? ORDER BY sequence",
            (max(1, self._index.sequence),),
        ).fetchall()
        if self._index.sequence and (not rows or rows.pop(0)[2] != self._index.head):
            raise LedgerError(f"entry {self._index.sequence}, which this process has seen, was changed or removed")
        for row in rows:
            self._index.follow(*row)
        self._check_committed(self._index)

    def _verified(self) -> tuple[tuple[Entry, ...], Index]:
        """Everything in the file, past this connection's cache."""
        if self._watch is None:
            entries, index = follow_all(self._connection)
        else:
            self._watch.look()
            with closing(connect_to_read(Path(self._path))) as connection:
                entries, index = follow_all(connection)
        self._check_committed(index)
        return entries, index

    def _check_committed(self, index: Index) -> None:
        sequence, head = self._committed
        if sequence and head not in index.heads:
            raise LedgerError(f"entry {sequence}, which this process has seen, was changed or removed")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._transaction("BEGIN IMMEDIATE"):
            self._catch_up()
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._transaction("BEGIN"):
            self._catch_up()
            yield

    @contextmanager
    def _transaction(self, begin: str, pragmas: bool = False) -> Iterator[None]:
        """All or nothing, on disk and in the index; every failure that is not a LedgerError becomes one."""
        with self._lock:
            try:
                if pragmas:
                    self._connection.execute("PRAGMA journal_mode = DELETE")
                    self._connection.execute("PRAGMA synchronous = EXTRA")
                self._connection.execute(begin)
                try:
                    yield
                    wrote = self._ahead
                    self._connection.execute("COMMIT")
                    self._committed, self._ahead = (self._index.sequence, self._index.head), False
                    if wrote and self._watch is not None:
                        self._watch.known = self._watch.look()
                except BaseException:
                    self._undo()
                    raise
            except BudgetExceeded:
                raise
            except LedgerError as error:
                raise LedgerError(blocking(self._where(), error)) from error
            except sqlite3.Error as error:
                raise LedgerError(f"{self._where()}: {error}") from error

    def _undo(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        if self._ahead:
            # The index holds an entry that the file does not: read it afresh at the next use.
            self._index, self._ahead = Index(), False

    def _where(self) -> str:
        return f"privacy ledger {self._path}"


def describe(mechanism: NoiseEvent | None) -> str:
    """A mechanism in words, as it stands in messages to the site's operator."""
    if mechanism is None:
        return "training without privacy"
    steps = "1 step" if mechanism.steps == 1 else f"{mechanism.steps} steps"
    return f"{steps} at sample rate {mechanism.sample_rate:.4g} with noise multiplier {mechanism.noise_multiplier:.4g}"


def _check_budget(
    where: str,
    history: History,
    what: str,
    mechanism: NoiseEvent | None,
    budget: Budget,
    promised: list[NoiseEvent],
) -> None:
    if budget.epsilon is None:
        return
    after = history.epsilon(budget.delta, also=(mechanism, *promised))
    if after > budget.epsilon:
        before = history.epsilon(budget.delta)
        beside = f" beside {len(promised)} unfinished run(s) that are agreed to" if promised else ""
        raise BudgetExceeded(
            f"privacy budget: {_figure(before)} of epsilon {budget.epsilon:g} (delta {budget.delta:g}) is spent "
            f"{where}; {what} asked for {describe(mechanism)}, which would make it {_figure(after)}{beside}"
        )


def _figure(epsilon: float) -> str:
    return "an unbounded amount" if math.isinf(epsilon) else f"{epsilon:.4g}"
