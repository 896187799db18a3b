"""A state store in a file, plans in it, and routers and clocks that the tests move."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedclaw.serve.routing.plan import RoutingPlan, changed, new_plan, plan_name
from fedclaw.serve.routing.router import Router
from fedclaw.serve.state.store import StateStore, StateUnavailable


class Clock:
    """Unix seconds that move when a test says so."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Away:
    """A store that can be cut off."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self.away = False

    def __getattr__(self, name: str) -> Any:
        def call(*words: Any) -> Any:
            if self.away:
                raise StateUnavailable("cut off")
            return getattr(self._store, name)(*words)

        return call


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def place(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state.db'}"


@pytest.fixture
def store(place: str) -> Iterator[StateStore]:
    with StateStore.open(place) as opened:
        yield opened


@pytest.fixture
def put(store: StateStore) -> Callable[..., RoutingPlan]:
    """Writes a plan of model `m` with stable version `v1` and these fields over whatever is there."""

    def write(**fields: Any) -> RoutingPlan:
        plan = new_plan("m", "v1", "ann", 1_000_000.0)
        plan = changed(plan, plan.decision, **fields)
        found = store.read(plan_name("m"))
        assert store.swap(plan_name("m"), None if found is None else found[0], plan.document())
        return plan

    return write


@pytest.fixture
def router(store: StateStore, clock: Clock) -> Router:
    """Not started: it reads and pushes when the test says so."""
    return Router(store, clock)
