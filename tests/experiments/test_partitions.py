"""Every way of dealing: all rows, once, the minimum to each, the same for a seed; and what each one promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.partitions.base import apportion
from experiments.partitions.description import describe
from experiments.partitions.features import FeatureShift
from experiments.partitions.labels import Dirichlet, Shards, fill_up
from experiments.partitions.natural import Natural
from experiments.partitions.settings import PartitionSettings
from experiments.partitions.sizes import Iid, Quantity
from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError
from fedclaw.frozen import Frozen

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
    assert [share.tolist() for share in hand.shares] == [
        hand.rows[start:end].tolist() for start, end in zip(hand.bounds[:-1], hand.bounds[1:], strict=True)
    ]
    assert hand.sizes.min() >= method.fewest(rows, clients) >= 1
    assert all((hand.owners[share] == client).all() for client, share in enumerate(hand.shares))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_a_seed_decides_the_hand(method):
    """The targets, inputs and sites being the same."""
    first, again, other = (deal(method, seed=seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first.rows, again.rows)
    assert np.array_equal(first.bounds, again.bounds)
    assert not np.array_equal(first.rows, other.rows)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_ten_thousand_clients_are_dealt_to(method):
    _, hand = deal(method, rows=100_000, clients=10_000, sites=np.arange(100_000) % 10_001)
    assert np.array_equal(np.sort(hand.rows), np.arange(100_000))
    assert hand.clients == 10_000
    assert hand.sizes.min() >= method.fewest(100_000, 10_000)
