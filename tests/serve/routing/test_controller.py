"""People's operations, and decisions that several control processes make at once."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fedclaw.serve.routing import controller
from fedclaw.serve.routing.controller import Controller
from fedclaw.serve.routing.plan import PlanError, RoutingPlan, changed, plan_name, read_plan
from fedclaw.serve.state.store import StateStore
from tests.serve.routing.conftest import Clock

ROOT = Path(__file__).parents[3]


def plan_of(store: StateStore, model: str = "m") -> RoutingPlan:
    stored = read_plan(store, model)
    assert stored is not None
    return stored.plan


@pytest.fixture
def first(store: StateStore, clock: Clock) -> RoutingPlan:
    return controller.add_version(store, "m", "v1", "ann", clock())


def test_the_first_version_of_a_model_answers_all_and_a_second_word_changes_nothing(
    store: StateStore, clock: Clock, first: RoutingPlan
):
    assert (first.mode, first.stable) == ("single", "v1")
    assert controller.add_version(store, "m", "v9", "bob", clock()) == first
    assert [event.kind for event in store.events("m")] == ["first_version"]


def test_each_operation_leaves_an_event_with_who(store: StateStore, clock: Clock, first: RoutingPlan):
    operations: list[Callable[[], RoutingPlan]] = [
        lambda: controller.start_canary(store, "m", "v2", "ann", clock()),
        lambda: controller.roll_back(store, "m", "bob", clock()),
        lambda: controller.start_shadow(store, "m", "v2", "cem", clock()),
        lambda: controller.pin(store, "m", "v2", "dee", clock()),
        lambda: controller.start_ab(store, "m", ["v1"], "eva", clock()),
        lambda: controller.roll_back(store, "m", "fay", clock()),
        lambda: controller.roll_back(store, "m", "gus", clock()),
    ]
    plans = [operation() for operation in operations]
    assert [plan.mode for plan in plans] == ["canary", "single", "shadow", "single", "ab", "single", "single"]
    assert [plan.stable for plan in plans] == ["v1", "v1", "v1", "v2", "v2", "v2", "v1"]
    events = store.events("m")[1:]
    assert [(event.kind, event.body["by"]) for event in events] == [
        ("canary_started", "ann"),
        ("rolled_back", "bob"),
        ("shadow_started", "cem"),
        ("pinned", "dee"),
        ("ab_started", "eva"),
        ("rolled_back", "fay"),
        ("rolled_back", "gus"),
    ]
    epochs = [plan.epoch for plan in plans]
    assert epochs == sorted(set(epochs))


def test_each_trial_tries_other_keys(store: StateStore, clock: Clock, first: RoutingPlan):
    salts = set()
    for _ in range(3):
        salts.add(controller.start_canary(store, "m", "v2", "ann", clock()).salt)
        controller.roll_back(store, "m", "ann", clock())
    assert len(salts) == 3


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (lambda s: controller.start_canary(s, "none", "v2", "ann", 1.0), "there is no model 'none'"),
        (lambda s: controller.start_canary(s, "m", "v1", "ann", 1.0), "the candidate is the stable version"),
        (lambda s: controller.start_canary(s, "m", "../x", "ann", 1.0), "candidate: String should match"),
        (lambda s: controller.start_canary(s, "m", "v2", "ann", 1.0, steps=(0.5, 0.1)), "steps: shares must rise"),
        (lambda s: controller.start_canary(s, "m", "v2", "ann", 1.0, mode="single"), "mode: not an option"),
        (lambda s: controller.start_canary(s, "m", "v2", "ann", 1.0, guards={"alpha": 2}), "guards: alpha"),
        (lambda s: controller.start_shadow(s, "m", "v2", "ann", 1.0, guards={"alpha": 2}), "guards.alpha"),
        (lambda s: controller.start_ab(s, "m", [], "ann", 1.0), "ab needs two arms or more"),
        (lambda s: controller.start_ab(s, "m", [f"v{n}" for n in range(2, 30)], "ann", 1.0), "arms: Tuple"),
        (lambda s: controller.start_ab(s, "m", ["v2", "v3"], "ann", 1.0, 0.4), "each arm keeps at least 40%"),
        (lambda s: controller.approve(s, "m", "ann", 1.0), "nothing waits for approval"),
        (lambda s: controller.roll_back(s, "m", "ann", 1.0), "there is no version to go back to"),
        (lambda s: controller.pin(s, "m", "a b", "ann", 1.0), "stable: String should match"),
    ],
)
def test_what_the_plan_does_not_allow_is_refused_and_changes_nothing(
    store: StateStore, first: RoutingPlan, operation: Callable[[StateStore], RoutingPlan], words: str
):
    with pytest.raises(PlanError, match=words):
        operation(store)
    assert plan_of(store) == first
    assert len(store.events("m")) == 1


def test_one_trial_at_a_time(store: StateStore, clock: Clock, first: RoutingPlan):
    controller.start_canary(store, "m", "v2", "ann", clock())
    with pytest.raises(PlanError, match="canary with v2 is on; roll it back or wait for its end"):
        controller.start_ab(store, "m", ["v3"], "bob", clock())


def test_an_open_version_is_not_what_is_fallen_back_to(store: StateStore, clock: Clock, first: RoutingPlan):
    broken = {"state": "open", "epoch": 1, "since": 1.0, "wait": 5.0}
    assert store.swap(plan_name("m"), 1, changed(first, first.decision, breakers={"v1": broken}).document())
    assert controller.pin(store, "m", "v2", "ann", clock()).last_good == ()


def test_a_plan_that_cannot_be_used_keeps_no_other_model_from_being_looked_after(store: StateStore, clock: Clock):
    store.swap(plan_name("a"), None, {"mode": "what"})
    failing_canary(store, "b", clock())
    assert Controller(store).step(clock() + 1) == 1
    assert plan_of(store, "b").mode == "single"


def failing_canary(store: StateStore, model: str, now: float) -> None:
    """With the evidence in the store that rolls it back."""
    controller.add_version(store, model, "v1", "ann", now)
    plan = controller.start_canary(store, model, "v2", "ann", now)
    for version, errors in (("v1", 0), ("v2", 40)):
        counts = {f"g{group}.{name}": value for group in (1, 2) for name, value in (("keys", 50), ("errors", errors))}
        store.add_counts(plan.test_scope, version, int(now), counts)


def test_three_control_processes_decide_each_thing_once(store: StateStore, place: str):
    models = [f"model-{number}" for number in range(12)]
    for model in models:
        failing_canary(store, model, store.now())
    words = [sys.executable, "-m", "tests.serve.routing.processes", "control", place, "3", "1"]
    done = subprocess.run(words, capture_output=True, timeout=100, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(line) for line in done.stdout.splitlines()) == len(models)
    events = Counter((event.model, event.kind) for event in store.events(limit=1000))
    assert {events[model, "canary_rolled_back"] for model in models} == {1}
    assert {plan_of(store, model).mode for model in models} == {"single"}
    assert {plan_of(store, model).epoch for model in models} == {2}
    found = store.read(f"guards/{models[0]}")
    assert found is not None
    seen = found[1]["guards"]["errors"]["seen"]  # type: ignore[call-overload,index]
    assert (seen[1], seen[2]) == ([50, 0, 50, 40], [50, 0, 50, 40])


@pytest.mark.slow
def test_workers_in_processes_of_their_own_leave_a_bad_version_together(store: StateStore, place: str):
    plan = controller.add_version(store, "m", "v1", "ann", store.now())
    assert store.swap(plan_name("m"), 1, changed(plan, plan.decision, last_good=("v0",)).document())
    decide = [sys.executable, "-m", "tests.serve.routing.processes", "control", place, "2", "14"]
    work = [sys.executable, "-m", "tests.serve.routing.processes", "workers", place, "4", "8", "v1"]
    with subprocess.Popen(decide, cwd=ROOT, stdout=subprocess.DEVNULL) as deciding:
        done = subprocess.run(work, capture_output=True, timeout=100, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        deciding.wait(60)
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(seen) == 4
    for one in seen:
        # Twenty until it opens, and a few probes.
        assert one["v1"] <= 40
        assert one["v0"] > 200
        assert "nobody" not in one
    kinds = [event.kind for event in store.events("m")]
    assert kinds[1] == "breaker_open"
    assert kinds.count("breaker_open") <= 3
    assert "breaker_closed" not in kinds
