"""A circuit breaker for each version: closed, open, half-open (M. Nygard, Release It!, 2018, section 5.2).

closed      All calls pass. It opens when, in the last `window` seconds, at least `least_calls` calls ended and at least
            `threshold` of them failed by the version's fault: a client's own errors and overload are no such failures.
            It opens sooner when nearly all of the last `least_calls` or so failed.
open        No call passes: the last good version answers, and if that is open as well, nobody (503 with Retry-After).
half-open   After `wait` seconds a few probes pass, one a second and worker. When `probes` of them ended it closes, or
            opens again with twice the wait, by the same rule. So between two versions that both fail nothing goes to
            and fro.

One client's failures do not take a version from the others. Clients are told apart by `GROUPS` groups (`counting.py`).
If the group that failed most is left out, and of the others' calls fewer than `_OTHERS` ended or a smaller share than
half of `threshold` failed, the breaker opens for that group alone. Where that group is all there is, that is everybody.

State is in the routing plan, so that all workers share it, and is changed by control processes from everybody's counts.
A worker that sees its own calls fail opens the breaker for itself at once, and tells so. When two did, or the counts of
all say so, the plan follows: one worker whose own process is ill takes the version from nobody else.
"""

from collections.abc import Mapping

from fedclaw.serve.routing.counting import Calls, total
from fedclaw.serve.routing.plan import EVERYBODY, BreakerPolicy, BreakerState

_OTHERS = 5
_TRIPS = 2
_NEARLY_ALL = 0.8
_CALM = 10
"""Windows without opening after which the wait begins anew at its shortest."""


def opens_for(policy: BreakerPolicy, window: Mapping[int, Calls], lately: Mapping[int, Calls]) -> int | None:
    """For which group of clients these calls, by group, open a closed breaker: EVERYBODY, one, or None.

    `window` holds those of the last `policy.window` seconds, `lately` the last of them, some more than
    `policy.least_calls` where there were so many.
    """
    found = _fails_for(policy, window, policy.least_calls, policy.threshold)
    lowest = max(policy.threshold, _NEARLY_ALL)
    return _fails_for(policy, lately, policy.least_calls, lowest) if found is None else found


def tripped_for(trips: Mapping[int, int]) -> int | None:
    """For whom the trips of single workers, by group, open the breaker of all workers."""
    if sum(trips.values()) < _TRIPS:
        return None
    return next(iter(trips)) if len(trips) == 1 else EVERYBODY


def _fails_for(policy: BreakerPolicy, by_group: Mapping[int, Calls], least: int, threshold: float) -> int | None:
    everyone = total(by_group)
    if everyone.calls < least or everyone.errors < threshold * everyone.calls:
        return None
    worst = max(by_group, key=lambda group: by_group[group].errors)
    others = total({group: calls for group, calls in by_group.items() if group != worst})
    fail_too = others.calls >= _OTHERS and others.errors >= policy.threshold / 2 * others.calls
    return EVERYBODY if fail_too else worst


def opened(policy: BreakerPolicy, before: BreakerState | None, now: float, group: int) -> BreakerState:
    """The breaker, open for a group. The wait is doubled if it was open not long ago."""
    if before is None:
        return BreakerState(state="open", epoch=1, since=now, wait=policy.wait, group=group)
    calm = before.state == "closed" and now - before.since > _CALM * policy.window
    wait = policy.wait if calm else min(2 * before.wait, policy.longest_wait)
    return BreakerState(state="open", epoch=before.epoch + 1, since=now, wait=max(wait, policy.wait), group=group)


def advance(
    policy: BreakerPolicy,
    state: BreakerState | None,
    window: Mapping[int, Calls],
    lately: Mapping[int, Calls],
    probes: Mapping[int, Calls],
    now: float,
    trips: Mapping[int, int] | None = None,
) -> BreakerState | None:
    """The next state, `state` itself if nothing changes; None: closed, and never open so far.

    `window` and `lately` are as `opens_for` has them, without calls from before the breaker last changed; `probes` are
    those of the current half-open epoch; `trips` are the workers' own in the window.
    """
    if state is None or state.state == "closed":
        group = opens_for(policy, window, lately)
        group = tripped_for(trips or {}) if group is None else group
        return state if group is None else opened(policy, state, now, group)
    if state.group != EVERYBODY and opens_for(policy, _others(window, state), _others(lately, state)) is not None:
        return opened(policy, state, now, EVERYBODY)
    if state.state == "open":
        due = now >= state.since + state.wait
        return _next(state, "half_open", now) if due else state
    if _fails_for(policy, probes, policy.probes, policy.threshold) is not None:
        return opened(policy, state, now, state.group)
    return _next(state, "closed", now) if total(probes).calls >= policy.probes else state


def is_open_for(state: BreakerState | None, group: int | None) -> bool:
    """Whether all but probes of a group's calls are kept from the version; None: a client that is in none."""
    return state is not None and state.state != "closed" and state.group in (EVERYBODY, group)


def _others(by_group: Mapping[int, Calls], state: BreakerState) -> dict[int, Calls]:
    return {group: calls for group, calls in by_group.items() if group != state.group}


def _next(state: BreakerState, to: str, now: float) -> BreakerState:
    return BreakerState.model_validate({**dict(state), "state": to, "epoch": state.epoch + 1, "since": now})


def retry_after(state: BreakerState, now: float) -> float:
    """Seconds until it is worth asking again; at least one."""
    return max(1.0, state.since + state.wait - now)
