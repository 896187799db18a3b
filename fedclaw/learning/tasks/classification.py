"""One of C classes: cross-entropy, probabilities, and metrics from counts by class and histograms of scores.

Precision, recall and F1 are those of the last class for C = 2 (list the positive label last in the schema); for
C > 2 they are the plain mean over the classes that occur among the targets or the predictions. A ratio
without cases (no prediction of the class, no target of it) counts as 0. The AUROC of C = 2 ranks by the
margin of the last class; for C > 2 it is the plain mean of one class against the rest.

A metric that has no value is left out: all of them for an empty test set, the AUROC when a class is missing from the
targets, whatever is not finite.

Legend: N examples, C classes; logits (N, C) float, targets (N,) class indices, int in [0, C).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.learning.tasks.base import LOSS, BoundedSum, Doubles, Sums, Tally, Targets, Task
from fedclaw.learning.tasks.class_sums import (
    COUNTS,
    HITS,
    RATIOS,
    Area,
    Labels,
    Pooled,
    check_counts,
    check_histograms,
    counts_of,
    histogram_shape,
    histograms_of,
    needed_for,
    ratio_of,
)
from fedclaw.learning.tasks.means import Means, check_mean
from fedclaw.protocol.arrays import Form
from fedclaw.protocol.messages import SCORES
from fedclaw.protocol.terms import SCORE_HISTOGRAM


def classification(logits: Doubles, targets: Labels) -> dict[str, float]:
    """Loss (mean cross-entropy in nats), accuracy, precision, recall, f1 and auroc, as far as they are defined."""
    if not len(targets):
        return {}
    log_probabilities = log_softmax(logits)
    predicted = np.argmax(logits, axis=1)
    counts = counts_of(predicted, targets, logits.shape[1])
    values = {
        "loss": float(-log_probabilities[np.arange(len(targets)), targets].mean()),
        "accuracy": float((predicted == targets).mean()),
        **{ratio: ratio_of(ratio, counts) or 0.0 for ratio in RATIOS},
        "auroc": auroc(log_probabilities, targets),
    }
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def log_softmax(logits: Doubles) -> Doubles:
    """Logarithms of the class probabilities, (N, C)."""
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        normalised: Doubles = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalised


def auroc(scores: Doubles, targets: Labels) -> float | None:
    """Area under the ROC curve from scores (N, C); None if a class is missing or a score is NaN."""
    classes = scores.shape[1]
    if np.isnan(scores).any() or len(np.unique(targets)) < classes:
        return None
    if classes == 2:
        return binary_auroc(scores[:, 1] - scores[:, 0], targets == 1)
    return float(np.mean([binary_auroc(scores[:, c], targets == c) for c in range(classes)]))


def binary_auroc(scores: Doubles, positive: NDArray[np.bool_]) -> float:
    """Probability that a positive outranks a negative, ties counting half (Mann-Whitney); both must occur.

    Mann, Whitney 1947; U = (sum of the positives' mid-ranks) - P (P + 1) / 2, and AUROC = U / (P (N - P)).
    """
    positives = int(positive.sum())
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mid_ranks = (last - (counts - 1) / 2)[inverse]
    wins = float(mid_ranks[positive].sum()) - positives * (positives + 1) / 2
    return wins / (positives * (len(scores) - positives))


if TYPE_CHECKING:
    import torch

METRICS = ("loss", "accuracy", "precision", "recall", "f1", "auroc")
"""All but `loss` lie in [0, 1]."""
_RANKS_WELL = 0.7


@dataclass(frozen=True)
class Classification(Task):
    """`labels` are the names of the C classes; `weights` how much an example of each counts in the loss, None: 1."""

    labels: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None

    name: ClassVar[str] = "classification"
    METRICS: ClassVar[tuple[str, ...]] = METRICS
    SHARED: ClassVar[tuple[str, ...]] = ("accuracy", "precision", "recall", "f1", "auroc")
    NOISED: ClassVar[tuple[str, ...]] = (LOSS, "accuracy", SCORE_HISTOGRAM)
    CLAUSES: ClassVar[tuple[str, ...]] = (SCORE_HISTOGRAM,)
    score: ClassVar[str] = "accuracy"
    head: ClassVar[tuple[str, str]] = ("logits", "probabilities")
    target_dtype: ClassVar[type[np.generic]] = np.int64
    columns_shown: ClassVar[int] = 2

    @property
    def outputs(self) -> int:
        """C."""
        return len(self.labels)

    def loss(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """Mean cross-entropy in nats over the batch.

        With class weights, each example's loss counts by its class's weight, and the sum is still divided by the number
        of examples: so the loss of a batch is the mean of its examples' losses, which clipping each alone rests on.
        """
        import torch
        from torch.nn import functional

        if self.weights is None:
            return functional.cross_entropy(outputs, targets, reduction="sum") / max(targets.shape[0], 1)
        losses = functional.cross_entropy(outputs, targets, reduction="none")
        counted = losses * torch.tensor(self.weights, dtype=outputs.dtype, device=outputs.device)[targets]
        return counted.sum() / max(targets.shape[0], 1)

    def link(self, outputs: "torch.Tensor") -> "torch.Tensor":
        """The probability of each class: softmax."""
        import torch

        return torch.softmax(outputs, dim=1)

    def evaluate(self, outputs: Doubles, targets: Targets) -> dict[str, float]:
        """Which definitions, and when one is left out: `fedclaw.learning.tasks.classification`."""
        return classification(outputs, targets)

    def sums(
        self, wanted: Sequence[str], bins: int | None, own: Mapping[str, float], outputs: Doubles, targets: Targets
    ) -> Sums:
        """Each metric times the examples; with precision, recall or f1 the counts by class that they are made of."""
        found = [name for name in wanted if name in own]
        lists: dict[str, list[float]] = {}
        if needed := needed_for(found):
            counts = counts_of(np.argmax(outputs, axis=1), targets, outputs.shape[1])
            lists = {name: counts[name].tolist() for name in needed}
        arrays = {SCORES: histograms_of(outputs, targets, bins)} if bins and self._scores(bins) else {}
        return Sums({name: own[name] * len(targets) for name in found}, lists, arrays)

    def bounded(
        self, wanted: Sequence[str], bins: int | None, outputs: Doubles, targets: Targets, loss_bound: float
    ) -> dict[str, BoundedSum]:
        """Correct answers, and histograms: each example is in one cell for each class that there is one of."""
        found = {}
        if "accuracy" in wanted:
            found["accuracy"] = BoundedSum(np.array(float((np.argmax(outputs, axis=1) == targets).sum())))
        if bins is not None and self._scores(bins):
            histograms = histograms_of(outputs, targets, bins)
            found[SCORES] = BoundedSum(histograms, sensitivity=float(np.sqrt(len(histograms))))
        return found

    def tally(self, wanted: Sequence[str], bins: int | None) -> "ClassTally":
        """Counts and histograms over the sites; without labels neither is read, and means alone are."""
        shape = self._scores(bins)
        return ClassTally(tuple(wanted), self.labels, {SCORES: Form(np.dtype(np.float64), shape)} if shape else {})

    @staticmethod
    def told_with(wanted: Sequence[str]) -> tuple[str, ...]:
        """The counts."""
        return needed_for(wanted)

    def agreement(self, outputs: "torch.Tensor", others: "torch.Tensor") -> float:
        """Share of the rows of two (N, C) logits with the same most probable class."""
        return (outputs.argmax(1) == others.argmax(1)).double().mean().item()

    def divergence(self, student: "torch.Tensor", teacher: "torch.Tensor", temperature: float) -> "torch.Tensor":
        """KL(teacher_T || student_T): Hinton, Vinyals, Dean 2015, section 2."""
        from torch.nn import functional

        student_log = functional.log_softmax(student / temperature, dim=-1)
        teacher_log = functional.log_softmax(teacher.detach() / temperature, dim=-1)
        return functional.kl_div(student_log, teacher_log, reduction="sum", log_target=True)

    def divergence_scale(self, temperature: float) -> float:
        """T^2."""
        return temperature**2

    def answers(self, outputs: "torch.Tensor") -> Targets:
        """The most probable class."""
        return outputs.detach().argmax(dim=1).cpu().numpy()

    def contradictions(self, outputs: "torch.Tensor") -> Targets:
        """The least probable class."""
        return outputs.detach().argmin(dim=1).cpu().numpy()

    def outputs_of(self, targets: "torch.Tensor") -> "torch.Tensor":
        """Logits whose most probable class is the label."""
        from torch.nn import functional

        return 10.0 * functional.one_hot(targets, len(self.labels)).float()

    @property
    def columns(self) -> tuple[str, ...]:
        """The class, its probability, and that of each class."""
        return ("label", "probability", *(f"p({label})" for label in self.labels))

    def cells(self, answer: NDArray[np.float32], threshold: float | None, digits: int = 6) -> tuple[str, ...]:
        """The label, and probabilities with so many digits."""
        chosen = int(decide(answer[None], threshold)[0])
        return (self.labels[chosen], *(f"{value:.{digits}f}" for value in (answer[chosen], *answer)))

    def facts(self) -> tuple[tuple[str, str], ...]:
        """The labels."""
        return (("Labels", ", ".join(self.labels)),)

    def limits(self) -> tuple[str, ...]:
        """What probabilities and labels are not."""
        return (
            "Probabilities are the softmax of the model's outputs; they have not been calibrated.",
            "The model knows only the labels listed above and answers every input with one of them.",
        )

    @staticmethod
    def nothing_learned(line: Mapping[str, Any]) -> str | None:
        """The warning for a model that does not beat its majority class; None: it does, or the sites did not say how
        common the classes are."""
        majority, metrics = line.get("majority"), line.get("metrics") or {}
        accuracy = metrics.get("accuracy")
        if not majority or accuracy is None or accuracy > majority["accuracy"]:
            return None
        words = (
            f"the model does not beat the majority class: its accuracy is {accuracy:.4f}, and whoever always answers "
            f"{majority['label']!r} has {majority['accuracy']:.4f}"
        )
        if (auroc := metrics.get("auroc", 0.0)) >= _RANKS_WELL:
            return (
                f"{words}; it ranks better than that (AUROC {auroc:.4f}): another decision threshold may be what it "
                "lacks"
            )
        return f"{words}; by this measure it has learned nothing"

    def random_targets(self, count: int, generator: np.random.Generator) -> Targets:
        """Every class as likely as the others."""
        return generator.integers(len(self.labels), size=count)

    def _scores(self, bins: int | None) -> tuple[int, int, int] | None:
        """Shape of the histograms of scores; None where none are made."""
        return histogram_shape(len(self.labels), bins) if bins else None


def decide(probabilities: NDArray[np.float32], threshold: float | None) -> NDArray[np.int64]:
    """The class of each row (N,): the second of two from `threshold` on, if there is one, else the likeliest."""
    if threshold is None or probabilities.shape[1] != 2:
        likeliest: NDArray[np.int64] = probabilities.argmax(axis=1)
        return likeliest
    return (probabilities[:, 1] >= threshold).astype(np.int64)


class ClassTally(Tally):
    """Sums of the sites' metrics times their examples, counts by class, and histograms of scores.

    A site counts by its test examples and by nothing else, and each metric lies in its range, so that no answer moves
    a mean further than so many examples can.
    """

    def __init__(self, wanted: tuple[str, ...], labels: tuple[str, ...], arrays: Mapping[str, Form]) -> None:
        self.numbers, self.lists, self.arrays = wanted, COUNTS if labels else (), arrays
        self.wanted, self.labels = wanted, labels
        self.pooled = Pooled()
        self.means = Means()

    def add(self, sums: Sums, examples: int) -> None:
        """Add metrics, counts and histograms."""
        for name, value in sums.numbers.items():
            check_mean(name, value, examples, None if name == LOSS else 1.0)
        counts = check_counts(sums.lists, len(self.labels), examples)
        if len(counts) < len(COUNTS):
            counts = {}
        hits = counts[HITS].sum() if counts else 0.0
        if counts and abs(hits - sums.numbers.get("accuracy", hits)) > 1e-6 * examples:
            raise UpdateError("the answer's accuracy is not that of the hits that it counts")
        scores = {name: check_histograms(array, examples, sums.deviation) for name, array in sums.arrays.items()}
        if counts:
            self.pooled.add_counts(counts, examples)
        for histograms in scores.values():
            self.pooled.add_histograms(histograms, sums.deviation, examples)
        for name, value in sums.numbers.items():
            has_cases = name not in RATIOS or not counts or ratio_of(name, counts) is not None
            self.means.add(name, value, examples, listed=has_cases)

    @property
    def metrics(self) -> dict[str, float]:
        """By name: of all test examples together where every site of a figure sent what adds up to it, else the
        example-weighted means. None of a ratio without cases."""
        found = {}
        ratios, area = self.pooled.ratios(), self.area
        for name in self.wanted:
            if name == "auroc" and area is not None:
                found[name] = area.value
            elif name in RATIOS and self._is_pooled(name):
                if name in ratios:
                    found[name] = ratios[name]
            elif (mean := self.means.mean(name)) is not None:
                found[name] = mean
        return found

    @property
    def over_sites(self) -> dict[str, dict[str, float]]:
        """Of the metrics that are ratios."""
        return self.means.over_sites(without=(LOSS,))

    @property
    def area(self) -> Area | None:
        """The AUROC of all test examples together with its bound; None where not every site's histograms are in it."""
        return self.pooled.area() if "auroc" in self.wanted and self._is_pooled("auroc") else None

    @property
    def by_class(self) -> dict[str, dict[str, float]]:
        """For more than two classes: the ratios of each."""
        return self.pooled.by_class(self.labels) if len(self.labels) > 2 else {}

    @property
    def majority(self) -> tuple[str, float] | None:
        """The commonest class of the test examples and its share: the accuracy of who always answers with it."""
        return self.pooled.majority(self.labels) if self.labels else None

    @property
    def beside(self) -> dict[str, Any]:
        """Ratios by class, the AUROC's bounds, the majority class."""
        found: dict[str, Any] = {}
        if by_class := self.by_class:
            found["by_class"] = by_class
        if (area := self.area) is not None:
            found["auroc"] = {"bound": area.bound, "interval": list(area.interval)}
        if (majority := self.majority) is not None:
            found["majority"] = {"label": majority[0], "accuracy": majority[1]}
        return found

    def _is_pooled(self, name: str) -> bool:
        covered = self.pooled.scored if name == "auroc" else self.pooled.counted
        return covered > 0 and covered >= self.means.weight(name)
