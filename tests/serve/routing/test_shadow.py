"""What two versions answered is compared row by row, and a mirror costs the answer nothing."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from fedclaw.serve.requests import InferenceResponse
from fedclaw.serve.routing.controller import add_version, approve, start_shadow
from fedclaw.serve.routing.shadow import Mirror, OutputComparison, compare
from fedclaw.serve.state.store import StateStore
from tests.serve.routing.conftest import Clock
from tests.serve.routing.traffic import Behaviour, Town


def answer(labels: list[str], high: list[float], refused: list[bool] | None = None) -> InferenceResponse:
    outputs = {
        "label": np.array(labels, object)[:, None],
        "probabilities": np.array([[p, 1 - p] for p in high], np.float32),
        "refused": np.array(refused or [False] * len(labels))[:, None],
    }
    return InferenceResponse("m", "v", "1", outputs)


ANSWER = answer(["a", "b", "a", ""], [0.9, 0.2, 0.7, np.nan], [False, False, False, True])


def test_the_same_answers_agree():
    assert compare(ANSWER, ANSWER, 0.5) == OutputComparison(4, 0, 0, 0.0, agrees=True)


@pytest.mark.parametrize("row", range(4))
def test_each_difference_is_counted_and_the_drawn_row_decides(row: int):
    other = answer(["a", "a", "a", "b"], [0.9, 0.6, 0.65, 0.1])
    found = compare(ANSWER, other, row / 4)
    assert (found.rows, found.labels_differ, found.refused_differ) == (4, 1, 1)
    assert found.largest_difference == pytest.approx(0.4)
    assert found.agrees is (row in (0, 2))
    assert compare(other, ANSWER, row / 4) == found


def test_values_agree_within_a_tolerance():
    def values(*numbers: float) -> InferenceResponse:
        return InferenceResponse("m", "v", "1", {"values": np.array(numbers, np.float32)[:, None]})

    assert compare(values(1.0, 2.0), values(1.0005, 2.0), 0.0, 1e-3).agrees
    assert not compare(values(1.0, 2.0), values(1.1, 2.0), 0.0, 1e-3).agrees
    assert compare(values(1.0, 2.0), values(1.1, 2.0), 0.6, 1e-3).agrees
    assert compare(values(1.0, 2.0), values(9.0, 2.0), 0.0).agrees
    assert not compare(values(1.0), values(np.nan), 0.0).agrees
    assert compare(values(1.0), values(np.nan), 0.0).largest_difference == np.inf


def test_without_labels_the_likeliest_class_decides():
    def likely(*high: float) -> InferenceResponse:
        return InferenceResponse("m", "v", "1", {"probabilities": np.array([[p, 1 - p] for p in high], np.float32)})

    found = compare(likely(0.9, 0.4), likely(0.6, 0.7), 0.0)
    assert found.agrees
    assert found.labels_differ == 1
    assert not compare(likely(0.9, 0.4), likely(0.6, 0.7), 0.5).agrees


def test_other_outputs_agree_nowhere():
    other = InferenceResponse("m", "v", "1", {"values": np.zeros((4, 1), np.float32)})
    fewer = answer(["a"], [0.9])
    for one in (other, fewer):
        assert not compare(ANSWER, one, 0.0).agrees
    wider = InferenceResponse("m", "v", "1", {**ANSWER.outputs, "probabilities": np.zeros((4, 3), np.float32)})
    assert compare(ANSWER, wider, 0.0).largest_difference == np.inf


def test_no_rows_agree():
    assert compare(answer([], []), answer([], []), 0.99).agrees


def test_mirrors_never_wait_and_never_fail_anything():
    async def main() -> None:
        mirror, release, done = Mirror(limit=3), asyncio.Event(), []

        async def ask() -> None:
            await release.wait()
            done.append(1)
            raise RuntimeError("the other version fails")

        assert [mirror.send(ask) for _ in range(5)] == [True, True, True, False, False]
        assert (mirror.at_work, mirror.dropped, done) == (3, 2, [])
        release.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert (mirror.at_work, len(done)) == (0, 3)
        release.clear()
        assert mirror.send(ask)
        await mirror.close()
        assert mirror.at_work == 0

    asyncio.run(main())


Shadowed = Callable[..., Town]


@pytest.fixture
def shadowed(store: StateStore, clock: Clock) -> Shadowed:
    def make(disagrees: float, **options: object) -> Town:
        add_version(store, "m", "v1", "ann", clock())
        start_shadow(store, "m", "v2", "ann", clock(), guards={"disagreement": 0.02}, **options)
        versions = {"v1": Behaviour(), "v2": Behaviour(disagrees=disagrees, errors=1.0)}
        return Town(store, clock, clock.advance, versions, rate=200.0)

    return make


def test_a_shadow_that_agrees_waits_for_a_persons_word(shadowed: Shadowed, store: StateStore, clock: Clock):
    town = shadowed(0.001)
    town.run(20, lambda: town.plan.waiting)
    town.run(3)
    assert town.kinds == ["first_version", "shadow_started", "shadow_agrees"]
    assert town.plan.mode == "shadow"
    assert set(town.answered) == {"v1"}
    approve(store, "m", "bob", clock())
    assert (town.plan.mode, town.plan.candidate, town.plan.share) == ("canary", "v2", 0.05)


def test_a_shadow_goes_on_by_itself_where_that_is_wanted(shadowed: Shadowed):
    town = shadowed(0.001, promote=True)
    town.run(20, lambda: town.plan.mode == "canary")
    assert town.kinds[-1] == "canary_started"


def test_a_shadow_that_differs_is_ended(shadowed: Shadowed):
    town = shadowed(0.1, promote=True)
    town.run(30, lambda: town.plan.mode == "single")
    assert town.kinds[-1] == "shadow_differs"
    assert set(town.answered) == {"v1"}
