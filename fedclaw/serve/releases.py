"""How a version comes to answer: what the configuration, the admin port and `publish` ask for, as changes of plans."""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedclaw.errors import UsageError
from fedclaw.serve.names import LONGEST_NAME, NAME
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.routing import controller
from fedclaw.serve.routing.plan import PREFIX, BreakerPolicy, PlanError, RoutingPlan, StoredPlan, read_plan
from fedclaw.serve.routing.waiting import waits_for
from fedclaw.serve.settings import ReleaseSettings
from fedclaw.serve.state.store import StateStore, WorkerBeat
from fedclaw.serve.version_catalogue import VersionCatalogue, in_memory

log = logging.getLogger(__name__)

CONFIGURATION = "configuration"
CONFIGURED = "configured"
"""Documents CONFIGURED/NODE/MODEL: the version that a node's configuration named when it was last started."""
LOADING = 60.0
"""Seconds that workers have to load a version before it is routed to."""
ALIVE = 3.0
"""Seconds without a beat after which a worker counts as gone."""
MIRRORED = 0.1
"""Share of the keys whose requests are compared."""
_changing = threading.Lock()
_UNDONE = {"canary_rolled_back", "rolled_back", "shadow_differs"}


def first_release(store: StateStore, model: str, version: str, node: str = "") -> None:
    """Let the version that `node` was started with answer, unless a release of others is under way.

    Raises UsageError where other nodes share the store and have not got it: they would have nothing to answer from.
    """
    plan = controller.add_version(store, model, version, CONFIGURATION, time.time())
    if version in plan.versions or plan.mode != "single":
        return
    wanted = _in_memory(store, model, version)
    if others := sorted({beat.node for beat in alive_workers(store) if beat.node != node and wanted not in beat.ready}):
        raise UsageError(
            f"{model} is answered by node {', '.join(others)} too, which has another version: start this node with "
            "that one, and publish the new version to both"
        )
    controller.pin(store, model, version, CONFIGURATION, time.time())


def release_configured(store: StateStore, model: str, version: str, node: str, new: bool) -> None:
    """Let the version that the node's configuration names answer, where it is `new` in the catalogue, or the
    configuration named another at the node's last start.

    A node that starts again as it was leaves what was published and decided since as it is. Raises UsageError.
    """
    named = f"{CONFIGURED}/{node}/{model}"
    found = store.read(named)
    before = None if found is None else found[1].get("version")
    if new or read_plan(store, model) is None or (before is not None and before != version):
        first_release(store, model, version, node)
    if before != version:
        store.swap(named, None if found is None else found[0], {"version": version})


def configure_breakers(store: StateStore, policy: BreakerPolicy) -> None:
    """Have the breakers of all models in the store go by the policy of the node that starts."""
    for name in store.names(PREFIX):
        model = name.removeprefix(PREFIX)
        try:
            controller.set_breaker(store, model, policy, CONFIGURATION, time.time())
        except PlanError as error:
            log.error("its breaker stays as it was: %s", error)


def begin(
    store: StateStore,
    model: str,
    version: str,
    settings: ReleaseSettings,
    mode: str,
    by: str,
    breaker: BreakerPolicy | None = None,
) -> Mapping[str, Any]:
    """Begin a release of a version that the catalogue has. `breaker` is for a model that has no plan yet. Raises
    ServeRefusal.

    A canary that needs a person's word is a shadow until somebody approves of it.
    """
    with _one_at_a_time():
        _require_version(store, model, version)
        load_everywhere(store, model, [version])
        if read_plan(store, model) is None and _is_first(store, model, version, by):
            if breaker is not None:
                controller.set_breaker(store, model, breaker, CONFIGURATION, time.time())
        else:
            _begin(store, model, version, settings, mode, by)
    return progress(store, model)


def _is_first(store: StateStore, model: str, version: str, by: str) -> bool:
    """Make the plan of a model that has none; False: another node was faster, with another version."""
    return version in controller.add_version(store, model, version, by, time.time()).versions


def _begin(store: StateStore, model: str, version: str, settings: ReleaseSettings, mode: str, by: str) -> None:
    if mode == "at_once":
        pin(store, model, version, by)
        return
    options: dict[str, Any] = {"mirror": MIRRORED, "guards": settings.guards, "steps": settings.steps}
    begins = controller.start_canary
    if mode == "shadow" or settings.approval == "manual":
        begins, options["promote"] = controller.start_shadow, mode == "shadow" and settings.promote
    else:
        options["approval"] = "manual" if settings.approval == "each_step" else "automatic"
    _allowed(lambda: begins(store, model, version, by, time.time(), **options))
    if mode == "canary" and settings.approval == "manual":
        _allowed(lambda: controller.ask_for_approval(store, model, by, time.time()))


def is_under_way(store: StateStore, model: str, version: str, mode: str) -> bool:
    """Whether a release of the version is what the plan says already, or has come to its end."""
    found = read_plan(store, model)
    if found is None:
        return False
    plan = found.plan
    if plan.mode == "single":
        return plan.stable == version
    if plan.candidate != version or mode == "at_once":
        return False
    if mode == "shadow":
        return plan.mode == "shadow"
    # A canary that needs a person's word begins as a shadow, which waits for it.
    return plan.mode == "canary" or plan.waiting


def load_everywhere(store: StateStore, model: str, versions: Sequence[str]) -> None:
    """Wait until every worker of every node has the versions in memory, warm, before anything is routed to them.

    A worker that was there when it began and does not answer any more has not: what it was to load may be what ended
    it. Raises ServeRefusal `unavailable` if one has not after `LOADING` seconds; then all is as it was.
    """
    catalogue, end = VersionCatalogue(store), time.monotonic() + LOADING
    wanted = {_in_memory(store, model, version) for version in versions}
    expected = {(beat.node, beat.worker) for beat in alive_workers(store)}
    if not expected:
        raise ServeRefusal("unavailable", "no worker is alive: nothing was changed", ALIVE)
    catalogue.stage(model, versions)
    while missing := _missing(store, expected, wanted):
        if time.monotonic() > end:
            catalogue.stage(model, [])
            node, worker = missing[0]
            raise ServeRefusal(
                "unavailable",
                f"{worker} of {node} has not loaded {', '.join(versions)} after {LOADING:g} s; "
                "its log says why. Nothing was changed",
            )
        time.sleep(0.1)


def _missing(store: StateStore, expected: set[tuple[str, str]], wanted: set[str]) -> list[tuple[str, str]]:
    """The workers, those `expected` and those that came since, that do not answer from the versions."""
    alive = {(beat.node, beat.worker): wanted <= set(beat.ready) for beat in alive_workers(store)}
    return sorted(worker for worker in expected | alive.keys() if not alive.get(worker, False))


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """What is loaded for one release, another would have forgotten. Raises ServeRefusal `conflict`."""
    if not _changing.acquire(blocking=False):
        raise ServeRefusal("conflict", "versions are being loaded or removed for somebody else: try again", 1.0)
    try:
        yield
    finally:
        _changing.release()


def pin(store: StateStore, model: str, version: str, by: str) -> None:
    """Let one version answer everything, from now on."""
    plan = _plan(store, model).plan
    if (plan.mode, plan.stable) != ("single", version):
        _allowed(lambda: controller.pin(store, model, version, by, time.time()))


def operate(store: StateStore, model: str, operation: str, body: Mapping[str, Any], by: str) -> Mapping[str, Any]:
    """One operation of the admin port: pin, approve, roll_back, ab. Raises ServeRefusal."""
    now = time.time()
    _plan(store, model)
    if operation == "pin":
        with _one_at_a_time():
            _require_version(store, model, body.get("version"))
            load_everywhere(store, model, [body["version"]])
            pin(store, model, body["version"], by)
    elif operation == "approve":
        early = body.get("early", False)
        if not isinstance(early, bool):
            raise ServeRefusal("bad_request", "early is true or false")
        _allowed(lambda: controller.approve(store, model, by, now, early=early))
    elif operation == "roll_back":
        _allowed(lambda: controller.roll_back(store, model, by, now))
    elif operation == "ab":
        versions, floor = body.get("versions"), body.get("floor")
        if not isinstance(versions, list) or not versions or not isinstance(floor, float | None):
            raise ServeRefusal("bad_request", "give versions, a list, and perhaps floor, a number from 0.05")
        with _one_at_a_time():
            for version in versions:
                _require_version(store, model, version)
            load_everywhere(store, model, versions)
            _allowed(lambda: controller.start_ab(store, model, versions, by, now, floor))
    else:
        raise ServeRefusal("not_found", "there is no such operation")
    return progress(store, model)


def progress(store: StateStore, model: str) -> Mapping[str, Any]:
    """How the last release stands: its state, a sentence, what it waits for, and the version that answers whoever
    nothing else does."""
    plan = _plan(store, model).plan
    state, says = _progress(plan)
    return {
        "state": state,
        "says": says,
        "waits_for": waits_for(store, plan, time.time()),
        "stable": plan.stable,
        "decision": plan.decision.model_dump(mode="json"),
    }


def _progress(plan: RoutingPlan) -> tuple[str, str]:
    if plan.mode == "single":
        undone = plan.decision.kind in _UNDONE
        return ("rolled_back" if undone else "answers"), f"{plan.stable} answers{' again' if undone else ''}"
    if plan.mode == "ab":
        return "ab", f"{', '.join(plan.arms)} compete"
    trying = f"{plan.candidate} answers {plan.share:.0%} of the keys" if plan.mode == "canary" else ""
    trying = trying or f"{plan.candidate} is compared, and answers nobody"
    return ("waits_for_approval", f"{trying}; it waits for approval") if plan.waiting else (plan.mode, trying)


def describe(store: StateStore, model: str) -> Mapping[str, Any]:
    """A model: its versions and its plan. Raises ServeRefusal."""
    entry = VersionCatalogue(store).read(model)
    if entry is None:
        raise ServeRefusal("not_found", f"there is no model {model[:100]}")
    found = read_plan(store, model)
    return {
        "model": model,
        "versions": {name: own.model_dump(mode="json") for name, own in entry.versions.items()},
        "plan": None if found is None else found.plan.document(),
    }


def remove(store: StateStore, model: str, version: str, by: str) -> Mapping[str, Any]:
    """Take a version that nothing is routed to out of the catalogue. Raises ServeRefusal."""
    with _one_at_a_time():
        found = read_plan(store, model)
        if found is not None and version in {*found.plan.versions, *found.plan.last_good}:
            raise ServeRefusal("conflict", f"version {version} answers, or may be fallen back to")
        VersionCatalogue(store).remove(model, version)
    store.append_event("removed", model, {"version": version, "by": by})
    return {"model": model, "removed": version}


def require_names(model: str, version: str | None) -> None:
    """Raise ServeRefusal for what cannot be the name of a model or a version."""
    for name in (model, version):
        if name is not None and not re.fullmatch(NAME, name):
            raise ServeRefusal("bad_request", f"names are letters, digits, '.', '_' and '-', at most {LONGEST_NAME}")


def _plan(store: StateStore, model: str) -> StoredPlan:
    found = read_plan(store, model)
    if found is None:
        raise ServeRefusal("not_found", f"there is no model {model[:100]}")
    return found


def alive_workers(store: StateStore) -> list[WorkerBeat]:
    """Those that are alive."""
    return [beat for beat in store.workers() if beat.age < ALIVE]


def _in_memory(store: StateStore, model: str, version: str) -> str:
    entry = VersionCatalogue(store).read(model)
    return in_memory(model, version, "" if entry is None else entry.versions[version].digest)


def _require_version(store: StateStore, model: str, version: object) -> None:
    entry = VersionCatalogue(store).read(model)
    if not isinstance(version, str) or entry is None or version not in entry.versions:
        raise ServeRefusal("not_found", f"there is no version {version!s:.100} of {model[:100]}")


def _allowed(change: Callable[[], RoutingPlan]) -> RoutingPlan:
    """Do it, or say why the plan does not allow it."""
    try:
        return change()
    except PlanError as error:
        raise ServeRefusal("conflict", str(error)) from None
