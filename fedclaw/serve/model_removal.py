"""A model that is taken away: from the catalogue and the routing plans at once, so that workers let go of it.

They see it within a quarter of a second: who asks then is told that there is no such model; what they had taken is
answered first. Bundles that no version has any more go an hour later.
"""

import time
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import JsonValue

from fedclaw.serve.monitoring.drift_watch import prefixes_of
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.releases import CONFIGURED, alive_workers
from fedclaw.serve.routing.canary import record_name
from fedclaw.serve.routing.plan import plan_name
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.version_catalogue import PREFIX, VersionCatalogue

_TRIES = 5


def remove_model(store: StateStore, model: str, by: str) -> Mapping[str, Any]:
    """Take a model away, whatever is being tried with it.

    Raises ServeRefusal: `not_found`; `conflict` where the configuration of a node that runs names it, and would bring
    it back at the next start.
    """
    if nodes := _configured_at(store, model):
        raise ServeRefusal(
            "conflict",
            f"the configuration of {', '.join(nodes)} names {model}: take it out there and start the node again first",
        )
    for _ in range(_TRIES):
        named = {name: found[0] for name in (PREFIX + model, plan_name(model)) if (found := store.read(name))}
        if not named:
            raise ServeRefusal("not_found", f"there is no model {model:.100}")
        # After the revision: what is added between the two is not removed unseen.
        entry = VersionCatalogue(store).read(model)
        versions = dict[str, JsonValue]()
        if entry is not None:
            versions |= {name: own.digest for name, own in entry.versions.items()}
        if store.remove(named, ("model_removed", model, {"versions": versions, "by": by})):
            _forget(store, model)
            return {"model": model, "removed": list(versions)}
        time.sleep(0.05)
    raise ServeRefusal("conflict", f"{model} is being changed by others: try again", 1.0)


def forget_configured(store: StateStore, node: str, models: Collection[str]) -> None:
    """Forget what the configuration of `node` named at an earlier start; now it names `models`."""
    for name in store.names(f"{CONFIGURED}/{node}/"):
        if name.rpartition("/")[2] not in models and (found := store.read(name)) is not None:
            store.remove({name: found[0]})


def _configured_at(store: StateStore, model: str) -> list[str]:
    alive = {beat.node for beat in alive_workers(store)}
    return sorted(node for node in alive if store.read(f"{CONFIGURED}/{node}/{model}") is not None)


def _forget(store: StateStore, model: str) -> None:
    """What was learnt from its trials and inputs: one of the same name that comes later begins anew."""
    of_inputs = [name for prefix in prefixes_of(model) for name in store.names(prefix)]
    for name in (record_name(model), *of_inputs):
        if (found := store.read(name)) is not None:
            store.remove({name: found[0]})
    store.forget(model)
