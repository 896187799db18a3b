"""Every way of dealing: all rows, once, the minimum to each, the same for a seed; and what each one promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.partitions.description import describe
from fedclaw.errors import UsageError
from fedclaw.simulation.partitions.base import apportion
from fedclaw.simulation.partitions.features import FeatureShift
from fedclaw.simulation.partitions.labels import Dirichlet, Shards, fill_up
from fedclaw.simulation.partitions.natural import Natural
from fedclaw.simulation.partitions.sizes import Iid, Quantity

METHODS = (
    Iid(),
    Dirichlet(alpha=0.1),
    Dirichlet(alpha=5),
    Shards(shards=2),
    Quantity(law="power", spread=1.5),
    Quantity(law="lognormal", spread=2),
    Quantity(law="dirichlet", spread=4),
    FeatureShift(kind="noise"),
    FeatureShift(kind="quantile", feature=1, strength=0.7),
    Natural(merge=True),
)
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)


def deal(method, *, rows=400, clients=7, seed=0, labels=4, sites=None, inputs=None):
    """A hand of made-up rows: targets by turns, two features, a site for each fifty rows."""
    targets = np.arange(rows) % labels
    numbers = np.random.default_rng(1).normal(size=(rows, 2)) if inputs is None else inputs
    where = np.arange(rows) // 50 if sites is None else sites
    return targets, method.deal(targets, numbers, clients, np.random.default_rng(seed), sites=where)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(METHODS), st.integers(50, 600), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_every_row_is_dealt_once_and_everybody_gets_the_minimum(method, rows, clients, labels, seed):
    sites = np.arange(rows) % clients
    _, hand = deal(method, rows=rows, clients=clients, labels=labels, seed=seed, sites=sites)
    assert np.array_equal(np.sort(hand.rows), np.arange(rows))
    assert hand.clients == clients
    spans = zip(hand.bounds[:-1], hand.bounds[1:], strict=True)
    assert [share.tolist() for share in hand.shares] == [hand.rows[start:end].tolist() for start, end in spans]
    assert hand.sizes.min() >= method.fewest(rows, clients) >= 1
    assert all((hand.owners[share] == client).all() for client, share in enumerate(hand.shares))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from((Dirichlet(alpha=0.05), Quantity(spread=3), Quantity(law="power", spread=100), Iid())),
    st.integers(1, 30),
    st.integers(1, 10),
    st.integers(0, 50),
)
def test_a_minimum_that_can_be_kept_is_kept(method, minimum, clients, more):
    """Down to the last row: with none to spare, everybody has exactly the minimum."""
    _, hand = deal(method.model_copy(update={"minimum": minimum}), rows=minimum * clients + more, clients=clients)
    assert hand.sizes.min() >= minimum


@each_method
def test_a_seed_decides_the_hand(method):
    first, again, other = (deal(method, seed=seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first.rows, again.rows)
    assert np.array_equal(first.bounds, again.bounds)
    assert not np.array_equal(first.rows, other.rows)


@each_method
def test_ten_thousand_clients_are_dealt_to(method):
    _, hand = deal(method, rows=100_000, clients=10_000, sites=np.arange(100_000) % 10_001)
    assert np.array_equal(np.sort(hand.rows), np.arange(100_000))
    assert hand.clients == 10_000
    assert hand.sizes.min() >= method.fewest(100_000, 10_000)


def slow_dirichlet(targets, clients, alpha, generator, fewest):
    """The same deal with a list for each client and a search for each row that is moved."""
    for _ in range(100):
        shares = [[] for _ in range(clients)]
        for label in np.unique(targets):
            rows = generator.permutation(np.flatnonzero(targets == label))
            cuts = np.cumsum(generator.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)
            for share, part in zip(shares, np.split(rows, cuts.astype(int)), strict=True):
                share.extend(part.tolist())
        if min(len(share) for share in shares) >= fewest:
            break
    while len(smallest := min(shares, key=len)) < fewest:
        smallest.append(max(shares, key=len).pop())
    return [generator.permutation(np.array(share)) for share in shares]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from((0.02, 0.1, 0.5, 2.0)), st.integers(1, 12), st.integers(0, 2**16))
def test_the_dirichlet_deal_is_that_of_the_obvious_loop(alpha, clients, seed):
    """To the last row, so that what was dealt before stays as it was."""
    targets = np.random.default_rng(7).integers(0, 3, 300)
    hand = Dirichlet(alpha=alpha).deal(targets, np.zeros((300, 1)), clients, np.random.default_rng(seed))
    fewest = min(20, 300 // (2 * clients))
    expected = slow_dirichlet(targets, clients, alpha, np.random.default_rng(seed), fewest)
    assert [share.tolist() for share in hand.shares] == [share.tolist() for share in expected]


def test_very_unlike_clients_still_get_their_fewest():
    """So small an alpha never deals all ten clients 20 examples: rows are moved."""
    _, hand = deal(Dirichlet(alpha=0.02), rows=500, clients=10, labels=2)
    assert hand.sizes.min() == 20


def test_rows_move_from_the_largest_to_the_smallest():
    shares = [np.array([0]), np.array([1, 2, 3, 4, 5]), np.array([], int), np.array([6, 7, 8])]
    filled = fill_up(shares, 2)
    assert [share.tolist() for share in filled] == [[0, 4], [1, 2], [5, 3], [6, 7, 8]]


def test_smaller_alpha_means_more_different_clients():
    distances = []
    for alpha in (0.05, 0.5, 5, 500):
        targets, hand = deal(Dirichlet(alpha=alpha), rows=20_000, clients=20, labels=10)
        distances.append(describe(hand, targets).total_variation["mean"])
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.7
    assert distances[-1] < 0.1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 99))
def test_shards_give_no_more_labels_than_shards(shards, clients, counts, seed):
    """Where there are as many shards as labels; every client has at least a row of each of its shards."""
    targets = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    pieces = shards * clients
    if not len(counts) <= pieces <= len(targets):
        return
    hand = Shards(shards=shards).deal(targets, np.zeros((len(targets), 1)), clients, np.random.default_rng(seed))
    assert max(len(np.unique(targets[share])) for share in hand.shares) <= shards
    assert hand.sizes.min() >= shards
    assert np.array_equal(np.sort(hand.rows), np.arange(len(targets)))


def test_the_shards_of_the_paper():
    """McMahan et al. 2017, section 3: 60,000 images of ten labels, 100 clients, two shards of 300 for each."""
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))
    hand = Shards(shards=2).deal(targets, np.zeros((60_000, 1)), 100, np.random.default_rng(0))
    assert hand.sizes.tolist() == [600] * 100
    assert max(len(np.unique(targets[share])) for share in hand.shares) == 2


def test_fewer_shards_than_labels_lie_across_labels():
    targets, hand = deal(Shards(shards=1), rows=100, clients=2, labels=4)
    assert hand.sizes.tolist() == [50, 50]
    assert sorted(np.unique(targets[share]).tolist() for share in hand.shares) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("law", ["power", "lognormal", "dirichlet"])
def test_quantity_changes_sizes_and_keeps_labels(law):
    sizes = []
    for spread in (0.2, 2.0):
        targets, hand = deal(Quantity(law=law, spread=spread), rows=40_000, clients=10, labels=4)
        sizes.append(hand.sizes / hand.sizes.mean())
        for share in hand.shares:
            shares = np.bincount(targets[share], minlength=4) / len(share)
            # Six standard deviations of a share of that many draws.
            assert np.abs(shares - 0.25).max() < 6 * np.sqrt(0.25 * 0.75 / len(share))
    assert sizes[0].std() < sizes[1].std()
    assert sizes[1].max() > 2


def test_power_law_sizes_have_their_tail():
    """Sizes are Pareto numbers, of which a share x^(-1 / spread) exceeds x times the smallest."""
    hand = Quantity(law="power", spread=0.5, minimum=1).deal(
        np.zeros(2_000_000, np.int64), np.zeros((2_000_000, 1)), 20_000, np.random.default_rng(3)
    )
    ratio = hand.sizes / hand.sizes.min()
    assert abs((ratio > 4).mean() - 4**-2) < 0.01


def test_apportioning_by_hand():
    """Ten by 1:2:7; of eleven, the largest remainders get the rest; who is short gets the minimum."""
    assert apportion(np.array([1.0, 2, 7]), 10, 0).tolist() == [1, 2, 7]
    assert apportion(np.array([1.0, 2, 7]), 11, 0).tolist() == [1, 2, 8]
    assert apportion(np.array([1.0, 2, 7]), 10, 2).tolist() == [2, 2, 6]
    assert apportion(np.array([1.0, 1, 1]), 11, 1).tolist() == [4, 4, 3]
    assert apportion(np.array([1e-300, 1.0]), 6, 3).tolist() == [3, 3]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.integers(0, 9), st.integers(0, 500))
def test_apportioned_numbers_add_up(weights, fewest, more):
    total = fewest * len(weights) + more
    numbers = apportion(np.array(weights), total, fewest)
    assert numbers.sum() == total
    assert numbers.min() >= fewest


def test_natural_clients_are_the_sites():
    sites = np.array(["b", "a", "b", "c", "a", "a"])
    hand = Natural().deal(np.zeros(6, np.int64), np.zeros((6, 1)), 3, np.random.default_rng(0), sites=sites)
    assert [sorted(share.tolist()) for share in hand.shares] == [[1, 4, 5], [0, 2], [3]]


def test_a_column_may_tell_the_site():
    inputs = np.array([[5.0, 1], [6, 0], [7, 1], [8, 0]])
    hand = Natural(column=1).deal(np.zeros(4, np.int64), inputs, 2, np.random.default_rng(0))
    assert [sorted(share.tolist()) for share in hand.shares] == [[1, 3], [0, 2]]


def test_merged_sites_stay_whole():
    """Of 5, 3, 2 and 1 rows, two clients get 5 + 1 and 3 + 2."""
    sites = np.repeat([0, 1, 2, 3], [3, 5, 1, 2])
    hand = Natural(merge=True).deal(np.zeros(11, np.int64), np.zeros((11, 1)), 2, np.random.default_rng(0), sites=sites)
    assert [np.unique(sites[share]).tolist() for share in hand.shares] == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("method", "clients", "words"),
    [
        (Iid(), 401, "partition.minimum"),
        (Dirichlet(minimum=50), 10, "partition.minimum: 50 examples for each of 10 clients are 500"),
        (Shards(shards=100), 7, "partition.shards"),
        (Shards(shards=1, minimum=150), 2, None),
        (Shards(shards=1, minimum=180), 3, "partition.minimum"),
        (Natural(), 7, "8 sites, not from 7"),
        (Natural(), 9, "8 sites, not from 9"),
        (Natural(minimum=51), 7, "8 sites"),
        (Natural(column=2), 2, "partition.column"),
        (FeatureShift(kind="quantile", feature=2), 2, "partition.feature"),
        (FeatureShift(kind="rotation"), 2, "partition.kind: rotation is for images"),
    ],
)
def test_what_the_data_cannot_bear_is_said(method, clients, words):
    if words is None:
        assert deal(method, clients=clients)[1].sizes.min() >= 150
        return
    with pytest.raises(UsageError, match=words):
        deal(method, clients=clients)
