"""What a round costs a site: which noise its ledger counts, the reservation before training, the receipt after it.

The ledger counts the noise that needs the least trust: the site's own if it adds any; else the shares of all sites
inside secure aggregation; else the server's, if the policy trusts the server with that; else none.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict

from fedclaw.errors import BudgetExceeded, LedgerError, PrivacyError
from fedclaw.privacy.accounting import NoiseEvent, calibrate
from fedclaw.privacy.mechanisms.receipts import central_receipt, clip_of, is_sampled
from fedclaw.privacy.mechanisms.shared_noise import distributed_mechanism, example_mechanism
from fedclaw.protocol.plan import Plan, Receipt, Refusal, RefusalCode, Trust
from fedclaw.protocol.records import serialised
from fedclaw.site.journal.ledger import Budget, Ledger, Remaining, Reservation
from fedclaw.site.policy.policy import Policy
from fedclaw.site.policy.rate_limit import check_charge
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
class Charge:
    """One round's mechanism as the ledger has it (None: no noise that counts), and whom it trusts."""

    kind: Literal["dp-sgd", "central", "distributed", "none"]
    mechanism: NoiseEvent | None
    trust: Trust


@dataclass(frozen=True)
class Books:
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
    if plan.privacy is not None:
        return Charge("dp-sgd", _local_mechanism(examples, plan), "nobody")
    central = plan.central
    if central is None:
        return Charge("none", None, "everybody")
    if central.noise_by == "sites":
        return Charge("distributed", _distributed(plan), "aggregation")
    if not policy.trust_server_noise:
        return Charge("none", None, "everybody")
    return Charge("central", example_mechanism(central, central.noise_multiplier), "server")


def _distributed(plan: Plan) -> NoiseEvent:
    if plan.secure is None:
        raise Refusal(RefusalCode.SECURE_AGGREGATION, "noise by the sites hides nothing without secure aggregation")
    try:
        return distributed_mechanism(plan)
    except PrivacyError as error:
        raise Refusal(RefusalCode.SECURE_AGGREGATION, str(error)) from error


def local_mechanism(site: Site, plan: Plan) -> NoiseEvent | None:
    """One round's DP-SGD: noise calibrated so that all rounds of the run together spend the epsilon asked."""
    return _local_mechanism(len(site.data.train), plan)


def _local_mechanism(examples: int, plan: Plan) -> NoiseEvent | None:
    if plan.privacy is None:
        return None
    rate = min(1.0, plan.training.batch_size / examples)
    steps = plan.training.local_steps(examples)
    try:
        noise = calibrate(plan.privacy.epsilon, plan.privacy.delta, rate, steps * plan.rounds)
    except PrivacyError as error:
        raise Refusal(
            RefusalCode.EPSILON,
            f"no noise keeps what was asked for within epsilon {plan.privacy.epsilon:g} at delta "
            f"{plan.privacy.delta:g}; ask for fewer rounds or steps, smaller batches or a larger epsilon",
        ) from error
    return NoiseEvent(sample_rate=rate, noise_multiplier=noise, steps=steps)


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
    books = Books(
        epsilon_run=site.ledger.spent(delta_of(site.policy, plan), run=plan.run, federation=plan.federation),
        epsilon_lifetime=site.ledger.spent(site.policy.delta),
        rounds=site.ledger.rounds(plan.run, plan.federation),
        head=site.ledger.head(),
        losses=site.ledger.losses(),
    )
    return receipt_for(site.policy, len(site.data.train), plan, charge, books)


def delta_of(policy: Policy, plan: Plan) -> float:
    """The delta at which a run's epsilon is told."""
    asked = plan.privacy or plan.central
    return asked.delta if asked else policy.delta


def receipt_for(policy: Policy, examples: int, plan: Plan, charge: Charge, books: Books) -> Receipt:
    """The receipt of any site with that policy and so many training examples, whose books say this."""
    mechanism, run, lifetime = charge.mechanism, books.epsilon_run, books.epsilon_lifetime
    budget = policy.epsilon
    bounded = budget is not None and np.isfinite(lifetime)
    return Receipt(
        mechanism=charge.kind,
        trust=charge.trust,
        secure_aggregation=plan.secure is not None,
        central=central_receipt(plan),
        sampler="poisson" if is_sampled(plan) else "shuffle",
        accountant=_accountant(mechanism),
        sample_rate=mechanism.sample_rate if mechanism else _rate(examples, plan),
        steps=plan.training.local_steps(examples),
        noise_multiplier=mechanism.noise_multiplier if mechanism else 0.0,
        max_grad_norm=clip_of(plan),
        delta=delta_of(policy, plan),
        rounds=books.rounds,
        epsilon_run=run if np.isfinite(run) else None,
        epsilon_lifetime=lifetime if np.isfinite(lifetime) else None,
        epsilon_left=max(0.0, budget - lifetime) if bounded and budget is not None else None,
        ledger_head=books.head,
        ledger_losses=books.losses,
    )


def _rate(examples: int, plan: Plan) -> float:
    """The share of the examples in a batch, where no noise counts."""
    if plan.central is not None and plan.central.unit == "example":
        return plan.central.sample_rate
    return min(1.0, plan.training.batch_size / examples)


def _accountant(mechanism: NoiseEvent | None) -> Literal["pld", "rdp", "none"]:
    if mechanism is None:
        return "none"
    return "pld" if mechanism.family == "gaussian" else "rdp"


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
