"""Which cell a row is in, and that it is in one at most, whatever it holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclaw.privacy.statistics import Records
from fedclaw.privacy.survival import SurvivalDesign

ENDS = (1.0, 2.0, 5.0)
DESIGN = SurvivalDesign("days", "dead", 1, ENDS, "arm", ("old", "new"))


def records(rows, labels=None):
    """(days, dead, arm) a row."""
    table = np.array(rows, np.float64).reshape(-1, 3)
    labels = np.zeros(len(table), np.int64) if labels is None else np.array(labels)
    return Records({"days": table[:, 0], "dead": table[:, 1], "arm": table[:, 2]}, labels)


def cells(rows, design=DESIGN, **how):
    return design.cells(design.vector([records(rows, **how)]))


def test_rows_worked_out_by_hand():
    found = cells(
        [
            (-3, 1, 0),  # before the first bin's end, so in it
            (1, 0, 0),  # at its end: in it
            (1.01, 1, 0),
            (5, 1, 0),  # the last end
            (5.01, 1, 0),  # died after the last end: not seen to die up to there
            (2, 1, 1),
        ]
    )
    assert found.tolist() == [[[1, 1], [0, 1], [1, 1]], [[0, 0], [0, 1], [0, 0]]]


def test_a_row_whose_time_event_or_group_is_missing_is_in_no_cell():
    nan = np.nan
    assert cells([(nan, 1, 0), (1, nan, 0), (1, 1, nan)]).sum() == 0
    assert cells([(nan, 1, 0), (1, 1, 0)]).sum() == 1


def test_the_target_tells_the_event_and_the_group():
    rows = [(1, 0, 0), (1, 0, 0), (2, 0, 1)]
    by_target = SurvivalDesign("days", "outcome", 2, ENDS)
    assert cells(rows, by_target, labels=[2, 0, 1]).tolist() == [[[1, 1], [1, 0], [0, 0]]]
    grouped = SurvivalDesign("days", "dead", 1, ENDS, "outcome", ("a", "b"))
    assert cells(rows, grouped, labels=[0, 1, 1]).tolist() == [[[1, 0], [0, 0], [0, 0]], [[1, 0], [1, 0], [0, 0]]]


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([*ENDS, np.nextafter(2.0, 3.0), 0.0, 5e-324])
)
LEVELS = st.sampled_from([0.0, 1.0, np.nan])
ROWS = st.lists(st.tuples(NUMBERS, LEVELS, LEVELS), max_size=30)


@given(ROWS, st.tuples(NUMBERS, LEVELS, LEVELS))
def test_any_row_more_is_in_one_cell_or_in_none(rows, added):
    """Exactly: counts are integers, so that no rounding adds to what one row moves."""
    moved = cells([*rows, added]) - cells(rows)
    missing = any(np.isnan(value) for value in added)
    assert sorted(moved.ravel().tolist()) == [0.0] * (DESIGN.dimension - 1) + [0.0 if missing else 1.0]
    assert np.linalg.norm(moved) <= 1.0


@given(ROWS)
def test_the_parts_that_rows_come_in_make_no_difference(rows):
    parts = [records(rows[start : start + 7]) for start in range(0, len(rows), 7)]
    assert np.array_equal(DESIGN.vector(parts), DESIGN.vector([records(rows)]))


@pytest.mark.parametrize("groups", [1, 3])
def test_the_vector_is_as_long_as_it_says(groups):
    names = tuple("abc"[:groups])
    design = SurvivalDesign("days", "dead", 1, ENDS, "arm" if groups > 1 else None, names)
    assert design.dimension == len(design.vector([records([(1, 1, 0)])])) == groups * 6
