"""Lower bounds on epsilon: known answers, monotonicity, and how often they are wrong."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from fedclaw.audit.bounds import (
    LARGEST_EPSILON,
    any_guessing_bound,
    attack_bound,
    gaussian_delta,
    gaussian_epsilon,
    guessing_bound,
    largest_deviation,
    least_rate,
)
from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import calibrate


def test_bounds_grow_with_what_is_known():
    assert guessing_bound(500, 400, 1e-5, 0.95) > guessing_bound(500, 350, 1e-5, 0.95) > 0
    assert guessing_bound(500, 240, 1e-5, 0.95) == 0


def test_guesses_about_any_mechanism_are_bounded_by_their_rate():
    """accuracy^100 = 0.05, and (e^epsilon + delta) / (1 + e^epsilon) = accuracy, by hand."""
    accuracy, delta = 0.05 ** (1 / 100), 1e-3
    assert any_guessing_bound(100, 100, delta, 0.95) == pytest.approx(math.log((accuracy - delta) / (1 - accuracy)))
    assert any_guessing_bound(500, 400, delta, 0.95) < guessing_bound(500, 400, delta, 0.95)
    assert any_guessing_bound(500, 240, delta, 0.95) == 0


def test_guesses_against_a_gaussian_mechanism_are_wrong_as_often_as_said():
    mu, trials, runs, delta = 1.0, 300, 4000, 1e-5
    right = np.random.default_rng(3).binomial(trials, stats.norm.cdf(mu / 2), runs)
    bound = {count: guessing_bound(trials, int(count), delta, 0.95) for count in set(right)}
    truth = gaussian_epsilon(mu, delta)
    wrong = np.mean([bound[count] > truth for count in right])
    assert 0.02 < wrong < 0.069
    assert np.median([bound[count] for count in right]) > 0.7 * truth


@pytest.mark.parametrize("epsilon", [2.0, 4.0, 8.0])
def test_half_the_noise_is_seen_in_the_guesses_of_1000_releases(epsilon):
    """Exactly, by binomial tails: 950 guesses, at their share of an alarm of 1e-4."""
    mu, delta, alarm, guesses = 1 / calibrate(epsilon, 1e-5, 1.0, 1), 1e-5, 1e-4 * 8 / 18, 950
    claim = gaussian_epsilon(mu, delta)
    least = next(c for c in range(guesses // 2, guesses) if guessing_bound(guesses, c, delta, 1 - alarm) > claim)
    assert stats.binom.sf(least - 1, guesses, stats.norm.cdf(mu / 2)) <= alarm
    assert stats.binom.sf(least - 1, guesses, stats.norm.cdf(mu)) > 0.97
    median = int(stats.binom.median(guesses, stats.norm.cdf(mu / 2)))
    assert guessing_bound(guesses, median, delta, 1 - 0.05 * 8 / 18) > 0.6 * epsilon


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
    with pytest.raises(PrivacyError, match="confidence"):
        least_rate(10, 3, 1.0)
    with pytest.raises(PrivacyError, match="delta"):
        gaussian_epsilon(1.0, 0.0)
    with pytest.raises(PrivacyError, match="at least one"):
        largest_deviation(1.0, 0, 0.9)
