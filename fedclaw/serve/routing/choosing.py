"""Which version answers a request, by one routing plan: the part of a request's way that depends on the plan alone.

A version whose breaker is open is stood in for by the stable one, and that by the last good ones. A choice that was not
drawn for its key (the version stands in, is probed, or is what the client insisted on) has propensity 0: no test,
posterior or estimate counts it.
"""

from collections.abc import Callable, Iterable, Mapping

from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import VersionChoice
from fedclaw.serve.routing.breaker import is_open_for, retry_after
from fedclaw.serve.routing.counting import group_of
from fedclaw.serve.routing.keys import KeyHash
from fedclaw.serve.routing.plan import BreakerState, StoredPlan

_PROBE_EVERY = 1.0


class VersionChooser:
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
        self.following: VersionChooser | None = None
        """What is gone by from `until` on; it may have one that follows it in turn."""
        self.until = 0.0
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

    def at(self, now: float) -> "VersionChooser":
        """Itself, or whichever follows it at the Unix time `now`."""
        return self if self.following is None or now < self.until else self.following.at(now)

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
