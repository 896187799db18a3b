"""Breakers that one worker opens by itself, from its own calls, before the control processes have heard of them.

They hold in this worker until the plan says something else of the version.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedclaw.serve.routing.breaker import advance, is_open_for, opened, opens_for
from fedclaw.serve.routing.choosing import VersionChooser
from fedclaw.serve.routing.counting import Calls, add_calls, total
from fedclaw.serve.routing.plan import BreakerState, RoutingPlan
from fedclaw.serve.routing.unsent_counts import UnsentCounts


@dataclass(slots=True)
class _Watch:
    """A version's calls of the last seconds in this worker, and the breaker that they opened here."""

    recent: deque[tuple[float, dict[int, Calls]]] = field(default_factory=deque)
    own: BreakerState | None = None
    """None: the plan's holds."""
    probes: dict[int, Calls] = field(default_factory=dict)
    """In `own` while it is half-open."""


class WorkerBreakers:
    """One worker's. Safe for many threads."""

    def __init__(self, counts: UnsentCounts, clock: Callable[[], float]) -> None:
        self._counts = counts
        self._clock = clock
        self._lock = threading.Lock()
        self._watches: dict[tuple[str, str], _Watch] = {}

    def own(self, model: str) -> dict[str, BreakerState]:
        """Those of a model that this worker opened, by version."""
        watched = {version: watch.own for (of, version), watch in self._watches.items() if of == model}
        return {version: state for version, state in watched.items() if state is not None}

    def follow(self, before: RoutingPlan | None, after: RoutingPlan) -> None:
        """What the control process decided replaces what this worker saw alone."""
        for version in after.breakers:
            watch = self._watches.get((after.model, version))
            if watch is not None and (before is None or before.breakers.get(version) != after.breakers[version]):
                watch.own = None
                watch.recent.clear()

    def trips(self, chooser: VersionChooser, version: str) -> bool:
        """After a failure: whether this worker's own calls open the version's breaker. Then it is open."""
        model, now, policy = chooser.plan.model, self._clock(), chooser.plan.breaker
        with self._lock:
            watch = self._watches.setdefault((model, version), _Watch())
            recent = [calls for at, calls in watch.recent if at > now - policy.window]
            recent.append(self._counts.calls(model, version))
            group = opens_for(policy, add_calls(recent), add_calls(_last(recent, policy.least_calls)))
            state = chooser.states.get(version)
            if group is None or is_open_for(state, group):
                return False
            watch.own = opened(policy, state, now, group)
            watch.recent.clear()
        self._counts.count(model, version, f"tripped.{group}")
        return True

    def probed(self, chooser: VersionChooser, version: str, group: int, *, failed: bool) -> None:
        """A call of a version that is not closed for the group: what is told of it is for the breaker alone."""
        state, model = chooser.states[version], chooser.plan.model
        if state.state != "half_open":
            return
        if version in chooser.own:
            with self._lock:
                probes = self._watches[model, version].probes
                probes.update(add_calls((probes, {group: Calls(1, int(failed))})))
            return
        names = (f"b{state.epoch}.g{group}.calls", f"b{state.epoch}.g{group}.errors")
        self._counts.count(model, version, *(names if failed else names[:1]))

    def look(
        self,
        calls: Mapping[tuple[str, str], Mapping[int, Calls]],
        plan_of: Callable[[str], RoutingPlan | None],
        now: float,
    ) -> set[str]:
        """Keep the `calls` that ended since the last look for a window, and move on the breakers that this worker
        opened. Returns the models of those that changed."""
        with self._lock:
            for place, by_group in calls.items():
                self._watches.setdefault(place, _Watch()).recent.append((now, dict(by_group)))
        moved = set[str]()
        for (model, version), watch in list(self._watches.items()):
            if (plan := plan_of(model)) is None:
                del self._watches[model, version]
                continue
            while watch.recent and watch.recent[0][0] <= now - plan.breaker.window:
                watch.recent.popleft()
            if watch.own is None or watch.own.state == "closed":
                continue
            after = advance(plan.breaker, watch.own, {}, {}, watch.probes, now)
            if after != watch.own:
                watch.own, watch.probes = after, {}
                moved.add(model)
        return moved


def _last(recent: list[dict[int, Calls]], least: int) -> list[dict[int, Calls]]:
    """The newest of them, until they hold so many calls."""
    held, kept = 0, list[dict[int, Calls]]()
    for calls in reversed(recent):
        kept.append(calls)
        if (held := held + total(calls).calls) >= least:
            break
    return kept
