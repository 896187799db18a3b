"""The one-run audit: what the guesses about many canaries in one run refute, whatever the canaries have in common.

Each of m canaries is in the data or not by the toss of a fair coin. From what the run lets out, the attacker guesses
the coins of the k canaries that he is surest of. k is fixed beforehand; which canaries they are is not.

**Bound.** Suppose that for each canary, whatever the other coins are, the outputs with it and without it are
(epsilon, delta)-close in both directions. Let e = exp(epsilon), and let R be the number of right guesses. For a
count c, a number eta and weights 0 <= a_0, ..., a_(k-1) <= a with

    1[t >= c]  <=  eta + t a_(t-1) - (k - t) e a_t       for t = 0, ..., k,

    P[R >= c]  <=  eta + m delta a.

*Proof.* Put t = R and take expectations: P[R >= c] <= eta + sum_i E[a_(R_i) (1[guess i right] - e 1[guess i wrong])],
where R_i counts the right guesses about the others: a_(R-1) stands by the right guesses, and there R_i = R - 1; a_R by
the wrong ones, and there R_i = R. Given the coins of all others, h = a_(R_i) and the guess about i are functions of the
output alone. With P_1 and P_0 for the outputs with i and without, the i-th term is
1/2 (P_1 - e P_0)(h 1[guessed in]) + 1/2 (P_0 - e P_1)(h 1[guessed out]) <= 1/2 a delta + 1/2 a delta, since
0 <= h <= a. Summed over the m canaries this is m delta a. QED.

With W ~ Binomial(k, e / (1 + e)), b_t = P[W = t] and S_t = P[W >= t], the smallest weights for a given eta >= S_c are
a_(t-1) = max(0, S_max(t, c) - eta S_t) / (t b_t): from t = k down they turn each inequality into an equality, since
t b_t = (k - t + 1) e b_(t-1). Above c they fall (S_t / b_t does, as b is log-concave), so

    P[R >= c]  <=  min over eta of  eta + m delta max_(1 <= t <= c) max(0, S_c - eta S_t) / (t b_t).

This is the idea of Steinke, Nasr, Jagielski 2023 ("Privacy Auditing with One (1) Training Run", theorem 5.2), with half
of its delta and the best eta; for what is rare it is the smaller of the two.

**Profiles.** A mechanism whose whole privacy profile epsilon -> delta(epsilon) is known (f-DP) is close in the above
sense for every pair of it. Each pair bounds the same probability, so their minimum does: nothing is paid for trying
them all. Several pairs j together bound it further: with 0 <= a_(t,j) <= a_j and

    1[t >= c]  <=  eta + t sum_j a_(t-1,j) - (k - t) sum_j e_j a_(t,j)      for t = 0, ..., k,

    P[R >= c]  <=  eta + m sum_j delta_j a_j,

by the same proof for each j. A linear programme proposes eta and the a_j; whatever it says, they count only if the
smallest weights that they leave room for, from t = k down, keep all inequalities (`_certified`). A profile is the
hypothesis of Mahloujifar, Melis, Chaudhuri 2024 ("Auditing f-Differential Privacy in One Run").

A Gaussian mechanism is far more private at a small epsilon than its delta of 1e-5 says, and this is what makes the
bound tight. Neither bound asks that canaries be independent of one another: the worst mechanism, which tells much, but
seldom, is allowed for. A bound that counts on a central limit theorem (Agrawal et al. 2026, "Let's Ask Gauss") is
closer still, and does not allow for it.

**What a number means.** `one_run_bound` bounds epsilon of any mechanism. `family_bound` is a bound for mechanisms of
one family alone, those that the accountant assumes with more noise or less: it says how little noise of that kind
there can be. It is the sharper one, and no bound on epsilon of a mechanism of another kind.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse
from scipy.special import gammaln

from fedclaw.audit.bounds import check_confidence, check_counts, last_refuted
from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import SMALLEST_NOISE, NoiseEvent, epsilon_of

Profile = Sequence[tuple[float, float]]
"""Pairs (epsilon, delta) that all hold for one mechanism."""

DELTAS: tuple[float, ...] = tuple(np.geomspace(1e-12, 0.5, 60).tolist())
"""At which a mechanism's epsilon is asked for: they differ by 58%."""

_SURE = 6.0
_STEP = 1 / 32
_FINEST, _COARSEST = -5 * 32, 5 * 32
# A family's noise is tried from 1/32 to 32 times the accounted, in steps of 2.2%.
_SEARCHES = 60
_PAIRS, _SUREST = 24, 50.0
# Pairs at most, and their largest epsilon.
_WINDOW = 4.0
# Deviations, at most, below c.
_SLACKS = (1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
_SLACKEST = 1e-3
# Of what the solver proposes, and of a probability: room for its tolerance.
_GOLDEN = (math.sqrt(5) - 1) / 2


def guesses_of(canaries: int) -> int:
    """How many of the canaries are guessed: the surest ones, half to be in and half to be out.

    6 sqrt(canaries): near the best for one Gaussian step with 200 to 10,000 canaries, by simulation. It depends on
    nothing that is seen.
    """
    return 2 * max(1, min(canaries // 2, round(_SURE / 2 * math.sqrt(canaries))))


def one_run_p_value(canaries: int, guesses: int, right: int, profile: Profile) -> float:
    """An upper bound on the probability of at least `right` right guesses of a mechanism with this profile."""
    check_counts(guesses, right)
    if not (guesses <= canaries and all(epsilon >= 0 and 0 <= delta <= 1 for epsilon, delta in profile)):
        raise PrivacyError("an audit has as many guesses as canaries at most, epsilon >= 0 and delta in [0, 1]")
    return min(_p_values(canaries, guesses, right, profile, 1.0))


def _p_values(canaries: int, guesses: int, right: int, profile: Profile, known: float) -> Iterator[float]:
    """The bounds, the quicker first; `known` where one is not below that."""
    least = known
    for epsilon, delta in profile if right else ():
        least = min(least, _p_value(canaries, guesses, right, epsilon, delta, least))
    yield least
    if right and len(profile) > 1:
        yield _together(canaries, guesses, right, profile)


def one_run_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """The largest epsilon at `delta` that the guesses refute, of any mechanism; 0 if none."""
    check_confidence(confidence)
    return last_refuted(lambda epsilon: one_run_p_value(canaries, guesses, right, [(epsilon, delta)]) <= 1 - confidence)


@dataclass(frozen=True)
class NoiseFamily:
    """The mechanisms that an accountant assumes, with `scale` times their noise: `events`, of which each canary is
    subject to one."""

    events: tuple[NoiseEvent, ...]

    def epsilon(self, scale: float, delta: float) -> float:
        """By the accountant; of the least private of the events."""
        if any(event.noise_multiplier * scale < SMALLEST_NOISE for event in self.events):
            return math.inf
        return max(
            _epsilon(replace(event, noise_multiplier=event.noise_multiplier * scale), delta) for event in self.events
        )

    def profile(self, scale: float) -> Profile:
        """By the accountant, at DELTAS."""
        pairs = ((self.epsilon(scale, delta), delta) for delta in DELTAS)
        return [(epsilon, delta) for epsilon, delta in pairs if math.isfinite(epsilon)]


def family_bound(
    family: NoiseFamily, canaries: int, guesses: int, right: int, delta: float, confidence: float
) -> float:
    """Epsilon at `delta` of the mechanism of `family` with the least noise that the guesses refute; 0 if none.

    If the mechanism is of the family, this exceeds its epsilon with a probability of at most 1 - confidence.
    It is never below `one_run_bound`: both go by the same guesses, so in the family they err together, and outside of
    it that one alone is a bound.
    """
    check_confidence(confidence)
    if one_run_p_value(canaries, guesses, right, [(0.0, 0.0)]) > 1 - confidence:
        # A mechanism that lets nothing out is not refuted, so none is: no distributions need to be made.
        return 0.0

    def refuted(step: int) -> bool:
        scale = 2.0 ** (step * _STEP)
        values = _p_values(canaries, guesses, right, family.profile(scale), 1 - confidence)
        return any(value < 1 - confidence for value in values)

    step = _least(refuted)
    anyway = one_run_bound(canaries, guesses, right, delta, confidence)
    return anyway if step is None else max(anyway, family.epsilon(2.0 ** (step * _STEP), delta))


def _least(refuted: Callable[[int], bool]) -> int | None:
    """The smallest refuted step of noise, by bisection: with more noise a mechanism promises more."""
    if not refuted(_COARSEST):
        return None
    low, high = _FINEST, _COARSEST
    while high > low + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


@lru_cache(maxsize=1 << 16)
def _epsilon(event: NoiseEvent, delta: float) -> float:
    return epsilon_of([event], delta)


def _p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float, known: float) -> float:
    """The bound of the module's docstring for c = right >= 1; `known` where it is not below that.

    It is at least S_c, and at least m delta / c unless that is above 1, since S_c >= b_c.
    """
    if canaries * delta >= known * right:
        return known
    counts = np.arange(1, guesses + 1)
    chances = _log_binomial(guesses, counts, epsilon)
    tails = np.logaddexp.accumulate(chances[::-1])[::-1]
    least = min(0.0, float(tails[right - 1]))
    if delta == 0 or math.exp(least) >= known:
        return min(known, math.exp(least))
    log_weights = least - np.log(counts[:right]) - chances[:right]
    excess = tails[:right] - least

    def bound(eta: float) -> float:
        left = -np.expm1(np.minimum(0.0, math.log(eta) + excess)) if eta else np.ones(right)
        weights = np.exp(np.minimum(700.0, log_weights)) * left
        return eta + canaries * delta * float(weights.max())

    return min(known, _smallest(bound, math.exp(least), known))


def _together(canaries: int, guesses: int, right: int, profile: Profile) -> float:
    """The bound of several pairs at once; 1 where none is found."""
    pairs = _thinned(canaries, guesses, right, profile)
    if not pairs:
        return 1.0
    ratios, deltas = np.exp([epsilon for epsilon, _ in pairs]), np.array([delta for _, delta in pairs])
    proposed = _proposed(canaries, guesses, right, ratios, deltas)
    if proposed is None:
        return 1.0
    for slack in _SLACKS:
        eta, weights = proposed[0] * (1 + slack) + _SLACKEST * slack, proposed[1:] * (1 + slack)
        if _certified(guesses, right, ratios, weights, eta):
            return min(1.0, float(eta + canaries * (deltas @ weights)))
    return 1.0


def _thinned(canaries: int, guesses: int, right: int, profile: Profile) -> Profile:
    """At most _PAIRS of the pairs, by ascending epsilon, among which those that matter are: cheap, and not much surer
    than the guesses are right; and the surest of all, which costs next to nothing."""
    surest = math.log((right + 1) / (guesses - right + 1)) + 1
    cheap = sorted(pair for pair in profile if canaries * pair[1] < guesses and 0 < pair[0] < _SUREST)
    chosen = [pair for pair in cheap if pair[0] <= surest]
    places = np.unique(np.linspace(0, len(chosen) - 1, min(_PAIRS - 1, len(chosen))).round().astype(int))
    return [*(chosen[place] for place in places), *(pair for pair in cheap[-1:] if pair[0] > surest)]


def _proposed(
    canaries: int, guesses: int, right: int, ratios: NDArray[np.float64], deltas: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """(1 + J,): eta and the a_j that minimise the bound, but for the solver's tolerance; None if it finds none.

    Variables: eta, a_j, and a_(t,j) of the levels t that matter, some deviations of the binomial count below c, and one
    for all from c up. Whatever is left out costs tightness alone.
    """
    pairs = len(ratios)
    top = min(right, guesses - 1)
    lowest = max(0, right - math.ceil(_WINDOW * (1 + math.sqrt(guesses) / 2)))
    levels = np.arange(lowest, top + 1)
    first = 1 + pairs
    rows = sparse.lil_matrix((len(levels) + 1, first + len(levels) * pairs))
    limits = np.zeros(len(levels) + 1)
    for row, count in enumerate([*levels.tolist(), top + 1]):
        rows[row, 0] = -1
        below, at = count - 1 - lowest, min(count, top) - lowest
        if below >= 0:
            rows[row, first + below * pairs : first + (below + 1) * pairs] = -float(count)
        if count < guesses:
            place = slice(first + at * pairs, first + (at + 1) * pairs)
            rows[row, place] = rows[row, place].toarray() + (guesses - count) * ratios
        limits[row] = -float(count >= right)
    each = sparse.identity(pairs)
    caps = sparse.hstack(
        [
            sparse.csr_matrix((len(levels) * pairs, 1)),
            -sparse.vstack([each] * len(levels)),
            sparse.identity(len(levels) * pairs),
        ]
    )
    cost = np.concatenate([[1.0], canaries * deltas, np.zeros(len(levels) * pairs)])
    found = optimize.linprog(
        cost,
        A_ub=sparse.vstack([rows.tocsr(), caps.tocsr()]),
        b_ub=np.concatenate([limits, np.zeros(len(levels) * pairs)]),
        bounds=(0, None),
        method="highs",
    )
    return None if found.x is None else np.maximum(0.0, found.x[:first])


def _certified(guesses: int, right: int, ratios: NDArray[np.float64], weights: NDArray[np.float64], eta: float) -> bool:
    """Whether there are weights that keep all inequalities: the smallest, with the smallest e_j first, from the top."""
    room = np.concatenate([[0.0], np.cumsum(weights)])
    price = np.concatenate([[0.0], np.cumsum(weights * ratios)])
    weight = 0.0
    for count in range(guesses, 0, -1):
        wrong = float(np.interp(weight, room, price))
        weight = max(0.0, ((guesses - count) * wrong + (count >= right) - eta) / count)
        if weight > room[-1]:
            return False
    return bool(guesses * float(np.interp(weight, room, price)) <= eta)


def _log_binomial(guesses: int, counts: NDArray[np.int64], epsilon: float) -> NDArray[np.float64]:
    """log P[W = count]."""
    choices = gammaln(guesses + 1) - gammaln(counts + 1) - gammaln(guesses - counts + 1)
    right, wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    return np.asarray(choices + counts * right + (guesses - counts) * wrong)


def _smallest(function: Callable[[float], float], low: float, high: float) -> float:
    """The least value that a convex function is found to have between `low` and `high`, by golden section."""
    ends = [function(low), function(high)]
    one, two = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_one, at_two = function(one), function(two)
    for _ in range(_SEARCHES):
        if at_one <= at_two:
            high, two, at_two = two, one, at_one
            one = high - _GOLDEN * (high - low)
            at_one = function(one)
        else:
            low, one, at_one = one, two, at_two
            two = low + _GOLDEN * (high - low)
            at_two = function(two)
        ends.append(min(at_one, at_two))
    return min(ends)
