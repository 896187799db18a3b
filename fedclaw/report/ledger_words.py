"""What a ledger's figures mean, in sentences for people who are no engineers. Plain text: whoever shows it escapes it.

What is promised, against whom and what is not, is said in the words of `fedclaw.privacy.claims`.
The reading of epsilon follows Dwork and Roth (2014), definition 2.4 and section 2.3.2; the orientation by size follows
Ponomareva et al. (2023), "How to DP-fy ML", section 5.2.
"""

import math
from collections.abc import Mapping
from typing import Any

from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.claims import Claim, claim_in, claim_of_sum
from fedclaw.site.journal.ledger import describe
from fedclaw.site.journal.spending import DataSetSpending, RunSpending

_LARGEST_IN_WORDS = 20.0


def meaning(item: DataSetSpending, unit: str = "example") -> list[str]:
    """What a data set's epsilon and delta say about one unit of it."""
    if math.isinf(item.epsilon):
        return [
            f"At least one run used these data without differential privacy. Nothing bounds what its results may "
            f"reveal about a single {unit}, up to reproducing them, and nothing spent before or after changes that."
        ]
    if not item.charges:
        return ["Nothing has been spent: no run has been charged for using these data."]
    return [
        f"Take any one {unit}. Whatever can be concluded from all that left this site could have been concluded "
        f"without it too, with a likelihood that differs by a factor of at most {factor(item.epsilon)} (e to the "
        f"power of epsilon), but for a chance of {chance(item.budget.delta)} (delta).",
        f"In other words: somebody who thinks it a toss-up whether a certain {unit} is in the data can become at most "
        f"{certainty(item.epsilon)} sure of it by what left, but for the same small chance.",
        "For orientation: an epsilon of up to 1 counts as strong protection, up to 10 as reasonable, and more as weak, "
        "though attacks seen in practice stay well below such bounds.",
    ]


def rounded(epsilon: float, *, down: bool = False) -> str:
    """Three digits; upwards, so that nothing spent is hidden, or downwards. `epsilon` is at least 0 and finite."""
    if epsilon == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(epsilon)))
    scaled = epsilon * 10**digits
    # What differs by a float's rounding alone is the number itself.
    whole = round(scaled) if math.isclose(scaled, round(scaled), rel_tol=1e-9) else scaled
    text = f"{(math.floor(whole) if down else math.ceil(whole)) / 10**digits:.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else text


def factor(epsilon: float) -> str:
    """e^epsilon, rounded up."""
    if epsilon > _LARGEST_IN_WORDS:
        return f"10^{math.ceil(epsilon / math.log(10))}"
    value = math.exp(epsilon)
    return f"{math.ceil(value):,}" if value >= 100 else rounded(value)


def chance(delta: float) -> str:
    """A small probability as one in so many."""
    return f"1 in {1 / delta:,.0f}"


def certainty(epsilon: float) -> str:
    """The largest posterior probability from an even prior, e^epsilon / (1 + e^epsilon), rounded up."""
    share = 1 / (1 + math.exp(-min(epsilon, 700.0)))
    return f"{math.ceil(share * 1000) / 10:g}%" if share < 0.999 else "more than 99.9%"


def work(mechanism: NoiseEvent | None) -> str:
    """What one kind of charge was for."""
    if mechanism is None:
        return "Without differential privacy."
    return f"{describe(mechanism)}."


def protection(receipt: Mapping[str, Any] | None) -> str:
    """Against whom the noise of a run holds, by the last receipt of it that left; None: none left."""
    if receipt is None:
        return "Nothing of it has left."
    return " ".join(claim.against for claim in (claim_in(receipt), *whole_site(receipt)))


def whole_site(receipt: Mapping[str, Any]) -> tuple[Claim, ...]:
    """What noise on the sum promises to the site as a whole, by a receipt of a run that has it."""
    central = receipt.get("central") or {}
    if central.get("unit") != "site":
        return ()
    return (claim_of_sum(central.get("noise_by")),)


def counted(run: RunSpending) -> str:
    """How often a run's rounds were charged, where that is not once each and settled."""
    notes = []
    if run.charges != run.rounds:
        notes.append(f"charged {run.charges} times")
    if run.open:
        notes.append(f"{run.open} open")
    return ", ".join(notes)
