"""A breaker opens for the version's faults, comes back by probes, and does not go to and fro."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclaw.serve.routing.breaker import advance, is_open_for, opened, opens_for, retry_after
from fedclaw.serve.routing.controller import add_version
from fedclaw.serve.routing.counting import Calls, group_of, total
from fedclaw.serve.routing.plan import EVERYBODY, BreakerPolicy, BreakerState, changed, plan_name, read_plan
from fedclaw.serve.state.store import StateStore
from tests.serve.routing.conftest import Clock
from tests.serve.routing.traffic import Behaviour, Town

POLICY = BreakerPolicy()


@pytest.mark.parametrize(
    ("by_group", "group"),
    [
        ({}, None),
        ({1: (19, 19)}, None),
        ({1: (20, 9), 2: (20, 9)}, None),
        ({1: (20, 10), 2: (5, 3)}, EVERYBODY),
        ({1: (1000, 999), 2: (1000, 999)}, EVERYBODY),
        ({1: (10, 10), 2: (10, 10)}, EVERYBODY),
        # One client fails always, the others hardly ever: not the version's fault, as far as they are concerned.
        ({1: (20, 20)}, 1),
        ({1: (1000, 1000), 2: (5, 0)}, 1),
        ({1: (1000, 1000), 2: (3, 0), 3: (2, 1)}, 1),
        ({1: (1000, 1000), 2: (4, 4)}, 1),
        ({1: (1000, 1000), 2: (8, 2)}, EVERYBODY),
    ],
)
def test_when_it_opens_and_for_whom(by_group: dict[int, tuple[int, int]], group: int | None):
    window = {one: Calls(*calls) for one, calls in by_group.items()}
    assert opens_for(POLICY, window, {}) == group
    assert opens_for(POLICY, {0: Calls(100_000, 0)}, window) == (
        group if 0.8 * total(window).calls <= total(window).errors else None
    )


def test_it_opens_for_everybody_when_the_others_fail_too():
    state = opened(POLICY, None, 100.0, 1)
    assert is_open_for(state, 1)
    assert not is_open_for(state, 2)
    assert not is_open_for(state, None)
    assert advance(POLICY, state, {2: Calls(100, 1)}, {}, {}, 101.0) == state
    after = advance(POLICY, state, {2: Calls(20, 20)}, {}, {}, 101.0)
    assert is_open_for(after, 2)
    assert is_open_for(after, None)


def test_it_opens_waits_probes_and_closes():
    bad, good = {0: Calls(20, 20), 1: Calls(5, 5)}, {0: Calls(20, 0)}
    assert advance(POLICY, None, good, {}, {}, 100.0) is None
    state = advance(POLICY, None, bad, {}, {}, 100.0)
    assert state == BreakerState(state="open", epoch=1, since=100.0, wait=5.0)
    assert advance(POLICY, state, bad, {}, {}, 104.9) == state
    probing = advance(POLICY, state, {}, {}, {}, 105.0)
    assert probing == BreakerState(state="half_open", epoch=2, since=105.0, wait=5.0)
    assert advance(POLICY, probing, {}, {}, {0: Calls(4, 0)}, 106.0) == probing
    closed = advance(POLICY, probing, {}, {}, {0: Calls(5, 0)}, 107.0)
    assert closed == BreakerState(state="closed", epoch=3, since=107.0, wait=5.0)
    assert advance(POLICY, closed, good, {}, {}, 108.0) == closed


def test_waits_grow_while_it_fails_and_begin_anew_after_a_calm():
    state, now, waits = opened(POLICY, None, 0.0, EVERYBODY), 0.0, []
    for _ in range(9):
        waits.append(state.wait)
        now += state.wait
        probing = advance(POLICY, state, {}, {}, {}, now)
        assert probing is not None
        again = advance(POLICY, probing, {}, {}, {0: Calls(5, 5)}, now + 1)
        assert again is not None
        assert again.state == "open"
        state, now = again, now + 1
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    closed = BreakerState(state="closed", epoch=9, since=now, wait=300.0)
    assert opened(POLICY, closed, now + 50, 1).wait == 300.0
    assert opened(POLICY, closed, now + 101, 1).wait == 5.0


def test_a_client_is_told_to_come_when_it_is_worth_it():
    state = BreakerState(state="open", epoch=1, since=100.0, wait=20.0)
    assert retry_after(state, 105.0) == 15.0
    assert retry_after(state, 300.0) == 1.0


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.floats(0, 20)), max_size=40))
def test_whatever_happens_its_epoch_rises_with_each_change_and_only_then(rounds: list[tuple[int, int, float]]):
    state, now = None, 1000.0
    for calls, errors, passed in rounds:
        now += passed
        seen = {0: Calls(calls, min(calls, errors))}
        after = advance(POLICY, state, seen, seen, seen, now)
        if after != state:
            assert after is not None
            assert after.epoch == (0 if state is None else state.epoch) + 1
            assert POLICY.wait <= after.wait <= POLICY.longest_wait
        state = after


@pytest.fixture
def town(store: StateStore, clock: Clock) -> Town:
    """A stable version v1 with a last good version v0, two workers and two controllers."""
    plan = add_version(store, "m", "v1", "ann", clock())
    assert store.swap(plan_name("m"), 1, changed(plan, plan.decision, last_good=("v0",)).document())
    good = {"v0": Behaviour(), "v1": Behaviour(), "v2": Behaviour()}
    return Town(store, clock, clock.advance, good, rate=100.0, clients=("north", "south", "east", "west"))


def test_the_last_good_version_answers_until_the_stable_one_is_well_again(town: Town):
    town.run(2)
    town.versions = {**town.versions, "v1": Behaviour(errors=1.0)}
    town.run(3)
    assert town.kinds[-1] == "breaker_open"
    seen = town.failed["v1"]
    assert 20 <= seen <= 70
    town.answered.clear()
    town.run(20)
    assert town.failed["v1"] - seen <= 3 * 12  # Two rounds of probes.
    assert town.failed["v0"] == town.failed["nobody"] == 0
    town.versions = {**town.versions, "v1": Behaviour()}
    town.run(40)
    town.answered.clear()
    town.run(2)
    assert set(town.answered) == {"v1"}
    event = next(event for event in town.store.events("m") if event.kind == "breaker_open")
    assert event.body["version"] == "v1"
    assert int(str(event.body["errors"])) >= 20
    assert town.plan.mode == "single"


def test_with_both_bad_nobody_answers_and_nothing_goes_to_and_fro(town: Town):
    town.versions = {version: Behaviour(errors=1.0) for version in town.versions}
    town.run(10)
    assert {version: state.state for version, state in town.plan.breakers.items()} == {"v0": "open", "v1": "open"}
    town.failed.clear()
    town.run(45)
    assert town.failed["nobody"] > 0.95 * town.failed.total()
    changes = Counter(town.kinds)
    assert changes["breaker_open"] <= 2 * 4
    assert changes["breaker_closed"] == 0


def test_a_hostile_client_takes_nothing_from_the_others(town: Town):
    """It comes first, when nobody else is there, and opens the breakers of all versions: for itself."""
    for number in range(1500):
        town.request(town.routers[number % 2], f"h{number}", "hostile", fails=1.0)
        if number % 100 == 99:
            town.run(0.25)
            town.controllers[0].step(town.clock())
    assert town.failed["nobody"] > 1000
    town.failed.clear()
    town.answered.clear()
    town.run(10)
    assert town.failed.total() == 0
    assert set(town.answered) == {"v1"}
    assert {state.group for state in town.plan.breakers.values()} == {group_of("hostile")}


def test_another_worker_learns_of_it_from_the_plan(town: Town):
    """One worker alone sees the failures; the other has not had one."""
    for number in range(40):
        town.request(town.routers[0], f"k{number}", town.clients[number % 4], fails=1.0)
    town.routers[0].push()
    town.controllers[1].step(town.clock())
    town.routers[1].refresh()
    choice = town.routers[1].choose("m", "k")
    assert choice is not None
    assert choice.version == "v0"
    stored = read_plan(town.store, "m")
    assert stored is not None
    assert stored.plan.is_open("v1")
