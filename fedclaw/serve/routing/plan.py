"""The routing plan of a model: which version answers whom, as one document in the state store.

Documents are `routing/MODEL`, changed by compare-and-swap on their revision. A document that does not fit is refused in
words and the last plan that did stays in force: the store is shared, and another release may have written to it.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol, Self

import orjson
from pydantic import AfterValidator, Field, JsonValue, StringConstraints, ValidationError, model_validator

from fedclaw.errors import FedClawError
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.serve.names import ModelName, VersionName

PREFIX = "routing/"
EVERYBODY = -1
"""All groups of clients."""
FLOOR = 0.05
"""The least share of the keys of an experiment that each of its versions keeps."""

Share = Annotated[float, Field(gt=0, le=1)]


def _rising(steps: tuple[float, ...]) -> tuple[float, ...]:
    if any(low >= high for low, high in pairwise(steps)) or steps[-1] != 1.0:
        raise ValueError(f"shares must rise and end at 1, as {list(STEPS)}")
    return steps


STEPS = (0.05, 0.1, 0.25, 0.5, 1.0)
Steps = Annotated[tuple[Share, ...], Field(min_length=1, max_length=20), AfterValidator(_rising)]
"""Of a canary: its shares of the keys, one after the other."""
Seconds = Annotated[float, Field(ge=0, lt=1e11)]


class PlanError(FedClawError):
    """A routing plan that cannot be, or a change to one that does not fit it."""


class Guards(Frozen):
    """What a canary may do before it is rolled back, and how sure the tests have to be (`guards.py`)."""

    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Chance that a canary within all margins is ever rolled back by a test, over all guards and steps together."""
    growth_alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Chance that a canary beyond a margin passes a step."""
    error_margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """By how much its share of failed requests may exceed the stable version's."""
    latency_factor: Annotated[float, Field(ge=1, le=100)] = 1.25
    """A request is slow if it takes longer than this times a quantile of the stable version's: its median, and the one
    below."""
    median_margin: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """By how much its share of requests that are slow by the median may exceed the stable version's."""
    tail_quantile: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    tail_margin: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The same for those that are slow by this quantile."""
    disagreement: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of rows that it may answer otherwise than the stable version; None: it is not meant to agree."""
    least_keys: Annotated[int, Field(ge=1, le=10**9)] = 100
    """Distinct keys that have to be seen at each step before the share grows."""
    patience: Seconds = 300.0
    """Seconds for which evidence from one client alone waits for what the others say."""
    bake: Seconds = 60.0
    """Seconds at the full share before the canary becomes the stable version."""


class BreakerPolicy(Frozen):
    """When a version that fails is taken out, and how it comes back (`breaker.py`)."""

    window: Annotated[int, Field(ge=1, le=3600)] = 10
    """Seconds that are looked at."""
    least_calls: Annotated[int, Field(ge=1, le=10**6)] = 20
    """Calls in the window before its share of errors says anything."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of errors at which it opens."""
    wait: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """Seconds until the first probes; doubled each time that they fail."""
    longest_wait: Annotated[float, Field(gt=0, le=86400)] = 300.0
    probes: Annotated[int, Field(ge=1, le=1000)] = 5
    """Probes in a row that have to succeed. Each worker sends one a second at most."""

    @model_validator(mode="after")
    def _waits_fit(self) -> Self:
        if self.longest_wait < self.wait:
            raise ValueError("longest_wait must not be shorter than wait")
        return self


class BreakerState(Frozen):
    """A breaker that is not closed, or was open a while ago."""

    state: Literal["closed", "open", "half_open"]
    epoch: Annotated[int, Field(ge=0, lt=2**53)]
    """Rises each time that it changes; probes are counted under it."""
    since: Seconds
    wait: Annotated[float, Field(gt=0, le=86400)]
    """Seconds from opening to the next probes."""
    group: Annotated[int, Field(ge=EVERYBODY, lt=1024)] = EVERYBODY
    """The only group of clients that it is open for."""


class RoutingDecision(Frozen):
    """The last change, why, and by whom."""

    kind: Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")]
    by: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    """A principal's name, or `controller`."""
    at: Seconds
    numbers: dict[str, JsonValue] = {}


class RoutingPlan(Frozen):
    """Which version of a model answers, and what is being tried."""

    format: Literal[1] = 1
    model: ModelName
    mode: Literal["single", "canary", "shadow", "ab"] = "single"
    stable: VersionName
    candidate: VersionName | None = None
    """canary, shadow: the version that is tried."""
    steps: Steps = STEPS
    """canary."""
    step: Annotated[int, Field(ge=0, le=19)] = 0
    approval: Literal["automatic", "manual"] = "automatic"
    """canary: whether a person's word is needed before the share grows, each time, and before it becomes stable."""
    waiting: bool = False
    """canary: the step is passed, and the share grows when a person says so."""
    promote: bool = False
    """shadow: whether a version that agrees goes on as a canary by itself."""
    mirror: Annotated[float, Field(ge=0, le=1)] = 0.0
    """canary, shadow: share of the keys whose requests go to the other version too, to be compared."""
    arms: Annotated[tuple[VersionName, ...], Field(max_length=20)] = ()
    """ab: the versions that compete."""
    propensities: Annotated[tuple[Share, ...], Field(max_length=20)] = ()
    """ab: the chance of each arm for a key that is new; they add up to 1."""
    floor: Annotated[float, Field(ge=FLOOR, le=0.5)] = FLOOR
    """ab: the least of them."""
    guards: Guards = Guards()
    breaker: BreakerPolicy = BreakerPolicy()
    breakers: Annotated[dict[VersionName, BreakerState], Field(max_length=40)] = {}
    last_good: Annotated[tuple[VersionName, ...], Field(max_length=5)] = ()
    """Versions that were stable before, the newest first: what is fallen back to."""
    salt: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    """Of the experiment's key hash."""
    epoch: Annotated[int, Field(ge=0, lt=2**53)] = 0
    """Rises with each change of who gets what; the tests' observations are counted under it."""
    epoch_began: Seconds = 0.0
    """Unix time."""
    decision: RoutingDecision

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if problem := self._problem():
            raise ValueError(problem)
        return self

    def _problem(self) -> str | None:
        tried = self.mode in ("canary", "shadow")
        if tried != (self.candidate is not None):
            return f"mode {self.mode} {'needs a' if tried else 'has no'} candidate"
        if self.candidate == self.stable:
            return "the candidate is the stable version"
        if self.step >= len(self.steps):
            return f"step {self.step} is none of {len(self.steps)} steps"
        return self._arms_problem() if self.mode == "ab" else None

    def _arms_problem(self) -> str | None:
        if len(self.arms) < 2 or len(set(self.arms)) < len(self.arms):
            return "ab needs two arms or more, each once"
        if len(self.propensities) != len(self.arms) or abs(sum(self.propensities) - 1.0) > 1e-9:
            return "propensities must be one for each arm and add up to 1"
        if min(self.propensities) < self.floor - 1e-9:
            return f"each arm keeps at least {self.floor:.0%}"
        return "the stable version must be one of the arms" if self.stable not in self.arms else None

    @property
    def share(self) -> float:
        """The candidate's share of the keys."""
        return self.steps[self.step] if self.mode == "canary" else 0.0

    @property
    def versions(self) -> tuple[str, ...]:
        """All that should be loaded and warm: those that answer, those that are tried, and the last good one."""
        tried = (self.candidate,) if self.candidate else self.arms if self.mode == "ab" else ()
        return tuple(dict.fromkeys((self.stable, *tried, *self.last_good[:1])))

    @property
    def test_scope(self) -> str:
        """Under which name the observations of this epoch are counted."""
        return f"{self.model}@{self.epoch}"

    @property
    def assignment_scope(self) -> str:
        """Under which name the experiment's keys are assigned to versions."""
        return f"{self.model}@{self.salt}"

    def is_open(self, version: str) -> bool:
        """Whether the version's breaker keeps all but probes from it, whoever asks."""
        state = self.breakers.get(version)
        return state is not None and state.state != "closed" and state.group == EVERYBODY

    def document(self) -> dict[str, JsonValue]:
        """As it lies in the store."""
        return self.model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """A plan as it was read: it may be replaced if its revision is still the store's."""

    revision: int
    plan: RoutingPlan


class Documents(Protocol):
    """What a plan needs of a state store."""

    def read(self, name: str) -> tuple[int, dict[str, JsonValue]] | None: ...  # noqa: D102

    def names(self, prefix: str = "") -> list[str]: ...  # noqa: D102


def new_plan(model: str, stable: str, by: str, now: float) -> RoutingPlan:
    """The plan of a model with one version."""
    try:
        return RoutingPlan(
            model=model,
            stable=stable,
            salt=new_salt(),
            epoch_began=now,
            decision=RoutingDecision(kind="first_version", by=by, at=now, numbers={"stable": stable}),
        )
    except ValidationError as error:
        raise PlanError(f"model {model!r:.80}: {explain(error)}") from None


def new_salt() -> str:
    """For one experiment."""
    return secrets.token_hex(16)


def plan_name(model: str) -> str:
    """The document's name."""
    return f"{PREFIX}{model}"


def parse_plan(model: str, document: Mapping[str, Any]) -> RoutingPlan:
    """The plan in a document. Raises PlanError, which says what is wrong with it."""
    try:
        plan = RoutingPlan.model_validate_json(orjson.dumps(document), strict=True)
    except (ValidationError, TypeError) as error:
        reason = explain(error, document, RoutingPlan) if isinstance(error, ValidationError) else "it is no JSON"
        raise PlanError(f"routing plan of {model!r:.80} in the state store is not used: {reason}") from None
    if plan.model != model:
        raise PlanError(f"routing plan of {model!r:.80} in the state store is not used: it is of {plan.model}")
    return plan


def read_plan(store: Documents, model: str) -> StoredPlan | None:
    """The plan of `model`; None if it has none. Raises PlanError."""
    found = store.read(plan_name(model))
    return None if found is None else StoredPlan(found[0], parse_plan(model, found[1]))


def changed(plan: RoutingPlan, decision: RoutingDecision, **fields: Any) -> RoutingPlan:
    """`plan` with other fields, checked. Raises PlanError."""
    try:
        return RoutingPlan.model_validate({**dict(plan), **fields, "decision": decision})
    except ValidationError as error:
        raise PlanError(f"model {plan.model}: {explain(error, settings=RoutingPlan)}") from None
