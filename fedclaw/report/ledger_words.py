"""What a ledger's figures mean, in sentences for people who are no engineers. Plain text: whoever shows it escapes it.

The reading of epsilon follows Dwork and Roth (2014), definition 2.4 and section 2.3.2; the orientation by size follows
Ponomareva et al. (2023), "How to DP-fy ML", section 5.2.
"""

import math
from collections.abc import Mapping, Set
from typing import Any

from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.site.journal.ledger import describe
from fedclaw.site.journal.spending import DataSetSpending, RunSpending

_LARGEST_IN_WORDS = 20.0

NOT_COVERED = (
    "People with several records in the data. For k records of one person, epsilon is up to k times as large, and "
    "delta grows by more than that.",
    "People whose records are held elsewhere too. Every site keeps a ledger of its own; what they spent adds up.",
    "What is true of a group. If a model learns that smokers fall ill more often, that says something about every "
    "smoker, whether or not they were in the data.",
    "The number of records, and results on test data where the site's policy lets them leave without noise.",
    "Constants that prepare the data, if the site computed them from its own records.",
    "Whatever left this organisation by another way than this software, and the security of its machines.",
)

_TRUST = {
    "nobody": "Noise was added here, before anything left: this holds against everybody.",
    "aggregation": "Every site added a share of the noise to a masked answer: this holds as long as enough of the "
    "other sites are honest.",
    "server": "The federation's server added the noise: this holds against everybody else, not against the server.",
    "everybody": "No noise was added.",
}


def meaning(item: DataSetSpending) -> list[str]:
    """What a data set's epsilon and delta say about one record in it."""
    if math.isinf(item.epsilon):
        return [
            "At least one run used these records without differential privacy. Nothing bounds what its results may "
            "reveal about single records, up to reproducing them, and nothing spent before or after changes that."
        ]
    if not item.charges:
        return ["Nothing has been spent: no run has been charged for using these records."]
    return [
        "Take any one record. Whatever can be concluded from all that left this site could have been concluded without "
        f"that record too, with a likelihood that differs by a factor of at most {factor(item.epsilon)} (e to the "
        f"power of epsilon), but for a chance of {chance(item.budget.delta)} (delta).",
        "In other words: somebody who thinks it a toss-up whether a certain record is in the data can become at most "
        f"{certainty(item.epsilon)} sure of it by what left, but for the same small chance.",
        "For orientation: an epsilon of up to 1 counts as strong protection, up to 10 as reasonable, and more as weak, "
        "though attacks seen in practice stay well below such bounds.",
    ]


def provided(trusted: Set[str]) -> list[str]:
    """What `meaning` depends on, by whom the receipts of a data set trust."""
    sentences = []
    if "server" in trusted:
        sentences.append(
            "This does not hold against the federation's server: in at least one run it added the noise itself, and "
            "saw this site's answers before."
        )
    if "aggregation" in trusted:
        sentences.append(
            "This holds as long as enough of the other sites are honest: in at least one run the noise was the sum of "
            "all sites' shares."
        )
    return sentences


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
    unit = " It hides this site's whole contribution." if receipt.get("unit") == "site" else ""
    return _TRUST.get(str(receipt.get("trust", "nobody")), "") + unit


def counted(run: RunSpending) -> str:
    """How often a run's rounds were charged, where that is not once each and settled."""
    notes = []
    if run.charges != run.rounds:
        notes.append(f"charged {run.charges} times")
    if run.open:
        notes.append(f"{run.open} open")
    return ", ".join(notes)
