"""How well each version did of late, by the feedback within a window.

| figure | of what | interval (0.95) |
| --- | --- | --- |
| accuracy | rows with a known label | Wilson's |
| precision, recall, false-positive rate | rows predicted to be of a class, that are, that are not | Wilson's |
| F1 | rows predicted to be of a class or that are | Wilson's of F*, see below |
| macro averages | classes that have the figure, each with the same weight | none |
| MAE, RMSE, mean score | rows with a known value, feedback with a score | Student's, of the mean (square) |
| completion, satisfaction | feedback that said it | Wilson's |
| reward | feedback that has one | Wilson's, which is wider than needed where rewards lie between 0 and 1 |

F1 is no proportion, but F* = F1 / (2 - F1) = TP / (TP + FP + FN) is one, of the rows that count at all, and rises with
F1 (Hand, Christen, Kirielle 2021, "F*: an interpretable transformation of the F-measure", section 2): the ends of its
interval, turned back, are those of F1's.

All take rows for independent draws; several rows of a person are not, and intervals are then too narrow. And feedback
is what clients chose to send: where wrong answers get more of it, the figures are worse than the model.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fedclaw.compress.intervals import CONFIDENCE, of_proportion
from fedclaw.serve.monitoring.metrics import FeedbackFigures
from fedclaw.serve.state.store import Feedback, StateStore

MOST_FEEDBACK = 10_000
"""The newest of a window that are looked at."""
MOST_CLASSES = 50
"""Classes with figures of their own: a client's labels do not make up as many as it likes."""


@dataclass(frozen=True, slots=True)
class WindowFigure:
    """A figure, of how many, and between which ends it lies."""

    value: float
    count: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """Of one class against all others. None: no row could say it."""

    support: int
    """Rows that are of this class."""
    precision: WindowFigure | None
    recall: WindowFigure | None
    f1: WindowFigure | None
    false_positive_rate: WindowFigure | None


@dataclass(frozen=True, slots=True)
class VersionFigures:
    """What the feedback in a window says of one version. None: nothing was said of it."""

    feedback: int
    accuracy: WindowFigure | None = None
    classes: Mapping[str, ClassFigures] = field(default_factory=dict)
    """By class; of too many the most frequent."""
    positive: str | None = None
    """Of two classes, the one that precision, recall and the like of the model speak of."""
    precision: WindowFigure | None = None
    recall: WindowFigure | None = None
    f1: WindowFigure | None = None
    false_positive_rate: WindowFigure | None = None
    mae: WindowFigure | None = None
    rmse: WindowFigure | None = None
    completion: WindowFigure | None = None
    satisfaction: WindowFigure | None = None
    """Share of the satisfied."""
    score: WindowFigure | None = None
    """Mean of the scores from 1 to 5."""
    reward: WindowFigure | None = None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def metrics(self) -> FeedbackFigures:
        """For Prometheus."""
        names = ("accuracy", "precision", "recall", "f1", "false_positive_rate", "completion", "satisfaction")
        found: dict[str, WindowFigure | None] = {name: getattr(self, name) for name in names}
        return FeedbackFigures(
            outcomes=self.feedback, **{name: None if one is None else one.value for name, one in found.items()}
        )


def windows(
    store: StateStore,
    model: str,
    *,
    seconds: float | None = 3600.0,
    last: int = MOST_FEEDBACK,
    labels: Sequence[str] = (),
) -> dict[str, VersionFigures]:
    """By version, of the feedback of the last `seconds` (None: whenever), and of that the `last` pieces of the model.

    `labels` are the model's, in its order; of two, the second is the positive one. Raises StateUnavailable.
    """
    since = 0.0 if seconds is None else store.now() - seconds
    by_version: dict[str, list[Feedback]] = {}
    for one in store.feedback(model, since, min(last, MOST_FEEDBACK)):
        by_version.setdefault(one.version, []).append(one)
    return {version: figures_of(by_version[version], labels) for version in sorted(by_version)}


def figures_of(feedback: Sequence[Feedback], labels: Sequence[str] = ()) -> VersionFigures:
    """Of these pieces, all of one version."""
    bodies = [one.body for one in feedback]
    pairs = [pair for body in bodies for pair in _pairs(body)]
    named = [(said, true) for said, true in pairs if isinstance(said, str) and isinstance(true, str)]
    errors = [said - true for said, true in pairs if isinstance(said, float) and isinstance(true, float)]
    return VersionFigures(
        feedback=len(bodies),
        **_classified(Counter(named), labels),
        mae=_mean([abs(error) for error in errors]),
        rmse=_root(_mean([error * error for error in errors])),
        completion=_share(bodies, "completed"),
        satisfaction=_share(bodies, "satisfied"),
        score=_mean(_numbers(bodies, "score")),
        reward=_share(bodies, "reward"),
    )


def _pairs(body: Mapping[str, Any]) -> Iterable[tuple[str | float, str | float]]:
    """What was predicted and what is true, of the rows of which both are known."""
    predicted, truth = body.get("predicted"), body.get("truth")
    if not isinstance(predicted, list) or not isinstance(truth, list):
        return []
    return [
        (said, true)
        for said, true in zip(predicted, truth, strict=False)
        if said is not None and true is not None and isinstance(said, str) == isinstance(true, str)
    ]


def _classified(table: Counter[tuple[str, str]], labels: Sequence[str]) -> dict[str, Any]:
    """Figures of labels, from how often each was predicted where each is true."""
    rows = sum(table.values())
    if rows == 0:
        return {}
    said: Counter[str] = Counter()
    true: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for (one, other), count in table.items():
        said[one] += count
        true[other] += count
        right[one] += count if one == other else 0
    names = labels[:MOST_CLASSES] or [name for name, _ in (said + true).most_common(MOST_CLASSES)]
    by_class = {name: _class_figures(right[name], said[name], true[name], rows) for name in sorted(names)}
    positive = labels[1] if len(labels) == 2 else None
    averages: dict[str, Any] = {
        name: _macro([getattr(one, name) for one in by_class.values()])
        for name in ("precision", "recall", "f1", "false_positive_rate")
    }
    if positive is not None:
        of_it = by_class.get(positive) or _class_figures(0, 0, 0, rows)
        averages = {name: getattr(of_it, name) for name in averages}
    accuracy = _proportion(sum(right.values()), rows)
    return {"accuracy": accuracy, "classes": by_class, "positive": positive, **averages}


def _class_figures(right: int, said: int, true: int, rows: int) -> ClassFigures:
    """Of a class: rows that were rightly said to be of it, said to be, that are, and all."""
    either = said + true - right
    star = _proportion(right, either)
    f1 = None
    if star is not None and star.low is not None and star.high is not None:
        f1 = WindowFigure(_from_star(star.value), either, _from_star(star.low), _from_star(star.high))
    return ClassFigures(
        support=true,
        precision=_proportion(right, said),
        recall=_proportion(right, true),
        f1=f1,
        false_positive_rate=_proportion(said - right, rows - true),
    )


def _from_star(star: float) -> float:
    return 2 * star / (1 + star)


def _macro(found: Sequence[WindowFigure | None]) -> WindowFigure | None:
    known = [one.value for one in found if one is not None]
    return WindowFigure(sum(known) / len(known), len(known)) if known else None


def _proportion(successes: float, count: int) -> WindowFigure | None:
    if count == 0:
        return None
    interval = of_proportion(successes, count)
    return WindowFigure(successes / count, count, interval.low, interval.high)


def _share(bodies: Sequence[Mapping[str, Any]], name: str) -> WindowFigure | None:
    """Of flags, or of numbers in [0, 1]: no such number varies more than a flag of the same mean."""
    known = _numbers(bodies, name)
    return _proportion(sum(known), len(known))


def _numbers(bodies: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(body[name]) for body in bodies if isinstance(body.get(name), bool | int | float)]


def _mean(values: Sequence[float]) -> WindowFigure | None:
    """Of numbers that are not negative."""
    count = len(values)
    if count < 2:
        return WindowFigure(values[0], count) if count else None
    from scipy.special import stdtrit

    mean = float(np.mean(values))
    half = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2) * np.std(values, ddof=1) / math.sqrt(count))
    return WindowFigure(mean, count, max(0.0, mean - half), mean + half)


def _root(found: WindowFigure | None) -> WindowFigure | None:
    if found is None or found.low is None or found.high is None:
        return None if found is None else WindowFigure(math.sqrt(found.value), found.count)
    return WindowFigure(math.sqrt(found.value), found.count, math.sqrt(found.low), math.sqrt(found.high))
