"""Figures of feedback, worked out by hand, and held against scikit-learn's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fedclaw.compress.intervals import of_proportion
from fedclaw.serve.state.store import Feedback, StateStore
from fedclaw.serve.state.windows import MOST_CLASSES, VersionFigures, WindowFigure, figures_of, windows


def said(*bodies: dict[str, Any]) -> list[Feedback]:
    return [Feedback(str(number), "m", "v", 0.0, body) for number, body in enumerate(bodies)]


def labelled(predicted: Sequence[str | None], truth: Sequence[str | None]) -> list[Feedback]:
    return said({"predicted": list(predicted), "truth": list(truth)})


def value(figure: WindowFigure | None) -> float:
    assert figure is not None
    return figure.value


def test_two_classes_by_hand():
    # Of the positive: 3 hits, 1 false alarm, 2 missed; 4 rightly not.
    feedback = labelled(["y"] * 4 + ["n"] * 6, ["y", "y", "y", "n", "y", "y", "n", "n", "n", "n"])
    found = figures_of(feedback, ["n", "y"])
    assert found.positive == "y"
    assert value(found.accuracy) == pytest.approx(0.7)
    assert value(found.precision) == pytest.approx(3 / 4)
    assert value(found.recall) == pytest.approx(3 / 5)
    assert value(found.f1) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert value(found.false_positive_rate) == pytest.approx(1 / 5)
    assert found.accuracy is not None
    interval = of_proportion(7, 10)
    assert (found.accuracy.count, found.accuracy.low, found.accuracy.high) == (10, interval.low, interval.high)
    assert value(found.classes["n"].false_positive_rate) == pytest.approx(2 / 5)
    assert found.classes["n"].support == 5
    assert found.metrics().f1 == value(found.f1)


def test_several_classes_are_as_scikit_learn_has_them():
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    random = np.random.default_rng(5)
    truth = random.choice(["a", "b", "c", "d"], 500, p=[0.5, 0.3, 0.15, 0.05])
    predicted = np.where(random.random(500) < 0.7, truth, random.choice(["a", "b", "c", "d"], 500))
    found = figures_of(labelled(predicted.tolist(), truth.tolist()))
    precision, recall, f1, support = precision_recall_fscore_support(truth, predicted, labels=["a", "b", "c", "d"])
    table = confusion_matrix(truth, predicted, labels=["a", "b", "c", "d"])
    for place, name in enumerate("abcd"):
        figures = found.classes[name]
        assert value(figures.precision) == pytest.approx(precision[place])
        assert value(figures.recall) == pytest.approx(recall[place])
        assert value(figures.f1) == pytest.approx(f1[place])
        false = table[:, place].sum() - table[place, place]
        assert value(figures.false_positive_rate) == pytest.approx(false / (500 - support[place]))
        assert figures.support == support[place]
    assert value(found.accuracy) == pytest.approx(accuracy_score(truth, predicted))
    assert (value(found.f1), value(found.recall)) == (pytest.approx(f1.mean()), pytest.approx(recall.mean()))


def test_the_intervals_hold_what_they_should_as_often_as_they_say():
    random = np.random.default_rng(7)
    held = {"accuracy": 0, "f1": 0, "mae": 0, "rmse": 0}
    runs, rows = 400, 150
    # Positives are 0.4 of all, hit with 0.8; a false alarm comes with 0.1.
    exact = {"accuracy": 0.4 * 0.8 + 0.6 * 0.9, "f1": 2 * 0.32 / (2 * 0.32 + 0.06 + 0.08)}
    exact |= {"mae": float(np.sqrt(2 / np.pi)), "rmse": 1.0}
    for _ in range(runs):
        truth = random.random(rows) < 0.4
        predicted = random.random(rows) < np.where(truth, 0.8, 0.1)
        names = np.array(["n", "y"])
        found = figures_of(labelled(names[predicted * 1].tolist(), names[truth * 1].tolist()), ["n", "y"])
        numbers = figures_of(said({"predicted": random.normal(size=rows).tolist(), "truth": [0.0] * rows}))
        for name, figure in (
            ("accuracy", found.accuracy),
            ("f1", found.f1),
            ("mae", numbers.mae),
            ("rmse", numbers.rmse),
        ):
            assert figure is not None
            assert figure.low is not None
            assert figure.high is not None
            held[name] += figure.low <= exact[name] <= figure.high
    # 0.95 of 400, with four deviations of 4.4 to either side.
    assert all(362 <= count <= 397 for count in held.values()), held


def test_rows_without_a_truth_or_a_prediction_do_not_count():
    found = figures_of(labelled(["a", None, "b", "b"], ["a", "a", None, "a"]))
    assert found.accuracy is not None
    assert (found.accuracy.value, found.accuracy.count) == (0.5, 2)
    assert found.classes["b"].recall is None
    assert found.classes["a"].false_positive_rate is None


def test_numbers_by_hand():
    found = figures_of(said({"predicted": [1.0, 5.0], "truth": [2.0, 5.0]}, {"predicted": [0.0], "truth": [-3.0]}))
    assert value(found.mae) == pytest.approx(4 / 3)
    assert value(found.rmse) == pytest.approx((10 / 3) ** 0.5)
    assert found.accuracy is None
    alone = figures_of(said({"predicted": [1.0], "truth": [3.0]}))
    assert (alone.mae, alone.rmse) == (WindowFigure(2.0, 1), WindowFigure(2.0, 1))


def test_completion_satisfaction_and_reward_by_hand():
    found = figures_of(
        said(
            {"completed": True, "satisfied": True, "score": 5, "reward": 1.0},
            {"completed": False, "satisfied": False, "score": 2, "reward": 0.5},
            {"completed": True, "satisfied": True},
        )
    )
    assert value(found.completion) == pytest.approx(2 / 3)
    assert value(found.satisfaction) == pytest.approx(2 / 3)
    assert value(found.score) == pytest.approx(3.5)
    assert value(found.reward) == pytest.approx(0.75)
    assert found.feedback == 3


def test_nothing_said_is_nothing_known():
    assert figures_of([]) == VersionFigures(feedback=0)
    assert figures_of(said({}, {"predicted": [], "truth": []})) == VersionFigures(feedback=2)
    assert (
        figures_of(said({"predicted": "x", "truth": 5, "reward": "x"}, {"predicted": ["a"], "truth": [1.0]})).reward
        is None
    )


def test_a_client_does_not_make_up_as_many_classes_as_it_likes():
    feedback = labelled([*["a"] * 500, *["b"] * 500], [f"made up {number}" for number in range(1000)])
    assert len(figures_of(feedback).classes) == MOST_CLASSES
    assert {"a", "b"} <= set(figures_of(feedback).classes)
    assert sorted(figures_of(feedback, ["a", "b", "c"]).classes) == ["a", "b", "c"]


def test_windows_are_of_each_version_and_end_where_they_should(store: StateStore):
    for number in range(6):
        store.credit(f"r{number}", "m", "v1" if number % 2 else "v2", {"reward": number / 10})
    store.credit("other", "n", "v1", {"reward": 1.0})
    found = windows(store, "m")
    assert sorted(found) == ["v1", "v2"]
    assert value(found["v1"].reward) == pytest.approx(0.3)
    last = windows(store, "m", seconds=None, last=2)
    assert [value(last[version].reward) for version in ("v1", "v2")] == [pytest.approx(0.5), pytest.approx(0.4)]
    assert windows(store, "m", seconds=-60) == {}
    assert windows(store, "none") == {}
