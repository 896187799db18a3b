"""Drift: alarms where inputs moved, and, but for the stated rate, nowhere else; noise and small samples raise none."""

import math

import numpy as np
import pytest

from fedclaw.export.marginals import Marginals, _marginal
from fedclaw.privacy.statistics import Design, Records, StatisticColumn, estimate
from fedclaw.serve.monitoring.drift import (
    BaselineFeature,
    BaselineShare,
    DriftBaseline,
    DriftRule,
    _Grouped,
    _interval,
    _moved,
    _steps,
    compare,
)
from fedclaw.serve.monitoring.input_counts import InputFeature, InputFeatures

COLUMNS = (
    StatisticColumn("age", bounds=(0.0, 100.0)),
    StatisticColumn("visits", bounds=(0.0, 100.0)),
    StatisticColumn("constant", bounds=(0.0, 100.0)),
    StatisticColumn("ward", levels=("a", "b", "c", "d")),
    StatisticColumn("rare", levels=("no", "yes")),
)
FEATURES = InputFeatures([InputFeature(one, 0 if one.levels else 64) for one in COLUMNS], lambda values: values)
SIGNIFICANT = DriftRule(alpha=0.1, psi=0.0, ks=0.0, share=0.0)
"""Any difference that the tests tell from chance."""


def rows(count, random, **moved):
    """`count` rows of one population; `moved` says what is different in it."""
    age = np.clip(random.normal(50 + moved.get("age", 0), 15, count), 0, 100)
    age[random.random(count) < moved.get("missing", 0.1)] = np.nan
    ward = random.choice(4, count, p=moved.get("ward", [0.5, 0.3, 0.17, 0.03]))
    return {
        "age": age,
        "visits": np.clip(random.poisson(3, count), 0, 100).astype(np.float64),
        "constant": np.full(count, 7.0 + moved.get("constant", 0)),
        "ward": ward.astype(np.float64),
        "rare": (random.random(count) < moved.get("rare", 0.004)).astype(np.float64),
    }


def charged(random, count=3000, deviation=3.0):
    """A baseline from a release of as many rows, with noise."""
    design = Design(COLUMNS, (), 64)
    records = Records(rows(count, random), np.zeros(count, np.int64))
    noised = design.vector([records]) + random.normal(0.0, deviation, design.dimension)
    told = estimate(design, noised, deviation, ())
    found = {one.name: _marginal(one, told.columns[one.name]) for one in COLUMNS}
    columns = {name: marginal for name, marginal in found.items() if marginal is not None}
    return DriftBaseline.charged(Marginals(release="statistics-1", examples=told.count, columns=columns))


def first(random, count=2000):
    return DriftBaseline.first_rows(FEATURES.count(rows(count, random)))


def alarms(baseline, count, random, rule=None, **moved):
    report = compare(FEATURES, baseline, FEATURES.count(rows(count, random, **moved)), rule or DriftRule())
    assert report is not None
    return report.alarms


def share_of_false_alarms(make, count, trials, rule, seed=0):
    random = np.random.default_rng(seed)
    return sum(bool(alarms(make(random), count, random, rule)) for _ in range(trials)) / trials


def at_most(rate, trials):
    """The largest share of `trials` that a rate of `rate` gives but one time in ten thousand."""
    return rate + 3.8 * math.sqrt(rate * (1 - rate) / trials)


@pytest.mark.parametrize("make", [charged, first])
@pytest.mark.parametrize("count", [200, 2000])
def test_without_drift_alarms_are_as_seldom_as_stated(make, count):
    assert share_of_false_alarms(make, count, 60, SIGNIFICANT) <= at_most(0.1, 60)


@pytest.mark.slow
@pytest.mark.parametrize("make", [charged, first])
@pytest.mark.parametrize("count", [200, 1000, 5000])
def test_without_drift_alarms_are_as_seldom_as_stated_over_many_trials(make, count):
    assert share_of_false_alarms(make, count, 1000, SIGNIFICANT, seed=1) <= at_most(0.1, 1000)
    assert share_of_false_alarms(make, count, 1000, DriftRule(), seed=2) <= at_most(0.01, 1000)


def test_the_chi_square_test_rejects_as_often_as_it_says_where_noise_dominates():
    """The covariance has the noise in it: without, most of these would be rejected."""
    random = np.random.default_rng(0)
    chances = []
    for _ in range(150):
        baseline = charged(random, 3000, 6.0).features["ward"]
        served = np.bincount(rows(3000, random)["ward"].astype(int), minlength=4).astype(np.float64)
        chances.append(_Grouped.of(served, baseline, [[0], [1], [2, 3]]).chance)
    assert 0.02 < np.mean(np.array(chances) < 0.1) < 0.18


def test_the_distribution_functions_may_differ_by_the_noise():
    random, beyond = np.random.default_rng(0), 0
    for _ in range(200):
        shares = 1 / 64 + random.normal(0, 0.01, 64)
        baseline = BaselineFeature(shares / shares.sum(), 0.01, 1e9, None)
        beyond += _steps(np.full(64, 1e7), baseline, 0.1)[1]
    assert beyond <= 200 * at_most(0.1, 200)
    shares[:32] += 0.02
    assert _steps(np.full(64, 1e7), BaselineFeature(shares / shares.sum(), 0.01, 1e9, None), 0.1)[1]


@pytest.mark.parametrize(
    ("moved", "feature"),
    [
        ({"age": 10.0}, "age"),
        ({"ward": [0.3, 0.3, 0.37, 0.03]}, "ward"),
        ({"ward": [0.4, 0.25, 0.15, 0.2]}, "ward"),
        ({"rare": 0.2}, "rare"),
        ({"constant": 5.0}, "constant"),
        ({"missing": 0.3}, "age"),
    ],
)
@pytest.mark.parametrize("make", [charged, first])
def test_what_moved_is_told_and_nothing_else(make, moved, feature):
    random = np.random.default_rng(3)
    for _ in range(5):
        assert alarms(make(random), 1000, random, **moved) == (feature,)


def test_few_rows_are_not_compared():
    random = np.random.default_rng(0)
    baseline = charged(random)
    assert compare(FEATURES, baseline, FEATURES.count(rows(199, random, age=40.0)), DriftRule()) is None


def test_a_difference_that_does_not_matter_is_none_however_many_rows():
    random = np.random.default_rng(0)
    baseline = first(random, 100_000)
    assert alarms(baseline, 100_000, random, age=2.0) == ()
    assert "age" in alarms(baseline, 100_000, random, SIGNIFICANT, age=2.0)


def test_a_column_that_is_mostly_noise_is_not_compared():
    random = np.random.default_rng(0)
    assert set(charged(random, 3000, 3.0).features) == {one.name for one in COLUMNS}
    assert "age" not in charged(random, 3000, 30.0).features


def test_refused_rows_are_a_feature_of_their_own():
    random = np.random.default_rng(0)
    baseline, served = charged(random), rows(1000, random)
    served["ward"][:100] = np.inf
    report = compare(FEATURES, baseline, FEATURES.count(served), DriftRule())
    assert report.alarms == ("refused rows",)
    assert report.refused == pytest.approx(0.1)
    served["ward"][20:100] = 0.0
    assert compare(FEATURES, baseline, FEATURES.count(served), DriftRule()).alarms == ()


def test_the_figures_of_a_case_worked_out_by_hand():
    """Baseline 1/2, 1/2 of 1e12 rows; served 3/4, 1/4 of 400: PSI = 1/4 ln 3, less its mean 1/400."""
    baseline = BaselineFeature(np.array([0.5, 0.5]), 0.0, 1e12, None)
    found = _Grouped.of(np.array([300.0, 100.0]), baseline, [[0], [1]])
    assert found.psi == pytest.approx(0.25 * math.log(3) - 1 / 400)
    # One degree of freedom: z = 0.25 / sqrt(0.25 / 400) = 10.
    assert found.chance == pytest.approx(1.523971e-23, rel=1e-4)


def test_the_source_is_told():
    random = np.random.default_rng(0)
    assert charged(random).source == "the charged question statistics-1"
    assert first(random).source == "the first 2000 sampled rows served"


def test_the_intervals_of_shares_are_clopper_and_pearsons():
    assert _interval(0.0, 10.0, 0.025) == (0.0, pytest.approx(0.3085, abs=1e-4))
    assert _interval(5.0, 10.0, 0.025) == (pytest.approx(0.1871, abs=1e-4), pytest.approx(0.8129, abs=1e-4))


def test_a_noisy_share_needs_more_of_a_change():
    rule = DriftRule()
    assert _moved(120, 1000, BaselineShare(0.05, 0.0, 3000.0), 0.01, rule)
    assert not _moved(120, 1000, BaselineShare(0.05, 0.03, 3000.0), 0.01, rule)
    assert not _moved(12, 100, BaselineShare(0.05, 0.0, 3000.0), 0.01, rule)
