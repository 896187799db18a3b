"""Canaries from start to end: real routers, store and controllers; made traffic."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from fedclaw.serve.routing.canary import begin, find, guard_names
from fedclaw.serve.routing.controller import add_version, approve, start_canary
from fedclaw.serve.routing.counting import group_of
from fedclaw.serve.routing.plan import Guards, changed, new_plan
from fedclaw.serve.routing.router import SETTLE
from fedclaw.serve.state.store import StateStore
from tests.serve.routing.conftest import Clock
from tests.serve.routing.traffic import Behaviour, Town

GOOD = Behaviour(errors=0.001)
PLAN = new_plan("m", "v1", "ann", 1.0)
MakeTown = Callable[..., Town]


@pytest.fixture
def town(store: StateStore, clock: Clock) -> MakeTown:
    def make(canary: Behaviour, options: Mapping[str, Any] | None = None, **more: Any) -> Town:
        add_version(store, "m", "v1", "ann", clock())
        made = Town(store, clock, clock.advance, {"v1": GOOD, "v2": canary}, **more)
        made.run(2)
        start_canary(store, "m", "v2", "ann", clock(), **(options or {}))
        for router in made.routers:
            router.refresh()
        return made

    return make


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"mode": "canary"}, 5 * 3 / 0.05),
        ({"mode": "canary", "guards": Guards(disagreement=0.01, alpha=0.1)}, 5 * 4 / 0.1),
        ({"mode": "canary", "steps": (0.5, 1.0)}, 2 * 3 / 0.05),
        ({"mode": "shadow", "guards": Guards(disagreement=0.01)}, 1 / 0.05),
    ],
)
def test_the_error_rate_is_split_over_guards_and_steps(fields: Mapping[str, Any], needed: float):
    plan = changed(PLAN, PLAN.decision, candidate="v2", **fields)
    _, found = find(plan, begin(plan), 1.0)
    for name in guard_names(plan):
        assert found.numbers[name]["rolls_back_at"] == pytest.approx(needed, rel=0.01)  # type: ignore[call-overload,index]


def test_at_the_last_step_half_of_it_is_the_bounds():
    before = changed(PLAN, PLAN.decision, candidate="v2", mode="canary", step=3)
    last = changed(before, PLAN.decision, step=4, epoch=1)
    record = begin(last, begin(before))
    assert set(record.ceilings) == set(record.guards) == {"errors"}
    assert find(last, record, 1.0)[1].numbers["errors"]["rolls_back_at"] == 200.0  # type: ignore[call-overload,index]


def until_decided(town: Town, seconds: float = 600) -> None:
    town.run(seconds, lambda: town.plan.mode == "single")


@pytest.mark.slow
def test_a_canary_that_is_as_good_grows_to_all_keys_and_becomes_stable(town: MakeTown):
    made = town(GOOD, options={"guards": {"bake": 5.0}}, rate=800.0)
    until_decided(made)
    grows = ["canary_grows"] * 4
    assert made.kinds == ["first_version", "canary_started", *grows, "canary_promoted"]
    assert made.plan.stable == "v2"
    assert made.plan.last_good == ("v1",)
    shares = [event.body["to"] for event in made.store.events("m") if event.kind == "canary_grows"]
    assert shares == [0.1, 0.25, 0.5, 1.0]
    for event in made.store.events("m"):
        if event.kind == "canary_grows":
            errors = event.body["errors"]
            assert isinstance(errors, dict)
            assert errors["says"] == "grow"
            assert int(errors["canary_keys"]) >= 100


@pytest.mark.parametrize(
    ("canary", "guard"),
    [(Behaviour(errors=0.05), "errors"), (Behaviour(errors=0.001, seconds=0.008), "median_latency")],
)
def test_a_canary_that_errs_or_is_slow_is_rolled_back_while_few_saw_it(town: MakeTown, canary: Behaviour, guard: str):
    made = town(canary, rate=800.0)
    until_decided(made)
    assert made.kinds[-1] == "canary_rolled_back"
    assert made.plan.stable == "v1"
    said = made.store.events("m")[-1].body
    assert said["share"] == 0.05
    assert isinstance(said[guard], dict)
    assert said[guard]["says"] == "roll_back"
    assert said["by"] == "controller"
    assert made.failed["v2"] <= 150
    assert made.answered["v2"] < 0.07 * made.answered["v1"]


def test_a_canary_that_disagrees_is_rolled_back_where_it_is_meant_to_agree(town: MakeTown):
    disagreeing = Behaviour(errors=0.001, disagrees=0.05)
    made = town(disagreeing, options={"guards": {"disagreement": 0.01}, "mirror": 0.3})
    until_decided(made)
    assert made.kinds[-1] == "canary_rolled_back"
    said = made.store.events("m")[-1].body["agreement"]
    assert isinstance(said, dict)
    assert said["says"] == "roll_back"


def test_a_canary_that_fails_altogether_is_ended_by_its_breaker(town: MakeTown):
    made = town(Behaviour(errors=1.0), rate=800.0)
    until_decided(made, 10)
    assert made.kinds[-1] == "canary_rolled_back"
    # Each worker opened its own breaker after 20 calls, whatever the store and the control process did.
    assert made.failed["v2"] <= 60


@pytest.mark.slow
def test_a_person_is_waited_for_where_the_plan_says_so(town: MakeTown, store: StateStore, clock: Clock):
    made = town(GOOD, options={"approval": "manual", "steps": (0.5, 1.0), "guards": {"bake": 3.0}})
    made.run(60, lambda: made.plan.waiting)
    made.run(3)
    assert made.kinds[-1] == "canary_waits"
    assert made.plan.share == 0.5
    approve(store, "m", "bob", clock())
    assert made.plan.share == 1.0
    made.run(60, lambda: made.plan.waiting)
    assert made.plan.stable == "v1"
    approve(store, "m", "bob", clock())
    assert (made.plan.stable, made.plan.mode) == ("v2", "single")
    assert [event.body["by"] for event in store.events("m")][-1] == "bob"


def test_one_hostile_client_does_not_roll_back_a_canary(town: MakeTown):
    """It sends thousands of requests that fail whenever the canary gets them, each with a new key."""
    made = town(GOOD, rate=200.0, options={"steps": (0.2, 1.0)})
    assert group_of("hostile") not in {group_of(client) for client in made.clients}
    number = rounds = 0
    # The others need some time to show that it is fine, more or less of it by which keys are the canary's.
    while made.plan.share == 0.2 and (rounds := rounds + 1) <= 240:
        for _ in range(50):
            number += 1
            router = made.routers[number % 2]
            choice = router.choose("m", f"made-up-{number}", principal="hostile")
            assert choice is not None
            # Not so often that the breaker opens for it.
            made.request(router, f"made-up-{number}", "hostile", fails=0.4 * (choice.version == "v2"))
        made.run(0.25)
        made.controllers[0].step(made.clock())
    assert made.failed["v2"] > 100
    assert "canary_rolled_back" not in made.kinds
    assert "canary_held" in made.kinds
    assert made.plan.share > 0.2


@pytest.mark.slow
def test_one_key_does_not_roll_back_a_canary(town: MakeTown):
    made = town(GOOD, rate=100.0)
    made.run(SETTLE)
    router = made.routers[0]
    key = next(f"k{n}" for n in range(1000) if getattr(router.choose("m", f"k{n}"), "version", "") == "v2")
    for _ in range(30):
        for number in range(10):
            made.request(router, key, "north", fails=float(number % 3 == 0))
        made.run(0.25)
    made.run(2)
    assert made.failed["v2"] >= 100
    assert "canary_rolled_back" not in made.kinds


@pytest.mark.slow
def test_at_all_keys_it_is_still_held_to_what_the_stable_version_did(town: MakeTown):
    made = town(GOOD, options={"steps": (0.5, 1.0), "guards": {"bake": 1e6}}, rate=600.0)
    made.run(60, lambda: made.plan.share == 1.0)
    made.versions = {**made.versions, "v2": Behaviour(errors=0.15)}
    until_decided(made, 60)
    assert made.kinds[-1] == "canary_rolled_back"
    assert made.plan.stable == "v1"


def test_load_that_rises_at_all_keys_is_not_the_canarys_fault(town: MakeTown):
    """Nothing is left to compare it with, and what is slow was measured when there was less load."""
    made = town(GOOD, options={"steps": (0.5, 1.0), "guards": {"bake": 20.0}}, rate=300.0)
    made.run(60, lambda: made.plan.share == 1.0)
    made.versions = dict.fromkeys(("v1", "v2"), Behaviour(errors=0.001, seconds=0.012))
    until_decided(made, 40)
    assert made.kinds[-1] == "canary_promoted"


def test_too_few_keys_decide_nothing(town: MakeTown):
    made = town(GOOD, keys=100)
    made.run(8)
    assert made.kinds == ["first_version", "canary_started"]
    assert made.plan.share == 0.05


@pytest.mark.slow
def test_of_20_identical_canaries_at_most_one_is_rolled_back(town: MakeTown, store: StateStore, clock: Clock):
    options = {"steps": (0.5, 1.0), "guards": {"bake": 1.0}}
    made = town(GOOD, options, rate=300.0, seed=3)
    for number in range(20):
        until_decided(made)
        if number < 19:
            new = "v2" if made.plan.stable == "v1" else "v1"
            start_canary(store, "m", new, "ann", clock(), **options)
            for router in made.routers:
                router.refresh()
    assert made.kinds.count("canary_promoted") + made.kinds.count("canary_rolled_back") == 20
    assert made.kinds.count("canary_rolled_back") <= 1
