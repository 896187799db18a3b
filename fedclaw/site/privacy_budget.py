"""What a round costs a site: which noise its ledger counts, the reservation before training, the receipt after it.

The ledger counts the noise that needs the least trust (`fedclaw.privacy.mechanisms`): the site's own if it adds any;
else the shares of all sites inside secure aggregation; else the server's, if the policy trusts the server with that;
else none.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from fedclaw.errors import BudgetExceeded, LedgerError, PrivacyError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.mechanism import Charge
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.records import serialised
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.site.journal.ledger import Budget, Ledger, Remaining, Reservation
from fedclaw.site.policy.policy import Policy
from fedclaw.site.rate_limit import check_charge
from fedclaw.site.site import Site

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asking:
    """One question, as a charge names it: by its message's id, which the server chooses, and by all that it says."""

    message: Message

    @property
    def key(self) -> str:
        """The message's id."""
        return self.message.metadata.message_id

    @cached_property
    def content(self) -> str:
        """SHA-256 (hexadecimal) of the message's type and records."""
        return content_digest(self.message.metadata.message_type, self.message.content)


def content_digest(kind: str, content: RecordDict) -> str:
    """SHA-256 (hexadecimal) of a message's type and of each of its records, by name, as they came."""
    digest = hashlib.sha256(f"{kind}|".encode())
    for name, record in sorted(content.items()):
        digest.update(f"{type(record).__name__}/{len(name)}/{name}|".encode())
        if isinstance(record, ArrayRecord):
            for key, array in sorted(record.items()):
                data = serialised(array)
                digest.update(f"{len(key)}/{key}/{len(data)}|".encode())
                digest.update(data)
        else:
            digest.update(f"{sorted(record.items())!r}|".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class LedgerFigures:
    """What a ledger says after a round was charged; epsilons may be infinite."""

    epsilon_run: float
    """Of the run, at the delta that the plan asks for, or the policy's."""
    epsilon_lifetime: float
    """Of all runs, at the policy's delta."""
    rounds: int
    head: str
    losses: int = 0
    """How often the ledger was gone on with after a loss."""


def charge_of(site: Site, plan: Plan) -> Charge:
    """What `plan` costs at `site`. Raises Refusal when no noise keeps it within the epsilon that it asks for."""
    return charge_for(site.policy, len(site.data.train), plan)


def charge_for(policy: Policy, examples: int, plan: Plan) -> Charge:
    """The same for any site with that policy and so many training examples."""
    mechanism = mechanism_of(plan)
    try:
        return mechanism.charge(examples, trust_server_noise=policy.trust_server_noise)
    except PrivacyError as error:
        code = RefusalCode.SECURE_AGGREGATION if mechanism.shares_noise else RefusalCode.EPSILON
        raise Refusal(code, str(error)) from error


@dataclass(frozen=True)
class Account:
    """One data set's ledger and what may be spent there: in all, and by one run (None: no limit), at `delta`."""

    ledger: Ledger
    epsilon: float | None
    delta: float
    epsilon_per_run: float | None = None

    @classmethod
    def training(cls, site: Site) -> "Account":
        """That of the site's training data."""
        policy = site.policy
        return cls(site.ledger, policy.epsilon, policy.delta, policy.epsilon_per_run)

    @property
    def budget(self) -> Budget:
        """What may be spent in all."""
        return Budget(epsilon=self.epsilon, delta=self.delta)

    @property
    def run_budget(self) -> Budget:
        """What one run may spend."""
        return Budget(epsilon=self.epsilon_per_run, delta=self.delta)


def remaining_of(policy: Policy, plan: Plan, purpose: str = "") -> Remaining:
    """What the run of `plan` has still to be charged, its present round included, if each round costs as much.

    What is charged for different purposes (training, or evaluation with noise) is agreed to apart.
    """
    return Remaining(
        charges=max(1, plan.rounds - plan.round + 1),
        last=plan.rounds,
        days=policy.agreement_days,
        partly=policy.allow_part_of_a_run,
        purpose=purpose,
    )


@dataclass(frozen=True)
class Due:
    """What one question is charged before it is answered."""

    asking: Asking
    federation: str
    run: str
    round: int
    mechanism: NoiseEvent | None
    account: Account
    """That of the data that is used."""
    remaining: Remaining | None = None
    """What the run has still to be charged there: it is agreed to or refused as a whole."""

    @classmethod
    def of_plan(
        cls, site: Site, plan: Plan, asking: Asking, mechanism: NoiseEvent | None, account: Account, purpose: str = ""
    ) -> "Due":
        """For a round of `plan`."""
        remaining = remaining_of(site.policy, plan, purpose)
        return cls(asking, plan.federation, plan.run, plan.round, mechanism, account, remaining)

    @property
    def is_waiting(self) -> bool:
        """Whether a reservation is open for this very question, which `reserve` would take up."""
        return self.account.ledger.is_waiting(
            self.asking.key, self.federation, self.run, self.round, self.mechanism, self.asking.content
        )


def reserve(site: Site, due: Due) -> Reservation:
    """Charge the ledger, durably, before anything is computed. Raises Refusal when the budget is not enough, or when
    it is too early for another round."""
    account = due.account
    with _refusing():
        # What takes up a charge again, because the very same question was asked before, is no new round.
        if not due.is_waiting:
            check_charge(site.policy, account.ledger)
        return account.ledger.reserve(
            due.asking.key,
            federation=due.federation,
            run=due.run,
            round=due.round,
            mechanism=due.mechanism,
            content=due.asking.content,
            budget=account.budget,
            run_budget=account.run_budget,
            remaining=due.remaining,
        )


def check_affordable(site: Site, due: Due) -> None:
    """Raise the Refusal that `reserve` would, and charge nothing: before what is done ahead of the charge."""
    account = due.account
    with _refusing():
        if not due.is_waiting:
            check_charge(site.policy, account.ledger)
            account.ledger.check_budgets(
                due.federation, due.run, due.mechanism, account.budget, account.run_budget, due.remaining
            )


def check_agreeable(site: Site, plan: Plan, mechanism: NoiseEvent | None) -> None:
    """Raise the Refusal that the charge of `plan` would meet, and charge nothing: before the session it belongs to."""
    account = Account.training(site)
    with _refusing():
        account.ledger.check_budgets(
            plan.federation,
            plan.run,
            mechanism,
            account.budget,
            account.run_budget,
            remaining_of(site.policy, plan),
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


def receipt_of(site: Site, plan: Plan, charge: Charge) -> Receipt:
    """The receipt of a round that was just charged."""
    figures = LedgerFigures(
        epsilon_run=site.ledger.spent(delta_of(site.policy, plan), run=plan.run, federation=plan.federation),
        epsilon_lifetime=site.ledger.spent(site.policy.delta),
        rounds=site.ledger.rounds(plan.run, plan.federation),
        head=site.ledger.head(),
        losses=site.ledger.losses(),
    )
    return receipt_for(site.policy, len(site.data.train), plan, charge, figures)


def delta_of(policy: Policy, plan: Plan) -> float:
    """The delta at which a run's epsilon is told."""
    asked = mechanism_of(plan).guarantee()
    return asked.delta if asked else policy.delta


def receipt_for(policy: Policy, examples: int, plan: Plan, charge: Charge, figures: LedgerFigures) -> Receipt:
    """The receipt of any site with that policy and so many training examples, whose ledger says this."""
    fields: dict[str, Any] = {"delta": policy.delta, **mechanism_of(plan).receipt_fields(examples, charge)}
    return Receipt(
        **fields,
        rounds=figures.rounds,
        **Receipt.figures(figures.epsilon_run, figures.epsilon_lifetime, policy.epsilon),
        ledger_head=figures.head,
        ledger_losses=figures.losses,
    )


def log_spending(plan: Plan, receipt: Receipt) -> None:
    """Tell the operator what the round cost."""
    run, lifetime = (
        "unbounded" if value is None else f"{value:.3f}" for value in (receipt.epsilon_run, receipt.epsilon_lifetime)
    )
    left = "no limit set" if receipt.epsilon_left is None else f"{receipt.epsilon_left:.3f} left"
    log.info(
        "run %s, round %d of %d: trained %d steps; epsilon %s by this run, %s in all, %s",
        *(plan.run, plan.round, plan.rounds, receipt.steps, run, lifetime, left),
    )
