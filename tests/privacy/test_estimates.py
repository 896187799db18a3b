"""What a noised vector says: right without noise, and as far off as its standard errors say with noise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclaw.privacy.statistics import Design, Records, StatisticColumn, _distribution, estimate, moments_of

COLUMNS = (StatisticColumn("age", bounds=(0.0, 100.0)), StatisticColumn("ward", levels=("a", "b")))
CLASSES = ("no", "yes")
QUANTILES = (0.1, 0.5, 0.9)


def data(count=20_000, seed=0):
    generator = np.random.default_rng(seed)
    age = np.clip(generator.gamma(4, 8, count), 0, 100)
    age[generator.random(count) < 0.1] = np.nan
    ward = (generator.random(count) < 0.3).astype(float)
    return Records({"age": age, "ward": ward}, (generator.random(count) < 0.25).astype(np.int64))


def test_without_noise_they_are_the_data_s_own():
    records = data()
    design = Design(COLUMNS, CLASSES, 200)
    told = estimate(design, design.vector([records]), 0.0, QUANTILES)
    age = records.columns["age"]
    column = told.columns["age"]
    assert told.count.value == pytest.approx(20_000)
    assert told.labels["yes"].value == pytest.approx(records.labels.sum())
    assert column.missing.value == pytest.approx(np.isnan(age).sum())
    assert column.missing_rate.value == pytest.approx(np.isnan(age).mean())
    assert column.mean.value == pytest.approx(np.nanmean(age), abs=1e-4)
    assert column.variance.value == pytest.approx(np.nanvar(age), rel=1e-4)
    for probability in QUANTILES:
        assert column.quantiles[f"{probability:g}"].value == pytest.approx(np.nanquantile(age, probability), abs=0.5)
    assert told.columns["ward"].levels["b"].value == pytest.approx(records.columns["ward"].sum())
    mean, variance = moments_of(told)["age"]
    assert (mean, variance) == (column.mean, column.variance)
    assert set(moments_of(told)) == {"age"}


def test_standard_errors_are_those_of_the_noise():
    """Over 400 draws of noise, each figure's deviation is what it says, within 15% (over 4 of its errors)."""
    design = Design(COLUMNS, CLASSES, 20)
    exact = design.vector([data(4000)])
    generator = np.random.default_rng(1)
    deviation, draws = 6.0, 400
    told = [
        estimate(design, exact + deviation * generator.normal(size=len(exact)), deviation, QUANTILES)
        for _ in range(draws)
    ]
    figures = {
        "count": [one.count for one in told],
        "label": [one.labels["yes"] for one in told],
        "level": [one.columns["ward"].levels["b"] for one in told],
        "rate": [one.columns["age"].missing_rate for one in told],
        "mean": [one.columns["age"].mean for one in told],
        "variance": [one.columns["age"].variance for one in told],
    }
    for name, estimates in figures.items():
        spread = np.std([one.value for one in estimates])
        said = np.mean([one.error for one in estimates])
        assert spread == pytest.approx(said, rel=0.15), name
    for probability in ("0.1", "0.5", "0.9"):
        quantiles = [one.columns["age"].quantiles[probability] for one in told]
        assert np.std([one.value for one in quantiles]) < 1.15 * np.mean([one.error for one in quantiles])


def test_noise_that_drowns_the_data_gives_figures_in_their_range_or_none():
    design = Design(COLUMNS, CLASSES, 20)
    exact = design.vector([data(50)])
    generator = np.random.default_rng(2)
    for _ in range(200):
        told = estimate(design, exact + 300 * generator.normal(size=len(exact)), 300.0, QUANTILES)
        assert told.count.value >= 0
        assert all(number.value >= 0 for number in told.labels.values())
        column = told.columns["age"]
        assert column.missing_rate is None or 0 <= column.missing_rate.value <= 1
        assert column.mean is None or 0 <= column.mean.value <= 100
        assert column.variance is None or 0 <= column.variance.value <= 50**2
        values = [column.quantiles[key].value for key in column.quantiles]
        assert values == sorted(values)
        assert all(0 <= value <= 100 for value in values)


def test_counts_that_are_added_up_stay_as_they_came():
    """Put back to 0 one by one, the noise of many empty levels would add up to examples that nobody has."""
    design = Design((StatisticColumn("score", levels=tuple("abcdefgh")),), (), 0)
    total = np.full(design.dimension, -1.0)
    for additive, sign in ((True, -1), (False, 0)):
        levels = estimate(design, total, 1.0, (), additive=additive).columns["score"].levels
        assert {np.sign(level.value) for level in levels.values()} == {sign}


def test_a_constant_column_has_no_variance_and_its_quantiles_are_its_value():
    design = Design(COLUMNS[:1], (), 50)
    told = estimate(
        design, design.vector([Records({"age": np.full(1000, 31.0)}, np.zeros(1000, np.int64))]), 0.0, (0.5,)
    )
    assert told.columns["age"].variance.value == pytest.approx(0, abs=1e-3)
    assert told.columns["age"].quantiles["0.5"].value == pytest.approx(31, abs=1)
    assert told.labels == {}


def test_a_column_that_is_always_missing_has_no_mean():
    design = Design(COLUMNS[:1], (), 8)
    told = estimate(design, design.vector([Records({"age": np.full(9, math.nan)}, np.zeros(9, np.int64))]), 0.0, (0.5,))
    column = told.columns["age"]
    assert column.missing_rate.value == pytest.approx(1)
    assert column.mean is column.variance is None
    assert column.quantiles == {}


def test_no_examples_say_nothing():
    design = Design(COLUMNS, CLASSES, 8)
    told = estimate(design, np.zeros(design.dimension), 0.0, QUANTILES)
    assert told.columns["age"].missing_rate is None


@given(st.lists(st.floats(-1, 5), min_size=2, max_size=12).filter(lambda counts: sum(counts) > 0.1))
def test_a_distribution_rises_from_0_to_1_and_is_that_of_counts_that_have_one(counts):
    shares = _distribution(np.array(counts))
    assert np.all(np.diff(shares) >= -1e-12)
    assert (shares[0], shares[-1], len(shares)) == (0, 1, len(counts) + 1)
    if min(counts) >= 0:
        assert np.allclose(shares[1:], np.cumsum(counts) / np.sum(counts))
