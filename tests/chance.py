"""Tests of randomness that a right implementation fails once in a thousand million times.

Noise and sampling come from a cryptographic source that nobody seeds, so a test of them can fail by chance. With
these it does so with probability `TINY`; a test that asks several times asks for samples large enough that what is
wrong is found at that level too.
"""

from typing import Any

import numpy as np
from scipy.stats import binom, chi2, kstest, norm, pearsonr

TINY = 1e-9
"""Probability with which a right implementation fails one of these."""
FAR = float(norm.isf(TINY / 2))
"""As many standard errors (6.11) is a normal estimate off with probability `TINY`."""


def squares_fit(total: float, count: int) -> bool:
    """Whether `total` can be the sum of the squares of `count` standard normal numbers, neither more nor less."""
    return bool(chi2.ppf(TINY / 2, count) < total < chi2.isf(TINY / 2, count))


def scale_is_right(values: Any, deviation: float = 1.0) -> bool:
    """Whether normal `values` (any shape) of mean zero have this standard deviation."""
    standard = np.asarray(values, np.float64) / deviation
    return squares_fit(float(np.square(standard).sum()), standard.size)


def is_standard_normal(values: Any) -> bool:
    """By Kolmogorov and Smirnov."""
    return bool(kstest(np.ravel(values), "norm").pvalue > TINY)


def uncorrelated(left: Any, right: Any) -> bool:
    """By Pearson's coefficient, whose law is exact for normal numbers."""
    return bool(pearsonr(np.ravel(left), np.ravel(right)).pvalue > TINY)


def counts_fit(found: Any, trials: int, probability: float) -> bool:
    """Whether each of `found` can be how often something of that probability happened, all together at `TINY`."""
    counts = np.atleast_1d(found)
    risk = TINY / 2 / len(counts)
    low, high = binom.ppf(risk, trials, probability), binom.isf(risk, trials, probability)
    return bool(np.all((low <= counts) & (counts <= high)))


def frequencies_fit(counts: Any) -> bool:
    """Whether cells that are equally likely, with some dozens expected of each, were met as often as `counts` says."""
    counts = np.asarray(counts)
    expected = counts.sum() / len(counts)
    return bool(np.square(counts - expected).sum() / expected < chi2.isf(TINY, len(counts) - 1))
