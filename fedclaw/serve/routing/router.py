"""A worker's routing: the choice for each request, from plans that lie in this process, and what came of it, counted.

`Router.choose` is on the hot path: it reads no file, no database, and no clock unless a breaker is half-open or a
canary is about to get more keys. A thread reads the plans each `PERIOD` and pushes the counts. While the state store is
away the last plans stay in force and counts pile up (they are sums: they do not grow).

    choosing.py         which version a plan gives a key
    key_assignments.py  which one an experiment gave it
    unsent_counts.py    what came of the requests
    worker_breakers.py  versions that fail here, before others know
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from fedclaw.errors import FedClawError
from fedclaw.serve.refusals import Code, ServeRefusal
from fedclaw.serve.repeated_work import RepeatedWork
from fedclaw.serve.requests import VersionChoice
from fedclaw.serve.routing.breaker import is_open_for
from fedclaw.serve.routing.choosing import VersionChooser
from fedclaw.serve.routing.counting import BUCKETS, NO_FAULT, bucket_of, group_of
from fedclaw.serve.routing.key_assignments import AssignmentStore, KeyAssignments
from fedclaw.serve.routing.plan import PREFIX, Documents, RoutingPlan, StoredPlan, parse_plan
from fedclaw.serve.routing.unsent_counts import CountStore, UnsentCounts
from fedclaw.serve.routing.worker_breakers import WorkerBreakers

log = logging.getLogger(__name__)

PERIOD = 0.25
"""Seconds between two looks at the plans, and between two pushes of counts."""
SETTLE = 1.0
"""Seconds from the decision that a canary gets more keys until all workers, which have read it by then, go by it at the
same moment: a key that two of them answer does not go back and forth."""
_LATE = 1.0  # A request that waited so long in vain was slow, whatever its deadline.
_MOST_CLIENTS = 10_000
_NOBODY: Mapping[str, VersionChoice] = {}


class RouterStore(Documents, CountStore, AssignmentStore, Protocol):
    """What a router needs of a state store."""


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
        self._choosers: dict[str, VersionChooser] = {}
        self._counts = UnsentCounts(store)
        self._breakers = WorkerBreakers(self._counts, clock)
        self._assignments = KeyAssignments(store, self._choosers, self.choose)
        self._assigned = self._assignments.known
        self._groups: dict[str, int] = {}
        self._ended = threading.Event()
        self._wake = threading.Event()
        self._complained: dict[str, str] = {}
        self._reading = RepeatedWork(log, "routing plans wait")
        self._pushing = RepeatedWork(log, "routing counts wait")
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Read the plans, then go on reading and pushing in threads. Raises StateUnavailable if the store is away."""
        self.refresh()
        for name, work in (("router-plans", self._keep_up), ("router-assignments", self._assignments.work)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Push what is counted and end the threads."""
        self._ended.set()
        self._wake.set()
        self._assignments.stop()
        for thread in self._threads:
            thread.join()
        with self._pushing.attempt():
            self.push()

    def plan(self, model: str) -> RoutingPlan | None:
        """The plan in force here."""
        chooser = self._chooser(model)
        return None if chooser is None else chooser.plan

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that have a plan."""
        return tuple(self._choosers)

    def choose(
        self, model: str, key: str, wanted_version: str | None = None, principal: str | None = None
    ) -> VersionChoice | None:
        """Which version answers a request with this routing key. None: `await assign(model, key, principal)` says it.

        `principal` is who asks: a breaker that only its own failures opened is open for it, and for nobody else.
        Raises ServeRefusal: no such model or version, or none that answers now.
        """
        chooser = self._chooser(model)
        if chooser is None:
            raise ServeRefusal("not_found", f"no model {model:.100}")
        if wanted_version is not None:
            return chooser.insisted(wanted_version, principal)
        return chooser.choose(key, principal, self._assigned.get(model, _NOBODY))

    async def assign(self, model: str, key: str, principal: str | None = None) -> VersionChoice:
        """Give an experiment's new key its version, once for all workers and nodes, and choose by it."""
        drawn = await self._assignments.ask(model, key)
        return self.choose(model, key, principal=principal) or drawn

    def record(
        self, choice: VersionChoice, *, model: str, key: str, principal: str, seconds: float, code: Code | None = None
    ) -> None:
        """What came of a request: `seconds` until it was answered, or the `code` with which it was refused."""
        chooser = self._chooser(model)
        if chooser is None:
            return
        group = self._groups.get(principal)
        if group is None:
            group = self._group_of(principal)
        ignored = code is not None and code in NO_FAULT
        bucket = bucket_of(seconds) if code is None else None
        version = choice.version
        self._counts.count_call(model, version, group, bucket, ignored)
        if chooser.tested and choice.propensity:
            if not ignored:
                self._observe(chooser, version, key, group, bucket)
            elif code == "deadline_exceeded" and seconds >= _LATE:
                self._observe(chooser, version, key, group, BUCKETS - 1)
        if not ignored and version in chooser.open and is_open_for(chooser.states[version], group):
            self._breakers.probed(chooser, version, group, failed=bucket is None)
        elif not ignored and bucket is None:
            self._failed(chooser, version)

    def record_comparison(self, model: str, version: str, *, key: str, principal: str, agrees: bool) -> None:
        """What came of a request that `version` saw as a mirror: whether it agrees in the row that is looked at
        (`shadow.compare`), which it does not if it failed."""
        chooser = self._chooser(model)
        if chooser is None:
            return
        self._counts.count(model, version, *(("mirrored",) if agrees else ("mirrored", "mirror_disagreed")))
        candidate = chooser.plan.candidate
        if candidate is not None and version in (candidate, chooser.plan.stable):
            names = ("compared",) if agrees else ("compared", "disagreed")
            self._counts.offer(chooser, candidate, self._group_of(principal), "m", key, names)

    def refresh(self) -> None:
        """Read the plans once. One that cannot be used is logged, and the last one stays. Raises StateUnavailable."""
        found = set()
        for name in self._store.names(PREFIX):
            model = name.removeprefix(PREFIX)
            read = self._store.read(name)
            if read is not None:
                found.add(model)
                self._take(model, *read)
        for gone in self._choosers.keys() - found:
            del self._choosers[gone]

    def push(self) -> None:
        """Push the counts once. Raises StateUnavailable: then they are pushed the next time."""
        now = self._clock()
        for model in self._breakers.look(self._counts.take(now), self.plan, now):
            self._prepare_again(self._choosers[model])
        self._counts.send(now)
        self._assignments.confirm()

    def _chooser(self, model: str) -> VersionChooser | None:
        chooser = self._choosers.get(model)
        return chooser if chooser is None or chooser.following is None else chooser.at(self._clock())

    def _take(self, model: str, revision: int, document: Mapping[str, object]) -> None:
        now, last = self._clock(), self._choosers.get(model)
        if last is not None and last.following is not None:
            before, last = last.plan, last.at(now)
            self._go_by(before, last)
        while last is not None and last.following is not None:
            last = last.following
        if last is not None and last.revision == revision:
            return
        try:
            stored = StoredPlan(revision, parse_plan(model, document))
        except FedClawError as error:
            if self._complained.get(model) != str(error):
                self._complained[model] = str(error)
                log.error("%s", error)
            return
        if last is not None and (begins := _begins(last.plan, stored.plan, now)) > now:
            last.until, last.following = begins, self._prepared(stored)
            return
        replaced = None if last is None else self._choosers[model].plan
        self._breakers.follow(replaced, stored.plan)
        self._go_by(replaced, self._prepared(stored))

    def _go_by(self, before: RoutingPlan | None, chooser: VersionChooser) -> None:
        if before is not None and before.salt != chooser.plan.salt:
            self._assignments.forget(before)
        self._choosers[chooser.plan.model] = chooser

    def _prepared(self, stored: StoredPlan) -> VersionChooser:
        return VersionChooser(stored, self._breakers.own(stored.plan.model), self._clock)

    def _prepare_again(self, chooser: VersionChooser) -> None:
        """Once a breaker of this worker's changed: also what follows."""
        self._choosers[chooser.plan.model] = made = self._prepared(StoredPlan(chooser.revision, chooser.plan))
        while (after := chooser.following) is not None:
            made.until, made.following = chooser.until, self._prepared(StoredPlan(after.revision, after.plan))
            chooser, made = after, made.following

    def _group_of(self, principal: str) -> int:
        group = self._groups.get(principal)
        if group is None:
            if len(self._groups) >= _MOST_CLIENTS:
                self._groups.clear()
            group = self._groups[principal] = group_of(principal)
        return group

    def _observe(self, chooser: VersionChooser, version: str, key: str, group: int, bucket: int | None) -> None:
        names = ("keys", "errors" if bucket is None else f"l{bucket}")
        self._counts.offer(chooser, version, group, "k", key, names)

    def _failed(self, chooser: VersionChooser, version: str) -> None:
        model = chooser.plan.model
        if self._breakers.trips(chooser, version):
            self._on_tripped(model, version)
            log.warning("model %s: version %s fails; this worker asks it no more for now", model, version)
            self._prepare_again(chooser)
            self._wake.set()

    def _keep_up(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(PERIOD)
            self._wake.clear()
            # The store may be away; whatever else goes wrong must not end the thread that everything depends on.
            with self._reading.attempt():
                self.refresh()
            with self._pushing.attempt():
                self.push()


def _begins(before: RoutingPlan, after: RoutingPlan, now: float) -> float:
    """The Unix time from which a worker goes by a plan. What takes keys from a version, or opens a breaker, is at once;
    and no clock that goes wrong makes the rest wait for longer than `SETTLE`."""
    grows = (
        after.mode == "canary"
        and after.epoch > before.epoch
        and after.stable == before.stable
        and before.candidate in (None, after.candidate)
        and after.share > before.share
        and after.breakers == before.breakers
    )
    return min(after.epoch_began, now) + SETTLE if grows else now
