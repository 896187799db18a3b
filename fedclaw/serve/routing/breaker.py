"""A circuit breaker for each version: closed, open, half-open (M. Nygard, Release It!, 2018, section 5.2).

closed      All calls pass. It opens when, in the last `window` seconds, at least `least_calls` calls ended and at least
            `threshold` of them failed by the version's fault: a client's own errors and overload are no such failures.
open        No call passes: the last good version answers, and if that is open as well, nobody (503 with Retry-After).
half-open   After `wait` seconds a few probes pass, one a second and worker. When `probes` of them ended it closes, or
            opens again with twice the wait, by the same rule. So between two versions that both fail nothing goes to
            and fro.

One client alone does not open a breaker against what the others see: the calls of the group of clients that failed most
are left out, and if the others made `_OTHERS` calls or more, and the share of them that failed is below half the
threshold, it stays closed. Where one client is all there is, its calls decide.

State is in the routing plan, so that all workers share it, and is changed by control processes from everybody's counts.
A worker that sees its own calls fail opens the breaker for itself at once, and the plan follows.
"""

from collections.abc import Mapping

from fedclaw.serve.routing.counting import Calls, total
from fedclaw.serve.routing.plan import BreakerPolicy, BreakerState

_OTHERS = 5
_CALM = 10
"""Windows without opening after which the wait begins anew at its shortest."""


def should_open(policy: BreakerPolicy, by_group: Mapping[int, Calls]) -> bool:
    """Whether the calls in the window, by group of clients, open a closed breaker."""
    return _fails(policy, policy.least_calls, by_group)


def _fails(policy: BreakerPolicy, least: int, by_group: Mapping[int, Calls]) -> bool:
    everyone = total(by_group)
    if everyone.calls < least or everyone.errors < policy.threshold * everyone.calls:
        return False
    worst = max(by_group.values(), key=lambda one: one.errors)
    others = Calls(everyone.calls - worst.calls, everyone.errors - worst.errors)
    return others.calls < _OTHERS or others.errors >= policy.threshold / 2 * others.calls


def opened(policy: BreakerPolicy, before: BreakerState | None, now: float) -> BreakerState:
    """The open breaker. The wait is doubled if it was open not long ago."""
    if before is None:
        return BreakerState(state="open", epoch=1, since=now, wait=policy.wait)
    calm = before.state == "closed" and now - before.since > _CALM * policy.window
    wait = policy.wait if calm else min(2 * before.wait, policy.longest_wait)
    return BreakerState(state="open", epoch=before.epoch + 1, since=now, wait=max(wait, policy.wait))


def advance(
    policy: BreakerPolicy,
    state: BreakerState | None,
    window: Mapping[int, Calls],
    probes: Mapping[int, Calls],
    now: float,
) -> BreakerState | None:
    """The next state, `state` itself if nothing changes; None: closed, and never open so far.

    `window` holds calls of the last `policy.window` seconds, and none from before the breaker last changed; `probes`
    those of the current half-open epoch.
    """
    if state is None or state.state == "closed":
        return opened(policy, state, now) if should_open(policy, window) else state
    if state.state == "open":
        due = now >= state.since + state.wait
        return _next(state, "half_open", now) if due else state
    if _fails(policy, policy.probes, probes):
        return opened(policy, state, now)
    return _next(state, "closed", now) if total(probes).calls >= policy.probes else state


def _next(state: BreakerState, to: str, now: float) -> BreakerState:
    return BreakerState.model_validate({**dict(state), "state": to, "epoch": state.epoch + 1, "since": now})


def retry_after(state: BreakerState, now: float) -> float:
    """Seconds until it is worth asking again; at least one."""
    return max(1.0, state.since + state.wait - now)
