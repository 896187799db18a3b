"""Figures over all sites' test examples, from what adds up: counts by class, and histograms of scores.

A ratio is no mean of ratios: a site without positives has no recall, and 0 in its place is nobody's measurement. So
each site counts, the counts are added, and the ratio is taken once; it is what one evaluation of all test examples
together would give. Of each class: `hits` (examples of it that were given its label), `given` (examples that were given
its label) and `asked` (examples of it). With two classes these are the confusion matrix.

The area under the ROC curve comes from histograms of scores by class, over bins that the plan fixes: the log-odds of
the class, in bins that are narrow around 0 and open at the ends. Two examples in one bin count as tied, so that

    |figure - exact| <= (sum over bins of positives x negatives) / (2 P N)

which is 1/2 where one bin holds all, and is told with the figure.

Legend: N examples, C classes, B bins; logits (N, C), targets (N,).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.learning.tasks.base import Doubles

Labels = NDArray[np.int64]

HITS, GIVEN, ASKED = "hits", "given", "asked"
COUNTS = (HITS, GIVEN, ASKED)
RATIOS = ("precision", "recall", "f1")
"""What is made of the counts, which leave where one of these may. Over more than two classes a mean of any of them is
over the classes that occur, so that each needs all three counts."""
BINS = 2048
MOST_CELLS = 1 << 18
"""Of the histograms of all classes together; with more classes than that allows, none are made."""
_EVEN, _TAIL = 0.5, 20.0
# Log-odds: within the first, bins are about even; beyond, they widen; the last ones begin at the second.
_CONFIDENCE = 1.96


@dataclass(frozen=True)
class Area:
    """An area under the ROC curve, how far the bins can put it off, and 95% of what the sites' noise does to it."""

    value: float
    bound: float
    noise: float = 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Where the exact one lies: for certain without noise, else in 95 of 100 cases."""
        reach = self.bound + self.noise
        return max(0.0, self.value - reach), min(1.0, self.value + reach)


@dataclass
class Pooled:
    """Sums over sites. What some site did not send covers the others' examples only."""

    counts: dict[str, Doubles] = field(default_factory=dict)
    """The sums of `COUNTS` (C,) over the sites that sent them; empty if none did."""
    counted: int = 0
    """Examples of those sites."""
    histograms: Doubles | None = None
    """(classes, 2, B): of examples that are not of a class, and that are."""
    variance: float = 0.0
    """Of the noise in each cell."""
    scored: int = 0
    """Examples of the sites whose histograms are in it."""

    def add_counts(self, counts: Mapping[str, Doubles], examples: int) -> None:
        """Add one site's `COUNTS`, of so many examples."""
        self.counts = {name: self.counts.get(name, 0.0) + counts[name] for name in COUNTS}
        self.counted += examples

    def add_histograms(self, histograms: Doubles, deviation: float, examples: int) -> None:
        """Add one site's, of so many examples, with noise of that deviation in each cell."""
        self.scored += examples
        self.histograms = histograms.copy() if self.histograms is None else self.histograms + histograms
        self.variance += deviation**2

    def ratios(self) -> dict[str, float]:
        """Of the last class for two classes, else the means over the classes that occur; none without cases."""
        found = {ratio: ratio_of(ratio, self.counts) for ratio in RATIOS} if self.counts else {}
        return {ratio: value for ratio, value in found.items() if value is not None}

    def by_class(self, labels: Sequence[str]) -> dict[str, dict[str, float]]:
        """The ratios of each class that has cases."""
        table: dict[str, dict[str, float]] = {}
        for ratio in RATIOS if self.counts else ():
            parts, wholes = _parts(ratio, self.counts)
            for label, part, whole in zip(labels, parts, wholes, strict=True):
                if whole > 0:
                    table.setdefault(label, {})[ratio] = float(part / whole)
        return table

    def majority(self, labels: Sequence[str]) -> tuple[str, float] | None:
        """The commonest class and its share of the test examples, from what the sites said of them; None: nothing."""
        asked = self.counts.get(ASKED)
        if asked is None or not asked.sum():
            return None
        return labels[int(asked.argmax())], float(asked.max() / asked.sum())

    def area(self) -> Area | None:
        """That of the last class for two classes, else the mean of each class against the rest; None without cases."""
        return None if self.histograms is None else area_of(self.histograms, self.variance)


def counts_of(predicted: Labels, targets: Labels, classes: int) -> dict[str, Labels]:
    """`COUNTS` of one test set, (C,) each."""
    counted = {HITS: targets[predicted == targets], GIVEN: predicted, ASKED: targets}
    return {name: np.bincount(labels, minlength=classes) for name, labels in counted.items()}


def needed_for(metrics: Sequence[str]) -> tuple[str, ...]:
    """The counts that these metrics are made of."""
    return COUNTS if set(metrics) & set(RATIOS) else ()


def ratio_of(ratio: str, counts: Mapping[str, NDArray[Any]]) -> float | None:
    """Precision, recall or f1 from counts (C,): of the last class for C = 2, else the mean over classes that occur.

    A class that occurs, but has no cases for the ratio, counts as 0, as in one evaluation of all examples; None if
    there is no case at all.
    """
    parts, wholes = _parts(ratio, counts)
    if len(parts) == 2:
        return float(parts[1] / wholes[1]) if wholes[1] > 0 else None
    occurs = counts[GIVEN] + counts[ASKED] > 0
    if not np.any(occurs):
        return None
    return float((parts[occurs] / np.maximum(wholes[occurs], 1)).mean())


def _parts(ratio: str, counts: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Numerators and denominators by class."""
    if ratio == "f1":
        return 2 * counts[HITS], counts[GIVEN] + counts[ASKED]
    return counts[HITS], counts[GIVEN if ratio == "precision" else ASKED]


def edges(bins: int) -> Doubles:
    """(bins - 1,) ascending: where one bin ends and the next begins. The first and the last bin are open."""
    inner = np.linspace(-1.0, 1.0, bins + 1)[1:-1]
    return _EVEN * np.sinh(inner * math.asinh(_TAIL / _EVEN))


def histogram_shape(classes: int, bins: int) -> tuple[int, int, int] | None:
    """Of what a site sends of so many classes: one histogram pair suffices for two; None: too many classes."""
    shape = (1 if classes == 2 else classes, 2, bins)
    return shape if classes >= 2 and math.prod(shape) <= MOST_CELLS else None


def histograms_of(logits: Doubles, targets: Labels, bins: int) -> Doubles:
    """Histograms (classes, 2, B) of the log-odds of each class (of the last alone for C = 2), by whether it is right.

    Each example is in exactly one cell for each class; a score that is no number lies in the first bin.
    """
    classes = logits.shape[1]
    chosen = [1] if classes == 2 else list(range(classes))
    found = np.zeros((len(chosen), 2, bins))
    for row, c in enumerate(chosen):
        where = bin_of(log_odds(logits, c), edges(bins))
        np.add.at(found[row], ((targets == c).astype(np.int64), where), 1.0)
    return found


def bin_of(scores: Doubles, ends: Doubles) -> NDArray[np.intp]:
    """The bin of each score (N,), from 0, between `ends` (B - 1,); a score that is no number lies in the first bin."""
    return np.searchsorted(ends, np.nan_to_num(scores, nan=-np.inf), side="right")


def log_odds(logits: Doubles, c: int) -> Doubles:
    """(N,) log p - log (1 - p) of class c: ranks as p does, and does not saturate with it."""
    from scipy.special import logsumexp

    with np.errstate(invalid="ignore"):
        odds: Doubles = logits[:, c] - logsumexp(np.delete(logits, c, axis=1), axis=1)
    return odds


def area_of(histograms: Doubles, variance: float = 0.0) -> Area | None:
    """From histograms (classes, 2, B) with noise of that variance in each cell; None if a class has no cases."""
    areas = [_area(negative, positive, variance) for negative, positive in histograms]
    known = [area for area in areas if area is not None]
    if not known or len(known) < len(areas):
        return None
    return Area(
        value=float(np.mean([area.value for area in known])),
        bound=float(np.mean([area.bound for area in known])),
        # One example is in the histograms of all classes: their errors are not taken as independent.
        noise=float(np.mean([area.noise for area in known])),
    )


def _area(negative: Doubles, positive: Doubles, variance: float) -> Area | None:
    """Mann-Whitney: a positive outranks a negative in a lower bin, and half of one in its own.

    The noise of the figure: to the first order its gradient by each cell, to the second the products of two noises.
    """
    positives, negatives = float(positive.sum()), float(negative.sum())
    if not (positives > 0 and negatives > 0):
        return None
    pairs = positives * negatives
    above = positives - np.cumsum(positive) + positive / 2
    below = np.cumsum(negative) - negative / 2
    value = float((negative * above).sum()) / pairs
    first = np.square(above - value * positives).sum() + np.square(below - value * negatives).sum()
    spread = math.sqrt(variance * float(first) + variance**2 * len(positive) ** 2 / 2) / pairs
    bound = float(np.abs(positive * negative).sum()) / (2 * pairs)
    return Area(min(max(value, 0.0), 1.0), min(bound, 0.5), _CONFIDENCE * spread)


def check_counts(counts: Mapping[str, Sequence[float]], classes: int, examples: int) -> dict[str, Doubles]:
    """What a site says it counted, as arrays (C,). Raises UpdateError unless so many examples can be counted so."""
    found: dict[str, Doubles] = {}
    for name, values in counts.items():
        array = np.asarray(values, dtype=np.float64) if len(values) == classes else np.array([np.nan])
        if not (np.isfinite(array).all() and (array >= 0).all() and (array == np.floor(array)).all()):
            raise UpdateError(f"the answer's {name!r} are not {classes} whole numbers of at least 0")
        if name != HITS and array.sum() != examples:
            raise UpdateError(f"the answer's {name!r} do not add up to its {examples} examples")
        found[name] = array
    if HITS in found and any((found[HITS] > whole).any() for name, whole in found.items() if name != HITS):
        raise UpdateError("the answer counts more hits of a class than there can be")
    return found


def check_histograms(histograms: Doubles, examples: int, deviation: float) -> Doubles:
    """What a site says its scores were, with noise of that deviation. Raises UpdateError for what cannot be."""
    if not np.isfinite(histograms).all():
        raise UpdateError("the answer's histograms hold numbers that are not finite")
    if deviation == 0:
        whole = (histograms >= 0).all() and (histograms == np.floor(histograms)).all()
        if not whole or (histograms.sum(axis=(1, 2)) != examples).any():
            raise UpdateError(f"the answer's histograms do not hold its {examples} examples")
    elif (np.abs(histograms) > examples + 50 * deviation).any():
        raise UpdateError("the answer's histograms hold more than its examples and its noise can be")
    return histograms
