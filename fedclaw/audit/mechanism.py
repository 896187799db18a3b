"""What a probed mechanism lets through: guesses of its canary, the canary's own size, and its noise.

Questions, each with a bound of its own:

    told beside      do the numbers that leave with the noised ones tell whether the canary is there?
    canary guesses   can the adversary tell whether the canary is there? (attack; Nasr et al. 2023)
    canary size      does the canary move what leaves by more than the clipping bound allows?
    noise scale      is the noise at the wire as large as the claim needs?
    shared noise     does the noise of one answer tell about that of another?
    separate shares  where sites bring parts of one noise: does one part tell about the others?

The first compares, and is never wrong; the guesses assume nothing of the mechanism but that its claim is that of a
Gaussian one. The others take what is left
when the known signal is taken away for independent Gaussian noise, of which every coordinate is a sample: thousands
of them in each answer, so that a scale that is a few per cent too small is seen within a few answers.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from fedclaw.audit.bounds import (
    LARGEST_EPSILON,
    any_guessing_bound,
    gaussian_delta,
    gaussian_epsilon,
    guessing_bound,
    largest_deviation,
)
from fedclaw.audit.findings import Finding
from fedclaw.audit.probe import Probe, guaranteed
from fedclaw.audit.subject import coins
from fedclaw.progress import Progress

log = logging.getLogger(__name__)

_ALMOST_ONE = 1 - 1e-12
_COMPARED = 1 << 17
# Numbers of an answer's noise that are compared with another's.
_LEAST_OVERLAP = 64
# Numbers of two shifted vectors that a correlation is taken of.
_MIDDLE = 0.5
# Between the canary's absence, 0, and its presence, 1.
_LEARNT, _FEWEST_LEARNT, _MOST_LEARNT = 0.1, 10, 50
# Share, and least and most number, of the trials that show where the middle is.
_REACH = 0.6
# Of the claimed epsilon: what the guesses are to show, where there are trials enough.
_WEIGHT = 8
# Of the guesses among the checks of a mechanism: the others measure, and lose little by being surer.
_SURE = 5.0
# Standard errors that it has to be off to be moved.


@dataclass(frozen=True)
class Trials:
    """What repeated releases of one probe showed.

    `scores` (T,) are their coordinates along the canary's direction, in units of the sensitivity; `squares` is the sum
    of squares of `degrees` other coordinates.
    """

    present: NDArray[np.bool_]
    scores: NDArray[np.float64]
    squares: float
    degrees: int

    def guessed(self) -> tuple[int, int]:
        """Guesses, and how many were right: a canary, if the score is nearer to what it is with one than without.

        That is 0 and 1, as the mechanism has it; but a canary that is larger than it may be moves the middle, so the
        first trials say where that is and are not guessed.
        """
        learnt = min(_MOST_LEARNT, max(_FEWEST_LEARNT, round(_LEARNT * len(self.scores))))
        there, away = self.scores[:learnt][self.present[:learnt]], self.scores[:learnt][~self.present[:learnt]]
        middle = _MIDDLE
        if len(there) and len(away):
            seen = float(there.mean() + away.mean()) / 2
            error = math.sqrt(self.squares / self.degrees * (1 / len(there) + 1 / len(away))) / 2
            middle = seen if seen > _MIDDLE + _SURE * error else _MIDDLE
        right = (self.scores[learnt:] > middle) == self.present[learnt:]
        return len(right), int(right.sum())


def enough_trials(probe: Probe, alarm: float, risk: float, most: int) -> int:
    """Trials after which half the noise is seen by guessing alone, but for one case in a thousand, and after which
    more often than not the bound, at this `risk`, is _REACH of the claimed epsilon; `most` at most.

    By the normal approximation: a guess is right with probability Phi(mu / 2), with half the noise Phi(mu).
    """
    mu = 1 / guaranteed(probe.epsilon, probe.delta)
    honest, faulty = float(stats.norm.cdf(mu / 2)), float(stats.norm.cdf(mu))
    spread = stats.norm.isf(alarm) * math.sqrt(honest * (1 - honest))
    spread += stats.norm.isf(1e-3) * math.sqrt(faulty * (1 - faulty))
    seen = float(spread) / (faulty - honest)
    least = float(stats.norm.cdf(_gaussian_mu(_REACH * probe.epsilon, probe.delta) / 2))
    reached = float(stats.norm.isf(risk)) * math.sqrt(honest * (1 - honest)) / (honest - least)
    return min(most, max(100, math.ceil(1.2 * max(seen, reached) ** 2)))


def _gaussian_mu(epsilon: float, delta: float) -> float:
    """The sensitivity over the deviation of the noise that keeps exactly that."""
    return float(optimize.brentq(lambda mu: gaussian_delta(mu, epsilon) - delta, 1e-6, 1e3))


def run_trials(probe: Probe, count: int) -> Trials:
    """Release `count` times, each with the canary in or out by the toss of a coin."""
    present, scores, squares, degrees = coins(count), np.empty(count), 0.0, 0
    progress = Progress(log, f"releases, {probe.label}", count)
    for trial, there in enumerate(present):
        progress.done(trial)
        released = probe.release(bool(there))
        scores[trial] = released @ probe.direction
        rest = released - scores[trial] * probe.direction
        squares += float(rest @ rest)
        degrees += len(released) - 1
    return Trials(present, scores, squares, degrees)


def examine(probe: Probe, trials: Trials) -> list[Finding]:
    """All that is asked of a mechanism."""
    found = [
        _told(probe),
        _guesses(probe, trials),
        _size(probe, trials),
        _scale(probe, trials),
        _shared(probe, probe.echoes()),
    ]
    return [*found, _apart(probe, trials)] if probe.shares > 1 else found


def _told(probe: Probe) -> Finding:
    """A number without noise that differs with the canary gives it away, whatever the noise is."""
    there, away = probe.told(True), probe.told(False)
    lower = 0.0 if there == away else LARGEST_EPSILON
    return Finding(
        name="told beside",
        subject=probe.label,
        kind="attack",
        epsilon_claimed=probe.epsilon,
        bound=lambda _: lower,
        bound_any=lambda _: lower,
        weight=0,
        seen="numbers and receipts are the same without the canary" if there == away else "other numbers or receipts",
        fault="the numbers or the receipt beside the answer tell whether one canary is there",
    )


def _guesses(probe: Probe, trials: Trials) -> Finding:
    count, right = trials.guessed()
    return Finding(
        name="canary guesses",
        subject=probe.label,
        kind="attack",
        epsilon_claimed=probe.epsilon,
        bound=lambda confidence: guessing_bound(count, right, probe.delta, confidence),
        bound_any=lambda confidence: any_guessing_bound(count, right, probe.delta, confidence),
        weight=_WEIGHT,
        seen=f"{right} of {count} guesses right",
        fault="whether one canary is there can be told too often: too little noise, or too large a contribution",
    )


def _measured(probe: Probe, name: str, bound: Callable[[float], float], *, seen: str, fault: str) -> Finding:
    return Finding(
        name=name,
        subject=probe.label,
        kind="measurement",
        epsilon_claimed=probe.epsilon,
        bound=bound,
        seen=seen,
        fault=fault,
    )


def _size(probe: Probe, trials: Trials) -> Finding:
    there, away = trials.scores[trials.present], trials.scores[~trials.present]
    if not (len(there) and len(away)):
        there, away = np.zeros(1), np.zeros(1)
    moved = float(there.mean() - away.mean())
    error = _deviation(trials) * math.sqrt(1 / len(there) + 1 / len(away))
    needed = guaranteed(probe.epsilon, probe.delta)

    def bound(confidence: float) -> float:
        """With the noise that the claim needs."""
        least = moved - float(stats.norm.ppf(confidence)) * error
        return gaussian_epsilon(least / needed, probe.delta)

    return _measured(
        probe,
        "canary size",
        bound,
        seen=f"the canary moves the release by {moved:.3g} +- {error:.2g} of the sensitivity",
        fault="one contribution is larger than the clipping bound allows: clipping is off or wrong",
    )


def _scale(probe: Probe, trials: Trials) -> Finding:
    needed = guaranteed(probe.epsilon, probe.delta)

    def bound(confidence: float) -> float:
        """With a canary that reaches the sensitivity."""
        most = largest_deviation(probe.counted * trials.squares, trials.degrees, confidence)
        return gaussian_epsilon(1 / most, probe.delta) if most else LARGEST_EPSILON

    return _measured(
        probe,
        "noise scale",
        bound,
        seen=f"deviation {_deviation(trials):.4g} of the sensitivity; the claim needs "
        f"{needed / math.sqrt(probe.counted):.4g}",
        fault="the noise at the wire is smaller than the claim needs: noise off, scaled down, or for a smaller "
        "sensitivity than that of the weights used",
    )


def _shared(probe: Probe, echoes: Mapping[str, NDArray[np.float64]]) -> Finding:
    """Who knows the other answer's noise knows a part, correlation squared, of this one's variance."""
    alike = most_alike({name: noise[:_COMPARED] for name, noise in echoes.items()})

    def bound(confidence: float) -> float:
        """What is left of the noise, if the correlation is no accident."""
        risk = 1 - confidence
        if alike.chance > risk:
            return 0.0
        # Fisher's z, at the confidence that one of so many tries needs.
        spread = float(stats.norm.isf(risk / (2 * alike.tried))) / math.sqrt(max(1, alike.overlap - 3))
        least = max(0.0, math.atanh(min(alike.correlation, _ALMOST_ONE)) - spread)
        return _left(probe, math.tanh(least))

    return _measured(
        probe,
        "shared noise",
        bound,
        seen=f"largest correlation {alike.correlation:.3g}, of {alike.first} and {alike.second}",
        fault=f"{alike.first} and {alike.second} have the same noise: a seed or a source is shared, and one answer "
        "takes the noise off the other",
    )


def _apart(probe: Probe, trials: Trials) -> Finding:
    """Parts that are alike add up to more than independent ones: by 1 + (shares - 1) x their correlation."""
    expected = guaranteed(probe.epsilon, probe.delta) ** 2 / probe.counted

    def correlation(variance: float) -> float:
        return min(1.0, max(0.0, (variance / expected - 1) / (probe.shares - 1)))

    def bound(confidence: float) -> float:
        """What is left of the others' noise for a site that knows its own."""
        variance = trials.squares / float(stats.chi2.ppf(confidence, trials.degrees))
        alike = correlation(variance)
        return _left(probe, alike) if alike else 0.0

    return _measured(
        probe,
        "separate shares",
        bound,
        seen=f"correlation {correlation(_deviation(trials) ** 2):.3g} between the parts of {probe.shares} sites",
        fault="the parts of the noise that sites bring are alike: a seed or a source is shared, and each site can take "
        "the others' noise off the sum",
    )


@dataclass(frozen=True)
class Alike:
    """The two of several vectors that are most alike, where they are shifted against each other most tellingly."""

    first: str
    second: str
    correlation: float
    """Absolute, of the numbers that overlap."""
    overlap: int
    tried: int
    """Pairs and shifts that were looked at."""

    @property
    def chance(self) -> float:
        """The probability of so large a correlation among so many tries of independent normals, at most.

        r sqrt((n - 1) / (1 - r^2)) of n pairs with mean zero has Student's distribution with n - 1 degrees.
        """
        freedom = self.overlap - 1
        ratio = self.correlation * math.sqrt(freedom / (1 - min(self.correlation, _ALMOST_ONE) ** 2))
        return min(1.0, 2 * self.tried * float(stats.t.sf(ratio, freedom)))


def most_alike(vectors: Mapping[str, NDArray[np.float64]]) -> Alike:
    """Compare all pairs of vectors (d,), at shifts of up to half their length if that leaves enough to compare.

    Two sites that share a stream need not stand at the same place of it.
    """
    (length,) = {len(vector) for vector in vectors.values()}
    reach = max(0, min(length // 2, length - _LEAST_OVERLAP))
    shifts = np.arange(-reach, reach + 1)
    overlaps = length - np.abs(shifts)
    pairs = list(combinations(vectors, 2))
    best, most = Alike(*pairs[0], 0.0, length, 1), -1.0
    for first, second in pairs:
        found = np.abs(_correlations(vectors[first], vectors[second], shifts))
        weight = -overlaps * np.log1p(-(np.minimum(found, _ALMOST_ONE) ** 2))
        at = int(np.argmax(weight))
        if weight[at] > most:
            most = float(weight[at])
            best = Alike(first, second, float(found[at]), int(overlaps[at]), len(pairs) * len(shifts))
    return best


def _correlations(
    first: NDArray[np.float64], second: NDArray[np.float64], shifts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """sum_i first_(i + shift) second_i over the norms of what overlaps, by the discrete Fourier transform."""
    length = len(first)
    product = np.fft.irfft(np.fft.rfft(first, 2 * length) * np.conj(np.fft.rfft(second, 2 * length)), 2 * length)
    squares = [np.concatenate([[0.0], np.cumsum(vector**2)]) for vector in (first, second)]
    low, high = np.maximum(0, shifts), length + np.minimum(0, shifts)
    norms = (squares[0][high] - squares[0][low]) * (squares[1][high - shifts] - squares[1][low - shifts])
    norms = np.sqrt(np.maximum(norms, 0.0))
    return np.asarray(np.divide(product[shifts], norms, out=np.zeros(len(shifts)), where=norms > 0).clip(-1, 1))


def _left(probe: Probe, correlation: float) -> float:
    """Epsilon for somebody who knows noise that has this correlation with the noise that protects."""
    left = guaranteed(probe.epsilon, probe.delta) * math.sqrt(1 - correlation**2)
    return gaussian_epsilon(1 / left, probe.delta) if left else LARGEST_EPSILON


def _deviation(trials: Trials) -> float:
    return math.sqrt(trials.squares / trials.degrees)
