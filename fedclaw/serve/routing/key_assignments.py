"""Versions of an experiment's keys: each key gets one for the whole experiment, from whichever worker asks first.

The store keeps who came first, and is asked in a thread, for many keys at once. While it is away a key's draw, which
depends on the key and the plan alone, holds in this worker, and is told to the store later.
"""

import asyncio
import logging
import queue
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import VersionChoice
from fedclaw.serve.routing.choosing import VersionChooser
from fedclaw.serve.routing.plan import RoutingPlan

log = logging.getLogger(__name__)

_MOST_KEYS = 100_000
_MOST_AT_ONCE = 256


class AssignmentStore(Protocol):
    """What assignments need of a state store."""

    def assign_all(self, model: str, versions: Mapping[str, str]) -> dict[str, str]: ...  # noqa: D102


@dataclass(slots=True)
class _Asked:
    model: str
    key: str
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[VersionChoice]"


class KeyAssignments:
    """One worker's. Safe for many threads."""

    def __init__(
        self,
        store: AssignmentStore,
        choosers: Mapping[str, VersionChooser],
        choose: Callable[[str, str], VersionChoice | None],
    ) -> None:
        """`choosers`, by model, are those in force; `choose(model, key)` chooses where there is no experiment."""
        self.known: dict[str, dict[str, VersionChoice]] = {}
        """By model and key."""
        self._store = store
        self._choosers = choosers
        self._choose = choose
        self._unconfirmed: dict[str, dict[str, str]] = {}
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()

    async def ask(self, model: str, key: str) -> VersionChoice:
        """The version of a key that has none yet. Raises ServeRefusal."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[VersionChoice] = loop.create_future()
        self._asked.put(_Asked(model, key, loop, answer))
        return await answer

    def work(self) -> None:
        """Answer whoever asks, until `stop`."""
        while (first := self._asked.get()) is not None:
            asked = [first]
            while len(asked) < _MOST_AT_ONCE and not self._asked.empty():
                if (more := self._asked.get()) is None:
                    self._asked.put(None)
                    break
                asked.append(more)
            by_model: dict[str, list[_Asked]] = {}
            for one in asked:
                by_model.setdefault(one.model, []).append(one)
            for model, wanted in by_model.items():
                self._assign(model, wanted)

    def stop(self) -> None:
        """Whoever asked before is still answered."""
        self._asked.put(None)

    def confirm(self) -> None:
        """Tell the store what was drawn while it was away; what it has from another worker is taken over.

        Raises StateUnavailable: then it is told the next time.
        """
        for chooser in list(self._choosers.values()):
            drawn = self._unconfirmed.get(chooser.plan.assignment_scope)
            if drawn:
                told = dict(drawn)
                self._keep(chooser.plan, self._store.assign_all(chooser.plan.assignment_scope, told))
                for key in told:
                    del drawn[key]

    def forget(self, plan: RoutingPlan) -> None:
        """The plan's experiment is over."""
        self.known.pop(plan.model, None)
        self._unconfirmed.pop(plan.assignment_scope, None)

    def _assign(self, model: str, asked: list[_Asked]) -> None:
        chooser = self._choosers.get(model)
        try:
            if chooser is None or chooser.plan.mode != "ab":
                choices = {one.key: self._choose(model, one.key) for one in asked}
            else:
                choices = {**self._assigned_now(chooser, [one.key for one in asked])}
        except Exception as error:
            for one in asked:
                _answer(one, error)
            return
        for one in asked:
            _answer(one, choices[one.key] or ServeRefusal("unavailable", "routing is changing; try again", 1.0))

    def _assigned_now(self, chooser: VersionChooser, keys: Iterable[str]) -> dict[str, VersionChoice]:
        drawn = {key: _written(*chooser.draw(key)) for key in keys}
        scope = chooser.plan.assignment_scope
        try:
            kept = self._store.assign_all(scope, drawn)
        except ServeRefusal:
            # The store is away. The draw depends on the key and the plan alone, so other workers draw the same.
            kept = drawn
            self._unconfirmed.setdefault(scope, {}).update(drawn)
        return self._keep(chooser.plan, kept)

    def _keep(self, plan: RoutingPlan, kept: Mapping[str, str]) -> dict[str, VersionChoice]:
        choices = {key: _choice(text) for key, text in kept.items()}
        chooser = self._choosers.get(plan.model)
        if chooser is None or chooser.plan.salt != plan.salt:
            return choices
        known = self.known.setdefault(plan.model, {})
        for key, choice in choices.items():
            if len(known) >= _MOST_KEYS:
                known.pop(next(iter(known)))
            known[key] = choice
        return choices


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
