"""Discrete Gaussian noise: N_Z(0, sigma^2), the integer x with probability proportional to exp(-x^2 / (2 sigma^2)).

Canonne, Kamath, Steinke 2020 ("The Discrete Gaussian for Differential Privacy") define it and prove that it protects
an integer as well as real Gaussian noise of the same sigma does. Integers have no least significant bits to leak by
(Mironov 2012), if the samples have the probabilities that the proof speaks of. So nothing here is a floating-point
number between the keystream and the sample: a uniform 128-bit number is looked up in a table of cumulative
probabilities, which is made once with integers of 256 bits after the point.

Distance. A sample's distribution is within 2^-100 of N_Z(0, sigma^2) in total variation: the tails beyond 12.2 sigma
that are left out weigh less than 2^-105, rounding each entry of a table to 128 bits moves less than 2^-106 in all.
A vector of d numbers is within d 2^-100, to be added to delta; for a thousand million numbers that is 10^-21.

Large sigma. Above _LARGEST_DIRECT a table would leave the cache, so x = a + m b with independent a, b of
N_Z(0, s^2), sigma^2 = s^2 (1 + m^2), a whole number m. Completing the square in b,

    P(x) is proportional to exp(-x^2 / (2 sigma^2)) * sum over b of exp(-(b - c x)^2 / (2 t^2)),

t = s / sqrt(1 + m^2), and by Poisson summation the sum lies within a factor 1 +- 2.1 exp(-2 pi^2 t^2) of a constant,
whatever c x is. m is chosen so that t >= 2.2, where that is 1 +- 2^-136. (Peikert 2010, "An Efficient and Parallel
Gaussian Sampler for Lattices", theorem 3.1; used for sampling by Poeppelmann, Ducas, Gueneysu 2014.)

Time: the lookup takes the time that it takes (a sample's value shows in cache and branch timing), as in most of
numerical Python; who can measure that at a site has the site.
"""

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource

SMALLEST_SIGMA = 0.5
"""The theorems on sums of discrete Gaussians start here."""

LARGEST_SIGMA = 2.0**30

_LARGEST_DIRECT = 1024.0
_TAIL = Fraction(61, 5)
# 12.2 deviations: 2 exp(-12.2^2 / 2) < 2^-106.
_SMOOTH = 2.2
_POINT = 256
# Binary digits after the point while a table is made; 77 decimal ones.
_DIGITS = 100
_WORD = 64
_GUIDE = 16
# The first 16 bits of a number choose a cell; most cells hold one boundary between two values, or none.
_CHUNK = 1 << 15


@dataclass(frozen=True)
class DiscreteGaussian:
    """N_Z(0, sigma^2), for `sigma` from 0.5 to 2^30. Raises PrivacyError for a sigma outside of that."""

    sigma: float

    def __post_init__(self) -> None:
        if not SMALLEST_SIGMA <= self.sigma <= LARGEST_SIGMA:
            raise PrivacyError(
                f"the sigma of a discrete Gaussian lies in [{SMALLEST_SIGMA:g}, {LARGEST_SIGMA:g}], not {self.sigma}"
            )

    def sample(self, count: int, source: "GaussianSource") -> NDArray[np.int64]:
        """(count,) independent samples, from `source` alone."""
        factor = _factor(self.sigma)
        table = _table(Fraction(self.sigma) ** 2 / (1 + factor**2))
        samples = np.empty(count, dtype=np.int64)
        for start in range(0, count, _CHUNK):
            part = samples[start : start + _CHUNK]
            table.fill(part, source)
            if factor:
                coarse = np.empty_like(part)
                table.fill(coarse, source)
                coarse *= factor
                part += coarse
        return samples


class _Table:
    """The values -bound .. bound and where each ends among the 128-bit numbers.

    Value number i belongs to the numbers u with ends[i - 1] <= u < ends[i]; `high` and `low` are the two words of
    `ends`, without the last, which is 2^128.
    """

    def __init__(self, ends: list[int], bound: int) -> None:
        mask = (1 << _WORD) - 1
        self._bound = bound
        self._high = np.array([end >> _WORD for end in ends[:-1]], dtype=np.uint64)
        self._low = np.array([end & mask for end in ends[:-1]], dtype=np.uint64)
        cells = np.arange(1 << _GUIDE, dtype=np.uint64) << np.uint64(_WORD - _GUIDE)
        first = np.searchsorted(self._high, cells, side="left")
        self._first = first.astype(np.int32)
        """By cell: the number of ends below it."""
        self._crowded = np.diff(first, append=len(self._high)) > 1
        self._crowded[-1] = True
        """By cell: more than one end lies in it. The last counts as such: one comparison must not run off the table."""

    def fill(self, samples: NDArray[np.int64], source: "GaussianSource") -> None:
        """Overwrite `samples` (n,) by independent samples."""
        words = source.words(len(samples))
        cells = words >> np.uint64(_WORD - _GUIDE)
        numbers = self._first[cells]
        # One comparison is enough where the cell holds one end or none: the next end may lie above the word, or not.
        ends = self._high.take(numbers, mode="clip")
        numbers += ends <= words
        tied = ends == words
        crowded = np.flatnonzero(self._crowded[cells])
        if crowded.size:
            there = words[crowded]
            found = np.searchsorted(self._high, there, side="right")
            numbers[crowded] = found
            tied[crowded] = (found > 0) & (self._high[found - 1] == there)
        if tied.any():
            self._settle(numbers, words, np.flatnonzero(tied), source)
        np.subtract(numbers, self._bound, out=samples)

    def _settle(
        self, numbers: NDArray[np.int32], words: NDArray[np.uint64], tied: NDArray[np.int64], source: "GaussianSource"
    ) -> None:
        """The second word decides where the first equals that of an end."""
        for place, second in zip(tied, source.words(len(tied)), strict=True):
            left = np.searchsorted(self._high, words[place], side="left")
            right = np.searchsorted(self._high, words[place], side="right")
            numbers[place] = left + np.searchsorted(self._low[left:right], second, side="right")


def _factor(sigma: float) -> int:
    """m of the module's docstring, 0 for a single table: as large as is needed and t >= _SMOOTH allows."""
    if sigma <= _LARGEST_DIRECT:
        return 0
    return min(math.ceil(sigma / _LARGEST_DIRECT), math.isqrt(int(sigma / _SMOOTH) - 1))


@lru_cache(maxsize=32)
def _table(variance: Fraction) -> _Table:
    """The table of N_Z(0, variance)."""
    bound = math.isqrt(math.ceil(_TAIL**2 * variance)) + 1
    half = _weights(variance, bound)
    weights = half[:0:-1] + half
    total = sum(weights)
    ends, reached = [], 0
    for weight in weights:
        reached += weight
        ends.append((reached << (2 * _WORD)) // total)
    return _Table(ends, bound)


def _weights(variance: Fraction, bound: int) -> list[int]:
    """exp(-x^2 / (2 variance)) for x = 0 .. bound, times 2^_POINT.

    By products alone: the weight of x + 1 is that of x times r^(2x + 1), r = exp(-1 / (2 variance)). Each product
    loses less than one unit of the last place, and a factor's loss counts in all later ones: bound^2 units at most.
    """
    ratio = _exponential(1 / (2 * variance))
    square = (ratio * ratio) >> _POINT
    weight, step, weights = 1 << _POINT, ratio, []
    for _ in range(bound + 1):
        weights.append(weight)
        weight = (weight * step) >> _POINT
        step = (step * square) >> _POINT
    return weights


def _exponential(exponent: Fraction) -> int:
    """exp(-exponent) times 2^_POINT, for an exponent above 0, to within one unit of the last place."""
    with localcontext(prec=_DIGITS):
        return int((Decimal(-exponent.numerator) / exponent.denominator).exp() * 2**_POINT)
