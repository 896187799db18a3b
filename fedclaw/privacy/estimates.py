"""What a noised sum of `fedclaw.privacy.statistics` vectors says: counts, means, variances, quantiles, rates, each with
the standard error that the noise gives it.

All of it is post-processing and costs nothing. The errors are those of the noise alone, to first order (the delta
method); that the data are a sample of something larger is not in them. A value that noise has pushed out of the range
that it can have is put back to its end, and a mean of next to no known values is left out.

Legend: d coordinates, B bins, T = sum of t, Q = sum of t^2 - 1/2, K known values; t in [-1, 1], see there.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedclaw.privacy.statistics import Design, Doubles, Kind, StatisticColumn
from fedclaw.protocol.frozen import Frozen

ENOUGH = 3.0
"""Standard errors that the number of known values has to be away from 0 for anything to be divided by it."""


class Estimate(Frozen):
    """A figure and its standard error."""

    value: float
    error: float


class ColumnStatistics(Frozen):
    """What is known of one column over all sites; None where too few values are known to say."""

    missing: Estimate
    missing_rate: Estimate | None
    mean: Estimate | None = None
    variance: Estimate | None = None
    """Population variance, of the values clipped to the declared bounds."""
    quantiles: dict[str, Estimate] = {}
    """By probability, "0.5" for the median; interpolated within the bins of the histogram."""
    levels: dict[str, Estimate] = {}
    """Number of examples by level."""


class Statistics(Frozen):
    """What a release says."""

    count: Estimate
    labels: dict[str, Estimate]
    columns: dict[str, ColumnStatistics]


class _Reading:
    """A noised vector, unweighted, block by block."""

    def __init__(self, design: Design, total: Doubles, deviation: float, *, additive: bool = False) -> None:
        self.design = design
        self._total = total
        self._deviation = deviation
        self._additive = additive

    def values(self, kind: Kind, column: str = "") -> Doubles:
        """Sums over the examples, (size of the block,)."""
        block = self.design.blocks[kind, column]
        return self._total[block.where] / block.weight

    def error(self, kind: Kind, column: str = "") -> float:
        """Standard error of each of them."""
        return self._deviation / self.design.blocks[kind, column].weight

    def number(self, kind: Kind, column: str = "") -> Estimate:
        """The first of them, by itself."""
        return Estimate(value=float(self.values(kind, column)[0]), error=self.error(kind, column))

    def counts(self, kind: Kind, column: str, names: tuple[str, ...]) -> dict[str, Estimate]:
        """Numbers of examples by name."""
        error = self.error(kind, column)
        values = zip(names, self.values(kind, column), strict=True)
        found = {name: Estimate(value=float(value), error=error) for name, value in values}
        return found if self._additive else {name: _at_least_zero(number) for name, number in found.items()}


def estimate(
    design: Design, total: Doubles, deviation: float, probabilities: tuple[float, ...], *, additive: bool = False
) -> Statistics:
    """Statistics from `total` (d,), whose every coordinate has noise of standard deviation `deviation`.

    `probabilities` name the quantiles; they need a histogram in the design. `additive`: numbers of examples by label
    and level are to be added up, so they stay as they came, below 0 too: sums of such as were put back to 0 would be
    too large.
    """
    reading = _Reading(design, total, deviation, additive=additive)
    return Statistics(
        count=_at_least_zero(reading.number("count")),
        labels=reading.counts("labels", "", design.classes) if design.classes else {},
        columns={column.name: _column(reading, column, probabilities) for column in design.columns},
    )


def _column(reading: _Reading, column: StatisticColumn, probabilities: tuple[float, ...]) -> ColumnStatistics:
    count, missing = reading.number("count"), reading.number("missing", column.name)
    known = Estimate(value=count.value - missing.value, error=math.hypot(count.error, missing.error))
    told = ColumnStatistics(missing=_at_least_zero(missing), missing_rate=_rate(missing, count))
    if column.levels:
        return told.model_copy(update={"levels": reading.counts("levels", column.name, column.levels)})
    if known.value < ENOUGH * known.error or known.value <= 0:
        return told
    mean, variance = _moments(reading, column, known)
    quantiles = _quantiles(reading, column, probabilities) if reading.design.bins else {}
    return told.model_copy(update={"mean": mean, "variance": variance, "quantiles": quantiles})


def _rate(part: Estimate, whole: Estimate) -> Estimate | None:
    if whole.value < ENOUGH * whole.error or whole.value <= 0:
        return None
    rate = part.value / whole.value
    error = math.hypot(part.error, rate * whole.error) / whole.value
    return Estimate(value=min(max(rate, 0.0), 1.0), error=min(error, 1.0))


def _moments(reading: _Reading, column: StatisticColumn, known: Estimate) -> tuple[Estimate, Estimate]:
    """Mean T/K and variance Q/K + 1/2 - (T/K)^2, from t back to the column's own scale."""
    first, second = reading.number("value", column.name), reading.number("square", column.name)
    mean, centred = first.value / known.value, second.value / known.value
    variance = centred + 0.5 - mean**2
    mean_error = math.hypot(first.error, mean * known.error) / known.value
    partials = (second.error, 2 * mean * first.error, (2 * mean**2 - centred) * known.error)
    variance_error = math.hypot(*partials) / known.value
    half = column.half
    return (
        Estimate(value=column.middle + half * min(max(mean, -1.0), 1.0), error=half * min(mean_error, 1.0)),
        Estimate(value=half**2 * min(max(variance, 0.0), 1.0), error=half**2 * min(variance_error, 1.0)),
    )


def _quantiles(reading: _Reading, column: StatisticColumn, probabilities: tuple[float, ...]) -> dict[str, Estimate]:
    noisy = reading.values("bins", column.name)
    edges = column.middle + column.half * np.linspace(-1.0, 1.0, len(noisy) + 1)
    total, bins = float(noisy.sum()), len(noisy)
    if total < ENOUGH * math.sqrt(bins) * reading.error("bins", column.name) or total <= 0:
        return {}
    shares = _distribution(noisy)
    told = {}
    for probability in probabilities:
        value = _inverse(shares, edges, probability)
        # Noise in F(x) - p, where F is made of the bins below x, weighted 1 - p, and those above, weighted -p.
        below = float(np.clip((value - edges[0]) / (edges[-1] - edges[0]), 0.0, 1.0)) * bins
        spread = math.sqrt((1 - probability) ** 2 * below + probability**2 * (bins - below))
        noise = reading.error("bins", column.name) * spread / total
        reach = _inverse(shares, edges, probability + noise) - _inverse(shares, edges, probability - noise)
        told[f"{probability:g}"] = Estimate(value=value, error=math.hypot(reach / 2, _within_bin(edges)))
    return told


def _distribution(noisy: Doubles) -> Doubles:
    """The monotone function nearest to the noisy cumulative histogram, from 0 to 1 at the B + 1 edges of its bins."""
    from scipy.optimize import isotonic_regression  # slow to import, and few ask for quantiles

    middle = isotonic_regression(np.cumsum(noisy)[:-1] / float(noisy.sum())).x
    return np.concatenate([[0.0], np.clip(middle, 0.0, 1.0), [1.0]])


def _inverse(shares: Doubles, edges: Doubles, probability: float) -> float:
    """Where the distribution reaches `probability`: the middle of the stretch, if it stays there."""
    wanted = min(max(probability, 0.0), 1.0)
    right = min(int(np.searchsorted(shares, wanted, side="right")), len(shares) - 1)
    left = max(int(np.searchsorted(shares, wanted, side="left")) - 1, 0)
    return (_crossing(shares, edges, left, wanted) + _crossing(shares, edges, right - 1, wanted)) / 2


def _crossing(shares: Doubles, edges: Doubles, bin_number: int, wanted: float) -> float:
    """Where the line from edge `bin_number` to the next one has the height `wanted`; held to the bin."""
    low, high = float(shares[bin_number]), float(shares[bin_number + 1])
    part = 0.5 if high <= low else min(max((wanted - low) / (high - low), 0.0), 1.0)
    return float(edges[bin_number] + part * (edges[bin_number + 1] - edges[bin_number]))


def _within_bin(edges: NDArray[np.float64]) -> float:
    """Standard deviation of a place that is uniform in a bin: what the histogram cannot tell."""
    return float(edges[1] - edges[0]) / math.sqrt(12)


def _at_least_zero(number: Estimate) -> Estimate:
    return number.model_copy(update={"value": max(number.value, 0.0)})


def moments_of(statistics: Statistics) -> Mapping[str, tuple[Estimate, Estimate]]:
    """Mean and variance of each column that has them."""
    return {
        name: (column.mean, column.variance)
        for name, column in statistics.columns.items()
        if column.mean is not None and column.variance is not None
    }
