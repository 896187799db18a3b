"""Whose rows they are, and samples of units that bring all of their rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.errors import PrivacyError
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.steps import poisson_batches
from fedclaw.privacy.units import Units, starts_of
from tests.chance import counts_fit

KEY = bytes(range(32))


def repeatable() -> GaussianSource:
    return GaussianSource(insecure_fixed_key_for_tests=KEY)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 10**12) | st.integers(0, 4), max_size=30), st.data())
def test_rows_of_some_units_wherever_they_stand(numbers: list[int], data: st.DataObject) -> None:
    units, names = Units.of(np.array(numbers, np.int64)), sorted(set(numbers))
    assert len(units) == len(names)
    assert units.sizes.tolist() == [numbers.count(name) for name in names]
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(names)))) if names else st.just(set())))
    rows = units.rows_of(np.array(chosen, np.int64))
    assert rows.tolist() == [row for unit in chosen for row, number in enumerate(numbers) if number == names[unit]]
    assert rows.dtype == np.int64
    assert units.firsts.tolist() == [numbers.index(name) for name in names]


@pytest.mark.parametrize("wrong", [np.array([0.5, 1.0]), np.zeros((2, 2), np.int64), np.array(["a", "b"])])
def test_what_is_no_number_a_row_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(PrivacyError, match="one whole number a row"):
        Units.of(wrong)


def test_units_are_sampled_and_not_rows() -> None:
    """A unit of a thousand rows is in a batch as often as one of a single row, with all of them."""
    numbers, q, steps = np.repeat(np.arange(20), [1000, *range(1, 20)]), 0.2, 2000
    whose = np.random.default_rng(0).permutation(numbers)
    units = Units.of(whose)
    often = np.zeros(20, np.int64)
    for chosen in poisson_batches(len(units), q, steps, GaussianSource()):
        batch = units.rows_of(chosen.numpy())
        found, rows = np.unique(whose[batch], return_counts=True)
        assert (rows == units.sizes[found]).all()
        assert len(np.unique(batch)) == len(batch)
        often[found] += 1
    assert counts_fit(often, steps, q)


def test_a_unit_at_the_end_that_is_not_sampled_changes_no_batch() -> None:
    numbers = np.array([3, 1, 1, 2, 3, 3])
    (there,) = poisson_batches(len(Units.of(np.append(numbers, [9, 9, 9, 9]))), 0.7, 1, repeatable())
    (gone,) = poisson_batches(len(Units.of(numbers)), 0.7, 1, repeatable())
    assert torch.equal(there[there < 3], gone)


def test_a_unit_whose_rows_lie_apart_is_refused() -> None:
    assert starts_of([2, 2, 5, 7, 7]).tolist() == [0, 2, 3, 5]
    assert starts_of([]).tolist() == [0]
    for wrong in ([1, 0], [0, 1, 0], [[0, 1]]):
        with pytest.raises(PrivacyError, match="rows"):
            starts_of(wrong)
