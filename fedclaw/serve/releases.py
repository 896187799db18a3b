"""How a version comes to answer: what the configuration, the admin port and `publish` ask for, as changes of plans."""

import re
import time
from collections.abc import Mapping
from typing import Any

from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.routing.plan import RoutingDecision, RoutingPlan, StoredPlan, changed, new_plan, plan_name, read_plan
from fedclaw.serve.settings import MODEL_NAME, ReleaseSettings
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.version_catalogue import VersionCatalogue

CONFIGURATION = "configuration"


def first_release(store: StateStore, model: str, version: str) -> None:
    """Let the version that a node was started with answer, unless a release of others is under way."""
    while True:
        found, now = read_plan(store, model), time.time()
        if found is None:
            plan = new_plan(model, version, CONFIGURATION, now)
            if store.swap(plan_name(model), None, plan.document()):
                return
            continue
        if version in found.plan.versions or found.plan.mode != "single":
            return
        if _swap(store, found, _at_once(found.plan, version, CONFIGURATION, now)):
            return


def begin(
    store: StateStore, model: str, version: str, _settings: ReleaseSettings, mode: str, by: str
) -> Mapping[str, Any]:
    """Begin a release of a version that the catalogue has. Raises ServeRefusal."""
    entry = VersionCatalogue(store).read(model)
    if entry is None or version not in entry.versions:
        raise ServeRefusal("not_found", f"there is no version {version[:100]} of {model[:100]}")
    if read_plan(store, model) is None:
        first_release(store, model, version)
        return progress(store, model)
    if mode == "at_once":
        pin(store, model, version, by)
        return progress(store, model)
    raise ServeRefusal("not_supported", f"mode {mode} is not there yet")


def pin(store: StateStore, model: str, version: str, by: str) -> None:
    """Let one version answer everything, from now on."""
    while True:
        found = _plan(store, model)
        if found.plan.mode == "single" and found.plan.stable == version:
            return
        if _swap(store, found, _at_once(found.plan, version, by, time.time())):
            return


def operate(store: StateStore, model: str, operation: str, body: Mapping[str, Any], by: str) -> Mapping[str, Any]:
    """One operation of the admin port. Raises ServeRefusal."""
    if operation == "pin":
        version = body.get("version")
        entry = VersionCatalogue(store).read(model)
        if not isinstance(version, str) or entry is None or version not in entry.versions:
            raise ServeRefusal("not_found", "there is no such version")
        pin(store, model, version, by)
        return progress(store, model)
    raise ServeRefusal("not_found", "there is no such operation")


def progress(store: StateStore, model: str) -> Mapping[str, Any]:
    """How the last release stands: its state, and a sentence."""
    plan = _plan(store, model).plan
    state = "answers" if plan.mode == "single" else plan.mode
    return {"state": state, "says": f"{plan.stable} answers", "decision": plan.decision.model_dump(mode="json")}


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
    plan = _plan(store, model).plan
    if version in {*plan.versions, *plan.last_good}:
        raise ServeRefusal("conflict", f"version {version} answers, or may be fallen back to")
    VersionCatalogue(store).remove(model, version)
    store.append_event("removed", model, {"version": version, "by": by})
    return {"model": model, "removed": version}


def require_names(model: str, version: str | None) -> None:
    """Raise ServeRefusal for what cannot be the name of a model or a version."""
    for name in (model, version):
        if name is not None and not re.fullmatch(MODEL_NAME, name):
            raise ServeRefusal("bad_request", "names are letters, digits, '.', '_' and '-', at most 64")


def _plan(store: StateStore, model: str) -> StoredPlan:
    found = read_plan(store, model)
    if found is None:
        raise ServeRefusal("not_found", f"there is no model {model[:100]}")
    return found


def _at_once(plan: RoutingPlan, version: str, by: str, now: float) -> RoutingPlan:
    decision = RoutingDecision(kind="at_once", by=by, at=now, numbers={"stable": version, "before": plan.stable})
    return changed(
        plan,
        decision,
        mode="single",
        stable=version,
        candidate=None,
        step=0,
        waiting=False,
        mirror=0.0,
        arms=(),
        propensities=(),
        breakers={},
        last_good=tuple(dict.fromkeys((plan.stable, *plan.last_good)))[:5],
        epoch=plan.epoch + 1,
        epoch_began=now,
    )


def _swap(store: StateStore, found: StoredPlan, plan: RoutingPlan) -> bool:
    done = store.swap(plan_name(plan.model), found.revision, plan.document())
    if done:
        decision = plan.decision
        store.append_event(decision.kind, plan.model, {"by": decision.by, **decision.numbers})
    return done
