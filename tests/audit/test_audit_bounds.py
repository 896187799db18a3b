"""Lower bounds on epsilon: known answers, monotonicity, and how often they are wrong."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from fedclaw.audit.bounds import (
    LARGEST_EPSILON,
    attack_bound,
    gaussian_delta,
    gaussian_epsilon,
    guessing_bound,
    largest_deviation,
    least_rate,
    one_run_bound,
    one_run_p_value,
)
from fedclaw.errors import PrivacyError


def slow_p_value(canaries, guesses, right, epsilon, delta):
    """Theorem 5.2, term by term."""
    accuracy = math.exp(epsilon) / (1 + math.exp(epsilon))
    chance = [math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k) for k in range(guesses + 1)]
    worst = max((sum(chance[right - i : right]) / i for i in range(1, right + 1)), default=0.0)
    return min(1.0, sum(chance[right:]) + 2 * canaries * delta * worst)


@pytest.mark.parametrize(("canaries", "guesses", "right"), [(30, 30, 22), (50, 12, 12), (9, 4, 0), (40, 25, 13)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
def test_the_p_value_is_that_of_the_theorem(canaries, guesses, right, epsilon, delta):
    wanted = slow_p_value(canaries, guesses, right, epsilon, delta)
    assert one_run_p_value(canaries, guesses, right, epsilon, delta) == pytest.approx(wanted, rel=1e-9)


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
    assert guessing_bound(500, 400, 1e-5, 0.95) > guessing_bound(500, 350, 1e-5, 0.95) > 0
    assert guessing_bound(500, 240, 1e-5, 0.95) == 0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_exceeds_its_epsilon_no_more_often_than_said(epsilon):
    """4000 runs of an epsilon-DP mechanism that reaches the bound: 5% may be wrong; 6.9% has a chance below 1e-7."""
    runs, canaries = 4000, 200
    right = np.random.default_rng(1).binomial(canaries, 1 / (1 + math.exp(-epsilon)), runs)
    bound = {count: one_run_bound(canaries, canaries, int(count), 0.0, 0.95) for count in set(right)}
    wrong = np.mean([bound[count] > epsilon for count in right])
    assert 0.02 < wrong < 0.069


def test_a_mechanism_that_sometimes_tells_all_stays_within_its_delta():
    """With probability delta all coins are published; an audit that ignored delta would be wrong more often."""
    epsilon, delta, canaries, runs = 0.5, 0.1, 30, 4000
    generator = np.random.default_rng(2)
    told = generator.random(runs) < delta
    right = np.where(told, canaries, generator.binomial(canaries, 1 / (1 + math.exp(-epsilon)), runs))

    def wrong(stated: float) -> float:
        bound = {count: one_run_bound(canaries, canaries, int(count), stated, 0.95) for count in set(right)}
        return np.mean([bound[count] > epsilon for count in right])

    assert wrong(delta) < 0.069 < wrong(0.0)


def test_guesses_against_a_gaussian_mechanism_are_wrong_as_often_as_said():
    mu, trials, runs, delta = 1.0, 300, 4000, 1e-5
    right = np.random.default_rng(3).binomial(trials, stats.norm.cdf(mu / 2), runs)
    bound = {count: guessing_bound(trials, int(count), delta, 0.95) for count in set(right)}
    truth = gaussian_epsilon(mu, delta)
    wrong = np.mean([bound[count] > truth for count in right])
    assert 0.02 < wrong < 0.069
    assert np.median([bound[count] for count in right]) > 0.7 * truth


def test_an_attack_is_bounded_from_both_sides():
    """Clopper-Pearson by hand where it has a closed form: 0 of n and n of n at 97.5% each."""
    low = 0.025 ** (1 / 100)
    assert least_rate(100, 100, 0.975) == pytest.approx(low)
    assert attack_bound(100, 100, 0, 100, 0.0, 0.95) == pytest.approx(math.log(low / (1 - low)))
    assert attack_bound(50, 100, 50, 100, 0.0, 0.95) == 0
    both = attack_bound(90, 100, 10, 100, 1e-3, 0.95)
    assert attack_bound(90, 100, 50, 100, 1e-3, 0.95) < both
    assert attack_bound(10, 10, 0, 10, 0.999, 0.95) == 0


@pytest.mark.parametrize("mu", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_the_gaussian_curve_is_that_of_the_accountant(mu, delta):
    grid = privacy_loss_distribution.from_gaussian_mechanism(1 / mu, value_discretization_interval=1e-4)
    assert gaussian_epsilon(mu, delta) == pytest.approx(grid.get_epsilon_for_delta(delta), rel=2e-3)
    assert gaussian_delta(mu, gaussian_epsilon(mu, delta)) == pytest.approx(delta, rel=1e-6)


def test_extremes_of_the_gaussian_curve():
    assert gaussian_epsilon(0.0, 1e-5) == 0
    assert gaussian_epsilon(math.inf, 1e-5) == LARGEST_EPSILON
    assert gaussian_epsilon(30.0, 1e-5) == pytest.approx(30.0**2 / 2 + 30 * stats.norm.isf(1e-5), rel=1e-2)


def test_a_deviation_is_bounded_from_above():
    generator = np.random.default_rng(4)
    squares = (generator.normal(scale=2.0, size=(2000, 50)) ** 2).sum(axis=1)
    below = np.mean([largest_deviation(total, 50, 0.95) < 2.0 for total in squares])
    assert 0.02 < below < 0.079
    assert largest_deviation(0.0, 50, 0.95) == 0


def test_counts_and_confidence_are_checked():
    with pytest.raises(PrivacyError, match="12 of 10"):
        least_rate(10, 12, 0.95)
    with pytest.raises(PrivacyError, match="as many guesses"):
        one_run_p_value(5, 10, 3, 1.0, 1e-5)
    with pytest.raises(PrivacyError, match="confidence"):
        one_run_bound(10, 10, 3, 1e-5, 1.0)
    with pytest.raises(PrivacyError, match="delta"):
        gaussian_epsilon(1.0, 0.0)
    with pytest.raises(PrivacyError, match="at least one"):
        largest_deviation(1.0, 0, 0.9)
