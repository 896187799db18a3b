"""Survival curves and the log-rank test: without noise the usual ones; with it, what bands and p-values promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2, kstest

from fedclaw.privacy.survival import EVERYBODY
from fedclaw.privacy.survival_estimates import Curve, NoisedHistogram, curves, log_rank
from tests.chance import TINY

# Weeks in remission on 6-MP and on placebo; negative: censored (Freireich and others 1963; Gehan 1965).
TREATED = (6, 6, 6, -6, 7, -9, 10, -10, -11, 13, 16, -17, -19, -20, 22, 23, -25, -32, -32, -34, -35)
PLACEBO = (1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23)
WEEKS = tuple(range(1, 36))

# By lifelines 0.30.3 (KaplanMeierFitter): week, share, band, number at risk. scikit-survival 0.28 has the same shares.
LIFELINES = {
    TREATED: (
        (6, 0.857143, 0.619718, 0.951552, 21),
        (7, 0.806723, 0.563147, 0.922809, 17),
        (10, 0.752941, 0.503200, 0.889362, 15),
        (13, 0.690196, 0.431610, 0.849066, 12),
        (16, 0.627451, 0.367511, 0.804912, 11),
        (22, 0.537815, 0.267779, 0.746791, 7),
        (23, 0.448179, 0.188052, 0.680143, 6),
    ),
    PLACEBO: (
        (1, 0.904762, 0.670046, 0.975294, 21),
        (2, 0.809524, 0.568905, 0.923889, 19),
        (3, 0.761905, 0.519391, 0.893257, 17),
        (4, 0.666667, 0.425350, 0.825044, 16),
        (5, 0.571429, 0.337977, 0.749241, 14),
        (8, 0.380952, 0.183067, 0.577789, 12),
        (11, 0.285714, 0.116561, 0.481820, 8),
        (12, 0.190476, 0.059482, 0.377435, 6),
        (15, 0.142857, 0.035657, 0.321162, 4),
        (17, 0.095238, 0.016259, 0.261250, 3),
        (22, 0.047619, 0.003324, 0.197045, 2),
        (23, 0.000000, 0.000000, 0.000000, 1),
    ),
}


def histogram(*groups, bins=35):
    """(G, K, 2) of signed weeks."""
    cells = np.zeros((len(groups), bins, 2))
    for cell, rows in zip(cells, groups, strict=True):
        for week in rows:
            cell[abs(week) - 1, int(week > 0)] += 1
    return cells


@pytest.mark.parametrize("rows", LIFELINES, ids=["6-MP", "placebo"])
def test_without_noise_a_curve_and_its_band_are_those_of_lifelines(rows):
    (curve,) = curves(NoisedHistogram(histogram(rows), 0.0))
    for week, *wanted, at_risk in LIFELINES[rows]:
        found = (curve.survival[week - 1], curve.low[week - 1], curve.high[week - 1])
        assert found == pytest.approx(wanted, abs=1e-6)
        assert curve.at_risk[week - 1] == at_risk


def test_medians_are_those_of_lifelines():
    treated, placebo = curves(NoisedHistogram(histogram(TREATED, PLACEBO), 0.0))
    assert treated.median(WEEKS) == (23, 13, None)
    assert placebo.median(WEEKS) == (8, 4, 11)


def test_the_log_rank_test_is_that_of_lifelines_and_scikit_survival():
    found = log_rank(NoisedHistogram(histogram(TREATED, PLACEBO), 0.0))
    assert found.statistic == pytest.approx(16.792940989216547, rel=1e-12)
    assert found.p_value == pytest.approx(4.168809109334511e-05, rel=1e-9)
    thirds = [(*TREATED, *PLACEBO)[start::3] for start in range(3)]
    found = log_rank(NoisedHistogram(histogram(*thirds), 0.0))
    assert (found.statistic, found.p_value) == pytest.approx((0.7163805891691822, 0.6989400578427428), rel=1e-12)


def row_by_row(rows):
    """The share without the event at the end of each week, by its definition."""
    share, told = 1.0, []
    for week in WEEKS:
        at_risk = sum(abs(row) >= week for row in rows)
        share *= 1 - sum(row == week for row in rows) / at_risk if at_risk else 1
        told.append(share)
    return told


SIGNED = st.integers(-35, 35).filter(bool)


@given(st.lists(SIGNED, min_size=1, max_size=40))
def test_without_noise_any_rows_have_the_curve_of_the_definition(rows):
    (curve,) = curves(NoisedHistogram(histogram(rows), 0.0))
    assert len(curve.survival) == max(map(abs, rows))
    assert curve.survival == pytest.approx(row_by_row(rows)[: len(curve.survival)], abs=1e-12)
    assert all(low <= share <= high for low, share, high in zip(curve.low, curve.survival, curve.high, strict=True))


def two_sample(rows, others):
    """Mantel's statistic for two groups, week by week."""
    excess = variance = 0.0
    for week in WEEKS:
        mine, both = (sum(abs(row) >= week for row in group) for group in (rows, [*rows, *others]))
        events = sum(row == week for row in [*rows, *others])
        if both > 1:
            excess += sum(row == week for row in rows) - events * mine / both
            variance += events * mine / both * (1 - mine / both) * (both - events) / (both - 1)
        elif both == 1:
            excess += sum(row == week for row in rows) - events * mine
    return excess**2 / variance if variance else None


@given(st.lists(SIGNED, min_size=2, max_size=30), st.lists(SIGNED, min_size=2, max_size=30))
def test_without_noise_any_two_groups_have_the_statistic_of_the_definition(rows, others):
    """Over the weeks in which somebody of both is at risk; later ones have nothing to compare and add nothing."""
    if (wanted := two_sample(rows, others)) is not None and wanted < 1e6:
        found = log_rank(NoisedHistogram(histogram(rows, others), 0.0))
        assert found.statistic == pytest.approx(wanted, rel=1e-6, abs=1e-9)


NOISY = st.floats(-50, 200, allow_nan=False)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(NOISY, NOISY), min_size=1, max_size=12).map(np.array),
    st.sampled_from([0.5, 3.0, 40.0]),
    st.sampled_from([0.0, 150.0]),
)
def test_whatever_noise_makes_of_cells_a_curve_falls_within_0_and_1_and_shows_no_small_number(cells, noise, smallest):
    asked = NoisedHistogram(np.stack([cells, cells[::-1]]), noise, smallest)
    for curve in curves(asked):
        shares = np.array([1.0, *curve.survival])
        assert np.all(np.diff(shares) <= 1e-12)
        assert np.all((np.array(curve.low) >= 0) & (np.array(curve.high) <= 1))
        assert all(low <= high for low, high in zip(curve.low, curve.high, strict=True))
        assert all(number >= smallest for number in curve.at_risk)
        assert len(curve.survival) == len(curve.low) == len(curve.high) == len(curve.at_risk)
    found = log_rank(asked)
    assert found is None or 0 < found.p_value <= 1


def test_a_curve_ends_where_noise_hides_how_many_are_at_risk():
    """Of 3 standard errors of sqrt(2 (K - k)) cells' noise."""
    cells = histogram(TREATED * 10)
    quiet, loud, deaf = (curves(NoisedHistogram(cells, noise))[0] for noise in (0.1, 5.0, 100.0))
    assert len(quiet.survival) == 35
    (expected,) = [week for week in range(35) if quiet.at_risk[week] <= 3 * 5 * np.sqrt(2 * (35 - week))][:1]
    assert len(loud.survival) == expected < 35
    assert deaf == Curve(survival=(), low=(), high=(), at_risk=())
    assert log_rank(NoisedHistogram(np.stack([cells[0], cells[0]]), 100.0)) is None
    assert log_rank(NoisedHistogram(cells, 1.0)) is None, "one group"
    assert EVERYBODY == "all"


def test_the_same_release_has_the_same_bands():
    cells = histogram(TREATED * 9, PLACEBO * 9) + 0.3
    one, other = (NoisedHistogram(cells, 2.0) for _ in range(2))
    assert curves(one) == curves(other)
    assert log_rank(one) == log_rank(other)


BINS = 24


@pytest.fixture
def fewer_draws(monkeypatch):
    """A third of the usual ones, where hundreds of bands or p-values are made."""
    monkeypatch.setattr("fedclaw.privacy.survival_estimates._DRAWS", 299)


def population(random, size, scale=1500.0):
    """Weibull times, exponential censoring, in bins of 150 days, (K, 2)."""
    until_event, until_end = random.weibull(1.2, size) * scale, random.exponential(1800, size)
    bins = np.minimum((np.minimum(until_event, until_end) / 150).astype(int), BINS - 1)
    cells = np.zeros((BINS, 2))
    np.add.at(cells, (bins, (until_event <= until_end).astype(int)), 1)
    return cells


@pytest.mark.usefixtures("fewer_draws")
@pytest.mark.parametrize(
    ("scale", "noise"), [(1500, 6.0), (30_000, 6.0), pytest.param(1500, 2.0, marks=pytest.mark.slow)]
)
def test_a_band_of_95_percent_holds_the_true_share_of_a_population_so_often(scale, noise):
    """Rows and noise drawn anew, 120 times; with a scale of 30,000 days next to no bin has an event.

    Truth is the curve of a million rows, whose own error is a thirtieth of that of 1000.

    Within one draw bins miss together, so what has a bound is how often a bin is missed: one that holds with 94% misses
    more often than that once in 10^9.
    """
    random, draws = np.random.default_rng(2), 120
    (whole,) = curves(NoisedHistogram(population(random, 1_000_000, scale)[None], 0.0))
    truth = np.array(whole.survival)
    held, reached, widths = np.zeros(BINS), np.zeros(BINS), []
    for _ in range(draws):
        cells = population(random, 1000, scale)[None] + noise * random.normal(size=(1, BINS, 2))
        (curve,) = curves(NoisedHistogram(cells, noise))
        end = len(curve.survival)
        inside = (np.array(curve.low) <= truth[:end]) & (truth[:end] <= np.array(curve.high))
        held[:end] += inside
        reached[:end] += 1
        widths.append(np.mean(np.array(curve.high) - curve.low))
    often = reached > draws / 2
    assert often.sum() > 8
    assert np.all((reached - held)[often] <= binom.isf(TINY / BINS, reached[often], 0.06))
    assert 0.925 < held.sum() / reached.sum() < 0.985
    assert 0.02 < np.mean(widths) < 0.35


def p_values(noise, scales, draws, size=500):
    random, found = np.random.default_rng(3), []
    for _ in range(draws):
        cells = np.stack([population(random, size, scale) for scale in scales])
        found.append(log_rank(NoisedHistogram(cells + noise * random.normal(size=cells.shape), noise)))
    return np.array([one.p_value for one in found if one is not None])


@pytest.mark.usefixtures("fewer_draws")
@pytest.mark.parametrize("scales", [(1500,) * 2, pytest.param((1500,) * 3, marks=pytest.mark.slow)], ids=["2", "3"])
def test_where_groups_do_not_differ_p_values_are_uniform_but_for_caution(scales):
    """Never smaller than uniform ones, and not much larger."""
    found = p_values(5.0, scales, draws := 120)
    assert len(found) > 0.95 * draws
    assert kstest(found, "uniform", alternative="greater").pvalue > TINY
    assert kstest(found, "uniform").statistic < 0.2
    assert np.sum(found < 0.05) <= binom.isf(TINY, len(found), 0.05)


@pytest.mark.usefixtures("fewer_draws")
def test_noise_that_is_not_counted_would_make_p_values_far_too_small():
    """The same numbers with chi-squared: the test of the test before."""
    random, found = np.random.default_rng(3), []
    for _ in range(60):
        cells = np.stack([population(random, 500) for _ in range(2)]) + 8.0 * random.normal(size=(2, BINS, 2))
        found.append(float(chi2.sf(log_rank(NoisedHistogram(cells, 8.0)).statistic, 1)))
    assert kstest(found, "uniform", alternative="greater").pvalue < TINY


@pytest.mark.usefixtures("fewer_draws")
def test_groups_that_differ_are_told_apart_through_the_noise():
    assert np.mean(p_values(3.0, (1200, 2200), 40) < 0.01) > 0.9
