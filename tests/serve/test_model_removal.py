"""A model that is removed: what goes with it, who may keep it, and one of the same name that comes later."""

import threading
from pathlib import Path

import pytest

from fedclaw.serve import releases
from fedclaw.serve.model_removal import forget_configured, remove_model
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.releases import release_configured
from fedclaw.serve.routing import controller
from fedclaw.serve.routing.plan import read_plan
from fedclaw.serve.routing.router import Router
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.version_catalogue import VersionCatalogue

ONE, OTHER = "1" * 64, "2" * 64


@pytest.fixture
def store(tmp_path: Path):
    with StateStore.open(f"sqlite:///{tmp_path / 'state.db'}") as found:
        yield found


def add(store: StateStore, model: str, version: str, digest: str) -> None:
    VersionCatalogue(store).add(model, version, digest, "run", "ann")
    controller.add_version(store, model, version, "ann", 1000.0)


def test_a_model_goes_with_its_plan_and_what_its_trials_left(store: StateStore):
    for model in ("heart", "heart.2"):
        add(store, model, "v1", ONE)
        VersionCatalogue(store).add(model, "v2", OTHER, "run", "ann")
        controller.start_canary(store, model, "v2", "ann", 1001.0)
        store.add_counts(f"{model}@1", "v2", 1001, {"keys": 5})
        for name in ("guards/", "drift/{}/ab/writer", "drift-baseline/{}/ab"):
            assert store.swap(name.format(model) if "{}" in name else name + model, None, {})
    kept = [name for name in store.names() if "heart.2" in name]
    assert remove_model(store, "heart", "ann") == {"model": "heart", "removed": ["v1", "v2"]}
    assert store.names() == kept
    assert store.counts("heart@1", 0) == {}
    assert store.counts("heart.2@1", 0) == {"v2": {"keys": 5}}
    (event,) = store.events("heart", limit=1)
    assert (event.kind, event.body) == ("model_removed", {"versions": {"v1": ONE, "v2": OTHER}, "by": "ann"})
    with pytest.raises(ServeRefusal, match="no model heart") as refused:
        remove_model(store, "heart", "ann")
    assert refused.value.code == "not_found"


def test_a_model_that_a_running_node_is_configured_with_stays(store: StateStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(releases, "ALIVE", 600.0)
    add(store, "heart", "v1", ONE)
    release_configured(store, "heart", "v1", "a", new=True)
    store.beat("b", "worker-1", [])
    # A node that does not run is not asked: its next start brings back what its configuration names.
    store.beat("a", "worker-1", [])
    with pytest.raises(ServeRefusal, match="the configuration of a names heart") as refused:
        remove_model(store, "heart", "ann")
    assert refused.value.code == "conflict"
    assert VersionCatalogue(store).models() == ["heart"]
    forget_configured(store, "a", {"heart"})
    with pytest.raises(ServeRefusal):
        remove_model(store, "heart", "ann")
    forget_configured(store, "a", {"lung"})
    remove_model(store, "heart", "ann")
    assert (VersionCatalogue(store).models(), read_plan(store, "heart")) == ([], None)


def test_a_worker_that_saw_neither_the_end_nor_the_beginning_follows_the_new_model(store: StateStore):
    add(store, "heart", "v1", ONE)
    router = Router(store)
    router.refresh()
    assert router.choose("heart", "key").version == "v1"
    remove_model(store, "heart", "ann")
    add(store, "heart", "v9", OTHER)
    router.refresh()
    assert router.choose("heart", "key").version == "v9"
    remove_model(store, "heart", "ann")
    router.refresh()
    with pytest.raises(ServeRefusal) as refused:
        router.choose("heart", "key")
    assert refused.value.code == "not_found"


def test_who_removes_while_versions_come_removes_all_of_them_or_is_followed_by_a_new_model(store: StateStore):
    catalogue = VersionCatalogue(store)

    def publish() -> None:
        for number in range(30):
            catalogue.add("heart", f"v{number}", ONE, "run", "ann")

    thread = threading.Thread(target=publish)
    thread.start()
    removed = list[str]()
    while thread.is_alive():
        try:
            removed += remove_model(store, "heart", "ann")["removed"]
        except ServeRefusal:
            continue
    thread.join()
    entry = catalogue.read("heart")
    left = [] if entry is None else list(entry.versions)
    # Each is where it was put, or was named by who removed it, and none by two.
    assert sorted([*removed, *left]) == sorted(f"v{number}" for number in range(30))
