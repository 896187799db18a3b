"""A canary: a new version answers 5% of the keys, then more, then all; or it is rolled back by itself.

    started -> step 1 (5%) -> ... -> step n (100%) -> promoted: it is the stable version
                  |                      |
                  +---- rolled back -----+

At each step the guards (`guards.py`) look at the keys that are new in it. The share grows when every guard says that
the canary is within its margin, and with `approval: manual` when a person has said so too. It is rolled back when one
guard says that it is not, or when its breaker opens. Nothing happens while too few keys were seen to tell.

At 100% no stable version is left to compare with: errors are held to a bound from the step before, and after `bake`
seconds the canary becomes the stable version. Latencies are not looked at any more: they rise and fall with what else
the machine does, so those of another time say nothing of the version.

Chance that a canary within all margins is rolled back by a guard: at most `guards.alpha`, over all guards and steps. By
Bonferroni, each step has an equal part of it, and so has each of its guards; at 100% one half for the bound and one for
the test.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, JsonValue, ValidationError

from fedclaw.protocol.frozen import Frozen
from fedclaw.serve.routing.counting import BUCKETS, GROUPS, bucket_of, quantile_bucket, upper_edge
from fedclaw.serve.routing.guards import GuardRecord, Levels, Says, Seen, Verdict, ceiling, look, verdict
from fedclaw.serve.routing.plan import RoutingPlan

GuardName = Literal["errors", "median_latency", "tail_latency", "agreement"]
LATENCIES: tuple[GuardName, ...] = ("median_latency", "tail_latency")
Counts = Mapping[str, Mapping[str, int]]
"""By version and name, as a state store has them."""
BASELINE = 300
"""Seconds before a trial from which the stable version's latency is taken."""
LEAST_LATENCIES = 100
"""Answers of the stable version that have to be seen before its quantile is taken."""
_LEAST_LOOK = 4  # Keys of each version. It knows nothing of what came of them, so the tests stay right.


class TrialRecord(Frozen):
    """What the guards have seen of a canary or shadow in one epoch; document `guards/MODEL`."""

    epoch: int
    guards: dict[GuardName, GuardRecord]
    slow_above: dict[GuardName, Annotated[int, Field(ge=0, lt=BUCKETS)]] = {}
    """Latency buckets above this one are slow; none: the stable version's quantiles are not known yet."""
    skipped: dict[GuardName, tuple[Seen, ...]] = {}
    """Latencies from before they were known: from them they were taken, so those cannot be tested by them."""
    ceilings: dict[GuardName, float] = {}
    """At 100%: bounds of the stable version's rates."""
    held: bool = False
    """Whether it was said that one client alone holds the canary."""


@dataclass(frozen=True, slots=True)
class TrialFinding:
    """What all guards together say."""

    says: Says
    numbers: dict[str, JsonValue]


def guard_names(plan: RoutingPlan) -> tuple[GuardName, ...]:
    """The guards of a plan's step: a shadow answers nobody, so only its agreement is looked at."""
    agreement: tuple[GuardName, ...] = () if plan.guards.disagreement is None else ("agreement",)
    if plan.mode == "shadow":
        return agreement
    return ("errors", *agreement) if plan.share == 1.0 else ("errors", *LATENCIES, *agreement)


def record_name(model: str) -> str:
    """The document of a model's record."""
    return f"guards/{model}"


def begin(plan: RoutingPlan, before: TrialRecord | None = None) -> TrialRecord:
    """The record of the epoch that begins with `plan`; `before` is that of the step before, of the same trial."""
    guards: dict[GuardName, GuardRecord] = {name: GuardRecord() for name in guard_names(plan)}
    ceilings: dict[GuardName, float] = {}
    if before is not None and plan.share == 1.0:
        ceilings = {"errors": ceiling(before.guards["errors"], _level(plan) / 2)} if "errors" in before.guards else {}
    slow_above = before.slow_above if before is not None else {}
    return TrialRecord(epoch=plan.epoch, guards=guards, slow_above=slow_above, ceilings=ceilings)


def parse_record(plan: RoutingPlan, document: Mapping[str, Any] | None) -> TrialRecord | None:
    """The record of the plan's epoch, from what lies in the store: of this epoch, of the step before, or of another
    trial or release. None: the plan is older than the record, and has been replaced."""
    try:
        record = TrialRecord.model_validate_json(orjson.dumps(document), strict=True)
    except (ValidationError, TypeError):
        return begin(plan)
    if record.epoch > plan.epoch:
        return None
    if record.epoch == plan.epoch and {*record.guards} == {*guard_names(plan)}:
        return record
    return begin(plan, record if record.epoch == plan.epoch - 1 and plan.step > 0 else None)


def slow_buckets(plan: RoutingPlan, stable: Mapping[str, int]) -> dict[GuardName, int]:
    """Above which latency bucket a request is slow, from the stable version's counts before the trial; empty: they are
    too few."""
    histogram = {bucket: count for bucket in range(BUCKETS) if (count := stable.get(f"l{bucket}", 0))}
    if sum(histogram.values()) < LEAST_LATENCIES:
        return {}
    quantiles: dict[GuardName, float] = {"median_latency": 0.5, "tail_latency": plan.guards.tail_quantile}
    found = {name: quantile_bucket(histogram, quantile) or 0 for name, quantile in quantiles.items()}
    factor = plan.guards.latency_factor
    return {name: bucket_of(upper_edge(min(bucket, BUCKETS - 2)) * factor) for name, bucket in found.items()}


def observe(plan: RoutingPlan, record: TrialRecord, counts: Counts) -> TrialRecord:
    """`record` after another look at the epoch's counts, if enough is new."""
    guards = dict(record.guards)
    for name, guard in record.guards.items():
        if name in LATENCIES and name not in record.slow_above:
            continue
        boundary = _boundary(plan, record, name)
        if boundary is _UNBOUNDED:
            continue
        seen = _seen(plan, counts, name, record.slow_above.get(name))
        before = _added(guard.seen, record.skipped[name]) if name in record.skipped else guard.seen
        new = [_less(now, then) for now, then in zip(seen, before, strict=True)]
        stable, _, canary, _ = (sum(column) for column in zip(*new, strict=True))
        if canary >= _LEAST_LOOK and (boundary is not None or stable >= _LEAST_LOOK):
            guards[name] = look(guard, new, _margin(plan, name), boundary)
    return record.model_copy(update={"guards": guards})


def keys_seen(plan: RoutingPlan, record: TrialRecord, counts: Counts) -> dict[GuardName, int]:
    """How many of the candidate's keys were counted for each guard, also those that it has not looked at yet."""
    found = dict.fromkeys(record.guards, 0)
    for name in record.guards:
        if name not in LATENCIES or name in record.slow_above:
            seen = _seen(plan, counts, name, record.slow_above.get(name))
            found[name] = sum(now[2] for now in seen) - sum(then[2] for then in record.skipped.get(name, ()))
    return found


def with_slow_buckets(
    plan: RoutingPlan, record: TrialRecord, counts: Counts, buckets: Mapping[GuardName, int]
) -> TrialRecord:
    """`record` once it is known what is slow; what was counted until now is not tested by it."""
    skipped = {name: tuple(_seen(plan, counts, name, bucket)) for name, bucket in buckets.items()}
    return record.model_copy(update={"slow_above": dict(buckets), "skipped": skipped})


def find(plan: RoutingPlan, record: TrialRecord, now: float) -> tuple[TrialRecord, TrialFinding]:
    """What follows from all guards."""
    levels = Levels(roll_back=_level(plan) / (2 if record.ceilings else 1), grow=plan.guards.growth_alpha)
    guards, verdicts = dict(record.guards), dict[GuardName, Verdict]()
    for name, guard in record.guards.items():
        said = verdict(guard, levels, plan.guards.least_keys, plan.guards.patience, now)
        guards[name], verdicts[name] = said.record, said
    numbers: dict[str, JsonValue] = {name: {**said.numbers, "says": said.says} for name, said in verdicts.items()}
    numbers |= {f"{name}_seconds": float(f"{upper_edge(slow):.4g}") for name, slow in record.slow_above.items()}
    said_all = {said.says for said in verdicts.values()}
    says: Says = next((word for word in _GRAVEST if word in said_all), "wait")
    return record.model_copy(update={"guards": guards}), TrialFinding(says, numbers)


_UNBOUNDED = -1.0
_GRAVEST: tuple[Says, ...] = ("roll_back", "hold", "wait", "grow")


def _level(plan: RoutingPlan) -> float:
    return plan.guards.alpha / (len(guard_names(plan)) or 1) / (1 if plan.mode == "shadow" else len(plan.steps))


def _boundary(plan: RoutingPlan, record: TrialRecord, name: GuardName) -> float | None:
    """None: the canary is compared with the stable version. `_UNBOUNDED`: there is nothing to hold it to."""
    if name == "agreement":
        return plan.guards.disagreement
    if plan.share < 1.0:
        return None
    bound = record.ceilings.get(name, 1.0) + _margin(plan, name)
    return bound if bound < 1.0 else _UNBOUNDED


def _margin(plan: RoutingPlan, name: GuardName) -> float:
    if name == "median_latency":
        return plan.guards.median_margin
    return plan.guards.tail_margin if name == "tail_latency" else plan.guards.error_margin


def _seen(plan: RoutingPlan, counts: Counts, name: GuardName, slow_above: int | None) -> list[Seen]:
    """By group, in the epoch so far."""
    stable, canary = counts.get(plan.stable, {}), counts.get(plan.candidate or "", {})
    if name == "agreement":
        return [(0, 0, *_pair(canary, group, "compared", "disagreed")) for group in range(GROUPS)]
    if name == "errors":
        return [(*_pair(stable, g, "keys", "errors"), *_pair(canary, g, "keys", "errors")) for g in range(GROUPS)]
    slow = BUCKETS if slow_above is None else slow_above
    return [(*_slow(stable, group, slow), *_slow(canary, group, slow)) for group in range(GROUPS)]


def _pair(counts: Mapping[str, int], group: int, keys: str, ones: str) -> tuple[int, int]:
    return counts.get(f"g{group}.{keys}", 0), counts.get(f"g{group}.{ones}", 0)


def _slow(counts: Mapping[str, int], group: int, above: int) -> tuple[int, int]:
    buckets = [counts.get(f"g{group}.l{bucket}", 0) for bucket in range(BUCKETS)]
    return sum(buckets), sum(buckets[above + 1 :])


def _added(one: tuple[Seen, ...], other: tuple[Seen, ...]) -> tuple[Seen, ...]:
    rows = (tuple(map(sum, zip(*pair, strict=True))) for pair in zip(one, other, strict=True))
    return tuple((a, b, c, d) for a, b, c, d in rows)


def _less(now: Seen, then: Seen) -> Seen:
    """What is new. Counts that were pruned are less than before: then nothing is, until they have caught up."""
    a, x, b, y = (max(0, new - old) for new, old in zip(now, then, strict=True))
    return a, min(x, a), b, min(y, b)
