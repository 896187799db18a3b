"""Who shares masks with whom, and whether the bounds on the graph hold when sites are drawn at random."""

import secrets
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation.parameters import (
    Graph,
    Parameters,
    _hypergeometric,
    least_threshold,
    neighbours_needed,
    permutation,
)
from tests.chance import frequencies_fit
from tests.privacy.secure_aggregation.rehearsal import parameters

Edges = dict[int, frozenset[int]]


def edges(count: int, neighbours: int) -> Edges:
    graph = Graph(secrets.token_hex(16), count, neighbours)
    return {index: frozenset(graph.neighbours_of(index)) for index in range(count)}


def is_connected(graph: Edges) -> bool:
    found, todo = set(), [next(iter(graph))]
    while todo:
        index = todo.pop()
        if index not in found:
            found.add(index)
            todo += graph[index] & graph.keys()
    return found == graph.keys()


@given(
    st.integers(2, 40).flatmap(
        lambda count: st.tuples(st.just(count), st.sampled_from([*range(2, count - 1, 2), count - 1]))
    )
)
def test_regular_symmetric_and_connected(shape: tuple[int, int]) -> None:
    graph = edges(*shape)
    for index, near in graph.items():
        assert len(near) == shape[1]
        assert index not in near
        assert all(index in graph[other] for other in near)
    assert is_connected(graph)


def test_every_party_draws_the_same_graph() -> None:
    one, other = (parameters(12, neighbours=4, session="a" * 32) for _ in range(2))
    assert [one.neighbours_of(site) for site in one.sites] == [other.neighbours_of(site) for site in other.sites]
    third = parameters(12, neighbours=4, session="b" * 32)
    assert [one.neighbours_of(site) for site in one.sites] != [third.neighbours_of(site) for site in third.sites]


def test_orders_are_uniform() -> None:
    seen = Counter(tuple(permutation(secrets.token_hex(16), 3)) for _ in range(8000))
    assert len(seen) == 6
    assert frequencies_fit(list(seen.values()))


def test_hypergeometric_by_hand() -> None:
    # 5 sites, 2 marked, 3 drawn: C(2,1) C(3,2) / C(5,3) = 6/10.
    assert _hypergeometric(5, 2, 3, 1) == pytest.approx(0.6)
    assert _hypergeometric(5, 2, 3, 3) == 0
    assert _hypergeometric(5, 4, 3, 1) == 0
    assert sum(_hypergeometric(50, 20, 10, met) for met in range(11)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("sites", "dropouts", "corrupt", "neighbours", "threshold"),
    [
        (2, 0, 0, 1, 2),
        (3, 1, 0, 2, 2),
        (4, 1, 1, 3, 3),
        (4, 1, 0, 3, 3),
        (5, 2, 0, 4, 3),
        (20, 3, 6, 19, 14),
        (64, 6, 6, 63, 36),
    ],
)
def test_small_federations_use_the_complete_graph(
    sites: int, dropouts: int, corrupt: int, neighbours: int, threshold: int
) -> None:
    assert neighbours_needed(sites, dropouts, corrupt) == (neighbours, threshold)


@pytest.mark.parametrize(("sites", "dropouts", "corrupt"), [(2, 1, 0), (4, 1, 2), (20, 7, 6), (3, 0, 3)])
def test_more_than_can_be_borne(sites: int, dropouts: int, corrupt: int) -> None:
    with pytest.raises(SecureAggregationError, match="tolerate fewer"):
        neighbours_needed(sites, dropouts, corrupt)


@pytest.mark.parametrize(("sites", "dropouts", "corrupt"), [(1, 0, 0), (5, -1, 0), (5, 0, -1)])
def test_counts_that_are_none(sites: int, dropouts: int, corrupt: int) -> None:
    with pytest.raises(SecureAggregationError, match="at least 2 sites"):
        neighbours_needed(sites, dropouts, corrupt)


def test_beyond_them_a_sparse_one_if_it_does() -> None:
    assert neighbours_needed(100, 10, 10) == (32, 22)
    # Too many corrupt sites for any sparse graph of this size.
    assert neighbours_needed(65, 10, 40).neighbours == 64


def test_degree_grows_like_the_logarithm() -> None:
    degrees = [neighbours_needed(count, count // 10, count // 10).neighbours for count in (200, 1000, 4000)]
    assert degrees == sorted(degrees)
    assert degrees[-1] < 160


@settings(max_examples=15, deadline=None)
@given(st.integers(65, 300), st.floats(0, 0.15), st.floats(0, 0.15))
def test_good_graphs(count: int, lost: float, colluding: float) -> None:
    """At random placements, the three conditions hold: one failure in 2^30 is allowed, none is seen."""
    dropouts, corrupt = int(lost * count), int(colluding * count)
    neighbours, threshold = neighbours_needed(count, dropouts, corrupt)
    graph = edges(count, neighbours)
    drawn = np.random.default_rng(secrets.randbits(64)).permutation(count)
    gone, bad = set(drawn[:dropouts].tolist()), set(drawn[dropouts : dropouts + corrupt].tolist())
    for near in graph.values():
        assert 2 * threshold > neighbours + 1 + len(near & bad)
        assert neighbours - len(near & gone) >= threshold - 1
    assert is_connected({index: near for index, near in graph.items() if index not in gone | bad})


def test_a_much_sparser_graph_fails() -> None:
    """78 neighbours are needed. With 12, most draws break E1 or E3: some site has 5 lost ones, some 3 corrupt ones."""
    count, dropouts, corrupt, thin = 200, 30, 20, 12
    assert neighbours_needed(count, dropouts, corrupt).neighbours == 78
    failures = 0
    for _ in range(20):
        graph, drawn = edges(count, thin), np.random.default_rng(secrets.randbits(64)).permutation(count)
        gone, bad = set(drawn[:dropouts].tolist()), set(drawn[dropouts : dropouts + corrupt].tolist())
        colluding, lost = (max(len(near & marked) for near in graph.values()) for marked in (bad, gone))
        failures += least_threshold(thin, colluding) > thin + 1 - lost
    assert failures > 0


class TestParameters:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"threshold": 2}, "threshold is from 3 to 5"),
            ({"threshold": 6}, "threshold is from 3 to 5"),
            ({"neighbours": 3}, "neighbours is 4"),
            ({"neighbours": 5, "threshold": 4}, "neighbours is 4"),
            ({"neighbours": 0, "threshold": 1}, "neighbours is 4"),
            ({"minimum": 1}, "minimum is from 2"),
            ({"minimum": 6}, "minimum is from 2"),
            ({"session": "short"}, "session"),
            ({"length": 0}, "length"),
            ({"sites": ("site-a",) * 5}, "named twice"),
            ({"sites": ("Site A", "b", "c", "d", "e")}, "cannot be used"),
        ],
    )
    def test_unsafe_ones_are_refused(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            parameters(5, **change)

    def test_every_field_is_in_the_digest(self) -> None:
        base: dict[str, object] = {"session": "a" * 32, "neighbours": 4, "threshold": 4}
        changes: list[dict[str, object]] = [
            {},
            {"session": "b" * 32},
            {"federation": "lung"},
            {"run": "summer"},
            {"round": 4},
            {"threshold": 5},
            {"neighbours": 2, "threshold": 3},
            {"length": 6},
            {"minimum": 3},
            {"terms": "a" * 64},
        ]
        assert {name for change in changes for name in change} | {"sites"} == set(Parameters.model_fields)
        digests = {parameters(7, **({**base} | change)).digest for change in changes}
        digests |= {parameters(8, **base).digest, parameters(7, **base, sites=parameters(7).sites[::-1]).digest}
        assert len(digests) == len(changes) + 2

    def test_how_many_may_collude(self) -> None:
        assert parameters(5, threshold=3).colluding == 0
        assert parameters(5, threshold=4).colluding == 2
        for colluding in range(5):
            assert parameters(9, threshold=least_threshold(8, colluding)).colluding >= colluding
