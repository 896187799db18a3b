"""What the entries of a ledger say when they are read in order: reservations, and what they cost together."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from fedclaw.errors import LedgerError, PrivacyError
from fedclaw.privacy.accounting import Family, NoiseEvent, epsilon_of, event_from_json
from fedclaw.protocol.chain import GENESIS, link

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
        )
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
