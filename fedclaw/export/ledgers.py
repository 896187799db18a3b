"""A site's ledger that is at hand, held against what a receipt says of it.

A receipt names the head that its site's ledger had; the ledger, up to the entry of that head, says what the run had
been charged by then. So whoever is shown a ledger can check every figure of the receipt, though the ledger has grown
since. At hand is a site's directory, its ledger's file alone, or what `python -m fedclaw.ledger show json=true
entries=true` printed of it.
"""

import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedclaw.errors import LedgerError, UsageError
from fedclaw.protocol.chain import canonical
from fedclaw.protocol.terms import DataUnit
from fedclaw.site.journal.history import Entry, History, Index, connect_to_read, follow_all
from fedclaw.site.journal.reconciliation import SiteJournal, check_journal, open_journal
from fedclaw.site.policy.policy import TEST

_SQLITE = b"SQLite format 3\0"
LARGEST = 256 << 20
"""Bytes of a printed ledger that are read."""
SAME = 0.01
"""How much, relatively, two versions' accountants may differ: grids differ by some tenths of a per cent."""


@dataclass(frozen=True)
class Claimed:
    """What a receipt says of its site's ledger."""

    site: str
    federation: str
    run: str
    head: str
    charges: int
    epsilon: float | None
    """Of the run, at `delta`; None: unbounded."""
    delta: float
    unit: DataUnit
    answers: int | None
    """Rounds of the run that the site's answers are in; None: not known."""


@dataclass(frozen=True)
class FoundInLedger:
    """What the ledger says of the run at the receipt's head."""

    sequence: int
    """Of the head's entry."""
    time: str
    charges: int
    epsilon: float
    fingerprints: tuple[str, ...]
    """SHA-256 of each content that the run was charged for."""
    open: int
    """Charges of the run up to there that are still not settled in the newest entry at hand: counted as spent."""


@dataclass(frozen=True)
class HeldLedger:
    """A ledger at hand, whole by its own chain."""

    path: Path
    site: str | None
    """As its site.yaml says; None: the file does not say whose it is."""
    entries: tuple[Entry, ...]
    index: Index
    journal: SiteJournal | None = None
    """The site's policy and outbound log, where its directory is at hand."""

    @classmethod
    def read(cls, path: Path) -> "HeldLedger":
        """Raises LedgerError for one that is damaged or lacks what left its site, UsageError for what is no ledger."""
        if path.is_dir():
            journal = open_journal(path)
            check_journal(journal)
            return cls(path, journal.settings.name, journal.entries, journal.index, journal)
        try:
            with path.open("rb") as file:
                start = file.read(LARGEST + 1)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        if start.startswith(_SQLITE):
            return cls(path, None, *_of_file(path))
        if len(start) > LARGEST:
            raise UsageError(f"{path} is larger than {LARGEST >> 20} MB: it is no printed ledger")
        return cls(path, None, *_of_print(path, start))

    def has(self, head: str) -> bool:
        """Whether the ledger ever had this head."""
        return head in self.index.heads

    def find(self, claimed: Claimed) -> FoundInLedger:
        """What it says where the receipt was given. Raises LedgerError for each contradiction, in a sentence."""
        if not self.has(claimed.head):
            raise LedgerError(
                f"{self.path}: the head {claimed.head[:16]}… that {claimed.site} gave for run {claimed.run} is not in "
                f"this ledger of {self.index.sequence} entries: it is another ledger, entries were cut off it, or an "
                "old copy was put back"
            )
        then = self._until(claimed.head)
        runs = [name for name in then.runs if name[1:] == (claimed.federation, claimed.run) and not _is_test(name[0])]
        spent = History()
        for name in runs:
            spent.include(then.runs[name])
        charged = list(self._charges(claimed, then.sequence))
        waiting = {sequence for waiting in self.index.open.values() for sequence in waiting}
        found = FoundInLedger(
            sequence=then.sequence,
            time=str(self.entries[then.sequence - 1].body.get("time", "at no time that it says")),
            charges=spent.charges,
            epsilon=spent.epsilon(claimed.delta) if spent.charges and 0 < claimed.delta < 1 else _unbounded(spent),
            fingerprints=tuple(dict.fromkeys(one.fingerprint for one in charged if one.fingerprint is not None)),
            open=len(waiting.intersection(one.sequence for one in charged)),
        )
        if wrong := "; ".join(_contradictions(claimed, found, {one.unit for one in charged if one.mechanism})):
            raise LedgerError(
                f"{self.path}: {claimed.site}'s receipt for run {claimed.run} is not what it has: {wrong}"
            )
        return found

    def over_budget(self, federation: str, run: str) -> str | None:
        """A sentence about a data set of that run on which more is spent than the site's policy allows; None: there is
        none, or no policy is at hand."""
        if self.journal is None:
            return None
        for item in self.journal.spending().data_sets:
            if item.run(run, federation) and item.budget.epsilon is not None and item.epsilon > item.budget.epsilon:
                return (
                    f"{self.path}: on data set {item.name} epsilon {item.epsilon:.4g} is spent of a budget of "
                    f"{item.budget.epsilon:g}"
                )
        return None

    def _until(self, head: str) -> Index:
        index = Index()
        for entry in self.entries:
            index.follow(entry.sequence, canonical(dict(entry.body)), entry.hash)
            if entry.hash == head:
                break
        return index

    def _charges(self, claimed: Claimed, last: int) -> Iterator[Any]:
        for reservation in self.index.reservations.values():
            if (reservation.federation, reservation.run) == (claimed.federation, claimed.run) and (
                reservation.sequence <= last and not _is_test(reservation.data_set)
            ):
                yield reservation


def _contradictions(claimed: Claimed, found: FoundInLedger, units: set[DataUnit]) -> Iterator[str]:
    if found.charges != claimed.charges:
        yield f"{claimed.charges} charges are claimed, and it has {found.charges}"
    epsilon = math.inf if claimed.epsilon is None else claimed.epsilon
    if not (math.isclose(epsilon, found.epsilon, rel_tol=SAME) or epsilon == found.epsilon):
        yield f"epsilon {_epsilon(epsilon)} is claimed, and its charges come to {_epsilon(found.epsilon)}"
    if units - {claimed.unit}:
        yield f"the unit {claimed.unit} is claimed, and it was charged for {' and '.join(sorted(units))}"
    answers = claimed.answers or 0
    if found.charges - found.open < answers:
        yield (
            f"{answers} answers are in the model, and only {found.charges - found.open} of its charges are settled: an "
            "answer that leaves is settled first"
        )


def _unbounded(spent: History) -> float:
    """At no delta: nothing, or without bound."""
    return math.inf if spent.charges else 0.0


def _epsilon(value: float) -> str:
    return "without bound" if math.isinf(value) else f"{value:.4g}"


def _is_test(data_set: str) -> bool:
    """Whether it is test data, which evaluations are charged to."""
    return data_set.endswith(TEST)


def _of_file(path: Path) -> tuple[tuple[Entry, ...], Index]:
    try:
        with closing(connect_to_read(path)) as connection:
            return follow_all(connection)
    except (LedgerError, sqlite3.Error) as error:
        raise LedgerError(f"{path}: {error}") from error


def _of_print(path: Path, content: bytes) -> tuple[tuple[Entry, ...], Index]:
    try:
        plain = json.loads(content)
        chain, head, problem = plain["chain"], plain["head"], plain.get("problem")
        lines = [(int(line["sequence"]), canonical(line["body"]), str(line["hash"])) for line in chain]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(
            f"{path} is no ledger: give a site's directory, its ledger's file, or what "
            "python -m fedclaw.ledger show json=true entries=true printed of it"
        ) from error
    if problem:
        raise LedgerError(f"{path}: its site said when it printed it: {str(problem)[:300]}")
    index = Index()
    try:
        entries = tuple(index.follow(*line) for line in lines)
    except LedgerError as error:
        raise LedgerError(f"{path}: {error}") from error
    if index.head != head:
        raise LedgerError(f"{path}: it ends with the head {index.head[:16]}… and says {str(head)[:16]}…")
    return entries, index
