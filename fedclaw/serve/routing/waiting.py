"""What a canary or shadow waits for, in words and numbers: for a person who wonders why its share does not grow."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Protocol

from pydantic import JsonValue

from fedclaw.serve.routing.canary import (
    BASELINE,
    LEAST_LATENCIES,
    TrialRecord,
    begin,
    find,
    keys_seen,
    parse_record,
    record_name,
)
from fedclaw.serve.routing.plan import RoutingPlan


class TrialStore(Protocol):
    """What is looked at."""

    def read(self, name: str) -> tuple[int, dict[str, JsonValue]] | None: ...  # noqa: D102

    def counts(self, model: str, since: int, until: int | None = None) -> dict[str, dict[str, int]]: ...  # noqa: D102


def waits_for(store: TrialStore, plan: RoutingPlan, now: float) -> dict[str, JsonValue] | None:
    """What the plan's trial waits for, at the Unix time `now`: a sentence, since when, and what each guard has of what
    it needs. None: nothing is being tried."""
    if plan.mode not in ("canary", "shadow"):
        return None
    found = store.read(record_name(plan.model))
    record = parse_record(plan, None if found is None else found[1]) or begin(plan)
    guards = _guards(plan, record, store.counts(plan.test_scope, 0), now)
    answers = _answers(store, plan) if plan.mode == "canary" and not record.slow_above else None
    numbers: dict[str, JsonValue] = {"since": plan.epoch_began, "guards": {**guards}}
    if answers is not None:
        numbers["stable_answers"] = {"answers": answers, "least_answers": LEAST_LATENCIES}
    return {"says": _says(plan, record, guards, answers), **numbers}


_Guard = dict[str, JsonValue]


def _guards(
    plan: RoutingPlan, record: TrialRecord, counts: Mapping[str, Mapping[str, int]], now: float
) -> dict[str, _Guard]:
    numbers, keys = find(plan, record, now)[1].numbers, keys_seen(plan, record, counts)
    found: dict[str, _Guard] = {}
    for name, guard in record.guards.items():
        own = numbers[name]
        assert isinstance(own, dict)
        left_out = own.get("left_out")
        others = guard.total[2] - guard.seen[left_out][2] if isinstance(left_out, int) else keys[name]
        found[name] = {"says": own["says"], "keys": others, "least_keys": plan.guards.least_keys}
        found[name] |= {"evidence": own["favour"], "enough": own["grows_at"]}
    return found


def _answers(store: TrialStore, plan: RoutingPlan) -> int:
    """Of the stable version, from which it becomes known what is slow."""
    counted = store.counts(plan.model, int(plan.epoch_began) - BASELINE).get(plan.stable, {})
    return sum(count for name, count in counted.items() if name[:1] == "l" and name[1:].isdigit())


def _says(plan: RoutingPlan, record: TrialRecord, guards: Mapping[str, _Guard], answers: int | None) -> str:
    since = f"since {_time(plan.epoch_began)}"
    if plan.waiting or not guards:
        return "a person's word"
    if any(guard["says"] == "hold" for guard in guards.values()):
        end = max(guard.crossed or 0.0 for guard in record.guards.values()) + plan.guards.patience
        return f"what others say: the evidence against it is one client's alone, and counts from {_time(end)} on"
    if plan.share == 1.0:
        return f"{_time(plan.epoch_began + plan.guards.bake)}, when it becomes the stable version if it stays as it is"
    if answers is not None and answers < LEAST_LATENCIES:
        return f"answers: {plan.stable} has given {answers} of the {LEAST_LATENCIES} that tell what is slow, {since}"
    pending = {name: guard for name, guard in guards.items() if guard["says"] != "grow"}
    if few := {name: guard for name, guard in pending.items() if _number(guard["keys"]) < plan.guards.least_keys}:
        name = min(few, key=lambda name: _number(few[name]["keys"]))
        return f"keys: {name} has seen {few[name]['keys']} of the {plan.guards.least_keys} that it needs, {since}"
    if not pending:
        return f"the next look, {since}"
    name = min(pending, key=lambda name: _number(pending[name]["evidence"]))
    guard = pending[name]
    return (
        f"evidence that it is within its margin: {name} has {_number(guard['evidence']):.3g} of the "
        f"{_number(guard['enough']):g} that it needs, from {guard['keys']} keys, {since}"
    )


def _number(value: JsonValue) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
