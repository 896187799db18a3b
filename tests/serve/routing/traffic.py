"""Made traffic through real routers, a real state store and a real controller, on a clock of its own."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.routing.controller import Controller
from fedclaw.serve.routing.plan import RoutingPlan, read_plan
from fedclaw.serve.routing.router import PERIOD, Router
from fedclaw.serve.state.store import StateStore


@dataclass(frozen=True)
class Behaviour:
    """How a version answers."""

    errors: float = 0.0
    seconds: float = 0.004
    spread: float = 0.3
    """Of the logarithm of the latency."""
    disagrees: float = 0.0
    rewards: float = 0.5


@dataclass
class Town:
    """Clients of one model `m`, and what they saw."""

    store: StateStore
    clock: Callable[[], float]
    advance: Callable[[float], None]
    versions: Mapping[str, Behaviour]
    workers: int = 2
    rate: float = 400.0
    """Requests a second, from keys that are new each time unless `keys` says how many there are."""
    keys: int | None = None
    clients: tuple[str, ...] = ("north", "south", "east")
    seed: int = 1
    failed: Counter[str] = field(default_factory=Counter)
    """Answers that failed, by version."""
    answered: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.routers = [Router(self.store, self.clock) for _ in range(self.workers)]
        self.controllers = [Controller(self.store) for _ in range(2)]
        self._next = 0
        for router in self.routers:
            router.refresh()

    @property
    def plan(self) -> RoutingPlan:
        stored = read_plan(self.store, "m")
        assert stored is not None
        return stored.plan

    @property
    def kinds(self) -> list[str]:
        """Of all decisions so far."""
        return [event.kind for event in self.store.events("m", limit=1000)]

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, with decisions each second."""
        for tick in range(int(seconds / PERIOD)):
            for _ in range(int(self.rng.poisson(self.rate * PERIOD))):
                self._ask()
            self.advance(PERIOD)
            for router in self.routers:
                router.push()
            if tick % 4 == 3:
                self.controllers[tick // 4 % 2].step(self.clock())
            for router in self.routers:
                router.refresh()
            if until():
                return

    def _ask(self) -> None:
        router = self.routers[int(self.rng.integers(self.workers))]
        self._next += 1
        number = self._next if self.keys is None else int(self.rng.integers(self.keys))
        self.request(router, f"key-{number}", self.clients[number % len(self.clients)])

    def request(self, router: Router, key: str, client: str, *, fails: float | None = None) -> str | None:
        """One request; returns the version that answered, or None if nobody did."""
        try:
            choice = router.choose("m", key, principal=client)
        except ServeRefusal:
            self.failed["nobody"] += 1
            return None
        assert choice is not None
        behaviour = self.versions[choice.version]
        failed = self.rng.random() < (behaviour.errors if fails is None else fails)
        seconds = behaviour.seconds * float(np.exp(self.rng.normal(0, behaviour.spread)))
        code = "internal" if failed else None
        router.record(choice, model="m", key=key, principal=client, seconds=seconds, code=code)
        self.answered[choice.version] += 1
        self.failed[choice.version] += failed
        for mirror in choice.mirrors:
            agrees = self.rng.random() >= max(self.versions[mirror].disagrees, behaviour.disagrees)
            router.record_comparison("m", mirror, key=key, principal=client, agrees=agrees)
        return choice.version
