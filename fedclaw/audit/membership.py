"""Membership inference on a whole run: which examples were in the training data, judging by their scores?

The one-run audit guesses the canaries' coins: the best scores were in, the worst were not (Steinke, Nasr, Jagielski
2023). The membership inference attack asks the same of the sites' own examples, by their loss (Yeom, Giacomelli,
Fredrikson, Jha 2018, "Privacy Risk in Machine Learning"), compared with the initial model's, so that an example that
is easy for everybody does not count as known (the idea of Carlini et al. 2022, "Membership Inference Attacks From First
Principles", with one reference).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedclaw.audit.bounds import attack_bound, least_rate, one_run_bound
from fedclaw.audit.findings import Finding

_SHARES = (1 / 32, 1 / 8, 1 / 4, 1 / 2)
# Of the canaries that are guessed to be in, and as many to be out: few sure guesses or many unsure ones.
_FALSE_ALARMS = 0.01
_FEWEST = 20
_CONFIDENCE = 0.95
# Of the intervals that are only shown.


@dataclass(frozen=True)
class Claim:
    """What a run claims for single examples; `epsilon` None: nothing."""

    label: str
    epsilon: float | None
    delta: float


def one_run(claim: Claim, scores: NDArray[np.float64], present: NDArray[np.bool_], how: str) -> Finding:
    """The one-run audit of canaries with these scores, (m,). `how` names what the scores are based on."""
    count = len(scores)
    order = np.argsort(scores)
    guessed: dict[int, int] = {}
    for share in _SHARES:
        each = max(1, int(share * count))
        guessed[2 * each] = int(present[order[count - each :]].sum() + (~present[order[:each]]).sum())

    def bound(confidence: float) -> float:
        """The best of the numbers of guesses; the risk is shared out among them."""
        each = 1 - (1 - confidence) / len(guessed)
        return max(one_run_bound(count, tried, right, claim.delta, each) for tried, right in guessed.items())

    best = max(guessed, key=lambda tried: one_run_bound(count, tried, guessed[tried], claim.delta, _CONFIDENCE))
    return Finding(
        name=f"one run, {how}",
        subject=claim.label,
        kind="attack",
        epsilon_claimed=claim.epsilon,
        bound=bound,
        seen=f"{guessed[best]} of {best} guesses about {count} canaries right",
        fault="too many of the planted examples can be told from those that were left out",
    )


def membership(
    claim: Claim, scores: NDArray[np.float64], present: NDArray[np.bool_], generator: np.random.Generator, how: str
) -> Finding | None:
    """The membership inference attack on examples with these scores, (E,); None if there are too few.

    The threshold is chosen on one half and counted on the other. The rates' bounds take the examples of one run to be
    independent trials; the one-run audit does without that.
    """
    half = np.zeros(len(scores), np.bool_)
    half[generator.permutation(len(scores))[: len(scores) // 2]] = True
    sides = [scores[chosen & inside] for chosen in (half, ~half) for inside in (present, ~present)]
    if min(len(side) for side in sides) < _FEWEST:
        return None
    threshold = _best_threshold(sides[0], sides[1], claim.delta)
    hits, alarms = int((sides[2] > threshold).sum()), int((sides[3] > threshold).sum())
    return Finding(
        name=f"membership inference, {how}",
        subject=claim.label,
        kind="attack",
        epsilon_claimed=claim.epsilon,
        bound=lambda sure: attack_bound(hits, len(sides[2]), alarms, len(sides[3]), claim.delta, sure),
        seen=_curve(scores[present], scores[~present]),
        fault=f"training examples can be told from others by their {how}",
    )


def auc(members: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float]:
    """The probability that a member has the larger score, ties counted half, and its standard error.

    The error is that of Hanley, McNeil 1982 ("The Meaning and Use of the Area under a ROC Curve").
    """
    ranks = stats.rankdata(np.concatenate([members, others]))
    a, b = len(members), len(others)
    area = (float(ranks[:a].sum()) - a * (a + 1) / 2) / (a * b)
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (a - 1) * (one - area**2) + (b - 1) * (two - area**2)) / (a * b)
    return area, math.sqrt(max(0.0, variance))


def _best_threshold(members: NDArray[np.float64], others: NDArray[np.float64], delta: float) -> float:
    candidates = np.quantile(np.concatenate([members, others]), np.linspace(0.02, 0.98, 49))

    def value(threshold: float) -> float:
        hits, alarms = int((members > threshold).sum()), int((others > threshold).sum())
        return attack_bound(hits, len(members), alarms, len(others), delta, _CONFIDENCE)

    return float(max(candidates, key=value))


def _curve(members: NDArray[np.float64], others: NDArray[np.float64]) -> str:
    area, error = auc(members, others)
    threshold = float(np.quantile(others, 1 - _FALSE_ALARMS, method="higher"))
    hits = int((members > threshold).sum())
    sure = 1 - (1 - _CONFIDENCE) / 2
    low, high = least_rate(len(members), hits, sure), 1 - least_rate(len(members), len(members) - hits, sure)
    return (
        f"AUC {area:.3f} +- {error:.3f}; {hits / len(members):.1%} of the members found at {_FALSE_ALARMS:.0%} false "
        f"alarms (95%: {low:.1%} to {high:.1%})"
    )
