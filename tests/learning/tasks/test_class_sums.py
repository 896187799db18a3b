"""Figures over all sites' test examples: what one evaluation of them together gives, however they are spread."""

import math

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedclaw.errors import UpdateError
from fedclaw.learning.tasks import classification as metrics
from fedclaw.learning.tasks.class_sums import BINS, Pooled, area_of, counts_of, edges, histograms_of
from fedclaw.learning.tasks.classification import METRICS, Classification
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import pack_wire
from fedclaw.protocol.messages import SCORE_NOISE, SCORES
from fedclaw.protocol.terms import SCORE_HISTOGRAM, PrivacyRequest
from fedclaw.server.evaluation import EvaluationQuestion
from fedclaw.server.run_directory import SiteReceipt
from fedclaw.server.run_state import hopeless_noise
from fedclaw.site.evaluation import bounded_together, noised
from fedclaw.site.policy.policy import Policy
from tests.samples import plan_of, receipt, run_record

LABELS = ("a", "b", "c", "d", "e")


@st.composite
def sites(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logits with ties and targets of two to four sites; some have one class alone."""
    classes = draw(st.integers(2, 5))
    found = []
    for _ in range(draw(st.integers(2, 4))):
        count = draw(st.integers(1, 12))
        only = draw(st.none() | st.integers(0, classes - 1))
        logits = draw(hnp.arrays(np.float64, (count, classes), elements=st.integers(-3, 3).map(float)))
        labels = st.integers(0, classes - 1) if only is None else st.just(only)
        found.append((logits, draw(hnp.arrays(np.int64, count, elements=labels))))
    return found


def whole(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([logits for logits, _ in parts]), np.concatenate([targets for _, targets in parts])


@settings(deadline=None, max_examples=60)
@given(sites())
def test_ratios_are_those_of_all_examples_together(parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    logits, targets = whole(parts)
    classes = logits.shape[1]
    pooled = Pooled()
    for own, labels in parts:
        counts = counts_of(own.argmax(axis=1), labels, classes)
        pooled.add_counts({name: values.astype(float) for name, values in counts.items()}, len(labels))
    expected = metrics.classification(logits, targets)
    found = pooled.ratios()
    for name, value in found.items():
        assert value == pytest.approx(expected[name])
    for name in {"precision", "recall", "f1"} - found.keys():
        # Without a case, where an evaluation says 0.
        assert expected[name] == 0
    common, share = pooled.majority(LABELS[:classes])
    assert share == pytest.approx(np.bincount(targets).max() / len(targets))
    assert (targets == LABELS.index(common)).mean() == share


def exact_area(logits: np.ndarray, targets: np.ndarray) -> float | None:
    odds = [metrics.log_softmax(logits)] if logits.shape[1] > 2 else [logits]
    return metrics.auroc(odds[0], targets)


@settings(deadline=None, max_examples=60)
@given(
    parts=sites(),
    scale=st.sampled_from([0.0, 1e-6, 0.01, 1.0, 10.0, 1e3, 1e30]),
    shift=st.sampled_from([0.0, -4.0, 15.0]),
    bins=st.sampled_from([2, 16, BINS]),
)
def test_the_area_is_within_its_bound_of_the_exact_one(
    parts: list[tuple[np.ndarray, np.ndarray]], scale: float, shift: float, bins: int
) -> None:
    """Saturated, tied and constant scores among them."""
    logits, targets = whole(parts)
    logits = logits[:, :2] * scale
    logits[:, 1] += shift
    targets = np.minimum(targets, 1)
    total = sum(histograms_of(logits[i : i + 3], targets[i : i + 3], bins) for i in range(0, len(targets), 3))
    assert total.sum() == len(targets)
    area, exact = area_of(total), exact_area(logits, targets)
    assert (area is None) == (exact is None)
    if area is not None:
        assert abs(area.value - exact) <= area.bound + 1e-12
        assert area.noise == 0
        low, high = area.interval
        assert 0 <= low <= exact + 1e-12
        assert exact - 1e-12 <= high <= 1
        if scale == 0:
            assert (area.value, area.bound) == (0.5, 0.5)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize(("spread", "shift"), [(0.02, 0.0), (0.3, -4.0), (2.0, 0.0), (6.0, 2.0)])
def test_the_area_is_that_of_all_scores_within_two_thousandths(classes: int, spread: float, shift: float) -> None:
    """A model that has barely begun, one for rare positives, an ordinary one, a sure one."""
    random = np.random.default_rng(0)
    targets = random.integers(0, classes, 20_000)
    logits = random.normal(size=(len(targets), classes)) * spread
    logits[np.arange(len(targets)), targets] += 0.8 * spread
    logits[:, -1] += shift
    area = area_of(histograms_of(logits, targets, BINS))
    assert area is not None
    assert area.value == pytest.approx(exact_area(logits, targets), abs=0.002)
    assert area.bound < 0.05


def test_bins_are_open_at_the_ends_and_ascend() -> None:
    assert len(edges(BINS)) == BINS - 1
    assert (np.diff(edges(BINS)) > 0).all()
    logits = np.array([[0.0, math.inf], [0.0, -math.inf], [0.0, 1e300], [math.nan, 0.0]])
    found = histograms_of(logits, np.array([1, 1, 1, 1]), 8)
    np.testing.assert_array_equal(found[0, 1], [2, 0, 0, 0, 0, 0, 0, 2])


def policy(**changes: object) -> Policy:
    fields = {
        "workloads": ("tabular",),
        "strategies": ("fedavg",),
        "epsilon": 8.0,
        "metrics": ("accuracy", SCORE_HISTOGRAM),
        "metrics_epsilon": 2.0,
        "metrics_budget": {"epsilon": 50.0, "delta": 1e-5},
    }
    return Policy(**{**fields, **changes})


@settings(deadline=None, max_examples=40)
@given(sites())
def test_one_example_moves_each_histogram_by_one_in_one_cell(parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """So `bounded_together` counts them as sums in which one example adds at most 1."""
    logits, targets = whole(parts)
    moved = histograms_of(logits, targets, 16) - histograms_of(logits[1:], targets[1:], 16)
    rows = len(moved)
    assert rows == (1 if logits.shape[1] == 2 else logits.shape[1])
    assert float(np.square(moved).sum()) == rows
    task = Classification(tuple(map(str, range(logits.shape[1]))))
    sums = task.bounded(("accuracy",), 16, logits, targets, 5.0)
    assert list(sums) == ["accuracy", SCORES]
    assert bounded_together(sums).sensitivity == pytest.approx(math.sqrt(1 + rows))


def test_the_interval_holds_the_exact_area_in_95_of_100_cases() -> None:
    random = np.random.default_rng(1)
    targets = random.integers(0, 2, 4000)
    logits = np.stack([np.zeros(4000), random.normal(size=4000) + targets], 1)
    exact = exact_area(logits, targets)
    source, sums = GaussianSource(), Classification(("no", "yes")).bounded(("accuracy",), 64, logits, targets, 5.0)
    drawn = [noised(policy(), bounded_together(sums), len(targets), source).value for _ in range(1000)]
    areas = [area_of(found.arrays[SCORES], found.deviation**2) for found in drawn]
    inside = np.mean([low <= exact <= high for low, high in (area.interval for area in areas)])
    assert inside > 0.9
    # And it is not wide for nothing: what noise does is what it says.
    told = np.mean([area.noise for area in areas]) / 1.96
    assert told == pytest.approx(np.std([area.value for area in areas]), rel=0.2)


def answer(
    values: dict[str, float], counts: dict[str, list[float]], examples: int, scores: np.ndarray | None = None
) -> RecordDict:
    lists = {name: [float(count) for count in own] if isinstance(own, list) else own for name, own in counts.items()}
    record = MetricRecord({"weight": float(examples), "examples": examples, **values, **lists})
    content = RecordDict({"metrics": record, "about": ConfigRecord({"run": "r"})})
    if scores is not None:
        content[SCORES] = pack_wire({SCORES: scores})
        record[SCORE_NOISE] = 0.0
    return content


def evaluated(labels: tuple[str, ...] = ("no", "yes"), score_bins: int | None = None) -> EvaluationQuestion:
    plan = plan_of(run_record(metrics=METRICS, score_bins=score_bins))
    return EvaluationQuestion(plan, {}, Classification(labels))


def of_site(logits: np.ndarray, targets: np.ndarray) -> RecordDict:
    values = {name: value * len(targets) for name, value in metrics.classification(logits, targets).items()}
    counts = counts_of(logits.argmax(axis=1), targets, 2)
    return answer(values, {name: own.tolist() for name, own in counts.items()}, len(targets))


def test_a_site_without_positives_is_no_zero() -> None:
    """The one that has them all has found 39 of 40; the other has none to find."""
    positive = np.tile([0.0, 1.0], (40, 1))
    positive[0] = [1.0, 0.0]
    total = evaluated()
    total.add("north", of_site(positive, np.ones(40, np.int64)))
    total.add("south", of_site(np.tile([1.0, 0.0], (40, 1)), np.zeros(40, np.int64)))
    assert total.tally.metrics["recall"] == pytest.approx(39 / 40)
    assert total.tally.metrics["precision"] == 1
    assert total.tally.metrics["f1"] == pytest.approx(78 / 79)
    assert total.tally.over_sites["recall"] == {"mean": pytest.approx(39 / 40), "spread": 0.0, "sites": 1}
    assert total.tally.over_sites["accuracy"]["sites"] == 2
    assert total.tally.majority == ("no", 0.5)


def test_without_any_positive_there_is_no_recall() -> None:
    total = evaluated()
    total.add("south", of_site(np.tile([1.0, 0.0], (4, 1)), np.zeros(4, np.int64)))
    assert total.tally.metrics.keys() >= {"accuracy", "loss"}
    assert not total.tally.metrics.keys() & {"precision", "recall", "f1"}


def test_a_site_that_sends_no_counts_leaves_the_mean_over_sites() -> None:
    total = evaluated()
    total.add("new", of_site(np.eye(2), np.arange(2)))
    total.add("old", answer({"recall": 0.5 * 2, "accuracy": 0.5 * 2}, {}, 2))
    assert total.tally.metrics["recall"] == pytest.approx(0.75)
    alone = evaluated()
    alone.add("old", answer({"accuracy": 1.0}, {}, 2))
    assert alone.tally.metrics == {"accuracy": 0.5}
    assert alone.tally.majority is None


def test_the_area_over_sites_of_one_class_each() -> None:
    """Neither has an AUROC; both together have one."""
    total = evaluated(score_bins=64)
    for label in (0, 1):
        logits, targets = np.array([[0.0, 2.0 * label], [0.0, 2.0 * label - 1]]), np.full(2, label)
        total.add(str(label), answer({}, {}, 2, histograms_of(logits, targets, 64)))
    assert total.tally.metrics["auroc"] == pytest.approx(1.0)
    assert total.tally.area.bound == 0


GOOD = {"hits": [1, 2], "given": [2, 2], "asked": [1, 3]}


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"hits": [-1, 2]}, "whole numbers of at least 0"),
        ({"hits": [0.5, 2]}, "whole numbers of at least 0"),
        ({"hits": [1, 2, 0]}, "whole numbers of at least 0"),
        ({"asked": [1, 2]}, "do not add up to its 4 examples"),
        ({"given": [400, -396]}, "whole numbers"),
        ({"hits": [2, 2]}, "more hits of a class"),
        ({"hits": [0, 2]}, "accuracy is not that of the hits"),
        ({"given": [1e300, 0]}, "no number of examples"),
        ({"given": 4.0}, "no list"),
    ],
)
def test_counts_that_cannot_be_are_refused_and_leave_nothing_behind(counts: dict[str, list[float]], words: str) -> None:
    total = evaluated()
    with pytest.raises(UpdateError, match=words):
        total.add("liar", answer({"accuracy": 3.0}, {**GOOD, **counts}, 4))
    assert total.tally.metrics == {}
    total.add("honest", answer({"accuracy": 3.0}, GOOD, 4))
    assert total.examples == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda scores: scores - 1, "do not hold its 2 examples"),
        (lambda scores: scores * 2, "do not hold its 2 examples"),
        (lambda scores: scores + np.where(np.arange(64) == 0, math.nan, 0), "not finite"),
        (lambda scores: scores[:, :, :32], "has shape"),
        (lambda scores: scores.astype(np.float32), "cannot be read"),
    ],
)
def test_histograms_that_cannot_be_are_refused(change: object, words: str) -> None:
    total = evaluated(score_bins=64)
    scores = change(histograms_of(np.zeros((2, 2)), np.arange(2), 64))
    with pytest.raises(UpdateError, match=words):
        total.add("liar", answer({}, {}, 2, scores))
    assert total.tally.area is None


def test_more_than_two_classes_have_figures_each() -> None:
    total = evaluated(("a", "b", "c"))
    predicted, targets = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    counts = {name: own.tolist() for name, own in counts_of(predicted, targets, 3).items()}
    total.add("one", answer({"accuracy": 2.0}, counts, 4))
    assert total.tally.by_class["b"] == {"precision": 1.0, "recall": pytest.approx(1 / 3), "f1": pytest.approx(0.5)}
    assert "recall" not in total.tally.by_class["c"]
    assert total.tally.by_class["c"]["precision"] == 0


def test_a_model_that_learned_nothing_is_called_that() -> None:
    line = {"metrics": {"accuracy": 0.63}, "majority": {"label": "no", "accuracy": 0.63}}
    assert "does not beat the majority class" in Classification.nothing_learned(line)
    assert "'no' has 0.6300; by this measure it has learned nothing" in Classification.nothing_learned(line)
    ranked = {**line, "metrics": {"accuracy": 0.6, "auroc": 0.975}}
    assert "another decision threshold" in Classification.nothing_learned(ranked)
    assert Classification.nothing_learned({**line, "metrics": {"accuracy": 0.64}}) is None
    assert Classification.nothing_learned({"metrics": {"accuracy": 0.1}}) is None


@pytest.mark.parametrize(("multiplier", "hopeless"), [(1.0, False), (30.0, False), (5000.0, True)])
def test_noise_under_which_nothing_can_be_learned_is_called_that(multiplier: float, hopeless: bool) -> None:
    """16 of 160 examples a step, 10 steps in each of 4 rounds: 16 sqrt(40 x 2) / z deviations at two sites."""
    record = run_record(rounds=4, privacy=PrivacyRequest(epsilon=1, delta=1e-3, max_grad_norm=1))
    item = receipt(mechanism="dp-sgd", sample_rate=0.1, steps=10, noise_multiplier=multiplier)
    sites_ = {name: SiteReceipt(examples=160, receipt=item) for name in ("north", "south")}
    warning = hopeless_noise(record, sites_, 2)
    assert (warning is not None) == hopeless
    if warning:
        assert "nothing can be learned" in warning
