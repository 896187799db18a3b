"""Values drawn from what a release of statistics says of one column: its marginal distribution, noise and all.

Whatever the release holds, the values lie within what the schema declares. That columns depend on each other is not in
a release, so it is not in what is drawn either.
"""

import numpy as np

from fedclaw.errors import DataError
from fedclaw.privacy.statistics import ColumnStatistics, Doubles, StatisticColumn

LEAST_SPREAD = 1e-9
"""Variance of a column in squares of its range, at least; at most as much below that of a fair coin's ends."""


def draw(column: StatisticColumn, told: ColumnStatistics, count: int, generator: np.random.Generator) -> Doubles | None:
    """(count,) numbers, or numbers of levels, NaN where missing; None where the release does not say enough.

    Numbers follow the quantiles, linear between them and the declared bounds; without any, the beta distribution over
    the bounds that has their mean and variance. Raises DataError for what no release says.
    """
    values = _levels(column, told, count, generator) if column.levels else _numbers(column, told, count, generator)
    if values is None:
        return None
    rate = told.missing_rate.value if told.missing_rate is not None else 0.0
    return np.where(generator.random(count) < rate, np.nan, values)


def _levels(
    column: StatisticColumn, told: ColumnStatistics, count: int, generator: np.random.Generator
) -> Doubles | None:
    if unknown := sorted(set(told.levels) - set(column.levels)):
        raise DataError(f"the column {column.name!r} has no level {unknown[0]!r:.100}")
    counts = np.array([told.levels[level].value if level in told.levels else 0.0 for level in column.levels])
    counts = np.maximum(counts, 0.0)
    if not counts.max():
        return None
    shares = counts / counts.max()  # first by the largest, so that no sum is infinite
    return generator.choice(len(shares), count, p=shares / shares.sum()).astype(np.float64)


def _numbers(
    column: StatisticColumn, told: ColumnStatistics, count: int, generator: np.random.Generator
) -> Doubles | None:
    if column.bounds is None:
        return None
    low, high = column.bounds
    if told.quantiles:
        places, values = _inverse(column, told)
        return np.interp(generator.random(count), places, values)
    if told.mean is None or told.variance is None:
        return None
    width = high - low
    mean = float(np.clip((told.mean.value - low) / width, LEAST_SPREAD, 1 - LEAST_SPREAD))
    most = mean * (1 - mean)
    variance = float(np.clip(told.variance.value / width / width, LEAST_SPREAD * most, most * (1 - LEAST_SPREAD)))
    strength = most / variance - 1
    return low + width * generator.beta(mean * strength, (1 - mean) * strength, count)


def _inverse(column: StatisticColumn, told: ColumnStatistics) -> tuple[Doubles, Doubles]:
    """Points of the inverse distribution function, from bound to bound; noise does not make it fall."""
    low, high = column._bounds()
    try:
        found = sorted((float(place), estimate.value) for place, estimate in told.quantiles.items())
    except ValueError as error:
        raise DataError(f"a quantile of the column {column.name!r} is at no number") from error
    if not all(0 < place < 1 for place, _ in found):
        raise DataError(f"a quantile of the column {column.name!r} is not between 0 and 1")
    values = np.clip(np.maximum.accumulate([value for _, value in found]), low, high)
    return np.array([0.0, *(place for place, _ in found), 1.0]), np.array([low, *values, high])
