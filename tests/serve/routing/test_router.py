"""Which version answers whom, what is counted of it, and what goes on while the state store is away."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from fedclaw.serve.refusals import STATUS, Code, ServeRefusal
from fedclaw.serve.requests import VersionChoice
from fedclaw.serve.routing.controller import add_version, approve, roll_back, start_canary
from fedclaw.serve.routing.counting import bucket_of, calls_by_group, group_of
from fedclaw.serve.routing.plan import BreakerState, RoutingPlan, plan_name
from fedclaw.serve.routing.router import SETTLE, Router
from fedclaw.serve.state.store import StateStore, StateUnavailable
from tests.chance import counts_fit
from tests.serve.routing.conftest import Away, Clock

Put = Callable[..., RoutingPlan]
KEYS = [f"key-{number}" for number in range(1_500)]


def versions(router: Router, keys: Iterable[str] = KEYS) -> list[str]:
    return [chosen(router, key).version for key in keys]


def chosen(router: Router, key: str, principal: str = "p") -> VersionChoice:
    choice = router.choose("m", key, principal=principal)
    assert choice is not None
    return choice


def record(
    router: Router, version: str, key: str, *, code: Code | None = None, principal: str = "p", **more: Any
) -> None:
    choice = VersionChoice(version, more.pop("propensity", 1.0))
    router.record(choice, model="m", key=key, principal=principal, seconds=more.pop("seconds", 0.001), code=code)


@contextmanager
def refused(code: Code) -> Iterator[pytest.ExceptionInfo[ServeRefusal]]:
    with pytest.raises(ServeRefusal) as error:
        yield error
    assert error.value.code == code


def test_one_version_answers_all(router: Router, put: Put):
    put()
    router.refresh()
    assert chosen(router, "k") == VersionChoice("v1")
    assert router.models == ("m",)


def started_canary(store: StateStore, clock: Clock, workers: int = 2) -> list[Router]:
    """Routers that have just read that a canary begins."""
    add_version(store, "m", "v1", "ann", clock())
    routers = [Router(store, clock) for _ in range(workers)]
    for router in routers:
        router.refresh()
    start_canary(store, "m", "v2", "ann", clock())
    return routers


def test_workers_go_by_a_growing_canary_at_the_same_moment_whenever_they_read_of_it(store: StateStore, clock: Clock):
    left, right = started_canary(store, clock)
    seen: list[list[str]] = []
    for share in (0.05, 0.1):
        left.refresh()
        for moment in range(8):
            if moment == 3:
                right.refresh()
            assert versions(left) == versions(right)
            seen.append(versions(left))
            clock.advance(SETTLE / 6)
        choice = next(choice for key in KEYS if (choice := chosen(right, key)).version == "v2")
        assert choice.propensity == share
        assert right.plan("m") == left.plan("m")
        left.refresh()
        right.refresh()
        assert versions(left) == versions(right) == seen[-1]
        approve(store, "m", "ann", clock(), early=True)
    for before, after in pairwise(seen):
        assert all(old == new or (old, new) == ("v1", "v2") for old, new in zip(before, after, strict=True))
    assert Counter(seen[0])["v2"] == 0 < Counter(seen[8])["v2"] < Counter(seen[-1])["v2"]


def test_two_steps_within_a_second_are_gone_by_one_after_the_other(store: StateStore, clock: Clock):
    left, right = started_canary(store, clock)
    left.refresh()
    clock.advance(SETTLE / 2)
    approve(store, "m", "ann", clock(), early=True)
    left.refresh()
    right.refresh()
    assert set(versions(left)) == set(versions(right)) == {"v1"}
    clock.advance(SETTLE / 2)
    assert left.plan("m").share == 0.05
    right.refresh()
    # A breaker of its own is no reason for a worker to fall behind.
    left._prepare_again(left._choosers["m"])
    assert left.plan("m").share == 0.05
    clock.advance(SETTLE / 2)
    assert left.plan("m").share == right.plan("m").share == 0.1
    assert versions(left) == versions(right)


def test_a_canary_that_is_rolled_back_gets_no_more_keys_at_once(store: StateStore, clock: Clock):
    (router,) = started_canary(store, clock, 1)
    router.refresh()
    clock.advance(SETTLE)
    assert "v2" in versions(router)
    approve(store, "m", "ann", clock(), early=True)
    router.refresh()
    roll_back(store, "m", "ann", clock())
    router.refresh()
    assert set(versions(router)) == {"v1"}
    clock.advance(10 * SETTLE)
    assert set(versions(router)) == {"v1"}


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_clock_that_is_wrong_does_not_make_a_canary_wait(store: StateStore, clock: Clock, skew: float):
    add_version(store, "m", "v1", "ann", clock())
    router = Router(store, clock)
    router.refresh()
    start_canary(store, "m", "v2", "ann", clock() + skew)
    for _ in range(5):
        router.refresh()
        clock.advance(SETTLE / 4)
    router.refresh()
    assert "v2" in versions(router)


def test_what_fails_here_before_a_canary_gets_its_keys_is_no_reason_to_forget_them(store: StateStore, clock: Clock):
    (router,) = started_canary(store, clock, 1)
    router.refresh()
    for number in range(100):
        record(router, "v1", f"k{number}", code="internal")
    with refused("unavailable"):
        chosen(router, "k")
    router.refresh()
    clock.advance(SETTLE)
    router.refresh()
    assert {router.choose("m", key, "v2").version for key in KEYS[:1]} == {"v2"}
    assert router.plan("m").candidate == "v2"


def test_a_canary_gets_its_share_of_keys_and_keeps_them_as_it_grows(router: Router, put: Put):
    plan = put(mode="canary", candidate="v2")
    router.refresh()
    first = versions(router)
    assert first == versions(router)
    assert counts_fit([Counter(first)["v2"]], len(KEYS), 0.05)
    assert {chosen(router, key).propensity for key in KEYS} == {0.05, 0.95}
    put(mode="canary", candidate="v2", step=2, salt=plan.salt)
    router.refresh()
    later = versions(router)
    assert counts_fit([Counter(later)["v2"]], len(KEYS), 0.25)
    assert all(after == "v2" for before, after in zip(first, later, strict=True) if before == "v2")
    put(mode="canary", candidate="v2", step=4, salt=plan.salt)
    router.refresh()
    assert set(versions(router)) == {"v2"}


def test_mirrors_see_a_share_of_the_keys_of_either_version(router: Router, put: Put):
    put(mode="canary", candidate="v2", step=3, mirror=0.2)
    router.refresh()
    choices = [chosen(router, key) for key in KEYS]
    assert {(one.version, one.mirrors) for one in choices} == {
        ("v1", ()), ("v1", ("v2",)), ("v2", ()), ("v2", ("v1",))
    }  # fmt: skip
    assert counts_fit([sum(bool(one.mirrors) for one in choices)], len(KEYS), 0.2)
    assert counts_fit(
        [sum(one.version == "v2" for one in choices if one.mirrors)], sum(bool(c.mirrors) for c in choices), 0.5
    )


def test_a_shadow_answers_nobody(router: Router, put: Put):
    put(mode="shadow", candidate="v2", mirror=1.0)
    router.refresh()
    assert {(one.version, one.mirrors) for one in (chosen(router, key) for key in KEYS)} == {("v1", ("v2",))}
    with refused("not_found"):
        router.choose("m", "k", "v2")


def test_a_client_may_insist_on_a_version_that_there_is(router: Router, put: Put):
    put(mode="canary", candidate="v2", last_good=("v0",))
    router.refresh()
    for version in ("v0", "v1", "v2"):
        assert router.choose("m", "k", version) == VersionChoice(version, 0.0)
    with refused("not_found") as error:
        router.choose("m", "k", "v9")
    assert "v9" in str(error.value)
    with refused("not_found"):
        router.choose("none", "k")


def test_only_the_versions_own_faults_are_errors(router: Router, put: Put, store: StateStore):
    put()
    router.refresh()
    for code in STATUS:
        record(router, "v1", "k", code=code)
    record(router, "v1", "k")
    router.push()
    counts = store.counts("m", 0)["v1"]
    faults = {"internal", "unavailable"}
    assert (counts["calls"], counts["errors"], counts["ignored"]) == (3, 2, len(STATUS.keys() - faults))


def test_counts_are_pushed_by_name_and_add_up(router: Router, put: Put, store: StateStore, clock: Clock):
    put()
    router.refresh()
    for principal, seconds, code in (("a", 0.002, None), ("a", 0.002, None), ("b", 0.5, None), ("b", 0.5, "internal")):
        record(router, "v1", "k", principal=principal, seconds=seconds, code=code)
    router.push()
    router.push()
    counts = store.counts("m", int(clock.now))["v1"]
    assert counts[f"l{bucket_of(0.002)}"] == 2
    assert counts[f"l{bucket_of(0.5)}"] == 1
    assert calls_by_group(counts) == {group_of("a"): (2, 0), group_of("b"): (2, 1)}
    assert store.counts("m", int(clock.now) + 1) == {}


def test_tests_count_a_key_once_whichever_worker_sees_it(store: StateStore, put: Put, clock: Clock):
    plan = put(mode="canary", candidate="v2", step=4, epoch=7)
    workers = [Router(store, clock) for _ in range(3)]
    for worker in workers:
        worker.refresh()
        for key in ("a", "b"):
            for _ in range(50):
                record(worker, "v2", key, code="internal")
        record(worker, "v2", "insisted", code="internal", propensity=0.0)
        record(worker, "v2", "client", code="bad_request")
        record(worker, "v2", "hung", code="deadline_exceeded", seconds=10.0)
        record(worker, "v2", "hasty", code="deadline_exceeded", seconds=0.001)
        worker.push()
    group = group_of("p")
    assert plan.test_scope == "m@7"
    assert store.counts("m@7", 0) == {"v2": {f"g{group}.keys": 3, f"g{group}.errors": 2, f"g{group}.l95": 1}}


def test_one_latency_of_a_version_and_few_keys_of_a_client_count_in_each_push(
    router: Router, put: Put, store: StateStore
):
    put(mode="canary", candidate="v2")
    router.refresh()
    for number in range(1, 4):
        for key in range(100):
            for version in ("v1", "v2"):
                record(router, version, f"{version}-{number}-{key}", seconds=1.0)
        router.push()
        group = group_of("p")
        counted = {f"g{group}.keys": 4 * number, f"g{group}.l{bucket_of(1.0)}": number}
        assert store.counts("m@0", 0) == {"v1": counted, "v2": counted}


def test_two_versions_that_are_alike_look_alike_whatever_their_shares_and_who_asks_when(
    router: Router, put: Put, store: StateStore
):
    """The canary has few keys, both are slow in busy hours, and requests of one of the clients fail at both."""
    put(mode="canary", candidate="v2")
    router.refresh()
    for number in range(40):
        busy = number % 2
        for client, stable, canary in (("a", 40, 2 * busy), ("b", 6, number % 3 == 0), ("c", 6, number % 5 == 0)):
            for key in range((1 + busy) * stable + canary):
                version = "v2" if key < canary else "v1"
                code: Code | None = "internal" if client == "a" else None
                seconds = 0.1 if busy else 0.01
                record(router, version, f"{number}-{key}-{client}", principal=client, seconds=seconds, code=code)
        router.push()
    counts = store.counts("m@0", 0)
    assert counts["v1"] == counts["v2"]
    assert counts["v2"][f"g{group_of('a')}.errors"] == 40
    assert sum(counts["v2"][f"g{group_of(client)}.keys"] for client in ("b", "c")) == 14 + 8


def test_a_key_waits_for_one_of_the_other_version_from_the_same_clients(router: Router, put: Put, store: StateStore):
    put(mode="canary", candidate="v2")
    router.refresh()
    assert group_of("p") != group_of("q")
    record(router, "v2", "one", code="internal")
    record(router, "v1", "other", principal="q")
    router.push()
    assert store.counts("m@0", 0) == {}
    record(router, "v1", "two")
    router.push()
    group = group_of("p")
    assert store.counts("m@0", 0) == {
        "v1": {f"g{group}.keys": 1},
        "v2": {f"g{group}.keys": 1, f"g{group}.errors": 1},
    }
    put(mode="canary", candidate="v2", epoch=1)
    router.refresh()
    record(router, "v2", "three", principal="q")
    router.push()
    assert store.counts("m@1", 0) == {}


def test_a_mirrored_request_counts_once_for_its_key(router: Router, put: Put, store: StateStore):
    put(mode="shadow", candidate="v2", mirror=1.0)
    router.refresh()
    for key, agrees in (("a", True), ("a", False), ("b", False), ("c", True)):
        router.record_comparison("m", "v2", key=key, principal="p", agrees=agrees)
    router.push()
    group = group_of("p")
    assert store.counts("m@0", 0) == {"v2": {f"g{group}.compared": 3, f"g{group}.disagreed": 1}}
    assert store.counts("m", 0)["v2"] == {"mirrored": 4, "mirror_disagreed": 2}


def test_routing_goes_on_while_the_store_is_away_and_no_count_is_lost(store: StateStore, put: Put, clock: Clock):
    put()
    cut = Away(store)
    router = Router(cut, clock)
    router.refresh()
    cut.away = True
    with pytest.raises(StateUnavailable):
        router.refresh()
    for _ in range(3):
        record(router, "v1", "k")
        with pytest.raises(StateUnavailable):
            router.push()
        clock.now += 1
    assert chosen(router, "k") == VersionChoice("v1")
    cut.away = False
    router.push()
    assert store.counts("m", 0)["v1"]["calls"] == 3


def test_a_plan_that_cannot_be_used_leaves_the_last_one_in_force(
    router: Router, put: Put, store: StateStore, caplog: pytest.LogCaptureFixture
):
    put()
    router.refresh()
    found = store.read(plan_name("m"))
    assert found is not None
    assert store.swap(plan_name("m"), found[0], {**found[1], "stable": "../v2"})
    router.refresh()
    router.refresh()
    assert chosen(router, "k") == VersionChoice("v1")
    assert [one.message.count("stable: String should match") for one in caplog.records] == [1]


def broken(state: str = "open", **fields: Any) -> BreakerState:
    return BreakerState.model_validate({"state": state, "epoch": 3, "since": 1_000_000.0, "wait": 5.0, **fields})


def test_the_last_good_version_stands_in_for_one_that_is_open(router: Router, put: Put):
    put(last_good=("v0",), breakers={"v1": broken()})
    router.refresh()
    assert chosen(router, "k") == VersionChoice("v0", 0.0)
    with refused("unavailable"):
        router.choose("m", "k", "v1")


def test_the_stable_version_stands_in_for_a_canary_or_an_arm(router: Router, put: Put):
    put(mode="canary", candidate="v2", step=4, breakers={"v2": broken()})
    router.refresh()
    assert set(versions(router)) == {"v1"}
    assert chosen(router, "k").propensity == 0.0


def test_nobody_answers_if_all_are_open_and_the_client_is_told_when_to_ask_again(
    router: Router, put: Put, clock: Clock
):
    put(last_good=("v0",), breakers={"v1": broken(), "v0": broken(wait=60.0)})
    router.refresh()
    clock.now += 2
    with refused("unavailable") as error:
        router.choose("m", "k")
    assert error.value.retry_after == 3.0
    assert error.value.status == 503


def test_a_half_open_version_gets_one_probe_a_second(router: Router, put: Put, store: StateStore, clock: Clock):
    put(last_good=("v0",), breakers={"v1": broken("half_open")})
    router.refresh()
    seen = Counter[str]()
    for _ in range(100):
        clock.now += 0.1
        choice = chosen(router, "k")
        seen[choice.version] += 1
        router.record(choice, model="m", key="k", principal="p", seconds=0.001)
    assert 9 <= seen["v1"] <= 11
    router.push()
    counts: Mapping[str, int] = store.counts("m", 0)["v1"]
    assert calls_by_group(counts, 3) == {group_of("p"): (seen["v1"], 0)}


def test_a_worker_opens_a_breaker_for_itself_at_once(router: Router, put: Put, clock: Clock):
    put(last_good=("v0",))
    router.refresh()
    failed = 0
    while chosen(router, "k").version == "v1":
        record(router, "v1", "k", code="internal")
        failed += 1
    assert failed == 20
    assert len(failures(router, 6, clock)) == 1  # A probe, when the wait is over.
    assert len(failures(router, 20, clock)) == 4 + 5  # Then the rest, and as many after twice the wait.
    for _ in range(30):
        clock.now += 1
        record(router, chosen(router, "k").version, "k")
        router.push()
    assert chosen(router, "k") == VersionChoice("v1")


def failures(router: Router, seconds: int, clock: Clock) -> list[str]:
    """Of four requests a second, those that `v1` answered: it fails."""
    found = []
    for _ in range(4 * seconds):
        clock.now += 0.25
        version = chosen(router, "k").version
        record(router, version, "k", code="internal" if version == "v1" else None)
        found += [version] if version == "v1" else []
        router.push()
    return found


def test_clients_faults_and_overload_open_nothing(router: Router, put: Put):
    put(last_good=("v0",))
    router.refresh()
    for number in range(1_000):
        for code in ("bad_request", "overloaded", "too_many_requests", "deadline_exceeded"):
            record(router, "v1", f"k{number}", code=code)
    assert chosen(router, "k") == VersionChoice("v1")


def test_one_client_alone_opens_a_breaker_for_itself(router: Router, put: Put):
    put(last_good=("v0",))
    router.refresh()
    for number in range(30):
        record(router, "v1", f"k{number}", principal=("north", "south")[number % 2])
    for number in range(3_000):
        record(router, "v1", f"k{number}", principal="hostile", code="internal")
    assert group_of("hostile") not in {group_of("north"), group_of("south"), group_of("new")}
    assert chosen(router, "k", "hostile") == VersionChoice("v0", 0.0)
    assert chosen(router, "k", "north") == chosen(router, "k", "new") == VersionChoice("v1")
    assert router.choose("m", "k", "v1", "north") == VersionChoice("v1", 0.0)
    with refused("unavailable"):
        router.choose("m", "k", "v1", "hostile")
