"""What a site says that a round cost it, held against what was asked.

A receipt is the site's own word. What the plan and the number of examples determine of it is compared with the plan;
the rest (epsilon, rounds, the ledger's head) is bounded by its type and never gets better within a run
(`fedclaw.protocol.plan.Receipt.after`).
"""

import math
from typing import Literal

from fedclaw.errors import PrivacyError, UpdateError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.mechanisms.shared_noise import distributed_mechanism, example_mechanism
from fedclaw.protocol.plan import NO_LEDGER, CentralReceipt, Plan, Receipt, Trust

Kind = Literal["dp-sgd", "central", "distributed", "none", "metrics"]

LONGEST_RECEIPT = 4096
"""Characters of a receipt's JSON; an honest one has about 500."""

_EXACT = 1e-9


def is_sampled(plan: Plan) -> bool:
    """Whether local batches are Poisson samples."""
    return plan.privacy is not None or (plan.central is not None and plan.central.unit == "example")


def clip_of(plan: Plan) -> float:
    """The L2 bound of an example's gradient, or of a site's update; 0: none."""
    if plan.privacy is not None:
        return plan.privacy.max_grad_norm
    return plan.central.clip if plan.central else 0.0


def central_receipt(plan: Plan) -> CentralReceipt | None:
    """The noise on the sum that `plan` announces."""
    central = plan.central
    if central is None:
        return None
    return CentralReceipt(unit=central.unit, noise_by=central.noise_by, epsilon=central.epsilon, delta=central.delta)


def check_receipt(receipt: Receipt, plan: Plan, examples: int) -> None:
    """Raise UpdateError, naming each field, for a receipt that no site with `examples` examples has of `plan`."""
    wrong = [
        f"{name} {_shown(getattr(receipt, name))} where the plan makes it {_shown(expected)}"
        for name, expected in _determined(receipt, plan, examples).items()
        if not _same(getattr(receipt, name), expected)
    ]
    if wrong:
        raise UpdateError(f"the privacy receipt contradicts what was asked: {'; '.join(wrong)}")
    if reason := _impossible(receipt):
        raise UpdateError(f"the privacy receipt cannot be true: {reason}")


def _determined(receipt: Receipt, plan: Plan, examples: int) -> dict[str, object]:
    """The receipt's fields as they have to be. Where the noise is the server's, the site says if its ledger counts it.

    Raises UpdateError for a mechanism that the plan does not have.
    """
    kinds = _kinds(plan)
    if receipt.mechanism not in kinds:
        raise UpdateError(
            f"the privacy receipt contradicts what was asked: mechanism {receipt.mechanism} where the plan makes it "
            f"{' or '.join(kinds)}"
        )
    asked = plan.privacy or plan.central
    return {
        "trust": kinds[receipt.mechanism],
        "secure_aggregation": plan.secure is not None,
        "central": central_receipt(plan),
        "sampler": "poisson" if is_sampled(plan) else "shuffle",
        "steps": plan.training.local_steps(examples),
        "max_grad_norm": clip_of(plan),
        **({} if asked is None else {"delta": asked.delta}),
        **_mechanism(receipt.mechanism, plan, examples),
    }


def _kinds(plan: Plan) -> dict[Kind, Trust]:
    """The mechanisms that a ledger may have charged for `plan`, and whom each trusts."""
    if plan.privacy is not None:
        return {"dp-sgd": "nobody"}
    if plan.central is None:
        return {"none": "everybody"}
    if plan.central.noise_by == "sites":
        return {"distributed": "aggregation"}
    return {"central": "server", "none": "everybody"}


def _mechanism(kind: Kind, plan: Plan, examples: int) -> dict[str, object]:
    """Rate and noise, where the plan alone determines them: the noise of DP-SGD is calibrated by the site."""
    if kind == "dp-sgd":
        return {"sample_rate": min(1.0, plan.training.batch_size / examples)}
    if kind == "none" or plan.central is None:
        return {"noise_multiplier": 0.0, "accountant": "none"}
    try:
        mechanism = _on_the_sum(kind, plan)
    except PrivacyError as error:
        raise UpdateError(f"the privacy receipt cannot be checked: {error}") from error
    return {"sample_rate": mechanism.sample_rate, "noise_multiplier": mechanism.noise_multiplier}


def _on_the_sum(kind: Kind, plan: Plan) -> NoiseEvent:
    assert plan.central is not None
    if kind == "distributed":
        return distributed_mechanism(plan)
    return example_mechanism(plan.central, plan.central.noise_multiplier)


def _impossible(receipt: Receipt) -> str | None:
    """What contradicts itself in a receipt of training."""
    unbounded = receipt.epsilon_run is None
    if receipt.mechanism == "none" and not unbounded:
        return f"epsilon {_shown(receipt.epsilon_run)} for training without noise that counts"
    if receipt.mechanism != "none" and (receipt.noise_multiplier == 0 or receipt.accountant == "none"):
        return f"mechanism {receipt.mechanism} with no noise or no accountant"
    if unbounded and receipt.epsilon_lifetime is not None:
        return "a bound on all runs together and none on this one"
    if receipt.epsilon_lifetime is None and receipt.epsilon_left is not None:
        return "something is left of the budget after an unbounded amount was spent"
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
