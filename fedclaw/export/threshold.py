"""The decision threshold of a model of two classes: the probability with the largest F1 on labelled examples.

One half is a poor threshold where positives are rare: a model that ranks well may give none of them so much. The
threshold tells something about the examples that it is chosen on. So they must not be a site's, unless the site is
asked and charged, and not the test data, whose metrics would flatter the model afterwards.

Legend: N examples.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import BundleError, DataError
from fedclaw.export.layout import Decision
from fedclaw.learning.statistics import SCORES, edges, parameters_digest
from fedclaw.learning.workload import Floats, Labels, Table
from fedclaw.privacy.statistics import ENOUGH
from fedclaw.server.statistics_release import Release

LEAST_OF_A_CLASS = 5
"""With fewer examples of a class a threshold is a matter of chance."""


def choose_threshold(positive: Floats, table: Table) -> Decision:
    """The threshold for `positive` (N,), probabilities of the second class, chosen by the labels of public data.

    Raises BundleError when a class has too few examples.
    """
    labels = table.targets
    counts = np.bincount(labels, minlength=2)
    if counts.min() < LEAST_OF_A_CLASS:
        raise BundleError(
            f"a threshold is chosen on at least {LEAST_OF_A_CLASS} examples of each class; there are "
            f"{counts[0]} and {counts[1]}"
        )
    cuts = _cuts(positive)
    scores = [f1(positive, labels, cut) for cut in cuts]
    best = int(np.argmax(scores))
    return Decision(
        threshold=float(cuts[best]),
        value=scores[best],
        value_at_half=f1(positive, labels, 0.5),
        chosen_on="public data",
        examples=len(labels),
        content=table.content,
    )


def threshold_of_release(release: Release, parameters: Mapping[str, NDArray[np.float32]]) -> Decision:
    """The threshold chosen on noised counts of the model's scores over the sites' training rows.

    Raises DataError for a release of something else, BundleError when the noise leaves too little of a class.
    """
    scores = release.scores
    if scores is None:
        raise DataError("the statistics hold no scores; make them with python -m fedclaw.statistics scores=RUNS/NAME")
    if scores.model != parameters_digest(parameters):
        raise DataError("the scores are of another model; make them with scores= this run, and its scores_model=")
    told = release.statistics.columns[SCORES].levels
    no, yes = (np.array([told[f"{label}/{number}"].value for number in range(scores.bins)]) for label in scores.labels)
    error = max(estimate.error for estimate in told.values())
    least = max(float(LEAST_OF_A_CLASS), ENOUGH * error * float(np.sqrt(scores.bins)))
    if min(no.sum(), yes.sum()) < least:
        raise BundleError("the noise of the statistics leaves too little of a class to choose a threshold by")
    # Above edge k are the bins from k + 1 on.
    hits, given = (np.cumsum(counts[::-1])[::-1][1:] for counts in (yes, yes + no))
    values = np.clip(2 * hits / np.maximum(given + yes.sum(), least), 0, 1)
    best, half = int(np.argmax(values)), int(np.argmin(np.abs(edges(scores.bins))))
    return Decision(
        threshold=float(1 / (1 + np.exp(-edges(scores.bins)[best]))),
        value=float(values[best]),
        value_at_half=float(values[half]),
        chosen_on="training data, by statistics",
        examples=max(1, round(release.statistics.count.value)),
        release=release.run,
    )


def f1(positive: Floats, labels: Labels, threshold: float) -> float:
    """2 TP / (2 TP + FP + FN), where a probability (N,) of `threshold` or more is positive; 0 without positives."""
    chosen = positive >= threshold
    hits = int((chosen & (labels == 1)).sum())
    every = int(chosen.sum()) + int((labels == 1).sum())
    return 2 * hits / every if every else 0.0


def _cuts(positive: Floats) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """One half and the midpoints between neighbouring probabilities, at most 1,000: all thresholds that differ."""
    values = np.unique(positive.astype(np.float64))
    middles = (values[1:] + values[:-1]) / 2
    if len(middles) > 1000:
        middles = middles[np.linspace(0, len(middles) - 1, 1000).astype(np.int64)]
    inside = middles[(middles > 0) & (middles < 1)]
    return np.concatenate([np.array([0.5]), inside])
