"""Discrete Gaussian samples against their exact probabilities."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, norm

from fedclaw.errors import PrivacyError
from fedclaw.privacy.discrete_gaussian import DiscreteGaussian, _exponential, _factor, _table, _weights
from fedclaw.privacy.noise import GaussianSource

KEY = bytes(range(32))
UNLIKELY = 1e-7
SAMPLES = 1_000_000


def draw(sigma, count=SAMPLES, key=KEY):
    return DiscreteGaussian(sigma).sample(count, GaussianSource(insecure_fixed_key_for_tests=key))


def probabilities(sigma):
    """(values, their exact probabilities) as far as doubles go."""
    bound = math.ceil(13 * sigma)
    values = np.arange(-bound, bound + 1)
    weights = np.exp(-(values.astype(float) ** 2) / (2 * sigma**2))
    return values, weights / weights.sum()


def goodness(samples, sigma):
    """p-value of Pearson's chi-square; neighbouring values are pooled until 50 samples are expected of each cell."""
    values, expected = probabilities(sigma)
    observed = np.bincount(np.clip(samples, values[0], values[-1]) - values[0], minlength=len(values))
    width = max(1, round(sigma / 8))
    starts = np.arange(0, len(values), width)
    expected = np.add.reduceat(expected, starts) * len(samples)
    observed = np.add.reduceat(observed, starts)
    large = expected >= 50
    statistic = ((observed - expected)[large] ** 2 / expected[large]).sum()
    rest = expected[~large].sum()
    if rest > 0:
        statistic += (observed[~large].sum() - rest) ** 2 / max(rest, 1)
    return chi2.sf(statistic, large.sum() - (rest == 0))


SIGMAS = [0.5, 0.71, 1.0, 2.5, 10.0, 300.0, 1024.0, 1025.0, 3000.0, 70_000.0]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_samples_have_the_exact_probabilities(sigma):
    assert goodness(draw(sigma), sigma) > UNLIKELY


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_test_would_see_a_sigma_two_per_cent_off(sigma):
    assert goodness(draw(sigma * 1.02), sigma) < UNLIKELY


@pytest.mark.parametrize("sigma", SIGMAS)
def test_variance(sigma):
    values, exact = probabilities(sigma)
    variance = float((values.astype(float) ** 2 * exact).sum())
    # The fourth moment is at most about 3 variance^2 (less concentrated only for the smallest sigma).
    slack = 5.5 * math.sqrt(max(2.0, float((values.astype(float) ** 4 * exact).sum()) / variance**2 - 1) / SAMPLES)
    assert draw(sigma).astype(float).var() == pytest.approx(variance, rel=slack)


@pytest.mark.parametrize("sigma", [0.5, 40.0, 5000.0])
def test_tails(sigma):
    samples = np.abs(draw(sigma))
    values, exact = probabilities(sigma)
    for deviations in (2.5, 3.0, 3.5, 4.0):
        expected = exact[np.abs(values) >= deviations * sigma].sum()
        slack = 5.5 * math.sqrt(expected / SAMPLES) + 3 / SAMPLES
        assert abs((samples >= deviations * sigma).mean() - expected) < slack


@pytest.mark.parametrize("sigma", [0.5, 100.0, 5000.0])
def test_neighbours_are_independent(sigma):
    samples = draw(sigma).astype(float)
    for lag in (1, 2, 1 << 14, 1 << 15):
        correlation = np.corrcoef(samples[:-lag], samples[lag:])[0, 1]
        assert abs(correlation) < 5.5 / math.sqrt(SAMPLES - lag)


def test_low_bits_of_a_large_sigma_are_uniform():
    counts = np.bincount(draw(20_000.0) % 256, minlength=256)
    statistic = ((counts - SAMPLES / 256) ** 2 / (SAMPLES / 256)).sum()
    assert chi2.sf(statistic, 255) > UNLIKELY


def test_the_same_key_gives_the_same_samples_and_another_key_others():
    assert np.array_equal(draw(12.0, 1000), draw(12.0, 1000))
    assert not np.array_equal(draw(12.0, 1000), draw(12.0, 1000, key=bytes(32)))
    assert draw(1.0, 0).shape == (0,)
    assert draw(1.0, 40_000).dtype == np.int64


def ends_of(sigma):
    table = _table(Fraction(sigma) ** 2)
    return [(int(high) << 64) + int(low) for high, low in zip(table._high, table._low, strict=True)], table._bound


@pytest.mark.parametrize("sigma", [0.5, 1.7, 33.25])
def test_the_table_is_right_to_its_last_bits(sigma):
    """Against decimal arithmetic with 80 digits, a series of its own for each value and none of the recurrences."""
    ends, bound = ends_of(sigma)
    assert math.erfc((bound + 0.5) / (sigma * math.sqrt(2))) < 2.0**-104
    with localcontext() as context:
        context.prec = 80
        scale = 2 * Decimal(sigma) ** 2
        wide = range(-2 * bound, 2 * bound + 1)
        weights = {x: (-(Decimal(x) ** 2) / scale).exp() for x in wide}
        total = sum(weights.values())
        reached = sum(weights[x] for x in wide if x < -bound)
        for x, end in zip(range(-bound, bound), ends, strict=True):
            reached += weights[x]
            assert abs(reached / total - Decimal(end) / 2**128) < Decimal(2) ** -104


@settings(max_examples=50, deadline=None)
@given(st.fractions(min_value=Fraction(1, 10**9), max_value=2))
def test_exponentials(exponent):
    """Against the series of the exponential function, in fractions; its terms alternate, so the next is the error."""
    term, exact = Fraction(1), Fraction(0)
    for number in range(1, 90):
        exact += term
        # As fine as is needed: the denominators would grow with each term.
        term = Fraction(round(-term * exponent / number * 2**400), 2**400)
    assert abs(term) < Fraction(1, 2**300)
    assert abs(Fraction(_exponential(exponent), 2**256) - exact) <= Fraction(1, 2**256)


def test_weights_of_a_wide_table_stay_exact():
    sigma = Fraction(1024)
    weights = _weights(sigma**2, 12_500)
    with localcontext() as context:
        context.prec = 90
        for x in (1, 1000, 5000, 12_500):
            exact = (-(Decimal(x) ** 2) / (2 * Decimal(1024) ** 2)).exp()
            assert abs(Decimal(weights[x]) / 2**256 - exact) < Decimal(2) ** -215


class Scripted(GaussianSource):
    """A source that says what it is told."""

    def __init__(self, *answers):
        super().__init__()
        self._answers = list(answers)

    def words(self, count):
        answer = self._answers.pop(0)
        assert len(answer) == count
        return np.array(answer, dtype=np.uint64)


@pytest.mark.parametrize("sigma", [0.5, 3.0, 1024.0])
def test_the_second_word_decides_ties_of_the_first_and_only_those(sigma):
    ends, bound = ends_of(sigma)
    mask = (1 << 64) - 1
    numbers = sorted({2, 3, len(ends) // 2, len(ends) // 2 + 1, len(ends) - 3, len(ends) - 1})
    first = [ends[number] >> 64 for number in numbers]
    for shift in (-1, 0):
        wanted = [ends[number] + shift for number in numbers]
        source = Scripted(first, [value & mask for value in wanted])
        expected = [sum(end <= value for end in ends) - bound for value in wanted]
        assert DiscreteGaussian(sigma).sample(len(numbers), source).tolist() == expected
    untied = [0x0123_4567_89AB_CDEF, 1 << 63, (1 << 63) + 12345]
    expected = [sum(end <= (word << 64) for end in ends) - bound for word in untied]
    assert DiscreteGaussian(sigma).sample(3, Scripted(untied)).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.sampled_from([0.5, 1.0, 7.3, 200.0]))
def test_every_number_finds_its_value(word, second, sigma):
    """The guide and the shortcuts against counting."""
    ends, bound = ends_of(sigma)
    sample = DiscreteGaussian(sigma).sample(1, Scripted([word], [second]))[0]
    assert sample == sum(end <= (word << 64) + second for end in ends) - bound


@pytest.mark.parametrize("word", [0, (1 << 64) - 1, (1 << 48) - 1, 1 << 48, ((1 << 16) - 1) << 48])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 50.0, 1000.0])
def test_the_corners_of_the_guide(word, sigma):
    ends, bound = ends_of(sigma)
    for second in (0, 1, (1 << 64) - 1):
        sample = DiscreteGaussian(sigma).sample(1, Scripted([word], [second]))[0]
        assert sample == sum(end <= (word << 64) + second for end in ends) - bound


@pytest.mark.parametrize("sigma", [1025.0, 1e4, 1e6, 1e9])
def test_large_sigmas_are_made_of_two_that_are_smooth_enough(sigma):
    factor = _factor(sigma)
    part = sigma / math.sqrt(1 + factor**2)
    assert part / math.sqrt(1 + factor**2) >= 2.2
    assert 4 * math.exp(-2 * math.pi**2 * 2.2**2) < 2.0**-135


def test_two_parts_have_the_probabilities_of_one():
    """The exact distribution of a + m b, by convolution, at the smallest sigma that the rule allows for m = 2."""
    part, factor = 2.2 * math.sqrt(5), 2
    sigma = part * math.sqrt(1 + factor**2)
    values, fine = probabilities(part)
    coarse = np.zeros(factor * (len(values) - 1) + 1)
    coarse[::factor] = fine
    both = np.convolve(fine, coarse)
    centre = len(both) // 2
    inner = int(6 * sigma)
    x = np.arange(-inner, inner + 1)
    single = np.exp(-(x.astype(float) ** 2) / (2 * sigma**2))
    ratio = both[centre - inner : centre + inner + 1] / single
    assert np.ptp(ratio) / ratio.mean() < 1e-11


def test_a_large_sample_looks_normal():
    scaled = draw(300_000.0) / 300_000.0
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):
        error = 5.5 * math.sqrt(quantile * (1 - quantile) / SAMPLES)
        assert abs((scaled <= norm.ppf(quantile)).mean() - quantile) < error


@pytest.mark.parametrize("sigma", [0.0, 0.49, -1.0, math.nan, math.inf, 2.0**31])
def test_a_sigma_outside_its_range_is_refused(sigma):
    with pytest.raises(PrivacyError, match="sigma of a discrete Gaussian"):
        DiscreteGaussian(sigma)
