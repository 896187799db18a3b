"""What a ledger says was spent: on which data set, by which run, when, and what is left of the budget.

Epsilons are those of `fedclaw.site.journal.history`, which the ledger itself checks budgets by. Those of several runs
do not add up to that of the data set: composed together they cost less than the sum.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.protocol.terms import DataUnit
from fedclaw.site.journal.history import Budget, Entry, History, Index, Reservation

BudgetOf = Callable[[str], Budget]
"""A data set's budget, by its name."""


@dataclass(frozen=True)
class RunSpending:
    """What one run of one federation was charged on one data set."""

    federation: str
    run: str
    rounds: int
    """Different rounds."""
    charges: int
    """As many as rounds, and one more for each round that was charged again."""
    open: int
    """Charges whose result has not left (yet): they count as spent."""
    first: str
    """Time of the first charge, ISO 8601, by the site's clock; in the ledger's order, whatever the clock did."""
    last: str
    epsilon: float
    """Of this run alone, at the budget's delta; infinite if a round had no differential privacy."""
    mechanisms: tuple[NoiseEvent | None, ...]
    """What was charged, equal mechanisms as one with all their steps; None: without privacy."""


@dataclass(frozen=True)
class ContentUse:
    """One content that a data set had, by its SHA-256 (None: not noted), and the charges that name it."""

    fingerprint: str | None
    charges: int
    first: str
    last: str


@dataclass(frozen=True)
class DataSetSpending:
    """One data set: its budget and all that was ever charged to it, by all runs and federations."""

    name: str
    budget: Budget
    epsilon: float
    """Of all charges together, at the budget's delta; maybe infinite."""
    runs: tuple[RunSpending, ...]
    """In the order of their first charge."""
    contents: tuple[ContentUse, ...]
    unit: DataUnit | None = None
    """What all of it is for, there or not; None: nothing was charged with noise."""

    @property
    def left(self) -> float | None:
        """Epsilon that may still be spent, at least 0; None: no limit is set."""
        return None if self.budget.epsilon is None else max(0.0, self.budget.epsilon - self.epsilon)

    @property
    def rounds(self) -> int:
        """Rounds of all runs."""
        return sum(run.rounds for run in self.runs)

    @property
    def charges(self) -> int:
        """Charges of all runs."""
        return sum(run.charges for run in self.runs)

    @property
    def open(self) -> int:
        """Open reservations of all runs."""
        return sum(run.open for run in self.runs)

    def run(self, name: str, federation: str) -> RunSpending | None:
        """The run of that name, if it was charged anything."""
        return next((run for run in self.runs if (run.run, run.federation) == (name, federation)), None)


@dataclass(frozen=True)
class Spending:
    """A ledger at one moment."""

    ledger: str
    """The identity that the ledger was given when it was begun."""
    head: str
    entries: int
    data_sets: tuple[DataSetSpending, ...]

    def data_set(self, name: str) -> DataSetSpending:
        """The data set of that name. Raises KeyError if it was neither charged nor asked for."""
        return {item.name: item for item in self.data_sets}[name]


@dataclass(frozen=True)
class Point:
    """Epsilon of a data set after its `charges`-th charge, which was at `time`."""

    time: str
    charges: int
    epsilon: float


def spending_of(entries: Sequence[Entry], index: Index, budget_of: BudgetOf, also: Iterable[str] = ()) -> Spending:
    """What these entries of one ledger say; `also` names data sets to list uncharged."""
    charges = [LedgerCharge.of(entry, index) for entry in entries if entry.sequence in index.reservations]
    names = dict.fromkeys([*(charge.reservation.data_set for charge in charges), *also])
    return Spending(
        ledger=str(entries[0].body.get("ledger", "")),
        head=index.head,
        entries=len(entries),
        data_sets=tuple(_data_set(name, charges, index, budget_of(name)) for name in names),
    )


def epsilon_over_time(entries: Sequence[Entry], index: Index, data_set: str, delta: float, most: int) -> list[Point]:
    """Epsilon at `delta` after at most `most` of a data set's charges, evenly chosen, the first and last among them.

    Never falls, though the accountant's rounding could let it by some tenths of a per cent.
    """
    charges = [
        (reservation, entry)
        for entry in entries
        if (reservation := index.reservations.get(entry.sequence)) and reservation.data_set == data_set
    ]
    stops = {round(part * (len(charges) - 1) / max(1, most - 1)) + 1 for part in range(most)} if charges else set()
    history, points, highest = History(), [], 0.0
    for number, (reservation, entry) in enumerate(charges, 1):
        history.add(reservation.mechanism)
        if number in stops:
            highest = max(highest, history.epsilon(delta))
            points.append(Point(str(entry.body["time"]), number, highest))
    return points


@dataclass(frozen=True)
class LedgerCharge:
    """A reservation, when it was written, and whether it is still open."""

    reservation: Reservation
    time: str
    open: bool

    @classmethod
    def of(cls, entry: Entry, index: Index) -> "LedgerCharge":
        """The charge that `entry`, a reservation, is."""
        reservation = index.reservations[entry.sequence]
        waiting = index.open[reservation.data_set, reservation.key]
        return cls(reservation, str(entry.body["time"]), entry.sequence in waiting)


def _data_set(name: str, charges: Sequence[LedgerCharge], index: Index, budget: Budget) -> DataSetSpending:
    own = [charge for charge in charges if charge.reservation.data_set == name]
    runs = dict.fromkeys((charge.reservation.federation, charge.reservation.run) for charge in own)
    return DataSetSpending(
        name=name,
        budget=budget,
        epsilon=index.lifetimes.get(name, History()).epsilon(budget.delta),
        runs=tuple(
            _run(
                [charge for charge in own if (charge.reservation.federation, charge.reservation.run) == key],
                index.runs[(name, *key)].epsilon(budget.delta),
            )
            for key in runs
        ),
        contents=_contents(own),
        unit=index.units.get(name),
    )


def _run(charges: Sequence[LedgerCharge], epsilon: float) -> RunSpending:
    one = charges[0].reservation
    return RunSpending(
        federation=one.federation,
        run=one.run,
        rounds=len({charge.reservation.round for charge in charges}),
        charges=len(charges),
        open=sum(charge.open for charge in charges),
        first=charges[0].time,
        last=charges[-1].time,
        epsilon=epsilon,
        mechanisms=_together(charge.reservation.mechanism for charge in charges),
    )


def _together(mechanisms: Iterable[NoiseEvent | None]) -> tuple[NoiseEvent | None, ...]:
    steps: Counter[NoiseEvent | None] = Counter()
    for mechanism in mechanisms:
        steps[mechanism and replace(mechanism, steps=0)] += mechanism.steps if mechanism else 0
    return tuple(mechanism and replace(mechanism, steps=count) for mechanism, count in steps.items())


def _contents(charges: Sequence[LedgerCharge]) -> tuple[ContentUse, ...]:
    uses: dict[str | None, list[LedgerCharge]] = {}
    for charge in charges:
        uses.setdefault(charge.reservation.fingerprint, []).append(charge)
    return tuple(ContentUse(name, len(used), used[0].time, used[-1].time) for name, used in uses.items())
