"""What the admin port and `publish` ask for becomes a plan, and each refusal has its code."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedclaw.errors import UsageError
from fedclaw.serve import releases
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.routing.plan import Guards, RoutingPlan, read_plan
from fedclaw.serve.settings import ReleaseSettings
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.version_catalogue import VersionCatalogue, in_memory

SETTINGS = ReleaseSettings()
MANUAL = ReleaseSettings(approval="manual", guards=Guards(disagreement=None))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    """A model of three versions, the first of which answers."""
    with StateStore.open(f"sqlite:///{tmp_path / 'state.db'}") as opened:
        for number in (1, 2, 3):
            VersionCatalogue(opened).add("heart", f"v{number}", f"{number}" * 64, "run", "ann")
        releases.first_release(opened, "heart", "v1")
        opened.beat("node", "worker-1", [loaded(number) for number in (1, 2, 3)])
        yield opened


def loaded(number: int) -> str:
    return in_memory("heart", f"v{number}", f"{number}" * 64)


def plan(store: StateStore) -> RoutingPlan:
    found = read_plan(store, "heart")
    assert found is not None
    return found.plan


def begin(store: StateStore, version: str, mode: str, settings: ReleaseSettings = SETTINGS) -> Mapping[str, Any]:
    return releases.begin(store, "heart", version, settings, mode, "ann")


def test_a_published_version_begins_as_a_canary_that_is_meant_to_agree(store: StateStore):
    said = begin(store, "v2", "canary")
    assert (said["state"], said["says"]) == ("canary", "v2 answers 5% of the keys")
    assert (plan(store).mode, plan(store).guards.disagreement, plan(store).mirror) == ("canary", 0.02, 0.1)
    assert plan(store).decision.by == "ann"
    assert said["waits_for"]["says"].startswith("answers: v1 has given 0 of the 100 that tell what is slow, since ")


def test_where_a_person_has_to_say_so_it_answers_nobody_before(store: StateStore):
    assert begin(store, "v2", "canary", MANUAL)["state"] == "waits_for_approval"
    assert (plan(store).mode, plan(store).candidate, plan(store).guards.disagreement) == ("shadow", "v2", None)
    assert releases.operate(store, "heart", "approve", {}, "bob")["state"] == "canary"
    assert [event.body["by"] for event in store.events("heart")][-1] == "bob"


def test_shadow_at_once_ab_and_back(store: StateStore):
    assert begin(store, "v2", "shadow")["state"] == "shadow"
    assert releases.operate(store, "heart", "roll_back", {}, "ann")["state"] == "rolled_back"
    assert begin(store, "v3", "at_once")["says"] == "v3 answers"
    assert releases.operate(store, "heart", "ab", {"versions": ["v1", "v2"]}, "ann")["state"] == "ab"
    assert releases.operate(store, "heart", "pin", {"version": "v2"}, "ann")["says"] == "v2 answers"
    assert releases.operate(store, "heart", "roll_back", {}, "ann")["says"] == "v3 answers again"


def test_a_node_that_starts_again_leaves_a_release_alone(store: StateStore):
    begin(store, "v2", "canary")
    before = plan(store)
    releases.first_release(store, "heart", "v3")
    assert plan(store) == before


REFUSED: list[tuple[Callable[[StateStore], object], str]] = [
    (lambda s: begin(s, "v9", "canary"), "not_found"),
    (lambda s: begin(s, "v1", "canary"), "conflict"),
    (lambda s: releases.begin(s, "none", "v1", SETTINGS, "canary", "ann"), "not_found"),
    (lambda s: releases.operate(s, "heart", "approve", {}, "ann"), "conflict"),
    (lambda s: releases.operate(s, "heart", "approve", {"early": True}, "ann"), "conflict"),
    (lambda s: releases.operate(s, "heart", "approve", {"early": "yes"}, "ann"), "bad_request"),
    (lambda s: releases.operate(s, "heart", "roll_back", {}, "ann"), "conflict"),
    (lambda s: releases.operate(s, "heart", "pin", {}, "ann"), "not_found"),
    (lambda s: releases.operate(s, "heart", "pin", {"version": ["v2"]}, "ann"), "not_found"),
    (lambda s: releases.operate(s, "none", "roll_back", {}, "ann"), "not_found"),
    (lambda s: releases.operate(s, "heart", "ab", {}, "ann"), "bad_request"),
    (lambda s: releases.operate(s, "heart", "ab", {"versions": ["v2"], "floor": "x"}, "ann"), "bad_request"),
    (lambda s: releases.operate(s, "heart", "ab", {"versions": ["v2"], "floor": 0.7}, "ann"), "conflict"),
    (lambda s: releases.operate(s, "heart", "ab", {"versions": ["v9"]}, "ann"), "not_found"),
    (lambda s: releases.operate(s, "heart", "what", {}, "ann"), "not_found"),
]


@pytest.mark.parametrize(("operation", "code"), REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(
    store: StateStore, operation: Callable[[StateStore], object], code: str
):
    before = plan(store)
    with pytest.raises(ServeRefusal) as refused:
        operation(store)
    assert refused.value.code == code
    assert plan(store) == before


def test_one_release_at_a_time(store: StateStore):
    begin(store, "v2", "canary")
    with pytest.raises(ServeRefusal) as refused:
        begin(store, "v3", "canary")
    assert refused.value.code == "conflict"
    assert "roll it back or wait" in str(refused.value)


@pytest.mark.parametrize(("approval", "plans"), [("automatic", "automatic"), ("each_step", "manual")])
def test_a_canary_waits_at_each_step_where_that_is_set(store, approval, plans):
    begin(store, "v2", "canary", ReleaseSettings(approval=approval))
    begun = plan(store)
    assert (begun.mode, begun.waiting, begun.approval) == ("canary", False, plans)
    releases.operate(store, "heart", "roll_back", {}, "ann")
    assert plan(store).approval == "automatic", "what comes next is not asked for what this one was"


@pytest.mark.parametrize("promote", [False, True])
def test_a_shadow_goes_on_by_itself_where_that_is_set_and_one_that_needs_a_word_does_not(store, promote):
    begin(store, "v2", "shadow", ReleaseSettings(promote=promote))
    assert plan(store).promote is promote
    releases.operate(store, "heart", "roll_back", {}, "ann")
    begin(store, "v2", "canary", ReleaseSettings(promote=promote, approval="manual"))
    assert (plan(store).mode, plan(store).promote, plan(store).waiting) == ("shadow", False, True)


def test_nothing_is_routed_to_a_version_that_a_worker_has_not_loaded(store, monkeypatch):
    monkeypatch.setattr(releases, "LOADING", 0.3)
    catalogue = VersionCatalogue(store)
    store.beat("node", "worker-1", [loaded(1)])
    with pytest.raises(ServeRefusal, match="worker-1 of node has not loaded v2"):
        releases.operate(store, "heart", "pin", {"version": "v2"}, "ann")
    assert read_plan(store, "heart").plan.stable == "v1"
    assert catalogue.read("heart").staged == ()
    store.beat("node", "worker-1", [loaded(1), loaded(2)])
    assert releases.operate(store, "heart", "pin", {"version": "v2"}, "ann")["says"] == "v2 answers"


def test_a_bundle_that_a_worker_has_as_another_version_is_not_routed_to_before_it_has_this_one(store, monkeypatch):
    monkeypatch.setattr(releases, "LOADING", 0.3)
    VersionCatalogue(store).add("lung", "v1", "1" * 64, "run", "ann")
    with pytest.raises(ServeRefusal, match="worker-1 of node has not loaded v1"):
        releases.begin(store, "lung", "v1", SETTINGS, "canary", "ann")
    store.beat("node", "worker-1", [loaded(1), in_memory("lung", "v1", "1" * 64)])
    assert releases.begin(store, "lung", "v1", SETTINGS, "canary", "ann")["says"] == "v1 answers"


def test_a_node_does_not_take_the_others_version_away(store):
    store.beat("other", "worker-1", [loaded(1)])
    with pytest.raises(UsageError, match="answered by node other too"):
        releases.first_release(store, "heart", "v2", "mine")
    assert read_plan(store, "heart").plan.stable == "v1"


def test_a_version_that_ends_the_workers_is_not_routed_to(store, monkeypatch):
    """They are alive when it begins, and silent since: none is left of which it could be said that it misses it."""
    monkeypatch.setattr(releases, "LOADING", 1.0)
    monkeypatch.setattr(releases, "ALIVE", 0.3)
    store.beat("node", "worker-1", [loaded(1)])
    with pytest.raises(ServeRefusal, match="worker-1 of node has not loaded v2"):
        begin(store, "v2", "at_once")
    with pytest.raises(ServeRefusal, match="no worker is alive"):
        begin(store, "v2", "canary")
    assert set(plan(store).versions) == {"v1"}
    assert VersionCatalogue(store).read("heart").staged == ()


def test_the_first_version_of_a_model_answers_once_it_is_loaded(store, monkeypatch):
    monkeypatch.setattr(releases, "LOADING", 0.3)
    VersionCatalogue(store).add("new", "v1", "9" * 64, "run", "ann")
    with pytest.raises(ServeRefusal, match="has not loaded v1"):
        releases.begin(store, "new", "v1", SETTINGS, "canary", "ann")
    assert read_plan(store, "new") is None
    store.beat("node", "worker-1", [in_memory("new", "v1", "9" * 64)])
    found = releases.begin(store, "new", "v1", SETTINGS, "canary", "ann")
    assert (found["says"], found["decision"]["by"]) == ("v1 answers", "ann")


def test_what_is_being_loaded_for_one_is_not_removed_by_another(store, monkeypatch):
    monkeypatch.setattr(releases, "LOADING", 1.0)
    store.beat("node", "worker-1", [loaded(1)])
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(begin, store, "v2", "at_once")
        while VersionCatalogue(store).read("heart").staged != ("v2",):
            time.sleep(0.01)
        for other in (lambda: begin(store, "v3", "at_once"), lambda: releases.remove(store, "heart", "v2", "ann")):
            with pytest.raises(ServeRefusal) as refused:
                other()
            assert refused.value.code == "conflict"
        store.beat("node", "worker-1", [loaded(1), loaded(2)])
        assert loading.result()["says"] == "v2 answers"
