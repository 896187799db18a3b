"""A key of an experiment has one version, whoever asks, and whether or not the store is there."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from threading import Thread

from fedclaw.serve.requests import VersionChoice
from fedclaw.serve.routing.choosing import VersionChooser
from fedclaw.serve.routing.key_assignments import KeyAssignments
from fedclaw.serve.routing.plan import RoutingPlan, StoredPlan, plan_name
from fedclaw.serve.routing.router import Router
from fedclaw.serve.state.store import StateStore, StateUnavailable
from tests.chance import counts_fit
from tests.serve.routing.conftest import Away, Clock
from tests.serve.state.race import assigned

Put = Callable[..., RoutingPlan]
KEYS = [f"key-{number}" for number in range(1_500)]


def test_an_experiment_assigns_a_key_once_whichever_worker_asks(store: StateStore, put: Put, clock: Clock):
    put(mode="ab", arms=("v1", "v2", "v3"), propensities=(0.2, 0.5, 0.3))
    left, right = Router(store, clock), Router(store, clock)
    left.start()
    right.start()

    async def assign(router: Router) -> list[VersionChoice]:
        return list(await asyncio.gather(*(router.assign("m", key) for key in KEYS)))

    try:
        assert left.choose("m", KEYS[0]) is None
        first = asyncio.run(assign(left))
        counted = Counter(one.version for one in first)
        for version, propensity in (("v1", 0.2), ("v2", 0.5), ("v3", 0.3)):
            assert counts_fit([counted[version]], len(KEYS), propensity)
            assert {one.propensity for one in first if one.version == version} == {propensity}
        found = store.read(plan_name("m"))
        assert found is not None
        plan = left.plan("m")
        assert plan is not None
        moved = plan.model_copy(update={"propensities": (0.9, 0.05, 0.05)})
        assert store.swap(plan_name("m"), found[0], moved.document())
        right.refresh()
        assert asyncio.run(assign(right)) == first
        assert [right.choose("m", key) for key in KEYS] == first
    finally:
        left.close()
        right.close()


def test_keys_are_assigned_while_the_store_is_away_and_told_to_it_later(store: StateStore, put: Put, clock: Clock):
    put(mode="ab", arms=("v1", "v2"), propensities=(0.5, 0.5))
    cut = Away(store)
    router = Router(cut, clock)
    router.start()
    try:
        cut.away = True
        drawn = asyncio.run(router.assign("m", "new"))
        assert router.choose("m", "new") == drawn
    finally:
        cut.away = False
        router.close()
    again = Router(store, clock)
    again.start()
    assert asyncio.run(again.assign("m", "new")) == drawn
    again.close()
    plan = again.plan("m")
    assert plan is not None
    assert assigned(store, plan.assignment_scope, "new", "other").split()[0] == drawn.version


def test_a_key_that_is_drawn_while_others_are_confirmed_is_told_to_the_store_too(put: Put, clock: Clock):
    plan = put(mode="ab", arms=("v1", "v2"), propensities=(0.5, 0.5))
    told: list[str] = []

    class Flickering:
        """Away for whoever asks for a version; while it confirms, it is asked."""

        def assign_all(self, model: str, versions: Mapping[str, str]) -> dict[str, str]:
            if not confirming:
                raise StateUnavailable("cut off")
            confirming.clear()
            if not told:
                asyncio.run(assignments.ask("m", "late"))
            told.extend(versions)
            return dict(versions)

    confirming: list[bool] = []
    chooser = VersionChooser(StoredPlan(1, plan), {}, clock)
    assignments = KeyAssignments(Flickering(), {"m": chooser}, lambda _model, _key: None)
    thread = Thread(target=assignments.work)
    thread.start()
    try:
        asyncio.run(assignments.ask("m", "soon"))
        for _ in range(2):
            confirming.append(True)
            assignments.confirm()
    finally:
        assignments.stop()
        thread.join()
    assert told == ["soon", "late"]
