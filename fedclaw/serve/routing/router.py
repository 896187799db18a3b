"""The choice for each request, from plans that lie in this process, and what came of it, counted.

`Router.choose` is on the hot path: it reads no file, no database, and no clock unless a breaker is half-open. A thread
reads the plans each `PERIOD` and pushes the counts. While the state store is away the last plans stay in force and
counts pile up (they are sums: they do not grow).

A version whose breaker is open is stood in for by the stable one, and that by the last good ones. A choice that was not
drawn for its key (the version stands in, is probed, or is what the client insisted on) has propensity 0: no test,
posterior or estimate counts it.
"""

import asyncio
import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fedclaw.errors import FedClawError
from fedclaw.serve.refusals import Code, ServeRefusal
from fedclaw.serve.requests import VersionChoice
from fedclaw.serve.routing.breaker import advance, is_open_for, opened, opens_for, retry_after
from fedclaw.serve.routing.counting import (
    BUCKETS,
    GROUPS,
    NO_FAULT,
    Calls,
    add_calls,
    bucket_of,
    group_of,
    sum_counts,
    total,
)
from fedclaw.serve.routing.keys import KeyHash
from fedclaw.serve.routing.plan import PREFIX, BreakerState, Documents, RoutingPlan, StoredPlan, parse_plan

log = logging.getLogger(__name__)

PERIOD = 0.25
"""Seconds between two looks at the plans, and between two pushes of counts."""
_KEYS_PER_PUSH = 4  # Of each group and version: a burst of calls that fail together counts a few times, not often.
_HOUR = 3600
_LATE = 1.0  # A request that waited so long in vain was slow, whatever its deadline.
_PROBE_EVERY = 1.0
_MOST_KEYS = 100_000
_MOST_CLIENTS = 10_000
_MOST_ASSIGNMENTS = 256


class RouterStore(Documents, Protocol):
    """What a router needs of a state store."""

    def add_counts(self, model: str, version: str, bucket: int, counts: Mapping[str, int]) -> None: ...  # noqa: D102

    def claim(self, scope: str, keys: Iterable[str]) -> set[str]: ...  # noqa: D102

    def assign_all(self, model: str, versions: Mapping[str, str]) -> dict[str, str]: ...  # noqa: D102


class _Tally:
    """What was counted of one version since the last push."""

    __slots__ = ("calls", "errors", "group_calls", "group_errors", "ignored", "latencies", "other")

    def __init__(self) -> None:
        self.calls = self.errors = self.ignored = 0
        self.latencies = [0] * BUCKETS
        self.group_calls = [0] * GROUPS
        self.group_errors = [0] * GROUPS
        self.other: dict[str, int] = {}

    def count(self, name: str) -> None:
        """One more."""
        self.other[name] = self.other.get(name, 0) + 1

    def counts(self) -> dict[str, int]:
        """By name."""
        named = {"calls": self.calls, "errors": self.errors, "ignored": self.ignored, **self.other}
        named |= {f"l{bucket}": count for bucket, count in enumerate(self.latencies)}
        named |= {f"g{group}.calls": count for group, count in enumerate(self.group_calls)}
        named |= {f"g{group}.errors": count for group, count in enumerate(self.group_errors)}
        return {name: count for name, count in named.items() if count}

    def by_group(self) -> dict[int, Calls]:
        """Of each group that called."""
        pairs = enumerate(zip(self.group_calls, self.group_errors, strict=True))
        return {group: Calls(*pair) for group, pair in pairs if pair[0]}


class _Sample:
    """Keys that were new to this worker since the last push, of one version, group and kind: a uniform sample."""

    __slots__ = ("keys", "offered")

    def __init__(self) -> None:
        self.keys: list[tuple[str, tuple[str, ...]]] = []
        """What the key is claimed as, and the names that go up by one with it."""
        self.offered = 0

    def offer(self, claimed: str, names: tuple[str, ...]) -> None:
        """By reservoir sampling, which knows nothing of what came of the call."""
        self.offered += 1
        if len(self.keys) < _KEYS_PER_PUSH:
            self.keys.append((claimed, names))
        elif (place := random.randrange(self.offered)) < _KEYS_PER_PUSH:  # noqa: S311
            self.keys[place] = (claimed, names)


class _Route:
    """One plan, made ready for choosing."""

    def __init__(self, stored: StoredPlan, own: Mapping[str, BreakerState], clock: Callable[[], float]) -> None:
        self.plan = plan = stored.plan
        self.revision = stored.revision
        self.hash = KeyHash(plan.model, plan.salt)
        self.own = frozenset(own)
        self.states = {**plan.breakers, **own}
        self.open = frozenset(version for version, state in self.states.items() if state.state != "closed")
        """For everybody or for a group."""
        self.tested = plan.mode == "canary"
        self.share = plan.share
        self.scope = plan.test_scope
        self.insistable = frozenset({plan.stable, *plan.last_good, *plan.versions}) - (
            {plan.candidate} if plan.mode == "shadow" else set()
        )
        self._clock = clock
        self._probed: dict[str, float] = {}
        healthy = {plan.stable, plan.candidate} - self.open
        self._stable, self._candidate = self._drawn(plan.stable, ()), self._drawn(plan.candidate, ())
        other = (plan.candidate,) if plan.candidate in healthy and plan.candidate is not None else ()
        self._stable_mirrored = self._drawn(plan.stable, other)
        self._candidate_mirrored = self._drawn(plan.candidate, (plan.stable,) if plan.stable in healthy else ())

    def _drawn(self, version: str | None, mirrors: tuple[str, ...]) -> VersionChoice:
        if version is None:
            return VersionChoice(self.plan.stable)
        return VersionChoice(version, self.share if version == self.plan.candidate else 1.0 - self.share, mirrors)

    def choose(self, key: str, principal: str | None, assigned: Mapping[str, VersionChoice]) -> VersionChoice | None:
        """None: an experiment's key that has no version yet."""
        choice = self._draw(key, assigned)
        if choice is not None and choice.version in self.open:
            return self.guarded(choice, principal)
        return choice

    def _draw(self, key: str, assigned: Mapping[str, VersionChoice]) -> VersionChoice | None:
        mode = self.plan.mode
        if mode == "single":
            return self._stable
        if mode == "ab":
            return assigned.get(key)
        if not self.plan.mirror:
            return self._candidate if self.hash.share(key) < self.share else self._stable
        position = self.hash.position(key)
        if position.mirror < self.plan.mirror:
            return self._candidate_mirrored if position.share < self.share else self._stable_mirrored
        return self._candidate if position.share < self.share else self._stable

    def guarded(self, choice: VersionChoice, principal: str | None) -> VersionChoice:
        """`choice`, or who answers for a version whose breaker is open. Raises ServeRefusal if nobody does."""
        group = None if principal is None else group_of(principal)
        if not is_open_for(self.states[choice.version], group):
            return choice
        order = tuple(dict.fromkeys((choice.version, self.plan.stable, *self.plan.arms, *self.plan.last_good)))
        for other in order:
            if not is_open_for(self.states.get(other), group) or self._probe_due(other):
                return VersionChoice(other, 0.0)
        raise self._nobody(order)

    def insisted(self, version: str, principal: str | None) -> VersionChoice:
        """The version that a client names. Raises ServeRefusal."""
        if version not in self.insistable:
            raise ServeRefusal("not_found", f"model {self.plan.model} has no version {version:.64} to ask for")
        group = None if principal is None else group_of(principal)
        if is_open_for(self.states.get(version), group) and not self._probe_due(version):
            raise self._nobody((version,))
        return VersionChoice(version, 0.0)

    def draw(self, key: str) -> tuple[str, float]:
        """An experiment's version for a key, and its propensity."""
        left = self.hash.share(key)
        for version, propensity in zip(self.plan.arms, self.plan.propensities, strict=True):
            left -= propensity
            if left < 0:
                return version, propensity
        return self.plan.arms[-1], self.plan.propensities[-1]

    def _probe_due(self, version: str) -> bool:
        if self.states[version].state != "half_open":
            return False
        now = self._clock()
        if now - self._probed.get(version, 0.0) < _PROBE_EVERY:
            return False
        self._probed[version] = now
        return True

    def _nobody(self, versions: Iterable[str]) -> ServeRefusal:
        now = self._clock()
        wait = min(retry_after(self.states[version], now) for version in versions if version in self.states)
        return ServeRefusal("unavailable", f"no version of model {self.plan.model} answers now; try again", wait)


@dataclass(slots=True)
class _Watch:
    """A version's calls of the last seconds in this worker, and the breaker that they opened here."""

    recent: deque[tuple[float, dict[int, Calls]]] = field(default_factory=deque)
    own: BreakerState | None = None
    """None: the plan's holds."""
    probes: dict[int, Calls] = field(default_factory=dict)
    """In `own` while it is half-open."""


@dataclass(slots=True)
class _Asked:
    model: str
    key: str
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[VersionChoice]"


class Router:
    """One worker's. Safe for many threads."""

    def __init__(
        self,
        store: RouterStore,
        clock: Callable[[], float] = time.time,
        on_tripped: Callable[[str, str], None] = lambda _model, _version: None,
    ) -> None:
        """`clock` gives Unix seconds; `on_tripped` is told when this worker itself opens a version's breaker."""
        self._on_tripped = on_tripped
        self._store = store
        self._clock = clock
        self._routes: dict[str, _Route] = {}
        self._lock = threading.Lock()
        self._tallies: dict[tuple[str, str], _Tally] = {}
        self._unsent: dict[tuple[str, str, int], dict[str, int]] = {}
        self._samples: dict[tuple[str, str, int, str], _Sample] = {}
        self._seen: dict[str, set[int]] = {}
        self._watches: dict[tuple[str, str], _Watch] = {}
        self._groups: dict[str, int] = {}
        self._assigned: dict[str, dict[str, VersionChoice]] = {}
        self._unconfirmed: dict[str, dict[str, str]] = {}
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._wake = threading.Event()
        self._complained: dict[str, str] = {}
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Read the plans, then go on reading and pushing in threads. Raises StateUnavailable if the store is away."""
        self.refresh()
        for work in (self._keep_up, self._assign_all):
            thread = threading.Thread(target=work, name=f"router{work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Push what is counted and end the threads."""
        self._ended.set()
        self._wake.set()
        self._asked.put(None)
        for thread in self._threads:
            thread.join()
        self._patiently("counts", self.push)

    def plan(self, model: str) -> RoutingPlan | None:
        """The plan in force here."""
        route = self._routes.get(model)
        return None if route is None else route.plan

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that have a plan."""
        return tuple(self._routes)

    def choose(
        self, model: str, key: str, wanted_version: str | None = None, principal: str | None = None
    ) -> VersionChoice | None:
        """Which version answers a request with this routing key. None: `await assign(model, key, principal)` says it.

        `principal` is who asks: a breaker that only its own failures opened is open for it, and for nobody else.
        Raises ServeRefusal: no such model or version, or none that answers now.
        """
        route = self._routes.get(model)
        if route is None:
            raise ServeRefusal("not_found", f"no model {model:.100}")
        if wanted_version is not None:
            return route.insisted(wanted_version, principal)
        return route.choose(key, principal, self._assigned.get(model, _NOBODY))

    async def assign(self, model: str, key: str, principal: str | None = None) -> VersionChoice:
        """Give an experiment's new key its version, once for all workers and nodes, and choose by it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[VersionChoice] = loop.create_future()
        self._asked.put(_Asked(model, key, loop, answer))
        drawn = await answer
        return self.choose(model, key, principal=principal) or drawn

    def record(
        self, choice: VersionChoice, *, model: str, key: str, principal: str, seconds: float, code: Code | None = None
    ) -> None:
        """What came of a request: `seconds` until it was answered, or the `code` with which it was refused."""
        route = self._routes.get(model)
        if route is None:
            return
        group = self._groups.get(principal)
        if group is None:
            group = self._group_of(principal)
        ignored = code is not None and code in NO_FAULT
        bucket = bucket_of(seconds) if code is None else None
        version = choice.version
        with self._lock:
            tally = self._tallies.get((model, version))
            if tally is None:
                tally = self._tallies[model, version] = _Tally()
            if ignored:
                tally.ignored += 1
            else:
                tally.calls += 1
                tally.group_calls[group] += 1
                if bucket is None:
                    tally.errors += 1
                    tally.group_errors[group] += 1
                else:
                    tally.latencies[bucket] += 1
        if route.tested and choice.propensity:
            if not ignored:
                self._observe(route, version, key, group, bucket)
            elif code == "deadline_exceeded" and seconds >= _LATE:
                self._observe(route, version, key, group, BUCKETS - 1)
        if not ignored and version in route.open and is_open_for(route.states[version], group):
            self._record_probe(route, version, group, failed=bucket is None)
        elif not ignored and bucket is None:
            self._look_at(route, version)

    def record_comparison(self, model: str, version: str, *, key: str, principal: str, agrees: bool) -> None:
        """What came of a request that `version` saw as a mirror: whether it agrees in the row that is looked at
        (`shadow.compare`), which it does not if it failed."""
        route = self._routes.get(model)
        if route is None:
            return
        with self._lock:
            tally = self._tallies.setdefault((model, version), _Tally())
            tally.count("mirrored")
            if not agrees:
                tally.count("mirror_disagreed")
        candidate = route.plan.candidate
        if candidate is not None and version in (candidate, route.plan.stable):
            group = self._group_of(principal)
            names = ("compared",) if agrees else ("compared", "disagreed")
            self._offer(route, candidate, group, "m", key, names)

    def refresh(self) -> None:
        """Read the plans once. One that cannot be used is logged, and the last one stays. Raises StateUnavailable."""
        found = set()
        for name in self._store.names(PREFIX):
            model = name.removeprefix(PREFIX)
            read = self._store.read(name)
            if read is not None:
                found.add(model)
                self._take(model, *read)
        for gone in self._routes.keys() - found:
            del self._routes[gone]

    def push(self) -> None:
        """Push the counts once. Raises StateUnavailable: then they are pushed the next time."""
        now = self._clock()
        with self._lock:
            tallies, self._tallies = self._tallies, {}
            samples, self._samples = self._samples, {}
        self._remember(tallies, now)
        for (model, version), tally in tallies.items():
            self._to_send((model, version, int(now)), tally.counts())
        self._send()
        self._confirm()
        for (scope, version), sampled in _by_version(samples).items():
            keys = _with_one_latency(sampled)
            new = self._store.claim(scope, [claimed for claimed, _ in keys])
            counts = sum_counts(dict.fromkeys(names, 1) for claimed, names in keys if claimed in new)
            self._to_send((scope, version, int(now) // _HOUR * _HOUR), counts)
        self._send()

    def _to_send(self, place: tuple[str, str, int], counts: Mapping[str, int]) -> None:
        if counts:
            self._unsent[place] = sum_counts((self._unsent.get(place, {}), counts))

    def _send(self) -> None:
        while self._unsent:
            (model, version, bucket), counts = next(iter(self._unsent.items()))
            self._store.add_counts(model, version, bucket, counts)
            del self._unsent[model, version, bucket]

    def _take(self, model: str, revision: int, document: Mapping[str, object]) -> None:
        before = self._routes.get(model)
        if before is not None and before.revision == revision:
            return
        try:
            stored = StoredPlan(revision, parse_plan(model, document))
        except FedClawError as error:
            if self._complained.get(f"plan {model}") != str(error):
                self._complained[f"plan {model}"] = str(error)
                log.error("%s", error)
            return
        for version in stored.plan.breakers:
            watch = self._watches.get((model, version))
            if watch is not None and (before is None or _differs(before.plan, stored.plan, version)):
                # What the control process decided replaces what this worker saw alone.
                watch.own = None
                watch.recent.clear()
        if before is not None and before.plan.salt != stored.plan.salt:
            self._assigned.pop(model, None)
            self._unconfirmed.pop(before.plan.assignment_scope, None)
        self._ready(stored)

    def _ready(self, stored: StoredPlan) -> None:
        model = stored.plan.model
        watched = {version: watch.own for (of, version), watch in self._watches.items() if of == model}
        own = {version: state for version, state in watched.items() if state is not None}
        self._routes[model] = _Route(stored, own, self._clock)

    def _group_of(self, principal: str) -> int:
        group = self._groups.get(principal)
        if group is None:
            if len(self._groups) >= _MOST_CLIENTS:
                self._groups.clear()
            group = self._groups[principal] = group_of(principal)
        return group

    def _observe(self, route: _Route, version: str, key: str, group: int, bucket: int | None) -> None:
        self._offer(route, version, group, "k", key, ("keys", "errors" if bucket is None else f"l{bucket}"))

    def _offer(self, route: _Route, version: str, group: int, kind: str, key: str, names: tuple[str, ...]) -> None:
        unit, scope = route.hash.position(key).unit, route.scope
        with self._lock:
            seen = self._seen.get(scope)
            if seen is None:
                for old in [one for one in self._seen if one.rpartition("@")[0] == route.plan.model]:
                    del self._seen[old]
                seen = self._seen[scope] = set()
            if (unit if kind == "k" else ~unit) in seen:
                return
            if len(seen) >= _MOST_KEYS:
                seen.clear()
            seen.add(unit if kind == "k" else ~unit)
            sample = self._samples.setdefault((scope, version, group, kind), _Sample())
            sample.offer(f"{kind}{unit:016x}", tuple(f"g{group}.{name}" for name in names))

    def _record_probe(self, route: _Route, version: str, group: int, *, failed: bool) -> None:
        state, model = route.states[version], route.plan.model
        if state.state != "half_open":
            return
        with self._lock:
            if version in route.own:
                probes = self._watches[model, version].probes
                probes.update(add_calls((probes, {group: Calls(1, int(failed))})))
                return
            tally = self._tallies.setdefault((model, version), _Tally())
            tally.count(f"b{state.epoch}.g{group}.calls")
            if failed:
                tally.count(f"b{state.epoch}.g{group}.errors")

    def _look_at(self, route: _Route, version: str) -> None:
        """After a failure: whether this worker's own calls open the breaker."""
        model, now, policy = route.plan.model, self._clock(), route.plan.breaker
        with self._lock:
            watch = self._watches.setdefault((model, version), _Watch())
            recent = [calls for at, calls in watch.recent if at > now - policy.window]
            tally = self._tallies.setdefault((model, version), _Tally())
            recent.append(tally.by_group())
            group = opens_for(policy, add_calls(recent), add_calls(_last(recent, policy.least_calls)))
            state = route.states.get(version)
            if group is None or is_open_for(state, group):
                return
            watch.own = opened(policy, state, now, group)
            watch.recent.clear()
            tally.count(f"tripped.{group}")
        self._on_tripped(model, version)
        log.warning("model %s: version %s fails; this worker asks it no more for now", model, version)
        self._ready(StoredPlan(route.revision, route.plan))
        self._wake.set()

    def _remember(self, tallies: Mapping[tuple[str, str], _Tally], now: float) -> None:
        """Keep the calls of the last window for `_look_at`, and move on the breakers that it opened."""
        with self._lock:
            for place, tally in tallies.items():
                if tally.calls:
                    self._watches.setdefault(place, _Watch()).recent.append((now, tally.by_group()))
        for (model, version), watch in list(self._watches.items()):
            if (route := self._routes.get(model)) is None:
                del self._watches[model, version]
                continue
            while watch.recent and watch.recent[0][0] <= now - route.plan.breaker.window:
                watch.recent.popleft()
            if watch.own is None or watch.own.state == "closed":
                continue
            after = advance(route.plan.breaker, watch.own, {}, {}, watch.probes, now)
            if after != watch.own:
                watch.own, watch.probes = after, {}
                self._ready(StoredPlan(route.revision, route.plan))

    def _keep_up(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(PERIOD)
            self._wake.clear()
            self._patiently("plans", self.refresh)
            self._patiently("counts", self.push)

    def _patiently(self, what: str, work: Callable[[], None]) -> None:
        """The store may be away; whatever else goes wrong must not end the thread that everything depends on."""
        try:
            work()
        except Exception as error:
            if self._complained.get(what) != str(error):
                self._complained[what] = str(error)
                expected = isinstance(error, FedClawError)
                log.warning("routing %s wait: %s", what, error, exc_info=None if expected else error)
        else:
            self._complained.pop(what, None)

    def _assign_all(self) -> None:
        while (first := self._asked.get()) is not None:
            asked = [first]
            while len(asked) < _MOST_ASSIGNMENTS and not self._asked.empty():
                if (more := self._asked.get()) is None:
                    self._asked.put(None)
                    break
                asked.append(more)
            by_model: dict[str, list[_Asked]] = {}
            for one in asked:
                by_model.setdefault(one.model, []).append(one)
            for model, wanted in by_model.items():
                self._assign(model, wanted)

    def _assign(self, model: str, asked: list[_Asked]) -> None:
        route = self._routes.get(model)
        try:
            if route is None or route.plan.mode != "ab":
                choices = {one.key: self.choose(model, one.key) for one in asked}
            else:
                choices = {**self._assigned_now(route, [one.key for one in asked])}
        except Exception as error:
            for one in asked:
                _answer(one, error)
            return
        for one in asked:
            _answer(one, choices[one.key] or ServeRefusal("unavailable", "routing is changing; try again", 1.0))

    def _assigned_now(self, route: _Route, keys: Iterable[str]) -> dict[str, VersionChoice]:
        drawn = {key: _written(*route.draw(key)) for key in keys}
        scope = route.plan.assignment_scope
        try:
            kept = self._store.assign_all(scope, drawn)
        except ServeRefusal:
            # The store is away. The draw depends on the key and the plan alone, so other workers draw the same.
            kept = drawn
            self._unconfirmed.setdefault(scope, {}).update(drawn)
        return self._keep(route.plan, kept)

    def _confirm(self) -> None:
        """Tell the store what was drawn while it was away; what it has from another worker is taken over."""
        for route in list(self._routes.values()):
            scope = route.plan.assignment_scope
            if drawn := self._unconfirmed.get(scope):
                self._keep(route.plan, self._store.assign_all(scope, dict(drawn)))
                del self._unconfirmed[scope]

    def _keep(self, plan: RoutingPlan, kept: Mapping[str, str]) -> dict[str, VersionChoice]:
        choices = {key: _choice(text) for key, text in kept.items()}
        current = self.plan(plan.model)
        if current is None or current.salt != plan.salt:
            return choices
        known = self._assigned.setdefault(plan.model, {})
        for key, choice in choices.items():
            if len(known) >= _MOST_KEYS:
                known.pop(next(iter(known)))
            known[key] = choice
        return choices


_NOBODY: Mapping[str, VersionChoice] = {}


def _last(recent: list[dict[int, Calls]], least: int) -> list[dict[int, Calls]]:
    """The newest of them, until they hold so many calls."""
    held, kept = 0, list[dict[int, Calls]]()
    for calls in reversed(recent):
        kept.append(calls)
        if (held := held + total(calls).calls) >= least:
            break
    return kept


def _by_version(
    samples: Mapping[tuple[str, str, int, str], _Sample],
) -> dict[tuple[str, str], list[tuple[str, tuple[str, ...]]]]:
    joined: dict[tuple[str, str], list[tuple[str, tuple[str, ...]]]] = {}
    for (scope, version, _, _), sample in samples.items():
        joined.setdefault((scope, version), []).extend(sample.keys)
    return joined


def _with_one_latency(keys: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Of one latency, drawn by lot: requests of a batch, or of a stall, are slow together."""
    timed = [place for place, (_, names) in enumerate(keys) if _is_latency(names[-1])]
    kept = random.choice(timed) if timed else -1  # noqa: S311
    return [
        (claimed, names if place == kept or place not in timed else names[:-1])
        for place, (claimed, names) in enumerate(keys)
    ]


def _is_latency(name: str) -> bool:
    return name.partition(".")[2].startswith("l")


def _differs(before: RoutingPlan, after: RoutingPlan, version: str) -> bool:
    return before.breakers.get(version) != after.breakers.get(version)


def _written(version: str, propensity: float) -> str:
    return f"{version} {propensity:.12f}"


def _choice(text: str) -> VersionChoice:
    version, _, propensity = text.partition(" ")
    return VersionChoice(version, float(propensity))


def _answer(asked: _Asked, answer: VersionChoice | Exception) -> None:
    def settle() -> None:
        if asked.answer.done():
            return
        if isinstance(answer, Exception):
            asked.answer.set_exception(answer)
        else:
            asked.answer.set_result(answer)

    try:
        asked.loop.call_soon_threadsafe(settle)
    except RuntimeError:
        log.debug("a request's event loop ended before its version was assigned")
