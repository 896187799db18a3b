"""Lower bounds on epsilon from the success of an attack, at a given confidence.

All bounds mean the same: if the mechanism is as private as claimed, the bound exceeds the claim with probability at
most 1 - confidence. A bound below the claim proves nothing.
"""

import math
from collections.abc import Callable

from scipy import stats
from scipy.special import log_ndtr

from fedclaw.errors import PrivacyError

LARGEST_EPSILON = 1e4
"""The largest bound that is reported: at this size there is no privacy left."""

_HALVINGS = 40


def guessing_bound(trials: int, right: int, delta: float, confidence: float) -> float:
    """A lower bound on epsilon at `delta` of a Gaussian mechanism, from one canary in independent trials.

    In each trial the canary is in by the toss of a fair coin, and the attacker guesses. Against a mechanism that is
    mu-GDP a guess is right with probability Phi(mu / 2) at most (Dong, Roth, Su 2022, section 2), so an exact binomial
    bound on that probability bounds mu from below; as Nasr et al. 2023 ("Tight Auditing of Differentially Private
    Machine Learning", section 4).
    """
    return gaussian_epsilon(2 * float(stats.norm.ppf(max(0.5, least_rate(trials, right, confidence)))), delta)


def any_guessing_bound(trials: int, right: int, delta: float, confidence: float) -> float:
    """The same of any mechanism: a guess is right with probability (e^epsilon + delta) / (1 + e^epsilon) at most.

    Kairouz, Oh, Viswanath 2015 ("The Composition Theorem for Differential Privacy", theorem 2.1).
    """
    rate = least_rate(trials, right, confidence)
    return math.log((rate - delta) / (1 - rate)) if 0.5 * (1 + delta) < rate else 0.0


def attack_bound(hits: int, members: int, false_alarms: int, others: int, delta: float, confidence: float) -> float:
    """log((true positive rate - delta) / false positive rate), each rate bounded (Clopper-Pearson) at half the risk.

    Also of the attack turned round, log((1 - false positive rate - delta) / (1 - true positive rate)), from the same
    two bounds; the larger counts. Jagielski, Ullman, Oprea 2020 ("Auditing Differentially Private Machine Learning").
    """
    half = 1 - (1 - confidence) / 2
    hit_rate = least_rate(members, hits, half)
    alarm_rate = 1 - least_rate(others, others - false_alarms, half)
    ratios = ((hit_rate - delta) / alarm_rate, (1 - alarm_rate - delta) / (1 - hit_rate))
    return min(LARGEST_EPSILON, max([0.0, *(math.log(ratio) for ratio in ratios if ratio > 0)]))


def least_rate(trials: int, successes: int, confidence: float) -> float:
    """The one-sided lower confidence bound of a probability (Clopper, Pearson 1934)."""
    check_counts(trials, successes)
    check_confidence(confidence)
    return float(stats.beta.ppf(1 - confidence, successes, trials - successes + 1)) if successes else 0.0


def largest_deviation(sum_of_squares: float, degrees: int, confidence: float) -> float:
    """The one-sided upper confidence bound of the standard deviation of normals with mean zero."""
    if degrees < 1 or not sum_of_squares >= 0:
        raise PrivacyError("a deviation is estimated from at least one number")
    check_confidence(confidence)
    return math.sqrt(sum_of_squares / float(stats.chi2.ppf(1 - confidence, degrees)))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The delta at `epsilon` of the Gaussian mechanism with sensitivity / deviation = mu (Balle, Wang 2018, thm 8)."""
    if mu <= 0:
        return 0.0
    first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return max(0.0, float(math.exp(first) * -math.expm1(min(0.0, second - first))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon at `delta` of the Gaussian mechanism with sensitivity / deviation = mu; LARGEST_EPSILON at most."""
    if not 0 < delta < 1:
        raise PrivacyError(f"delta lies in (0, 1), not {delta}")
    if not mu < math.inf:
        return LARGEST_EPSILON
    return last_refuted(lambda epsilon: gaussian_delta(mu, epsilon) > delta)


def last_refuted(refuted: Callable[[float], bool]) -> float:
    """The largest refuted epsilon, by bisection: all from 0 up to it are refuted."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
        if high > LARGEST_EPSILON:
            return LARGEST_EPSILON
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def check_counts(trials: int, successes: int) -> None:
    """Raises PrivacyError."""
    if not (trials >= 1 and 0 <= successes <= trials):
        raise PrivacyError(f"{successes} of {trials} is no count of successes among trials")


def check_confidence(confidence: float) -> None:
    """Raises PrivacyError."""
    if not 0 < confidence < 1:
        raise PrivacyError(f"a confidence lies between 0 and 1, not {confidence}")
