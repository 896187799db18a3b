"""How sure a figure is that a few hundred examples gave, and the difference of two figures of the same examples.

An accuracy has Wilson's score interval (Wilson 1927; Brown, Cai, DasGupta 2001, "Interval Estimation for a Binomial
Proportion", section 3.1.1): unlike p +- 1.96 s it stays within [0, 1] and is sound near 1, where compared models lie.
Two models that answered the same examples are compared by the examples on which they differ, as McNemar's test does;
the interval of the difference is Tango's score interval (Tango 1998, "Equivalence test and confidence interval for the
difference in proportions for the paired-sample design", section 3; recommended by Fagerland, Lydersen, Laake 2014).
What is no mean of right and wrong, as R2, is resampled: the percentile bootstrap (Efron, Tibshirani 1993, section 13.3)
over examples, both models on the same ones.

All take examples for independent draws. Rows of one person are not: with several of a person an interval is too narrow.

Legend: N examples, B resamples.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.protocol.frozen import Frozen

CONFIDENCE = 0.95
RESAMPLES = 1000
_BESIDE = 1e-9
MOST_UNDEFINED = 0.05
"""Share of the resamples that may be without a score; with more, there is no interval."""

Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]
Score = Callable[[Indices], float | None]
"""The score of some rows; None where they have none."""


class Interval(Frozen):
    """Where the figure of all such examples lies, with confidence 0.95."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"


class Difference(Frozen):
    """One model's score less another's on the same examples, with its interval."""

    value: float
    interval: Interval | None
    """None: it could not be compared example by example."""
    examples: int = Field(default=0, ge=0)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval says which of the two is better, else 0."""
        if self.interval is None:
            return 0
        return int(self.interval.low > 0) - int(self.interval.high < 0)


def _z() -> float:
    from scipy.special import ndtri

    return float(ndtri(0.5 + CONFIDENCE / 2))


def of_proportion(successes: float, count: int) -> Interval:
    """Wilson's, of so many successes among `count` examples, at least one."""
    share, z = successes / count, _z()
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Interval(low=max(0.0, middle - half), high=min(1.0, middle + half))


def of_paired(first: Flags, second: Flags) -> Difference:
    """Share of right answers of `first` (N,) less that of `second` (N,), N at least 1, with Tango's interval."""
    count = len(first)
    gained, lost = int((first & ~second).sum()), int((~first & second).sum())
    interval = Interval(low=-_upper(lost, gained, count), high=_upper(gained, lost, count))
    return Difference(value=(gained - lost) / count, interval=interval, examples=count)


def _upper(gained: int, lost: int, count: int) -> float:
    """Upper end of Tango's interval for (gained - lost) / count: where the score statistic is -z."""
    from scipy.optimize import brentq

    z, estimate = _z(), (gained - lost) / count
    if estimate >= 1:
        return 1.0

    def excess(difference: float) -> float:
        # The likelihood's maximum for the share that only the second got right, given the difference (his appendix).
        b = -gained - lost + (2 * count - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        share = (math.sqrt(max(b**2 - 8 * count * c, 0.0)) - b) / (4 * count)
        variance = count * max(2 * share + difference * (1 - difference), 0.0)
        return count * difference - (gained - lost) - z * math.sqrt(variance)

    # Where the models differ on no example, the variance is 0 at the estimate itself, which is no end of the interval.
    return float(brentq(excess, estimate + _BESIDE * (1 - estimate), 1.0))


def resamples(count: int, seed: int = 0) -> Iterator[Indices]:
    """B times (N,) row numbers, drawn with replacement: the same for the same seed, so that models are compared on
    them. One after the other: all of a million rows together would be 8 GB."""
    random = np.random.default_rng(seed)
    return (random.integers(0, count, count) for _ in range(RESAMPLES))


def of_bootstrap(score: Score, count: int, seed: int = 0) -> Interval | None:
    """Percentile interval of a score of rows; None where too many resamples have none."""
    return _percentiles([score(rows) for rows in resamples(count, seed)])


def of_paired_bootstrap(first: Score, second: Score, count: int, seed: int = 0) -> Interval | None:
    """Percentile interval of a difference of scores on the same resamples."""
    pairs = [(first(rows), second(rows)) for rows in resamples(count, seed)]
    return _percentiles([None if a is None or b is None else a - b for a, b in pairs])


def _percentiles(found: list[Any]) -> Interval | None:
    known = [value for value in found if value is not None]
    if len(known) < (1 - MOST_UNDEFINED) * len(found):
        return None
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(low=float(low), high=float(high))
