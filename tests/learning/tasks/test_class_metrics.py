"""The metrics against scikit-learn, ties and absent classes included."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as oracle

from fedclaw.clients.vision import VisionWorkload
from fedclaw.clients.vision_schema import VisionSchema
from fedclaw.learning.tasks import classification as metrics
from fedclaw.learning.tasks.classification import METRICS


@st.composite
def labelled_logits(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Logits with many ties, and targets in which classes may be absent."""
    classes = draw(st.integers(2, 5))
    count = draw(st.integers(1, 25))
    logits = draw(hnp.arrays(np.float64, (count, classes), elements=st.integers(-3, 3).map(float)))
    targets = draw(hnp.arrays(np.int64, count, elements=st.integers(0, classes - 1)))
    return logits, targets


@settings(deadline=None, max_examples=80)
@given(labelled_logits())
def test_against_scikit_learn(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, targets = case
    classes = logits.shape[1]
    found = metrics.classification(logits, targets)
    predicted = logits.argmax(axis=1)
    average = "binary" if classes == 2 else "macro"
    want = {
        "loss": oracle.log_loss(targets, np.exp(metrics.log_softmax(logits)), labels=range(classes)),
        "accuracy": oracle.accuracy_score(targets, predicted),
        "precision": oracle.precision_score(targets, predicted, average=average, zero_division=0),
        "recall": oracle.recall_score(targets, predicted, average=average, zero_division=0),
        "f1": oracle.f1_score(targets, predicted, average=average, zero_division=0),
    }
    if len(set(targets.tolist())) == classes:
        scores = metrics.log_softmax(logits)
        if classes == 2:
            want["auroc"] = oracle.roc_auc_score(targets, scores[:, 1] - scores[:, 0])
        else:
            each = [oracle.roc_auc_score(targets == c, scores[:, c]) for c in range(classes)]
            want["auroc"] = float(np.mean(each))
    assert found == pytest.approx(want, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float64, st.integers(2, 40), elements=st.floats(-5, 5) | st.sampled_from([0.0, 1.0])),
    st.randoms(use_true_random=False),
)
def test_binary_auroc_against_scikit_learn_and_counting(scores: np.ndarray, random) -> None:
    positive = np.array([random.random() < 0.5 for _ in scores])
    positive[0], positive[1] = True, False
    wins = [(s > t) + 0.5 * (s == t) for s in scores[positive] for t in scores[~positive]]
    assert metrics.binary_auroc(scores, positive) == pytest.approx(np.mean(wins), abs=1e-9)
    assert metrics.binary_auroc(scores, positive) == pytest.approx(oracle.roc_auc_score(positive, scores), abs=1e-9)


def test_two_classes_by_hand() -> None:
    # the last class is positive: predictions 1 1 0 0 1, targets 1 0 1 0 1
    logits = np.array([[0.0, 2], [0, 1], [1, 0], [3, 0], [0, 3]])
    found = metrics.classification(logits, np.array([1, 0, 1, 0, 1]))
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["auroc"] == pytest.approx(5 / 6)  # only (-1 of class 1, 1 of class 0) is the wrong way round
    turned = metrics.classification(logits[:, ::-1], np.array([0, 1, 0, 1, 0]))
    assert turned["precision"] == pytest.approx(1 / 2)


def test_what_is_undefined_is_left_out() -> None:
    assert metrics.classification(np.zeros((0, 3)), np.zeros(0, np.int64)) == {}
    one_class = metrics.classification(np.eye(3)[[0, 1]], np.array([0, 1]))
    assert set(one_class) == set(METRICS) - {"auroc"}
    diverged = metrics.classification(np.array([[math.nan, 0.0], [0.0, 1.0]]), np.array([0, 1]))
    assert "loss" not in diverged
    assert "auroc" not in diverged
    assert all(math.isfinite(value) for value in diverged.values())


def test_confident_logits_neither_overflow_nor_tie() -> None:
    """In float32 the softmax of 40 and of 60 are both exactly 1; their order must still count."""
    logits = np.array([[0.0, 60.0], [0.0, 40.0], [1000.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.classification(logits, np.array([1, 0, 0]))
    assert found["auroc"] == 1.0
    assert found["loss"] == pytest.approx(40 / 3)


def test_a_workload_reports_the_names_of_the_plan() -> None:
    workload = VisionWorkload(VisionSchema.parse("{shape: [1, 2, 2], labels: [a, b]}", "s"))
    logits = torch.randn(8, 2, requires_grad=True)
    targets = torch.tensor([0, 1] * 4)
    found = workload.evaluate(logits, targets)
    assert tuple(found) == METRICS
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert workload.loss(logits, targets).item() == pytest.approx(found["loss"], rel=1e-5)
