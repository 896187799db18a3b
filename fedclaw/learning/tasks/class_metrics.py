"""Classification metrics of one test set. numpy only.

Precision, recall and F1 are those of the last class for C = 2 (list the positive label last in the schema); for
C > 2 they are the plain mean over the classes that occur among the targets or the predictions. A ratio
without cases (no prediction of the class, no target of it) counts as 0. The AUROC of C = 2 ranks by the
margin of the last class; for C > 2 it is the plain mean of one class against the rest.

A metric that has no value is left out: all of them for an empty test set, the AUROC when a class is missing from the
targets, whatever is not finite.

Legend: N examples, C classes; logits (N, C) float, targets (N,) int in [0, C).
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedclaw.learning.tasks.base import Doubles
from fedclaw.learning.tasks.class_sums import RATIOS, Labels, counts_of, ratio_of


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
