"""What settings say of releases and breakers is what is done: real routers, store and controllers; made traffic."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedclaw.serve import releases
from fedclaw.serve.routing.plan import BreakerPolicy, Guards
from fedclaw.serve.settings import ReleaseSettings
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.version_catalogue import VersionCatalogue, in_memory
from tests.serve.routing.conftest import Clock
from tests.serve.routing.traffic import Behaviour, Town

GOOD = Behaviour(errors=0.001)
LATENCIES_APART = {"median_margin": 0.9, "tail_margin": 0.9}
MakeTown = Callable[..., Town]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    """A model `m` of two versions, which one worker has in memory."""
    with StateStore.open(f"sqlite:///{tmp_path / 'state.db'}") as opened:
        for number in (1, 2):
            VersionCatalogue(opened).add("m", f"v{number}", f"{number}" * 64, "run", "ann")
        yield opened


@pytest.fixture
def town(store: StateStore) -> MakeTown:
    def make(candidate: Behaviour, **more: float) -> Town:
        clock = Clock(time.time())
        releases.first_release(store, "m", "v1")
        made = Town(store, clock, clock.advance, {"v1": GOOD, "v2": candidate}, **more)
        made.run(2)
        return made

    return make


def begin(store: StateStore, settings: ReleaseSettings, mode: str = "canary") -> None:
    store.beat("node", "worker-1", [in_memory("m", f"v{number}", f"{number}" * 64) for number in (1, 2)])
    releases.begin(store, "m", "v2", settings, mode, "ann")


def test_a_canary_takes_the_steps_that_are_set(store: StateStore, town: MakeTown):
    made = town(GOOD, rate=600.0)
    guards = Guards(least_keys=30, error_margin=0.1, bake=3.0, **LATENCIES_APART)
    begin(store, ReleaseSettings(steps=(0.3, 0.6, 1.0), guards=guards))
    shares: list[float] = []
    while made.plan.mode == "canary" and len(shares) < 60:
        shares.append(made.plan.share)
        made.run(1)
    assert list(dict.fromkeys(shares)) == [0.3, 0.6, 1.0]
    assert 3 <= shares.count(1.0) <= 5
    assert made.plan.stable == "v2"


@pytest.mark.parametrize(("margin", "kind"), [(0.01, "canary_rolled_back"), (0.3, "canary_promoted")])
def test_guards_roll_back_by_the_margins_that_are_set(store: StateStore, town: MakeTown, margin: float, kind: str):
    made = town(Behaviour(errors=0.12), rate=600.0)
    guards = Guards(error_margin=margin, least_keys=30, bake=1.0, **LATENCIES_APART)
    begin(store, ReleaseSettings(steps=(0.5, 1.0), guards=guards))
    made.run(60, lambda: made.plan.mode == "single")
    assert made.kinds[-1] == kind


def test_a_shadow_that_a_person_approves_of_takes_the_steps_that_are_set(store: StateStore, town: MakeTown):
    made = town(GOOD)
    begin(store, ReleaseSettings(approval="manual", steps=(0.4, 1.0), guards=Guards(alpha=0.01)))
    assert (made.plan.mode, made.plan.guards.alpha) == ("shadow", 0.01)
    releases.operate(store, "m", "approve", {}, "bob")
    assert (made.plan.mode, made.plan.share, made.plan.guards.alpha) == ("canary", 0.4, 0.01)


def test_a_changed_setting_holds_from_the_next_release_on(store: StateStore, town: MakeTown):
    made = town(GOOD)
    begin(store, ReleaseSettings(steps=(0.4, 1.0), guards=Guards(least_keys=7)))
    before = made.plan
    releases.operate(store, "m", "roll_back", {}, "bob")
    assert made.plan.steps == before.steps
    begin(store, ReleaseSettings())
    assert (made.plan.steps, made.plan.guards) == (ReleaseSettings().steps, ReleaseSettings().guards)


@pytest.mark.parametrize(("threshold", "opens"), [(0.05, True), (0.5, False)])
def test_a_breaker_opens_as_is_set_also_for_a_model_that_is_there(
    store: StateStore, town: MakeTown, threshold: float, opens: bool
):
    made = town(GOOD, rate=200.0)
    releases.configure_breakers(store, BreakerPolicy(threshold=threshold))
    made.versions = {"v1": Behaviour(errors=0.2)}
    made.run(4)
    assert ("breaker_open" in made.kinds) == opens


def test_a_breaker_that_is_set_anew_leaves_a_canary_and_the_last_decision_as_they_are(
    store: StateStore, town: MakeTown
):
    made = town(GOOD)
    begin(store, ReleaseSettings())
    before = made.plan
    policy = BreakerPolicy(window=30)
    releases.configure_breakers(store, policy)
    releases.configure_breakers(store, policy)
    assert made.plan == before.model_copy(update={"breaker": policy})
    assert made.kinds == ["first_version", "canary_started", "breaker_policy"]


def test_the_first_version_of_a_model_that_is_published_has_the_breaker_that_is_set(store: StateStore):
    store.beat("node", "worker-1", [in_memory("m", f"v{number}", f"{number}" * 64) for number in (1, 2)])
    releases.begin(store, "m", "v1", ReleaseSettings(), "canary", "ann", BreakerPolicy(probes=2))
    described = releases.describe(store, "m")
    assert described["plan"]["breaker"]["probes"] == 2
