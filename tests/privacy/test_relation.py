"""The pair of distributions that docs/privacy.md derives for zero-out and add-or-remove, and what the accountant says.

P = (1 - q) N(0, z^2) + q N(1, z^2): one step's noised sum with the unit. Q = N(0, z^2): without it, or with nothing in
its place. Both directions count.
"""

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.privacy_accountant import NeighboringRelation

from fedclaw.privacy.accounting import ORDERS, NoiseEvent, epsilon_of, sampled_curve

DELTA = 1e-4
STEPS = [(1.0, 1.0), (0.5, 1.0), (0.1, 0.7), (0.1, 2.0), (0.01, 0.6)]


def normal(x, mean, z):
    return np.exp(-((x - mean) ** 2) / (2 * z * z)) / (z * np.sqrt(2 * np.pi))


def hockey_sticks(q, z, epsilon):
    """The least delta at `epsilon` of (P, Q) and of (Q, P), by adding up the densities on a fine grid."""
    x, step = np.linspace(-20 * z, 20 * z + 1, 200_001, retstep=True)
    without = normal(x, 0, z)
    present = (1 - q) * without + q * normal(x, 1, z)
    return tuple(
        float(np.maximum(one - np.exp(epsilon) * other, 0).sum() * step)
        for one, other in ((present, without), (without, present))
    )


@pytest.mark.parametrize(("q", "z"), STEPS)
def test_the_accountant_covers_both_directions_and_little_more(q, z):
    epsilon = epsilon_of([NoiseEvent(q, z, 1)], DELTA)
    assert max(hockey_sticks(q, z, epsilon)) <= DELTA * (1 + 1e-6)
    assert max(hockey_sticks(q, z, 0.98 * epsilon)) > DELTA


def test_one_direction_alone_would_be_too_little():
    """With sampling, what is there shows more than what is not: an accountant of (Q, P) alone would say less."""
    epsilon = epsilon_of([NoiseEvent(0.1, 0.7, 1)], DELTA)
    with_it, without_it = hockey_sticks(0.1, 0.7, 0.9 * epsilon)
    assert with_it > DELTA > without_it


@pytest.mark.parametrize(("q", "z"), STEPS)
def test_zero_out_and_add_or_remove_have_the_same_distributions(q, z):
    """As dp_accounting has them; for one step and for many."""
    made = [
        privacy_loss_distribution.from_gaussian_mechanism(
            z, sampling_prob=q, value_discretization_interval=1e-3, neighboring_relation=relation
        )
        for relation in (NeighboringRelation.REPLACE_SPECIAL, NeighboringRelation.ADD_OR_REMOVE_ONE)
    ]
    for count in (1, 10):
        one, other = (step.self_compose(count).get_epsilon_for_delta(DELTA) for step in made)
        assert one == other > 0
        assert one == pytest.approx(epsilon_of([NoiseEvent(q, z, count)], DELTA), rel=0.01)


@pytest.mark.parametrize(("q", "z"), STEPS)
def test_renyi_divergences_cover_both_directions(q, z):
    """At order 2, by adding up the densities."""
    x, step = np.linspace(-20 * z, 20 * z + 1, 200_001, retstep=True)
    without = normal(x, 0, z)
    present = (1 - q) * without + q * normal(x, 1, z)
    pairs = ((present, without), (without, present))
    divergences = [float(np.log((one[other > 0] ** 2 / other[other > 0]).sum() * step)) for one, other in pairs]
    (told,) = sampled_curve(q, 1 / (2 * z * z))[np.isclose(ORDERS, 2.0)]
    assert max(divergences) <= told * (1 + 1e-6)
    assert told <= max(divergences) * (1 + 1e-3)
