"""Feature shift: what clients' instruments do to inputs, and that they do nothing else."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.simulation.partitions.features import FeatureShift
from fedclaw.simulation.partitions.sizes import Iid
from fedclaw.simulation.partitions.transforms import Brightness, Noise, Rotation

IMAGES = np.random.default_rng(5).integers(0, 17, (120, 6, 8)).astype(float)
TABLE = np.random.default_rng(6).normal(size=(3000, 2)) * [1.0, 50.0]


def deal(method, inputs, clients=4, seed=0):
    return method.deal(np.arange(len(inputs)) % 3, inputs, clients, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", ["noise", "brightness", "rotation"])
def test_inputs_change_by_client_and_nothing_else_does(kind):
    """The rows are those of an iid deal with the same seed, and what is handed in stays as it is."""
    before = IMAGES.copy()
    hand, plain = deal(FeatureShift(kind=kind), IMAGES), deal(Iid(), IMAGES)
    assert np.array_equal(IMAGES, before)
    assert [sorted(mine) for mine in hand.shares] == [sorted(mine) for mine in plain.shares]
    for client, share in enumerate(hand.shares):
        seen = hand.inputs(client, IMAGES)
        assert seen.shape == IMAGES[share].shape
        assert not np.allclose(seen, IMAGES[share])
        assert IMAGES.min() <= seen.min()
        assert seen.max() <= IMAGES.max()
        assert np.array_equal(seen, hand.inputs(client, IMAGES)), "the same question, another answer"
    assert np.array_equal(IMAGES, before)


@pytest.mark.parametrize("kind", ["noise", "brightness", "rotation"])
def test_clients_see_the_same_image_differently(kind):
    transform = deal(FeatureShift(kind=kind), IMAGES).transform
    views = [transform.apply(client, IMAGES[:5]) for client in range(4)]
    assert all(not np.allclose(views[one], views[other]) for one in range(4) for other in range(one))


def test_quantile_and_iid_leave_inputs_alone():
    for method in (Iid(), FeatureShift(kind="quantile")):
        hand = deal(method, TABLE)
        assert hand.transform is None
        assert all(np.array_equal(hand.inputs(k, TABLE), TABLE[share]) for k, share in enumerate(hand.shares))


def test_noise_has_the_variance_of_the_paper():
    """Client i of K, from 1: strength x i / K, in units of each column's variance (Li et al. 2022, section 3)."""
    hand = deal(FeatureShift(kind="noise", strength=0.4), TABLE, clients=2)
    assert hand.transform.levels.tolist() == [0.2, 0.4]
    for client, share in enumerate(hand.shares):
        noise = hand.inputs(client, TABLE) - TABLE[share]
        expected = hand.transform.levels[client] * TABLE.var(axis=0)
        # A variance estimated from 1,500 draws has a relative deviation of 3.7%; this is six of them.
        assert np.allclose(noise.var(axis=0), expected, rtol=0.22)
        assert np.abs(noise.mean(axis=0) / np.sqrt(expected)).max() < 6 / np.sqrt(len(share))


def test_noise_has_a_seed_of_the_deal():
    first, again, other = (deal(FeatureShift(), TABLE, seed=seed).transform for seed in (0, 0, 1))
    assert np.array_equal(first.apply(1, TABLE), again.apply(1, TABLE))
    assert not np.allclose(first.apply(1, TABLE), other.apply(1, TABLE))


def test_brightness_by_hand():
    """Distances from black are multiplied; white is white."""
    dim = Brightness(np.array([0.5, 1.5]), (2.0, 10.0))
    image = np.array([[[2.0, 4.0], [6.0, 10.0]]])
    assert dim.apply(0, image).tolist() == [[[2.0, 3.0], [4.0, 6.0]]]
    assert dim.apply(1, image).tolist() == [[[2.0, 5.0], [8.0, 10.0]]]


def test_a_quarter_turn_by_hand():
    """Counter-clockwise: the top right corner comes to the top left."""
    turned = Rotation(np.array([90.0, 0.0, 180.0]), (0.0, 9.0))
    image = np.arange(9.0).reshape(1, 3, 3)
    assert np.allclose(turned.apply(0, image)[0], np.rot90(image[0]))
    assert np.allclose(turned.apply(1, image), image)
    assert np.allclose(turned.apply(2, image)[0], np.rot90(image[0], 2))


def test_what_turns_in_from_outside_is_black():
    """The corners of a white image on black at 45 degrees; the middle stays white."""
    seen = Rotation(np.array([45.0]), (1.0, 5.0)).apply(0, np.full((1, 9, 9), 5.0))[0]
    assert np.allclose(seen[[0, 0, -1, -1], [0, -1, 0, -1]], 1.0)
    assert np.allclose(seen[3:6, 3:6], 5.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.floats(-180, 180))
def test_a_turn_leaves_the_middle_and_invents_no_brightness(height, width, degrees):
    image = np.random.default_rng(0).random((2, height, width))
    seen = Rotation(np.array([degrees]), (0.0, 1.0)).apply(0, image)
    assert seen.min() >= -1e-12
    assert seen.max() <= image.max() + 1e-12
    if height % 2 and width % 2:
        middle = (slice(None), height // 2, width // 2)
        assert np.allclose(seen[middle], image[middle])


def test_noise_on_images_stays_within_their_range():
    noise = Noise(np.array([1.0]), np.array(16.0), (0.0, 16.0), seed=1)
    seen = noise.apply(0, IMAGES)
    assert seen.min() == 0
    assert seen.max() == 16


def test_quantiles_cut_the_feature_in_runs():
    hand = deal(FeatureShift(kind="quantile", feature=1), TABLE)
    edges = [(TABLE[share, 1].min(), TABLE[share, 1].max()) for share in hand.shares]
    assert all(high <= low for (_, high), (low, _) in pairwise(edges))
    assert hand.sizes.tolist() == [750] * 4


def test_a_part_of_the_rows_may_be_dealt_by_the_feature():
    """With half of them, a client's mean lies between that of a full deal by the feature and everybody's."""
    full, half = (deal(FeatureShift(kind="quantile", strength=strength), TABLE) for strength in (1.0, 0.5))
    lowest = [TABLE[hand.shares[0], 0].mean() for hand in (full, half)]
    assert 0.3 < lowest[1] / lowest[0] < 0.7
