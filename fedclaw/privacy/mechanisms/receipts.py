"""What a site says that a round cost it, held against what was asked.

A receipt is the site's own word. What the plan, the schema and the number of examples determine of it is compared with
what the plan's mechanism says (`Mechanism.receipt_fields`, which a site writes its receipt by); the rest (relation,
epsilon, rounds, the ledger's head) is bounded by its type and never gets better within a run
(`fedclaw.protocol.receipt.Receipt.after`).
"""

import math

from fedclaw.errors import PrivacyError, UpdateError
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.protocol.receipt import NO_LEDGER, CentralReceipt, Receipt
from fedclaw.protocol.terms import DataUnit, Plan

LONGEST_RECEIPT = 4096
"""Characters of a receipt's JSON; an honest one has about 500."""

_EXACT = 1e-9


def check_receipt(receipt: Receipt, plan: Plan, examples: int, unit: DataUnit = "example") -> None:
    """Raise UpdateError, naming each field, for a receipt that no site of `examples` units has of `plan`.

    `unit` is what the schema protects, which all sites share.
    """
    if receipt.unit != unit:
        raise UpdateError(f"the privacy receipt is for the unit {receipt.unit}, and the schema makes it {unit}")
    wrong = [
        f"{name} {_shown(getattr(receipt, name))} where the plan makes it {_shown(expected)}"
        for name, expected in _determined(receipt, mechanism_of(plan), examples).items()
        if not _same(getattr(receipt, name), expected)
    ]
    if wrong:
        raise UpdateError(f"the privacy receipt contradicts what was asked: {'; '.join(wrong)}")
    if reason := impossible(receipt):
        raise UpdateError(f"the privacy receipt cannot be true: {reason}")


def _determined(receipt: Receipt, mechanism: Mechanism, examples: int) -> dict[str, object]:
    """The receipt's fields as they have to be. Raises UpdateError for a mechanism that the plan does not have."""
    try:
        charges = mechanism.possible_charges(examples)
    except PrivacyError as error:
        raise UpdateError(f"the privacy receipt cannot be checked: {error}") from error
    charge = next((charge for charge in charges if charge.kind == receipt.mechanism), None)
    if charge is None:
        raise UpdateError(
            f"the privacy receipt contradicts what was asked: mechanism {receipt.mechanism} where the plan makes it "
            f"{' or '.join(charge.kind for charge in charges)}"
        )
    fields = mechanism.receipt_fields(examples, charge)
    if mechanism.noises_steps:
        # Calibrated at the site.
        del fields["noise_multiplier"]
    return fields


def impossible(receipt: Receipt) -> str | None:
    """What contradicts itself in a receipt of training, in a clause; None: nothing does."""
    unbounded = receipt.epsilon_run is None
    if receipt.mechanism == "none" and not unbounded:
        return f"epsilon {_shown(receipt.epsilon_run)} for training without noise that counts"
    if receipt.mechanism != "none" and (receipt.noise_multiplier == 0 or receipt.accountant == "none"):
        return f"mechanism {receipt.mechanism} with no noise or no accountant"
    if not unbounded and receipt.delta == 0:
        return f"epsilon {_shown(receipt.epsilon_run)} at delta 0, which no noise on a sample gives"
    if unbounded and receipt.epsilon_lifetime is not None:
        return "a bound on all runs together and none on this one"
    if receipt.epsilon_lifetime is None and receipt.epsilon_left is not None:
        return "something is left of the budget after an unbounded amount was spent"
    if receipt.epsilon_left == 0:
        return "nothing is left of its budget, or less, and its ledger refuses what the budget does not hold"
    if receipt.rounds < 1:
        return "no round of this run is on the ledger, and this one was to be charged first"
    return "it names no ledger" if receipt.ledger_head == NO_LEDGER else None


def _same(said: object, expected: object) -> bool:
    if isinstance(said, float) and isinstance(expected, float):
        return math.isclose(said, expected, rel_tol=_EXACT)
    return said == expected


def _shown(value: object) -> str:
    if isinstance(value, CentralReceipt):
        return f"unit {value.unit}, noise by {value.noise_by}, epsilon {value.epsilon:g}, delta {value.delta:g}"
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
