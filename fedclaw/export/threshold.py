"""The threshold at which a model of two classes answers the second one: where F1 is largest on labelled examples.

The likelier class is a poor answer where positives are rare: a model that ranks well may give none of them a half. The
threshold is a figure of the examples that it is chosen on, so these must not be a site's unless the site is asked and
charged for it, nor the test data, whose metrics would flatter the model afterwards.

Legend: N examples.
"""

import numpy as np

from fedclaw.errors import BundleError
from fedclaw.export.layout import Decision
from fedclaw.workload import Floats, Labels, Table

LEAST_OF_A_CLASS = 5
"""With fewer examples of a class than this, a threshold is an accident."""


def choose_threshold(positive: Floats, table: Table) -> Decision:
    """The threshold for `positive` (N,), probabilities of the second of two classes, from the labels of public data.

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


def f1(positive: Floats, labels: Labels, threshold: float) -> float:
    """2 TP / (2 TP + FP + FN) when probabilities (N,) from `threshold` on are positive; 0 without a positive."""
    chosen = positive >= threshold
    hits = int((chosen & (labels == 1)).sum())
    every = int(chosen.sum()) + int((labels == 1).sum())
    return 2 * hits / every if every else 0.0


def _cuts(positive: Floats) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """One half, and the middles between neighbouring probabilities, at most 1,000 of them: all that cut differently."""
    values = np.unique(positive.astype(np.float64))
    middles = (values[1:] + values[:-1]) / 2
    if len(middles) > 1000:
        middles = middles[np.linspace(0, len(middles) - 1, 1000).astype(np.int64)]
    inside = middles[(middles > 0) & (middles < 1)]
    return np.concatenate([np.array([0.5]), inside])
