"""The canary's tests: what they promise is enumerated exactly, and simulated with somebody who looks all the time."""

import math
from collections.abc import Iterable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, norm

from fedclaw.serve.routing.counting import GROUPS
from fedclaw.serve.routing.guards import (
    EXCESS,
    GuardRecord,
    Levels,
    Seen,
    Verdict,
    ceiling,
    log_e_values,
    look,
    verdict,
)
from tests.chance import TINY

Floats = NDArray[np.float64]
LEVELS = Levels(roll_back=0.005, grow=0.05)
GUESSES = len(EXCESS)


def in_group(seen: Seen, group: int = 0) -> list[Seen]:
    return [seen if one == group else (0, 0, 0, 0) for one in range(GROUPS)]


def looked(seen: Iterable[Seen], margin: float = 0.01, boundary: float | None = None) -> GuardRecord:
    record = GuardRecord()
    for one in seen:
        record = look(record, in_group(one), margin, boundary)
    return record


def e_values(record: GuardRecord) -> tuple[float, float]:
    """Against the canary, and in its favour."""
    return float(np.exp(record.against[0]).mean()), float(np.exp(record.favour[0]).mean())


def outcomes(record: GuardRecord, n_a: int, n_b: int, margin: float) -> dict[tuple[int, int], tuple[float, float]]:
    """Both e-values after one look more, by how many ones it saw."""
    seen = product(range(n_a + 1), range(n_b + 1))
    return {(x_a, x_b): e_values(look(record, in_group((n_a, x_a, n_b, x_b)), margin)) for x_a, x_b in seen}


def expectations(values: dict[tuple[int, int], tuple[float, float]], p: float, q: float) -> tuple[float, float]:
    """Of both e-values, exactly."""
    n_a, n_b = max(values)
    chances_a, chances_b = binom.pmf(range(n_a + 1), n_a, p), binom.pmf(range(n_b + 1), n_b, q)
    sums = sum(chances_a[x_a] * chances_b[x_b] * np.array(both) for (x_a, x_b), both in values.items())
    return float(sums[0]), float(sums[1])


SLOW_RATES = ((0.001, 0.001), (0.0, 0.01), (0.05, 0.05), (0.3, 0.31), (0.9, 0.91))
RATES = (0.0, 0.001, 0.05, 0.3, 0.5, 0.9, 1.0)


@pytest.mark.parametrize(("n_a", "n_b"), [(1, 1), (3, 2), (1, 4)])
@pytest.mark.parametrize("before", [(0, 0, 0, 0), (40, 1, 9, 3), (20, 20, 4, 0), (3, 0, 3, 3)])
@pytest.mark.parametrize("margin", [0.01, 0.2])
def test_under_the_null_hypothesis_a_look_gains_nothing_on_average(n_a: int, n_b: int, before: Seen, margin: float):
    values = outcomes(GuardRecord(seen=tuple(in_group(before))), n_a, n_b, margin)
    for p in RATES:
        for q in {*RATES, min(1.0, p + margin)}:
            against, favour = expectations(values, p, q)
            if q <= p + margin:
                assert against <= 1 + 1e-9
            if q >= p + margin:
                assert favour <= 1 + 1e-9


def test_under_the_alternative_it_gains():
    record = GuardRecord(seen=tuple(in_group((100, 5, 20, 5))))
    assert expectations(outcomes(record, 5, 2, 0.01), 0.05, 0.3)[0] > 1.05
    assert expectations(outcomes(record, 5, 2, 0.2), 0.05, 0.05)[1] > 1.05


@pytest.mark.parametrize("boundary", [0.02, 0.5, 0.97])
def test_one_sample_is_held_to_a_boundary(boundary: float):
    for q in RATES:
        sums = np.zeros(2)
        for x in range(6):
            sums += binom.pmf(x, 5, q) * np.array(e_values(looked([(0, 0, 5, x)], boundary=boundary)))
        if q <= boundary:
            assert sums[0] <= 1 + 1e-9
        if q >= boundary:
            assert sums[1] <= 1 + 1e-9


@given(st.lists(st.tuples(*[st.integers(0, 50)] * 4), min_size=1, max_size=4), st.floats(0.001, 0.5))
def test_no_counts_break_the_arithmetic(counts: list[tuple[int, int, int, int]], margin: float):
    record = looked([(a + x, x, b + y, y) for a, x, b, y in counts], margin)
    assert np.isfinite(record.against).all()
    assert np.isfinite(record.favour).all()
    assert GuardRecord.model_validate_json(record.model_dump_json()) == record
    assert math.isfinite(float(verdict(record, LEVELS, 1, 300.0, 0.0).numbers["against"]))


def simulate(
    rng: np.random.Generator, looks: int, p: float, q: float, *, margin: float = 0.01, share: float = 0.3
) -> Verdict:
    """One canary, looked at after each few keys, stopped as soon as the test says anything."""
    record = GuardRecord()
    for number in range(looks):
        n_b = int(rng.integers(2, 30))
        n_a = int(n_b / share)
        seen = (n_a, int(rng.binomial(n_a, p)), n_b, int(rng.binomial(n_b, q)))
        record = look(record, in_group(seen), margin)
        said = verdict(record, LEVELS, 100, 300.0, float(number))
        if said.says == "roll_back":
            return said
    return said


@pytest.mark.parametrize(
    ("q", "margin", "most"),
    [(0.05, 0.01, 900), (0.2, 0.01, 150), (0.999, 0.01, 40), (0.4, 0.05, 150)],
)
def test_a_bad_canary_is_found_within_so_many_keys(q: float, margin: float, most: int):
    rng = np.random.default_rng(5)
    for _ in range(5):
        said = simulate(rng, 100, 0.002, q, margin=margin)
        assert said.says == "roll_back"
        assert int(said.numbers["canary_keys"]) <= most


def test_a_good_canary_grows_and_one_beyond_the_margin_does_not():
    rng = np.random.default_rng(6)
    assert simulate(rng, 60, 0.002, 0.002).says == "grow"
    assert simulate(rng, 60, 0.002, 0.02).says != "grow"


def test_it_does_not_grow_before_enough_keys_were_seen():
    record = looked([(2000, 0, 99, 0)] * 1, margin=0.2)
    assert verdict(record, LEVELS, 100, 300.0, 0.0).says == "wait"
    assert verdict(record, LEVELS, 99, 300.0, 0.0).says == "grow"


def test_one_client_alone_does_not_roll_back_what_is_fine_for_the_others():
    record = GuardRecord()
    for _ in range(60):
        new = [(0, 0, 0, 0)] * GROUPS
        new[3] = (50, 0, 50, 50)
        new[4], new[9] = (20, 0, 4, 0), (20, 0, 4, 0)
        record = look(record, new, 0.01)
        said = verdict(record, LEVELS, 100, 300.0, 1.0)
        assert said.says in ("hold", "wait", "grow")
    assert said.says == "grow"
    assert said.numbers["left_out"] == 3
    assert float(said.numbers["against"]) > 1e9


def test_evidence_from_one_client_counts_if_the_others_say_nothing_for_long():
    record = GuardRecord()
    new = [(0, 0, 0, 0)] * GROUPS
    new[3], new[4] = (500, 0, 50, 20), (1, 0, 1, 0)
    said = verdict(look(record, new, 0.01), LEVELS, 100, 300.0, 1000.0)
    assert said.says == "hold"
    assert verdict(said.record, LEVELS, 100, 300.0, 1299.0).says == "hold"
    assert verdict(said.record, LEVELS, 100, 300.0, 1300.0).says == "roll_back"


def test_a_client_that_is_all_there_is_decides():
    said = verdict(looked([(500, 0, 50, 20)]), LEVELS, 100, 300.0, 0.0)
    assert said.says == "roll_back"


def test_a_fault_that_two_clients_see_rolls_back():
    new = [(0, 0, 0, 0)] * GROUPS
    new[3], new[4] = (500, 0, 50, 20), (500, 0, 50, 20)
    assert verdict(look(GuardRecord(), new, 0.01), LEVELS, 100, 300.0, 0.0).says == "roll_back"


def test_the_ceiling_holds_at_every_look_together():
    rng = np.random.default_rng(7)
    misses = 0
    for _ in range(100):
        keys = np.cumsum(rng.integers(1, 40, 40))
        ones = np.cumsum(rng.random(int(keys[-1])) < 0.05)
        bounds = [ceiling(looked_at(int(n), int(ones[n - 1])), 0.05) for n in keys]
        misses += min(bounds) < 0.05
    assert misses <= binom.isf(TINY, 100, 0.05)
    assert ceiling(looked_at(1000, 50), 0.05) < 0.08
    assert ceiling(looked_at(0, 0), 0.05) > 0.99


def looked_at(keys: int, ones: int) -> GuardRecord:
    return GuardRecord(seen=tuple(in_group((keys, ones, 0, 0))))


def ever_rolled_back(rates: Floats, rng: np.random.Generator, canaries: int, margin: float, level: float) -> Floats:
    """After how many keys each canary is rolled back, with a look after every few keys; infinity: never.

    `rates` (looks, 2 or 2 x canaries) are of the stable version and of the canary.
    """
    evidence = np.zeros((canaries, GUESSES))
    before = np.zeros((canaries, 4))
    after = np.full(canaries, np.inf)
    for p, q in rates:
        stable, keys = rng.integers(10, 60, canaries), rng.integers(2, 30, canaries)
        new = np.stack([stable, rng.binomial(stable, p), keys, rng.binomial(keys, q)], 1).astype(float)
        evidence += log_e_values(before, new, margin)[0]
        before += new
        crossed = np.exp(evidence).mean(1) >= 1 / level
        after = np.where(crossed & np.isinf(after), before[:, 2], after)
    return after


@pytest.mark.parametrize(
    ("p", "q"),
    [(0.05, 0.06), *(pytest.param(p, q, marks=pytest.mark.slow) for p, q in SLOW_RATES)],
)
def test_of_2000_innocent_canaries_no_more_are_rolled_back_than_said_however_often_one_looks(p: float, q: float):
    after = ever_rolled_back(np.tile([p, q], (60, 1)), np.random.default_rng(8), 2000, 0.01, 0.05)
    assert np.isfinite(after).sum() <= binom.isf(TINY, 2000, 0.05)


def test_a_test_of_a_fixed_sample_would_roll_back_three_times_as_many_as_it_says():
    """What these tests are for: such canaries, by the pooled z-test at 5%, with twenty looks."""
    rng = np.random.default_rng(8)
    stable, canary = rng.binomial(200, 0.05, (2, 2000, 20)).cumsum(-1)
    keys = 200 * np.arange(1, 21)
    pooled = (stable + canary) / (2 * keys)
    z = (canary - stable) / keys / np.sqrt(pooled * (1 - pooled) * 2 / keys)
    assert (z > norm.isf(0.05)).any(-1).mean() > 0.15


@pytest.mark.slow
def test_load_that_comes_and_goes_for_both_versions_rolls_nothing_back():
    waves = 0.25 + 0.2 * np.sin(np.arange(60) / 4)
    after = ever_rolled_back(np.stack([waves, waves], 1), np.random.default_rng(9), 2000, 0.05, 0.05)
    assert np.isfinite(after).sum() <= binom.isf(TINY, 2000, 0.05)


@pytest.mark.parametrize(("q", "margin", "half", "nearly_all"), [(0.05, 0.01, 300, 800), (0.2, 0.01, 60, 150)])
def test_so_many_keys_of_a_bad_canary_are_needed(q: float, margin: float, half: int, nearly_all: int):
    after = ever_rolled_back(np.tile([0.001, q], (80, 1)), np.random.default_rng(10), 1000, margin, 0.005)
    assert np.median(after) <= half
    assert np.quantile(after, 0.95) <= nearly_all


@pytest.mark.slow
def test_keys_that_always_fail_do_so_for_both_versions():
    """Not independent draws, but four thousand keys of which some always fail, hashed to the versions."""
    rng = np.random.default_rng(11)
    canaries, keys = 1000, 4000
    fails, canary = rng.random((canaries, keys)) < 0.05, rng.random((canaries, keys)) < 0.25
    evidence, before, ever = np.zeros((canaries, GUESSES)), np.zeros((canaries, 4)), np.zeros(canaries, bool)
    for part in np.split(np.arange(keys), 20):
        ones, ours = fails[:, part], canary[:, part]
        columns = (~ours, ones & ~ours, ours, ones & ours)
        new = np.stack([column.sum(1) for column in columns], 1).astype(float)
        evidence += log_e_values(before, new, 0.01)[0]
        before += new
        ever |= np.exp(evidence).mean(1) >= 1 / 0.05
    assert ever.sum() <= binom.isf(TINY, canaries, 0.05)
