"""Intervals against published examples and by their coverage; differences that are paired."""

import tracemalloc

import numpy as np
import pytest

from fedclaw.compress.intervals import Difference, Interval, of_bootstrap, of_paired, of_paired_bootstrap, of_proportion
from fedclaw.compress.measure import at_sites, verdict
from fedclaw.compress.record import Control


def answers(both, first, second, neither):
    """Who was right, as two arrays with these counts."""
    return (
        np.repeat([True, True, False, False], [both, first, second, neither]),
        np.repeat([True, False, True, False], [both, first, second, neither]),
    )


def test_wilson_as_published():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I: 81/263, 15/148, 0/20.
    for successes, count, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        found = of_proportion(successes, count)
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert of_proportion(20, 20).high == 1.0


def test_tango_as_published():
    # Tango 1998, section 5, cross-over trial of Jones and Kenward: a 43, b 0, c 1, d 0; 95% interval -0.060 to 0.118.
    # The difference there is of the other two, so the signs are turned.
    found = of_paired(*answers(43, 1, 0, 0))
    assert found.value == pytest.approx(1 / 44)
    assert (found.interval.low, found.interval.high) == (
        pytest.approx(-0.060, abs=1e-3),
        pytest.approx(0.118, abs=1e-3),
    )


@pytest.mark.parametrize(
    "counts", [(10, 0, 0, 0), (0, 10, 0, 0), (0, 0, 10, 0), (3, 0, 0, 7), (5, 2, 4, 1), (0, 9, 1, 0)]
)
def test_an_interval_holds_its_figure_and_turns_with_its_sides(counts):
    first, second = answers(*counts)
    there, back = of_paired(first, second), of_paired(second, first)
    assert -1 <= there.interval.low <= there.value <= there.interval.high <= 1
    assert (back.interval.low, back.interval.high) == (
        pytest.approx(-there.interval.high),
        pytest.approx(-there.interval.low),
    )
    assert there.interval.low < there.interval.high


def test_paired_is_narrower_than_unpaired_where_models_err_alike():
    found = of_paired(*answers(180, 6, 2, 12))
    alone = of_proportion(186, 200)
    assert found.interval.high - found.interval.low < alone.high - alone.low


def test_the_interval_covers_the_truth():
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        first, second = random.random((2, 80)) < [[0.9], [0.8]]
        interval = of_paired(first, second).interval
        held += interval.low <= 0.1 <= interval.high
    assert 0.92 < held / 400 < 0.98


def test_a_bootstrap_is_paired_and_says_when_there_is_no_score():
    values = np.random.default_rng(1).normal(size=200)
    alone = of_bootstrap(lambda rows: float(values[rows].mean()), 200)
    assert alone.low < values.mean() < alone.high
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.1)
    pair = of_paired_bootstrap(lambda r: float(values[r].mean()) + 0.01, lambda r: float(values[r].mean()), 200)
    assert (pair.low, pair.high) == (pytest.approx(0.01), pytest.approx(0.01))
    assert of_bootstrap(lambda _: None, 200) is None


def control(name, accuracy, low, high):
    difference = Difference(value=(low + high) / 2, interval=Interval(low=low, high=high), examples=100)
    return Control(name=name, accuracy=accuracy, difference=difference)


def test_a_gain_is_one_over_the_better_control_only():
    weak, strong = "fine-tuned without teacher", "trained from scratch"
    better = verdict("accuracy", (control(weak, 0.7, 0.1, 0.3), control(strong, 0.88, -0.01, 0.05)), True)
    assert better == (
        "No gain shown: the better control, trained from scratch, may reach as much "
        "(accuracy +0.020, 95% interval -0.010 to +0.050)."
    )
    assert verdict("accuracy", (control(weak, 0.7, 0.1, 0.3),), True).startswith("A gain over the better control, fine")
    assert verdict("r2", (control(weak, 0.7, -0.3, -0.1),), True).startswith("No gain: the better control, fine-tuned")
    assert "controls=false" in verdict("accuracy", (), False)
    unlike = verdict("accuracy", (control(weak, 0.7, 0.1, 0.3),), True, at_sites=True)
    assert unlike.startswith("Better than the better control, fine-tuned")
    assert "not called a gain" in unlike
    assert "not known" in verdict("accuracy", (Control(name=weak, accuracy=None),), True)


def test_noise_that_was_cut_off_at_all_right_has_no_interval():
    assert at_sites({"accuracy": 1.0}, "accuracy", 100, noised=True).interval is None
    assert at_sites({"accuracy": 1.0}, "accuracy", 100, noised=False).interval is not None


def test_a_bootstrap_of_many_rows_needs_memory_for_one_resample():
    tracemalloc.start()
    of_bootstrap(lambda _: None, 20_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6, "all thousand of them are 160 MB"
