"""What an answer cost a site, as its ledger has it: the receipt that goes with the answer."""

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.limits import MOST_CHARGED
from fedclaw.protocol.terms import DataUnit, Relation, SumNoiseTerms

NO_LEDGER = "simulated"
"""In the place of a ledger's head, where clients are simulated and have none."""

Head = Annotated[str, Field(max_length=64, pattern=rf"^([0-9a-f]{{64}}|{NO_LEDGER})$")]
"""Of a site's ledger: SHA-256, hexadecimal."""

Epsilon = Annotated[float, Field(ge=0, le=1e15)]
"""What was spent, or is left."""

Trust = Literal["nobody", "aggregation", "server", "everybody"]
"""Whom a guarantee needs to be honest: nobody but the site itself (local noise), enough of the other sites (distributed
noise inside secure aggregation), the server (its noise); `everybody`: there is no noise. From the least to the most."""


class CentralReceipt(SumNoiseTerms):
    """The noise on the sum that the site's answer went into, by the server's plan: (epsilon, delta) of the run.

    Its unit may be the whole site, while the ledger, and every other figure of the receipt, counts examples.
    """


class Spent(Frozen):
    """What was spent on a data set, as a site's ledger has it."""

    delta: float = Field(ge=0, lt=1)
    epsilon_lifetime: Epsilon | None
    """Spent on this data set by all runs; None: unbounded."""
    ledger_head: Head


class BudgetSpent(Spent):
    """The same with what this run spent, and what is left."""

    epsilon_run: Epsilon | None
    """Spent by this run so far; None: unbounded (trained without privacy)."""
    epsilon_left: Epsilon | None
    """Budget minus lifetime; None: the data set has no budget or it was spent without bound."""

    @staticmethod
    def figures(run: float, lifetime: float, budget: float | None) -> dict[str, Any]:
        """The epsilons of a ledger that says `run` and `lifetime`, which may be infinite; `budget` None: no limit."""
        bounded = math.isfinite(lifetime)
        return {
            "epsilon_run": run if math.isfinite(run) else None,
            "epsilon_lifetime": lifetime if bounded else None,
            "epsilon_left": max(0.0, budget - lifetime) if bounded and budget is not None else None,
        }


class TrainingCost(Spent):
    """What training cost a site, as receipts and a statement say it. All figures are for one unit of its data."""

    mechanism: Literal["dp-sgd", "central", "distributed", "none", "metrics"]
    """Whose noise the ledger charged; `metrics`: the site's own on an evaluation, charged to its test data."""
    unit: DataUnit = "example"
    relation: Relation = "zero-out"
    """Both make the sentence that every document says of the figures (`fedclaw.privacy.claims`). The defaults are those
    of receipts from before they were noted."""
    trust: Trust = "nobody"
    """Who has to be honest for the figures to hold."""
    secure_aggregation: bool = False
    """Whether the server saw nothing but sums."""
    central: CentralReceipt | None = None
    """Noise on the sum, by the server's plan, with its own unit."""
    sampler: Literal["poisson", "shuffle"]
    accountant: Literal["pld", "rdp", "none"]
    sample_rate: float = Field(ge=0, le=1)
    steps: int = Field(ge=0, le=MOST_CHARGED)
    noise_multiplier: float = Field(ge=0)
    max_grad_norm: float = Field(ge=0)
    rounds: int = Field(ge=0, le=MOST_CHARGED)
    """Rounds of this run that the ledger holds, interrupted ones included."""
    ledger_losses: int = Field(default=0, ge=0, le=MOST_CHARGED)
    """How often the ledger, or its newest entries, was lost and the site went on at its operator's word: what had been
    spent by then is in no figure here."""


class Receipt(TrainingCost, BudgetSpent):
    """What one round cost a site, as its ledger has it."""

    def after(self, before: "Receipt") -> "Receipt":
        """What is told of a site that said `before` earlier in the same run: of each figure the worse one.

        A ledger only grows, so a figure that falls is a mistake or a lie, and what was unbounded once stays so. The
        ledger's head is that of the receipt whose figures stand: it is what they can be checked against.
        """
        told: dict[str, object] = {
            "epsilon_run": _larger(before.epsilon_run, self.epsilon_run),
            "epsilon_lifetime": _larger(before.epsilon_lifetime, self.epsilon_lifetime),
            "epsilon_left": self._less_left(before),
            "delta": max(before.delta, self.delta),
            "rounds": max(before.rounds, self.rounds),
            "ledger_losses": max(before.ledger_losses, self.ledger_losses),
            "secure_aggregation": before.secure_aggregation and self.secure_aggregation,
            "relation": self.relation if before.relation == self.relation else "zero-out",
        }
        trusts = get_args(Trust)
        if trusts.index(before.trust) > trusts.index(self.trust):
            kept = ("mechanism", "trust", "accountant", "sample_rate", "noise_multiplier")
            told |= {name: getattr(before, name) for name in kept}
        if self.is_better_than(before):
            told["ledger_head"] = before.ledger_head
        return self.model_copy(update=told)

    def is_better_than(self, before: "Receipt") -> bool:
        """Whether less is said to be spent, or in fewer rounds, than `before` says: no ledger says that."""
        return (
            _larger(before.epsilon_run, self.epsilon_run) != self.epsilon_run
            or _larger(before.epsilon_lifetime, self.epsilon_lifetime) != self.epsilon_lifetime
            or before.rounds > self.rounds
        )

    def _less_left(self, before: "Receipt") -> float | None:
        """The smaller rest of the budget; None where there is no budget or it was spent without bound."""
        if _larger(before.epsilon_lifetime, self.epsilon_lifetime) is None:
            return None
        return min((item.epsilon_left for item in (before, self) if item.epsilon_left is not None), default=None)


def _larger(before: float | None, now: float | None) -> float | None:
    """The larger epsilon; None is unbounded."""
    return None if before is None or now is None else max(before, now)
