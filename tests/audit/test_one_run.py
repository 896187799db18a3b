"""The one-run bound: against a linear programme, against the theorem that it sharpens, and how often it is wrong."""

import math
from bisect import bisect_left
from functools import lru_cache

import numpy as np
import pytest
from scipy import optimize, stats

from fedclaw.audit import one_run
from fedclaw.audit.bounds import gaussian_delta
from fedclaw.audit.one_run import (
    NoiseFamily,
    family_bound,
    guesses_of,
    one_run_bound,
    one_run_p_value,
)
from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import NoiseEvent, calibrate
from tests.chance import TINY

DELTA = 1e-5
SIZES = [(30, 30, 22), (50, 12, 12), (9, 4, 1), (40, 25, 13), (200, 84, 70)]


def theorem_of_2023(canaries, guesses, right, epsilon, delta):
    """Theorem 5.2 of Steinke, Nasr, Jagielski 2023, term by term."""
    chance = stats.binom.pmf(np.arange(guesses + 1), guesses, 1 / (1 + math.exp(-epsilon)))
    worst = max((sum(chance[right - i : right]) / i for i in range(1, right + 1)), default=0.0)
    return min(1.0, sum(chance[right:]) + 2 * canaries * delta * worst)


def programme(canaries, guesses, right, epsilon, delta):
    """The least eta + m delta a under the docstring's inequalities; variables eta, a, a_0 .. a_(k-1)."""
    rows = np.zeros((2 * guesses + 1, guesses + 2))
    rows[:, 0][: guesses + 1] = -1
    for count in range(guesses + 1):
        if count > 0:
            rows[count, 1 + count] = -count
        if count < guesses:
            rows[count, 2 + count] += (guesses - count) * math.exp(epsilon)
            rows[guesses + 1 + count, [1, 2 + count]] = -1, 1
    limits = np.concatenate([-(np.arange(guesses + 1) >= right).astype(float), np.zeros(guesses)])
    cost = np.concatenate([[1, canaries * delta], np.zeros(guesses)])
    return min(1.0, optimize.linprog(cost, A_ub=rows, b_ub=limits, bounds=(0, None), method="highs").fun)


@pytest.mark.parametrize(("canaries", "guesses", "right"), SIZES)
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_the_weights_are_the_best_there_are(canaries, guesses, right, epsilon, delta):
    found = one_run_p_value(canaries, guesses, right, [(epsilon, delta)])
    assert found == pytest.approx(programme(canaries, guesses, right, epsilon, delta), rel=1e-5, abs=1e-8)
    if found < 0.5:
        assert found <= theorem_of_2023(canaries, guesses, right, epsilon, delta) * (1 + 1e-9)


def all_at_once(canaries, guesses, right, profile):
    """The least eta + m sum delta_j a_j under the docstring's inequalities for all pairs, levels and counts."""
    pairs = len(profile)
    ratios = np.exp([epsilon for epsilon, _ in profile])
    rows = np.zeros((guesses + 1 + guesses * pairs, 1 + pairs + guesses * pairs))
    rows[: guesses + 1, 0] = -1
    for count in range(guesses + 1):
        if count > 0:
            rows[count, 1 + count * pairs : 1 + (count + 1) * pairs] = -count
        if count < guesses:
            rows[count, 1 + (count + 1) * pairs : 1 + (count + 2) * pairs] = (guesses - count) * ratios
    for level in range(guesses):
        for pair in range(pairs):
            row = guesses + 1 + level * pairs + pair
            rows[row, 1 + pair], rows[row, 1 + (level + 1) * pairs + pair] = -1, 1
    limits = np.concatenate([-(np.arange(guesses + 1) >= right).astype(float), np.zeros(guesses * pairs)])
    cost = np.concatenate([[1], canaries * np.array([delta for _, delta in profile]), np.zeros(guesses * pairs)])
    return optimize.linprog(cost, A_ub=rows, b_ub=limits, bounds=(0, None), method="highs").fun


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "mu"), [(300, 40, 38, 0.4), (10_000, 30, 28, 0.5), (100, 20, 20, 0.8)]
)
def test_pairs_together_come_near_the_best_there_is(canaries, guesses, right, mu):
    """And below what the best of them shows alone; never below the optimum of the whole programme."""
    profile = [(epsilon, gaussian_delta(mu, epsilon)) for epsilon in np.arange(0.1, 5.1, 0.2).tolist()]
    found, best = one_run_p_value(canaries, guesses, right, profile), all_at_once(canaries, guesses, right, profile)
    assert best * (1 - 1e-6) <= found <= 1.2 * best
    assert found < 0.95 * min(one_run_p_value(canaries, guesses, right, [pair]) for pair in profile)


def test_what_a_solver_proposes_counts_only_if_it_holds(monkeypatch):
    profile = [(epsilon, gaussian_delta(0.4, epsilon)) for epsilon in np.arange(0.1, 5.1, 0.2).tolist()]
    best, real = all_at_once(300, 40, 38, profile), one_run._proposed
    for factor in (0.5, 0.99):
        monkeypatch.setattr(one_run, "_proposed", lambda *asked, factor=factor: factor * real(*asked))
        assert one_run_p_value(300, 40, 38, profile) >= best
    monkeypatch.setattr(one_run, "_proposed", lambda *_: None)
    alone = min(one_run_p_value(300, 40, 38, [pair]) for pair in profile)
    assert one_run_p_value(300, 40, 38, profile) == pytest.approx(alone, rel=1e-6)


def test_one_guess_is_right_as_often_as_it_can_be():
    """(e^epsilon + delta) / (1 + e^epsilon), and of pure privacy a binomial tail: both exact."""
    assert one_run_p_value(1, 1, 1, [(0.7, 0.1)]) == pytest.approx((math.exp(0.7) + 0.1) / (1 + math.exp(0.7)))
    tail = stats.binom.sf(21, 30, 1 / (1 + math.exp(-0.7)))
    assert one_run_p_value(30, 30, 22, [(0.7, 0.0)]) == pytest.approx(tail)
    assert one_run_p_value(30, 30, 0, [(0.7, 0.0)]) == 1


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_all_right_refutes_up_to_a_known_epsilon(count):
    """accuracy^count = 0.05 is solved by hand."""
    accuracy = 0.05 ** (1 / count)
    assert one_run_bound(count, count, count, 0.0, 0.95) == pytest.approx(math.log(accuracy / (1 - accuracy)))


def test_bounds_grow_with_what_is_known():
    by_right = [one_run_bound(1000, 400, right, 1e-5, 0.95) for right in (200, 240, 300, 360, 400)]
    assert by_right[0] == 0
    assert by_right[1:] == sorted(by_right[1:])
    assert len(set(by_right)) == 5
    by_delta = [one_run_bound(1000, 400, 390, delta, 0.95) for delta in (0.0, 1e-5, 1e-4, 1e-3)]
    assert by_delta == sorted(by_delta, reverse=True)
    assert by_delta[0] > by_delta[-1]
    assert one_run_bound(1000, 400, 360, 1e-5, 0.95) > one_run_bound(1000, 400, 360, 1e-5, 0.9999)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_exceeds_its_epsilon_no_more_often_than_said(epsilon):
    """4000 runs of an epsilon-DP mechanism that reaches the bound: 5% may be wrong; 6.9% has a chance below 1e-7."""
    right = np.random.default_rng(1).binomial(200, 1 / (1 + math.exp(-epsilon)), 4000)
    wrong = np.mean([one_run_p_value(200, 200, int(count), [(epsilon, 0.0)]) <= 0.05 for count in right])
    assert 0.02 < wrong < 0.069


def test_a_mechanism_that_sometimes_tells_all_stays_within_its_delta():
    """With probability delta all coins are published; an audit that ignored delta would be wrong more often."""
    epsilon, delta, canaries, runs = 0.5, 0.1, 30, 4000
    generator = np.random.default_rng(2)
    told = generator.random(runs) < delta
    right = np.where(told, canaries, generator.binomial(canaries, 1 / (1 + math.exp(-epsilon)), runs))

    def wrong(stated: float) -> float:
        refuted = {count: one_run_bound(canaries, canaries, int(count), stated, 0.95) > epsilon for count in set(right)}
        return np.mean([refuted[count] for count in right])

    assert wrong(delta) < 0.069 < wrong(0.0)


def test_what_is_told_much_but_seldom_refutes_no_profile():
    """Once in 20 runs a randomised response, else nothing: as private as a Gaussian mechanism at every epsilon.

    Who takes the guesses for independent refutes it in every such run, at any confidence.
    """
    mu, told, canaries = 0.5, 0.05, 2000
    epsilons = np.linspace(0, 6, 241)
    least = np.array([gaussian_delta(mu, epsilon) for epsilon in epsilons])

    def is_dominated(answered: float) -> bool:
        excess = told * (math.exp(answered) - np.exp(epsilons)) / (1 + math.exp(answered))
        return bool(np.all(excess <= least))

    answered = max(epsilon for epsilon in epsilons if is_dominated(epsilon))
    accuracy = 1 / (1 + math.exp(-answered))
    profile = list(zip(epsilons.tolist(), least.tolist(), strict=True))
    right = int(stats.binom.ppf(0.5, canaries, accuracy))
    """At least so many are right in half of the runs that tell: with probability 0.025."""
    assert stats.binom.sf(right - 1, canaries, stats.norm.cdf(mu / 2)) < 1e-6
    assert 0.025 <= one_run_p_value(canaries, canaries, right, profile) < 0.15


def test_half_of_the_surest_guesses_are_in():
    assert [guesses_of(canaries) for canaries in (8, 36, 200, 1000, 10_000)] == [8, 36, 84, 190, 600]
    assert guesses_of(9) == 8


@lru_cache
def gaussian(epsilon: float) -> NoiseFamily:
    """One Gaussian step with the noise that epsilon takes."""
    return NoiseFamily((NoiseEvent(1.0, calibrate(epsilon, DELTA, 1.0, 1), 1),))


def right_guesses(canaries, mu, runs, seed):
    """(runs,): right guesses about canaries that each move a coordinate of their own by mu deviations."""
    generator, each = np.random.default_rng(seed), guesses_of(canaries) // 2
    counts = []
    for _ in range(runs):
        present = generator.random(canaries) < 0.5
        order = np.argsort(generator.normal(size=canaries) + mu * present)
        counts.append(int(present[order[-each:]].sum() + (~present[order[:each]]).sum()))
    return np.array(counts)


@pytest.mark.parametrize(
    "epsilon", [pytest.param(0.5, marks=pytest.mark.slow), 2.0, pytest.param(8.0, marks=pytest.mark.slow)]
)
def test_a_gaussian_step_exceeds_its_epsilon_no_more_often_than_said(epsilon):
    """Exactly at its claim, in 1500 runs: the bound exceeds it from a certain count on, which few runs reach."""
    family, canaries, runs = gaussian(epsilon), 1000, 1500
    guesses, claim, profile = guesses_of(canaries), family.epsilon(1.0, DELTA), family.profile(1.0)
    counts = right_guesses(canaries, 1 / family.events[0].noise_multiplier, runs, seed=3)
    for risk in (0.05, 0.5):
        likely = range(guesses // 2, guesses + 1)
        least = bisect_left(likely, -risk, key=lambda count: -one_run_p_value(canaries, guesses, count, profile))
        most = min(guesses, likely[0] + least - 1)
        assert family_bound(family, canaries, guesses, most, DELTA, 1 - risk) <= claim
        assert (counts > most).sum() <= stats.binom.isf(TINY, runs, risk)


SHARES = {  # (canaries, epsilon): median share of the accountant's epsilon at 95%, by the bound of 2023 and by this one
    (1000, 1.0): (0.19, 0.31),
    (1000, 2.0): (0.30, 0.49),
    (1000, 4.0): (0.35, 0.57),
    (1000, 8.0): (0.32, 0.58),
    (10_000, 0.5): (0.32, 0.45),
    (10_000, 1.0): (0.40, 0.55),
    (10_000, 2.0): (0.47, 0.65),
    (10_000, 4.0): (0.47, 0.67),
    (10_000, 8.0): (0.44, 0.69),
}


@pytest.mark.parametrize(
    ("canaries", "epsilon"),
    [case if case == (10_000, 2.0) else pytest.param(*case, marks=pytest.mark.slow) for case in SHARES],
)
def test_the_median_share_of_a_gaussian_steps_epsilon(canaries, epsilon):
    family, guesses = gaussian(epsilon), guesses_of(canaries)
    runs = 401 if canaries == 1000 else 61
    median = int(np.median(right_guesses(canaries, 1 / family.events[0].noise_multiplier, runs, seed=4)))
    share = family_bound(family, canaries, guesses, median, DELTA, 0.95) / epsilon
    assert share == pytest.approx(SHARES[canaries, epsilon][1], abs=0.05)
    assert share > SHARES[canaries, epsilon][0] + 0.05
    assert (canaries, epsilon) < (10_000, 2.0) or share > 0.6


def test_a_bound_of_any_mechanism_is_never_above_one_of_a_family():
    family = gaussian(2.0)
    anyway, there = (
        one_run_bound(10_000, 600, 480, DELTA, 0.95),
        family_bound(family, 10_000, 600, 480, DELTA, 0.95),
    )
    assert 0.5 < anyway < there - 0.2
    assert family_bound(family, 10_000, 600, 310, DELTA, 0.95) == one_run_bound(10_000, 600, 310, DELTA, 0.95) == 0


def test_a_sampled_mechanism_is_bounded_by_its_own_profile():
    """Of several sites with other rates and noise, the least private counts; more noise refutes no less."""
    events = tuple(NoiseEvent(rate, calibrate(3.0, DELTA, rate, 40), 40) for rate in (0.1, 0.3))
    family = NoiseFamily(events)
    assert family.epsilon(1.0, DELTA) == max(NoiseFamily((event,)).epsilon(1.0, DELTA) for event in events)
    assert 2.9 < family.epsilon(1.0, DELTA) <= 3.0
    assert family.epsilon(0.5, DELTA) > 3.0 > family.epsilon(2.0, DELTA)
    assert family.epsilon(1e-6, DELTA) == math.inf
    values = [one_run_p_value(400, 120, 85, family.profile(scale)) for scale in (0.5, 1.0, 2.0)]
    assert values == sorted(values, reverse=True)


def test_counts_and_confidence_are_checked():
    with pytest.raises(PrivacyError, match="as many guesses"):
        one_run_p_value(5, 10, 3, [(1.0, 1e-5)])
    with pytest.raises(PrivacyError, match="delta in"):
        one_run_p_value(5, 5, 3, [(1.0, 2.0)])
    with pytest.raises(PrivacyError, match="12 of 10"):
        one_run_p_value(20, 10, 12, [(1.0, 1e-5)])
    with pytest.raises(PrivacyError, match="confidence"):
        one_run_bound(10, 10, 3, 1e-5, 1.0)
