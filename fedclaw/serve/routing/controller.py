"""Decisions about versions: what control processes decide by themselves, and what people tell them to.

`Controller.step` is one round over all models: it reads what workers counted, and changes plans. Any number of control
processes may do it at once. A plan is changed by compare-and-swap together with the event that says why, with its
numbers: both are written or neither, by one process. What the guards have seen is kept the same way, so each look is
counted once.

People's operations take `by`, who asked, for the event. They raise PlanError for what the plan does not allow.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import JsonValue, ValidationError

from fedclaw.protocol.frozen import explain
from fedclaw.serve.routing.breaker import advance
from fedclaw.serve.routing.canary import (
    BASELINE,
    TrialFinding,
    TrialRecord,
    find,
    observe,
    parse_record,
    record_name,
    slow_buckets,
    with_slow_buckets,
)
from fedclaw.serve.routing.counting import Calls, calls_by_group, sum_counts, total, trips_by_group
from fedclaw.serve.routing.plan import (
    EVERYBODY,
    PREFIX,
    BreakerPolicy,
    BreakerState,
    Guards,
    PlanError,
    RoutingDecision,
    RoutingPlan,
    StoredPlan,
    changed,
    new_plan,
    new_salt,
    plan_name,
    read_plan,
)
from fedclaw.serve.routing.thompson import ArmRewards, CreditedFeedback, sum_rewards, updated_propensities

log = logging.getLogger(__name__)

CONTROLLER = "controller"
_LATELY = 1
"""Seconds before the current one in which a breaker's last calls are."""
_SKEW = 2
"""Seconds by which the clocks of workers may differ."""
_LEARN_EVERY = 5.0
_LEAST_CHANGE = 0.01
_TRIES = 5
_KEPT = 3


class ControlStore(Protocol):
    """What decisions need of a state store."""

    def read(self, name: str) -> tuple[int, dict[str, JsonValue]] | None: ...  # noqa: D102

    def names(self, prefix: str = "") -> list[str]: ...  # noqa: D102

    def swap(  # noqa: D102
        self,
        name: str,
        revision: int | None,
        document: Mapping[str, JsonValue],
        event: tuple[str, str, Mapping[str, JsonValue]] | None = None,
    ) -> bool: ...

    def counts(self, model: str, since: int, until: int | None = None) -> dict[str, dict[str, int]]: ...  # noqa: D102

    def feedback(self, model: str, since: float = 0.0) -> Sequence[CreditedFeedback]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class _Change:
    """What a plan becomes, and why."""

    kind: str
    fields: Mapping[str, Any]
    numbers: Mapping[str, JsonValue]
    by: str = CONTROLLER


class Controller:
    """Of one control process."""

    def __init__(self, store: ControlStore) -> None:
        self._store = store
        self._learnt: dict[str, float] = {}
        self._complained: dict[str, str] = {}

    def step(self, now: float) -> int:
        """One round at the Unix time `now`. Returns how many plans it changed. Raises StateUnavailable."""
        return sum(self._patiently(name.removeprefix(PREFIX), now) for name in self._store.names(PREFIX))

    def _patiently(self, model: str, now: float) -> bool:
        """A plan that cannot be used must not keep the other models from being looked after."""
        try:
            stored = read_plan(self._store, model)
        except PlanError as error:
            if self._complained.get(model) != str(error):
                self._complained[model] = str(error)
                log.error("%s", error)
            return False
        return stored is not None and self._step(stored, now)

    def _step(self, stored: StoredPlan, now: float) -> bool:
        plan = stored.plan
        if (change := self._breakers(plan, now)) is not None:
            return _apply(self._store, stored, change, now)
        if plan.mode in ("canary", "shadow"):
            change = self._trial(plan, now)
        elif plan.mode == "ab":
            change = self._experiment(plan, now)
        return change is not None and _apply(self._store, stored, change, now)

    def _breakers(self, plan: RoutingPlan, now: float) -> _Change | None:
        """The next state of the first breaker that changes."""
        policy = plan.breaker
        counts = self._store.counts(plan.model, int(now) - policy.window)
        last = self._store.counts(plan.model, int(now) - _LATELY)
        for version in dict.fromkeys((*plan.versions, *plan.last_good, *plan.breakers)):
            mine, lately = counts.get(version, {}), last.get(version, {})
            probes, state = dict[int, Calls](), plan.breakers.get(version)
            if state is not None and now - state.since < policy.window:
                # What was counted before it changed is what it changed for.
                since = int(state.since) + 1
                mine = self._store.counts(plan.model, since).get(version, {})
                lately = self._store.counts(plan.model, max(since, int(now) - _LATELY)).get(version, {})
            if state is not None and state.state == "half_open":
                since = int(state.since) - _SKEW
                probes = calls_by_group(self._store.counts(plan.model, since).get(version, {}), state.epoch)
            after = advance(
                policy, state, calls_by_group(mine), calls_by_group(lately), probes, now, trips_by_group(mine)
            )
            if after is not None and after != state:
                ends = after.state == "open" and version == plan.candidate
                ends = ends and (after.group == EVERYBODY or not self._others(plan, after.group, now))
                return _breaker_change(plan, version, after, total(calls_by_group(mine)), total(probes), ends=ends)
        return None

    def _others(self, plan: RoutingPlan, group: int, now: float) -> bool:
        """Whether clients of other groups used the model lately."""
        counts = sum_counts(self._store.counts(plan.model, int(now) - BASELINE).values())
        return any(other != group for other in calls_by_group(counts))

    def _trial(self, plan: RoutingPlan, now: float) -> _Change | None:
        """Another look of the guards, and what follows from it."""
        name = record_name(plan.model)
        found = self._store.read(name)
        record = parse_record(plan, None if found is None else found[1])
        if record is None:
            return None
        looked, finding = find(plan, self._look(plan, record, now), now)
        held = finding.says == "hold"
        event = ("canary_held", plan.model, {**finding.numbers, "version": plan.candidate}) if held else None
        looked = looked.model_copy(update={"held": looked.held or held})
        if found is None or looked != record or found[1].get("epoch") != plan.epoch:
            revision = None if found is None else found[0]
            said = event if not record.held else None
            if not self._store.swap(name, revision, looked.model_dump(mode="json"), said):
                return None  # Another control process looked.
        return _trial_change(plan, finding, now)

    def _look(self, plan: RoutingPlan, record: TrialRecord, now: float) -> TrialRecord:
        counts = self._store.counts(plan.test_scope, 0)
        if plan.mode == "canary" and not record.slow_above:
            baseline = self._store.counts(plan.model, int(plan.epoch_began) - BASELINE).get(plan.stable, {})
            record = with_slow_buckets(plan, record, counts, slow_buckets(plan, baseline))
        return observe(plan, record, counts)

    def _experiment(self, plan: RoutingPlan, now: float) -> _Change | None:
        """New propensities, if what was learnt moves one by a hundredth."""
        if now - self._learnt.get(plan.model, -_LEARN_EVERY) < _LEARN_EVERY:
            return None
        self._learnt[plan.model] = now
        sums = self.rewards(plan)
        after = updated_propensities(plan, sums)
        if max(abs(new - old) for new, old in zip(after, plan.propensities, strict=True)) < _LEAST_CHANGE:
            return None
        return _Change("propensities", {"propensities": after}, _experiment_numbers(plan, sums, after))

    def rewards(self, plan: RoutingPlan) -> dict[str, ArmRewards]:
        """What became of the experiment's keys so far."""
        return sum_rewards(plan.arms, self._store.feedback(plan.model, plan.epoch_began), int(plan.epoch_began))


def add_version(store: ControlStore, model: str, version: str, by: str, now: float) -> RoutingPlan:
    """Make the plan of a model that has none, with its first version; else the plan that there is."""
    if (stored := read_plan(store, model)) is not None:
        return stored.plan
    plan = new_plan(model, version, by, now)
    store.swap(plan_name(model), None, plan.document(), _event(plan))
    return _existing(store, model).plan


def set_breaker(store: ControlStore, model: str, policy: BreakerPolicy, by: str, now: float) -> RoutingPlan:
    """Have the breakers of a model's versions go by `policy` from now on. It decides about no version, so the plan's
    last decision stays."""
    for _ in range(_TRIES):
        stored = _existing(store, model)
        if stored.plan.breaker == policy:
            return stored.plan
        after = changed(stored.plan, stored.plan.decision, breaker=policy)
        event = ("breaker_policy", model, {"by": by, "at": now, **policy.model_dump(mode="json")})
        if store.swap(plan_name(model), stored.revision, after.document(), event):
            return after
    raise _contended(model)


def start_canary(store: ControlStore, model: str, version: str, by: str, now: float, **options: Any) -> RoutingPlan:
    """Give a new version the first step's share of the keys.

    `options` are fields of the plan: steps, approval, mirror, guards, breaker. Raises PlanError while another trial is
    on.
    """

    def change(plan: RoutingPlan) -> _Change:
        _must_be_idle(plan)
        fields = {"mode": "canary", "candidate": version, **_fresh(plan, now), **_allowed(options, _CANARY_OPTIONS)}
        mirror = fields.get("mirror", plan.mirror)
        guards = _guards(fields.get("guards"), plan)
        if guards.disagreement is not None and not mirror:
            fields["mirror"] = _MIRRORED
        return _Change("canary_started", fields, {"version": version, "stable": plan.stable}, by)

    return _ordered(store, model, change, now)


def start_shadow(store: ControlStore, model: str, version: str, by: str, now: float, **options: Any) -> RoutingPlan:
    """Have a version see a share of the requests (`mirror`, all of them if it is not given) and answer none.

    `options` are mirror, guards, promote: whether it becomes a canary by itself once it is known to agree, and the
    steps of that canary.
    """

    def change(plan: RoutingPlan) -> _Change:
        _must_be_idle(plan)
        fields = {"mode": "shadow", "candidate": version, "mirror": 1.0, **_fresh(plan, now)}
        fields |= _allowed(options, _SHADOW_OPTIONS)
        return _Change("shadow_started", fields, {"version": version, "stable": plan.stable}, by)

    return _ordered(store, model, change, now)


def start_ab(
    store: ControlStore, model: str, versions: Iterable[str], by: str, now: float, floor: float | None = None
) -> RoutingPlan:
    """Let the stable version and these compete for rewards, from equal shares."""

    def change(plan: RoutingPlan) -> _Change:
        _must_be_idle(plan)
        arms = tuple(dict.fromkeys((plan.stable, *versions)))
        fields = {"mode": "ab", "arms": arms, "propensities": (1 / len(arms),) * len(arms), **_fresh(plan, now)}
        fields |= {} if floor is None else {"floor": floor}
        return _Change("ab_started", fields, {"versions": list(arms)}, by)

    return _ordered(store, model, change, now)


def ask_for_approval(store: ControlStore, model: str, by: str, now: float) -> RoutingPlan:
    """Have what is tried wait for a person's word from now on, whatever the tests say in its favour."""

    def change(plan: RoutingPlan) -> _Change:
        if plan.mode not in ("canary", "shadow"):
            raise PlanError(f"model {plan.model}: nothing is tried that could be approved")
        return _Change("approval_asked", {"waiting": True}, {"version": plan.candidate}, by)

    return _ordered(store, model, change, now)


def approve(store: ControlStore, model: str, by: str, now: float, *, early: bool = False) -> RoutingPlan:
    """Say a person's word: a canary that waits takes its next step, a shadow that waits becomes a canary.

    `early`: also one that does not wait for a person, but for its guards.
    """

    def change(plan: RoutingPlan) -> _Change:
        tried = plan.mode in ("canary", "shadow")
        if not tried or not (plan.waiting or early):
            hint = f"; `early` lets {plan.candidate} go on before its guards say so" if tried else ""
            raise PlanError(f"model {plan.model}: nothing waits for approval{hint}")
        numbers: dict[str, JsonValue] = {} if plan.waiting else {"early": True}
        return _next_step(plan, now, numbers, by) if plan.mode == "canary" else _promoted_shadow(plan, now, numbers, by)

    return _ordered(store, model, change, now)


def roll_back(store: ControlStore, model: str, by: str, now: float) -> RoutingPlan:
    """End what is being tried; where nothing is, go back to the last good version."""

    def change(plan: RoutingPlan) -> _Change:
        if plan.mode != "single":
            return _Change("rolled_back", _ended(plan, now), {"stable": plan.stable, "version": plan.candidate}, by)
        if not plan.last_good:
            raise PlanError(f"model {plan.model}: there is no version to go back to")
        fields = {"stable": plan.last_good[0], "last_good": plan.last_good[1:], **_ended(plan, now)}
        return _Change("rolled_back", fields, {"stable": plan.last_good[0], "version": plan.stable}, by)

    return _ordered(store, model, change, now)


def pin(store: ControlStore, model: str, version: str, by: str, now: float) -> RoutingPlan:
    """Have one version answer everybody from now on, whatever was being tried. Its breaker begins closed."""

    def change(plan: RoutingPlan) -> _Change:
        fields = {**_ended(plan, now), "stable": version, "last_good": _last_good(plan, version)}
        fields["breakers"] = {name: state for name, state in plan.breakers.items() if name != version}
        return _Change("pinned", fields, {"version": version, "before": plan.stable}, by)

    return _ordered(store, model, change, now)


_MIRRORED = 0.1  # Share of the keys, where a canary is meant to agree and nothing else is said.
_CANARY_OPTIONS = frozenset({"steps", "approval", "mirror", "guards", "breaker"})
_SHADOW_OPTIONS = frozenset({"mirror", "guards", "promote", "steps"})


def _trial_change(plan: RoutingPlan, finding: TrialFinding, now: float) -> _Change | None:
    numbers = {**finding.numbers, "version": plan.candidate, "share": plan.share}
    if finding.says == "roll_back":
        kind = "canary_rolled_back" if plan.mode == "canary" else "shadow_differs"
        return _Change(kind, _ended(plan, now), numbers)
    if plan.waiting:
        return None
    if plan.mode == "canary" and plan.share == 1.0:
        if finding.says == "hold" or now < plan.epoch_began + plan.guards.bake:
            return None
    elif finding.says != "grow":
        return None
    if plan.mode == "shadow":
        if plan.promote:
            return _promoted_shadow(plan, now, numbers, CONTROLLER)
        return _Change("shadow_agrees", {"waiting": True}, numbers)
    if plan.approval == "manual":
        return _Change("canary_waits", {"waiting": True}, numbers)
    return _next_step(plan, now, numbers, CONTROLLER)


def _next_step(plan: RoutingPlan, now: float, numbers: Mapping[str, JsonValue], by: str) -> _Change:
    step = plan.step + 1
    if plan.share == 1.0:
        return _Change("canary_promoted", _promoted(plan, now), {**numbers, "version": plan.candidate}, by)
    fields = {"step": step, "waiting": False, "epoch": plan.epoch + 1, "epoch_began": now}
    return _Change("canary_grows", fields, {**numbers, "version": plan.candidate, "to": plan.steps[step]}, by)


def _promoted_shadow(plan: RoutingPlan, now: float, numbers: Mapping[str, JsonValue], by: str) -> _Change:
    fields = {**_fresh(plan, now), "mode": "canary", "candidate": plan.candidate, "mirror": plan.mirror}
    return _Change("canary_started", fields, {**numbers, "version": plan.candidate, "stable": plan.stable}, by)


def _promoted(plan: RoutingPlan, now: float) -> dict[str, Any]:
    version = plan.candidate or plan.stable
    return {**_ended(plan, now), "stable": version, "last_good": _last_good(plan, version)}


def _last_good(plan: RoutingPlan, stable: str) -> tuple[str, ...]:
    """Without versions whose breaker is open: those are none to fall back to."""
    before = [one for one in dict.fromkeys((plan.stable, *plan.last_good)) if one != stable and not plan.is_open(one)]
    return tuple(before[:_KEPT])


def _ended(plan: RoutingPlan, now: float) -> dict[str, Any]:
    ended = {"mode": "single", "candidate": None, "arms": (), "propensities": (), "mirror": 0.0, "promote": False}
    ended |= {"approval": "automatic", "waiting": False, "step": 0}
    return {**ended, "epoch": plan.epoch + 1, "epoch_began": now}


def _fresh(plan: RoutingPlan, now: float) -> dict[str, Any]:
    return {"salt": new_salt(), "step": 0, "waiting": False, "epoch": plan.epoch + 1, "epoch_began": now}


def _must_be_idle(plan: RoutingPlan) -> None:
    if plan.mode != "single":
        tried = plan.candidate or ", ".join(plan.arms)
        raise PlanError(f"model {plan.model}: {plan.mode} with {tried} is on; roll it back or wait for its end")


def _allowed(options: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    if unknown := sorted(options.keys() - known):
        raise PlanError(f"{unknown[0]:.60}: not an option; options are {', '.join(sorted(known))}")
    return {name: value for name, value in options.items() if value is not None}


def _guards(given: Any, plan: RoutingPlan) -> Guards:
    try:
        return plan.guards if given is None else Guards.model_validate(given)
    except ValidationError as error:
        raise PlanError(f"guards: {explain(error, given, Guards)}") from None


def _breaker_change(
    plan: RoutingPlan, version: str, state: BreakerState, calls: Calls, probes: Calls, *, ends: bool
) -> _Change:
    """`ends`: with it the canary is over."""
    numbers: dict[str, JsonValue] = {
        "version": version,
        "state": state.state,
        "for": "everybody" if state.group == EVERYBODY else f"clients of group {state.group}",
        "calls": calls.calls,
        "errors": calls.errors,
        "window_seconds": plan.breaker.window,
        "probes": probes.calls,
        "probe_errors": probes.errors,
        "wait_seconds": state.wait,
    }
    if ends:
        # It is no longer asked, so its breaker has nothing to say; trying it again is a new trial.
        rest = {name: one for name, one in plan.breakers.items() if name != version}
        kind = "canary_rolled_back" if plan.mode == "canary" else "shadow_differs"
        return _Change(kind, {**_ended(plan, state.since), "breakers": rest}, {**numbers, "because": "breaker"})
    breakers = {name: one for name, one in plan.breakers.items() if name in _named(plan)}
    return _Change(f"breaker_{state.state}", {"breakers": {**breakers, version: state}}, numbers)


def _named(plan: RoutingPlan) -> frozenset[str]:
    return frozenset({*plan.versions, *plan.last_good})


def _experiment_numbers(
    plan: RoutingPlan, sums: Mapping[str, ArmRewards], after: Sequence[float]
) -> dict[str, JsonValue]:
    return {
        arm: {"keys": sums[arm].keys, "rewards": round(sums[arm].rewards, 6), "propensity": propensity}
        for arm, propensity in zip(plan.arms, after, strict=True)
    }


def _ordered(store: ControlStore, model: str, change: Callable[[RoutingPlan], _Change], now: float) -> RoutingPlan:
    """Change a plan as a person says, whatever others do to it at the same time."""
    for _ in range(_TRIES):
        stored = _existing(store, model)
        if _apply(store, stored, change(stored.plan), now):
            return _existing(store, model).plan
    raise _contended(model)


def _contended(model: str) -> PlanError:
    return PlanError(f"model {model}: its plan is being changed by others; try again")


def _existing(store: ControlStore, model: str) -> StoredPlan:
    if (stored := read_plan(store, model)) is None:
        raise PlanError(f"there is no model {model!r:.80}")
    return stored


def _apply(store: ControlStore, stored: StoredPlan, change: _Change, now: float) -> bool:
    """Swap the plan and append the event, or neither."""
    decision = RoutingDecision(kind=change.kind, by=change.by, at=now, numbers=dict(change.numbers))
    try:
        after = changed(stored.plan, decision, **change.fields)
    except PlanError as error:
        if change.by != CONTROLLER:
            raise
        log.error("a decision does not fit the plan: %s", error)
        return False
    swapped = store.swap(plan_name(after.model), stored.revision, after.document(), _event(after))
    if swapped:
        log.info("model %s: %s by %s: %s", after.model, change.kind, change.by, change.numbers)
    return swapped


def _event(plan: RoutingPlan) -> tuple[str, str, dict[str, JsonValue]]:
    decision = plan.decision
    return decision.kind, plan.model, {"by": decision.by, "at": decision.at, "epoch": plan.epoch, **decision.numbers}
