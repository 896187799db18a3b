"""The robust strategies on small numbers whose answers are worked out by hand."""

import numpy as np
import pytest

from fedclaw.errors import UpdateError
from fedclaw.learning.strategy import Participation
from fedclaw.strategies.bulyan import Bulyan, selection
from fedclaw.strategies.centred_clipping import CENTRE, CentredClipping
from fedclaw.strategies.krum import Krum
from fedclaw.strategies.median import Median
from fedclaw.strategies.multi_krum import MultiKrum
from fedclaw.strategies.norm_bounding import NormBounding
from fedclaw.strategies.rfa import Rfa
from fedclaw.strategies.robust import RobustStrategy, squared_distances
from fedclaw.strategies.trimmed_mean import TrimmedMean


def combined(strategy: RobustStrategy, rows: list, weights: list[float] | None = None) -> list[float]:
    """What `strategy` makes of `rows`, single numbers or vectors, in its first round."""
    updates = np.array(rows, np.float32).reshape(len(rows), -1)
    state = strategy.server_state({"w": updates[0]})
    return strategy.robust_aggregate(updates, np.array(weights or [1.0] * len(rows)), state).tolist()


def test_median() -> None:
    assert combined(Median(), [[1, 5], [2, -1], [9, 0]]) == [2, 0]


def test_median_of_an_even_number_is_between_the_two_in_the_middle() -> None:
    assert combined(Median(), [[1, 7], [100, 7], [3, 7], [2, -7]]) == [2.5, 7]


def test_median_of_the_largest_numbers_does_not_overflow() -> None:
    large = float(np.finfo(np.float32).max)
    assert combined(Median(), [large, large, large, large]) == [large]


def test_trimmed_mean() -> None:
    # 0 and 100 go; (1 + 2 + 6) / 3.  Then of ties one goes: 1, 1, 1 are left of -9, 1, 1, 1, 1.
    assert combined(TrimmedMean(hostile=1), [[6, 1], [1, 1], [0, -9], [100, 1], [2, 1]]) == [3, 1]


def test_trimmed_mean_that_trims_nothing_is_the_mean() -> None:
    assert combined(TrimmedMean(hostile=0), [[1, 2], [3, 4]]) == [2, 3]


def test_krum() -> None:
    # n - f - 2 = 2 neighbours.  Scores: 0: 1 + 9; 1: 1 + 4; 3: 4 + 9; 10: 0.25 + 49; 10.5: 0.25 + 56.25.
    assert combined(Krum(hostile=1), [10.5, 0, 3, 1, 10]) == [1]


def test_krum_of_equals_takes_the_first() -> None:
    # -1 and 1 both score 4 + 4
    assert combined(Krum(hostile=1), [-3, -1, 1, 3, 100]) == [-1]
    assert combined(Krum(hostile=1), [-3, 1, -1, 3, 100]) == [1]


def test_multi_krum() -> None:
    # as for Krum; n - f - 2 = 2 are kept, 1 and 0.  The third would be 3.
    rows = [10.5, 0, 3, 1, 10]
    assert combined(MultiKrum(hostile=1), rows) == [0.5]
    assert combined(MultiKrum(hostile=1, keep=3), rows) == pytest.approx([4 / 3])
    assert combined(MultiKrum(hostile=1, keep=1), rows) == combined(Krum(hostile=1), rows)
    assert combined(MultiKrum(hostile=1, keep=99), rows) == pytest.approx([4.9])


def test_bulyans_selection() -> None:
    # n = 7, f = 1.  4 neighbours: 2 scores 10.  3: 1 and 3 score 14, the first is taken.  2: 3 scores 1 + 9.
    # 1: 0 and 4 score 16.  Then none are left by Krum's count, so 1: 4 and 50 score 46^2.
    updates = np.array([[0], [1], [2], [3], [4], [50], [100]], np.float32)
    assert selection(squared_distances(updates), 1) == [2, 1, 3, 0, 4]


def test_bulyan() -> None:
    # 0, 1, 2, 5, 6 are chosen, whose median is 2; the three nearest to it are 0, 1 and 2
    assert combined(Bulyan(hostile=1), [0, 1, 2, 5, 6, 1000, -1000]) == [1]


def test_bulyan_of_two_values_equally_far_from_the_median_takes_the_smaller() -> None:
    # the first five are chosen; of -2, -2, 0, 2, 2 in the second coordinate 0 and both of the smaller are left
    rows = [[0, -2], [1, -2], [2, 0], [3, 2], [4, 2], [50, 0], [100, 0]]
    assert combined(Bulyan(hostile=1), rows) == pytest.approx([2, -4 / 3])


def test_bulyan_without_hostile_sites_is_the_mean() -> None:
    assert combined(Bulyan(hostile=0), [1, 2, 9]) == [4]


def test_rfa_is_where_the_diagonals_of_a_quadrilateral_cross() -> None:
    # (0, 0) + t (2, 1) = (4, 0) + s (-1, 3) at s = 4/7, t = 12/7
    assert combined(Rfa(), [[0, 0], [4, 0], [6, 3], [2, 6]]) == pytest.approx([24 / 7, 12 / 7], abs=1e-5)


def test_rfa_weighs() -> None:
    # on a line it is the weighted median: 3 of 5 at 10, though its mean is 20
    assert combined(Rfa(), [10, 20, 50], [3.0, 1.0, 1.0]) == pytest.approx([10], abs=1e-4)
    assert combined(Rfa(), [10, 20, 50], [1.0, 1.0, 1.0]) == pytest.approx([20], abs=1e-4)
    assert combined(Rfa(), [10, 20, 50], [1.0, 1.0, 3.0]) == pytest.approx([50], abs=1e-4)


def test_rfa_leaves_an_update_that_it_happens_to_begin_at() -> None:
    # plain Weiszfeld would stay at the update that changes nothing
    assert combined(Rfa(), [[0, 0], [1, 1], [1, 0.9], [0.9, 1]])[0] == pytest.approx(0.95, abs=0.05)


def test_norm_bounding() -> None:
    # (30, 40) has norm 50 and comes down to (3, 4); (3, 4) stays
    assert combined(NormBounding(bound=5), [[30, 40], [3, 4]]) == pytest.approx([3, 4])
    assert combined(NormBounding(bound=5), [[0, 0], [0, 0.5]]) == [0, 0.25]


def test_norm_bounding_by_the_median_norm() -> None:
    # norms 50, 5 and 1: the bound is 5
    assert combined(NormBounding(), [[30, 40], [3, -4], [1, 0]]) == pytest.approx([7 / 3, 0], abs=1e-6)


def test_centred_clipping() -> None:
    # from 0, within 1: (1 - 0.5) / 2.  Once more from 0.25: 0.25 + (1 - 0.75) / 2.
    assert combined(CentredClipping(radius=1), [3, -0.5]) == [0.25]
    assert combined(CentredClipping(radius=1, iterations=2), [3, -0.5]) == [0.375]


def test_centred_clipping_begins_where_the_last_round_ended() -> None:
    strategy = CentredClipping(radius=1)
    state = strategy.server_state({"a": np.zeros(1, np.float32), "b": np.zeros((1, 1), np.float32)})
    first = strategy.robust_aggregate(np.array([[3, 0], [-0.5, 0]], np.float32), np.ones(2), state)
    mean = strategy.aggregate({"a": first[:1], "b": first[1:].reshape(1, 1)}, state, Participation(2, 2))
    mean["a"] *= 0  # the optimiser overwrites what it is given
    assert {name: array.tolist() for name, array in state[CENTRE].items()} == {"a": [0.25], "b": [[0]]}
    # 4 and -0.5 away from (0.25, 0): (1 - 0.5) / 2 further
    again = strategy.robust_aggregate(np.array([[4.25, 0], [-0.25, 0]], np.float32), np.ones(2), state)
    assert again.tolist() == [0.5, 0]


def test_centred_clipping_by_the_median_distance() -> None:
    # 1, 2 and 30 away from 0: the radius is 2
    assert combined(CentredClipping(), [1, -2, 30]) == pytest.approx([1 / 3])


@pytest.mark.parametrize(
    ("strategy", "fewest"),
    [
        (Median(), 3),
        (TrimmedMean(hostile=2), 5),
        (Krum(hostile=2), 7),
        (MultiKrum(hostile=2), 7),
        (Bulyan(hostile=2), 11),
        (Rfa(), 3),
        (NormBounding(), 3),
        (NormBounding(bound=1), 1),
        (CentredClipping(), 3),
        (CentredClipping(radius=1), 1),
    ],
)
def test_too_few_updates_are_told(strategy: RobustStrategy, fewest: int) -> None:
    assert strategy.fewest == fewest
    combined(strategy, [1.0] * fewest)
    if fewest > 1:
        with pytest.raises(UpdateError, match=f"at least {fewest} sites, and {fewest - 1} came"):
            combined(strategy, [1.0] * (fewest - 1))
