"""Whoever asks why a canary stands still is told which number is waited for, and since when."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from fedclaw.serve.routing.controller import add_version, approve, ask_for_approval, pin, start_canary, start_shadow
from fedclaw.serve.routing.plan import PlanError
from fedclaw.serve.routing.waiting import waits_for
from fedclaw.serve.state.store import StateStore
from tests.serve.routing.conftest import Clock
from tests.serve.routing.traffic import Behaviour, Town

GOOD = Behaviour(errors=0.001)
SINCE = "since 1970-01-12 13:46:42 UTC"
MakeTown = Callable[..., Town]


@pytest.fixture
def town(store: StateStore, clock: Clock) -> MakeTown:
    def make(seconds: float = 2, **more: Any) -> Town:
        add_version(store, "m", "v1", "ann", clock())
        made = Town(store, clock, clock.advance, {"v1": GOOD, "v2": GOOD}, **more)
        made.run(seconds)
        return made

    return make


def awaited(town: Town) -> dict[str, Any]:
    found = waits_for(town.store, town.plan, town.clock())
    assert found is not None
    return found


def test_where_nothing_is_tried_nothing_is_waited_for(town: MakeTown):
    made = town()
    assert waits_for(made.store, made.plan, made.clock()) is None


def test_too_few_keys_are_told_with_how_many_there_are_and_a_person_lets_it_go_on(
    town: MakeTown, store: StateStore, clock: Clock
):
    made = town(keys=100)
    start_canary(store, "m", "v2", "ann", clock())
    made.run(20)
    found = awaited(made)
    assert found["since"] == made.plan.epoch_began
    keys = {name: guard["keys"] for name, guard in found["guards"].items()}
    counted = store.counts(made.plan.test_scope, 0).get("v2", {})
    assert keys["errors"] == sum(count for name, count in counted.items() if name.endswith(".keys")) < 30
    least = min(keys, key=lambda name: keys[name])
    assert found["says"] == f"keys: {least} has seen {keys[least]} of the 100 that it needs, {SINCE}"
    with pytest.raises(PlanError, match="nothing waits for approval; `early` lets v2 go on before its guards say so"):
        approve(store, "m", "bob", clock())
    assert approve(store, "m", "bob", clock(), early=True).share == 0.1
    event = store.events("m")[-1]
    assert (event.kind, event.body["by"], event.body["early"]) == ("canary_grows", "bob", True)
    assert awaited(made)["since"] == clock()
    for share in (0.25, 0.5, 1.0):
        assert approve(store, "m", "bob", clock(), early=True).share == share
    assert awaited(made)["says"].endswith(", when it becomes the stable version if it stays as it is")
    assert approve(store, "m", "bob", clock(), early=True).stable == "v2"


def test_a_stable_version_that_nobody_asks_is_what_is_waited_for(town: MakeTown, store: StateStore, clock: Clock):
    made = town(rate=10.0)
    start_canary(store, "m", "v2", "ann", clock())
    made.run(1)
    says = awaited(made)["says"]
    found = re.fullmatch(rf"answers: v1 has given (\d+) of the 100 that tell what is slow, {SINCE}", says)
    assert found is not None
    assert 10 <= int(found[1]) <= 60


def test_with_keys_enough_it_is_evidence(town: MakeTown, store: StateStore, clock: Clock):
    made = town(rate=300.0)
    start_canary(store, "m", "v2", "ann", clock(), steps=(0.3, 1.0), guards={"least_keys": 5})
    made.run(5)
    assert made.plan.share == 0.3
    guards = awaited(made)["guards"]
    name = min((name for name in guards if guards[name]["says"] == "wait"), key=lambda name: guards[name]["evidence"])
    text = f"evidence that it is within its margin: {name} has {guards[name]['evidence']:.3g} of the 20 that it needs"
    assert awaited(made)["says"] == f"{text}, from {guards[name]['keys']} keys, {SINCE}"


def test_one_clients_evidence_is_told_with_when_it_counts(town: MakeTown, store: StateStore, clock: Clock):
    made = town(rate=40.0)
    start_canary(store, "m", "v2", "ann", clock(), steps=(0.5, 1.0))
    number = 0
    while "canary_held" not in made.kinds and number < 2_000:
        for _ in range(10):
            number += 1
            router = made.routers[number % 2]
            choice = router.choose("m", f"made-up-{number}", principal="hostile")
            assert choice is not None
            made.request(router, f"made-up-{number}", "hostile", fails=0.4 * (choice.version == "v2"))
        made.run(1)
    says = r"what others say: the evidence against it is one client's alone, and counts from 1970-01-12 13:5.:.. UTC on"
    assert re.fullmatch(says, awaited(made)["says"])


def test_a_person_is_what_a_shadow_waits_for(town: MakeTown, store: StateStore, clock: Clock):
    made = town()
    start_shadow(store, "m", "v2", "ann", clock())
    assert awaited(made)["says"] == "a person's word"
    pin(store, "m", "v1", "ann", clock())
    start_shadow(store, "m", "v2", "ann", clock(), guards={"disagreement": 0.02})
    assert awaited(made)["says"].startswith("keys: agreement has seen 0 of the 100 that it needs, since ")
    ask_for_approval(store, "m", "ann", clock())
    assert awaited(made)["says"] == "a person's word"
