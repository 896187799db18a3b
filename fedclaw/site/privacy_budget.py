"""What a round costs a site: which noise its ledger counts, the reservation before training, the receipt after it.

The ledger counts the noise that needs the least trust (`fedclaw.privacy.mechanisms`): the site's own if it adds any;
else the shares of all sites inside secure aggregation; else the server's, if the policy trusts the server with that;
else none.

How often a server may ask is limited too: `rounds_per_day` and `minimum_seconds_between_rounds`, by the site's own
books.

What counts is written down already, durably and before anything leaves: each charge to the data set in the ledger, and
for evaluations that cost nothing each line of the outbound log. So neither a restart nor another run's name forgets
it. What is kept of both in memory follows them entry by entry. Charges and such evaluations are counted apart, since a
round usually has one of each.

The same question asked again is not another round: a reply that was finished is sent again from the outbox without
asking here, and a charge whose result never left is taken up again.

The books' order is trusted and the clock is not: an entry is taken to be no older than those before it, and a clock
that is set back has to catch up with them. It thus opens nothing.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from fedclaw.errors import BudgetExceeded, LedgerError, PrivacyError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.mechanisms.mechanism import Charge, Mechanism
from fedclaw.protocol.receipt import BudgetSpent, Receipt
from fedclaw.protocol.records import serialised
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.site.journal.history import Entry
from fedclaw.site.journal.ledger import Budget, Ledger, Remaining, Reservation
from fedclaw.site.journal.outbound import OutboundEntry, OutboundLog
from fedclaw.site.policy.policy import Policy
from fedclaw.site.site import Site

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asking:
    """One question, as a charge names it: its message, with the id that the server chooses and all that it says, and
    which round of which run it is."""

    message: Message
    federation: str
    run: str
    round: int
    rounds: int = 1
    """Of the whole run."""

    @property
    def key(self) -> str:
        """The message's id."""
        return self.message.metadata.message_id

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the message's type and records."""
        return content_digest(self.message.metadata.message_type, self.message.content)

    def remaining(self, policy: Policy, purpose: str = "") -> Remaining:
        """What the run has still to be charged, its present round included, if each round costs as much.

        What is charged for different purposes (training, or evaluation with noise) is agreed to apart.
        """
        return Remaining(
            charges=max(1, self.rounds - self.round + 1),
            last=self.rounds,
            days=policy.agreement_days,
            partly=policy.allow_part_of_a_run,
            purpose=purpose,
        )


def content_digest(kind: str, content: RecordDict) -> str:
    """SHA-256 (hexadecimal) of a message's type and of each of its records, by name, as they came."""
    digest = hashlib.sha256(f"{kind}|".encode())
    for name, record in sorted(content.items()):
        digest.update(f"{type(record).__name__}/{len(name)}/{name}|".encode())
        if isinstance(record, ArrayRecord):
            for key, array in sorted(record.items()):
                parts = serialised(array)
                digest.update(f"{len(key)}/{key}/{sum(map(len, parts))}|".encode())
                for data in parts:
                    digest.update(data)
        else:
            digest.update(f"{sorted(record.items())!r}|".encode())
    return digest.hexdigest()


def charge_for(policy: Policy, examples: int, mechanism: Mechanism) -> Charge:
    """What a round costs a site with that policy and so many training examples.

    Raises Refusal when no noise keeps it within the epsilon that it asks for.
    """
    try:
        return mechanism.charge(examples, trust_server_noise=policy.trust_server_noise)
    except PrivacyError as error:
        code = RefusalCode.SECURE_AGGREGATION if mechanism.shares_noise else RefusalCode.EPSILON
        raise Refusal(code, str(error)) from error


def delta_of(policy: Policy, mechanism: Mechanism) -> float:
    """The delta at which a run's epsilon is told."""
    asked = mechanism.guarantee()
    return asked.delta if asked else policy.delta


@dataclass(frozen=True)
class Account:
    """One data set's ledger, and what may be spent there: in all, and by one run (None: as much)."""

    ledger: Ledger
    budget: Budget
    run_budget: Budget | None = None

    @classmethod
    def training(cls, site: Site) -> "Account":
        """That of the site's training data."""
        policy = site.policy
        run = Budget(policy.epsilon_per_run, policy.delta)
        return cls(site.ledger, Budget(policy.epsilon, policy.delta), run)

    def spent(self, asking: Asking, delta: float) -> dict[str, Any]:
        """What a receipt says of it after a charge: of the run at `delta`, of all runs at the budget's own."""
        run = self.ledger.spent(delta, run=asking.run, federation=asking.federation)
        figures = BudgetSpent.figures(run, self.ledger.spent(self.budget.delta), self.budget.epsilon)
        return {**figures, "delta": delta, "ledger_head": self.ledger.head()}

    def figures(self, asking: Asking, delta: float) -> dict[str, Any]:
        """The same with the run's rounds, and how often the ledger was gone on with after a loss."""
        rounds = self.ledger.rounds(asking.run, asking.federation)
        return {**self.spent(asking, delta), "rounds": rounds, "ledger_losses": self.ledger.losses()}


@dataclass(frozen=True)
class Due:
    """What one question is charged before it is answered."""

    asking: Asking
    mechanism: NoiseEvent | None
    account: Account
    """That of the data that is used."""
    remaining: Remaining | None = None
    """What the run has still to be charged there: it is agreed to or refused as a whole."""

    @classmethod
    def training(cls, site: Site, asking: Asking, mechanism: NoiseEvent | None) -> "Due":
        """For a round on the training data."""
        return cls(asking, mechanism, Account.training(site), asking.remaining(site.policy))

    @property
    def is_waiting(self) -> bool:
        """Whether a reservation is open for this very question, which `reserve` would take up."""
        asking = self.asking
        return self.account.ledger.is_waiting(
            asking.key, asking.federation, asking.run, asking.round, self.mechanism, asking.digest
        )


def reserve(site: Site, due: Due) -> Reservation:
    """Charge the ledger, durably, before anything is computed. Raises Refusal when the budget is not enough, or when
    it is too early for another round."""
    account, asking = due.account, due.asking
    with _refusing():
        # What takes up a charge again, because the very same question was asked before, is no new round.
        if not due.is_waiting:
            check_charge(site.policy, account.ledger)
        return account.ledger.reserve(
            asking.key,
            federation=asking.federation,
            run=asking.run,
            round=asking.round,
            mechanism=due.mechanism,
            content=asking.digest,
            budget=account.budget,
            run_budget=account.run_budget,
            remaining=due.remaining,
            unit=site.data.train.unit,
        )


def check_affordable(site: Site, due: Due) -> None:
    """Raise the Refusal that `reserve` would, and charge nothing: before what is done ahead of the charge."""
    account, asking = due.account, due.asking
    with _refusing():
        if not due.is_waiting:
            check_charge(site.policy, account.ledger)
            account.ledger.check_budgets(
                asking.federation, asking.run, due.mechanism, account.budget, account.run_budget, due.remaining
            )


@contextmanager
def _refusing() -> Iterator[None]:
    """What the ledger says no to, or fails at, is a Refusal."""
    try:
        yield
    except BudgetExceeded as error:
        # The ledger's figures (steps, sample rate, what is spent) tell how many examples there are: for the log.
        raise Refusal(
            RefusalCode.BUDGET,
            "privacy budget: what is left of it at this site, for its data set or for this run, beside what is agreed "
            "to, is not enough for the rest of the run",
        ) from error
    except LedgerError as error:
        log.error("%s", error)
        raise Refusal(RefusalCode.FAILED, "the site's privacy ledger cannot be used; it does not train") from error


def receipt_of(site: Site, asking: Asking, mechanism: Mechanism, charge: Charge) -> Receipt:
    """The receipt of a round that was just charged."""
    figures = Account.training(site).figures(asking, delta_of(site.policy, mechanism))
    figures |= {"unit": site.data.train.unit, "relation": site.relation}
    return Receipt(**{**mechanism.receipt_fields(site.examples, charge), **figures})


def log_spending(asking: Asking, receipt: Receipt) -> None:
    """Tell the operator what the round cost."""
    run, lifetime = (
        "unbounded" if value is None else f"{value:.3f}" for value in (receipt.epsilon_run, receipt.epsilon_lifetime)
    )
    left = "no limit set" if receipt.epsilon_left is None else f"{receipt.epsilon_left:.3f} left"
    log.info(
        "run %s, round %d of %d: trained %d steps; epsilon %s by this run, %s in all, %s",
        *(asking.run, asking.round, asking.rounds, receipt.steps, run, lifetime, left),
    )


DAY = timedelta(days=1)
_WRITTEN_TO = timedelta(seconds=1)
# The books cut times to whole seconds: what they note may have been so much later.


def check_charge(policy: Policy, ledger: Ledger) -> None:
    """Raise a Refusal with code FREQUENCY if it is too early for another charge to the ledger's data set.

    For a question of several stages before the first: none that was broken off can be taken up again.
    """
    if is_limited(policy):
        check_frequency(policy, ledger.charge_times(policy.rounds_per_day or 1))


def check_evaluation(policy: Policy, outbound: OutboundLog | None) -> None:
    """Raise a Refusal with code FREQUENCY if it is too early for an evaluation that costs nothing.

    A site that keeps no outbound log (a simulation) does not limit them.
    """
    if is_limited(policy) and outbound is not None:
        check_frequency(policy, outbound.evaluation_times(policy.rounds_per_day or 1))


def is_limited(policy: Policy) -> bool:
    """Whether the policy has a limit, for which the outbound log has to be read."""
    return policy.rounds_per_day is not None or policy.minimum_seconds_between_rounds > 0


def check_frequency(policy: Policy, times: Iterable[str], now: datetime | None = None) -> None:
    """Raise a Refusal with code FREQUENCY if another round may not begin now.

    `times` are those of the rounds so far, oldest first, as the outbound log has them.
    """
    began = in_order(times)
    if not began:
        return
    now = now or datetime.now(UTC)
    least = timedelta(seconds=policy.minimum_seconds_between_rounds)
    if least and now < began[-1] + least:
        _refuse(
            f"takes part in a round every {policy.minimum_seconds_between_rounds:g} seconds", began[-1] + least, now
        )
    most = policy.rounds_per_day
    if most is not None and len(began) >= most and now < began[-most] + DAY:
        _refuse(f"takes part in {most} round(s) in 24 hours", began[-most] + DAY, now)


def in_order(times: Iterable[str]) -> list[datetime]:
    """The times as dates, each no earlier than those before it."""
    ordered: list[datetime] = []
    for text in times:
        time = datetime.fromisoformat(text) + _WRITTEN_TO
        ordered.append(max(time, ordered[-1]) if ordered else time)
    return ordered


def _refuse(limit: str, opens: datetime, now: datetime) -> None:
    wait = -(-(opens - now) // timedelta(seconds=1))
    raise Refusal(RefusalCode.FREQUENCY, f"asked too often: this site {limit} at most; ask again in {wait} seconds")


def charge_times(entries: Iterable[Entry], data_set: str) -> list[str]:
    """When the data set was charged, in the ledger's order."""
    bodies = (entry.body for entry in entries)
    return [str(body["time"]) for body in bodies if body["kind"] == "reserve" and body["data_set"] == data_set]


def evaluation_times(lines: Iterable[OutboundEntry]) -> list[str]:
    """When an evaluation was answered at no cost; sent again counts once, refused not at all, charged in the ledger."""
    return [line.time for line in lines if line.is_free_evaluation]
