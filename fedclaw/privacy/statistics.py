"""Descriptive statistics of a data set as one vector that a single noise addition makes differentially private.

    v = sum over examples x of phi(x),        ||phi(x)|| <= 1 in the L2 norm,

so that adding or removing one example moves v by at most 1, whatever the example holds. Gaussian noise of standard
deviation z in every coordinate is then one Gaussian mechanism with the noise multiplier z: NoiseEvent(1.0, z, 1). Where
the unit is a person, of whom r examples at most are added up, v moves by at most r, and the deviation is r z.
Everything that is read off the noised v, or off a sum of several sites', is post-processing: means, variances,
quantiles, rates (`estimate`).

What phi holds, with the weight w of each block of coordinates. t in [-1, 1] is the value of a numeric column, clipped
to the bounds that the schema declares and scaled; nothing about the bounds comes from data.

    count     1                                    w^2 = g
    labels    one-hot of the label                 w^2 = g
    a column, whose cell is missing or is not:
      missing 1 if it is missing                   w^2 = g
      levels  one-hot of its level                 w^2 = g                 (categories)
      value   t                                    w^2 = g s               (numbers)
      square  t^2 - 1/2                            w^2 = 4 g s
      bins    one-hot of t's bin                   w^2 = g (1 - 2 s)

How the noise is split. Count, labels and each column are questions of equal standing: g = 1 / number of questions. A
cell is either missing or it is not, so both sides of a column have all of g. t^2 - 1/2 has half the range of t^2, hence
its fourfold w^2; t^2 w^2 + (t^2 - 1/2)^2 w^2 is convex in t^2 and largest where t^2 = 1, at 2 g s. s is 1/3, and 1/2
without a histogram.

Exactness. t is rounded to whole steps of 2^-20, and the examples are added up as integers, so that neither the order of
the additions nor the size of the data set changes what one example contributes. A floating-point sum does not have
that: its sensitivity is larger than the formula says (Casacuberta, Shoemate, Vadhan, Wagaman 2022, "Widespread
Underestimation of Sensitivity in Differentially Private Libraries").

What is read off a noised sum, each figure with the standard error that the noise gives it, costs nothing. The errors
are those of the noise alone, to first order (the delta method); that the data are a sample of something larger is not
in them. A value that noise has pushed out of the range that it can have is put back to its end, and a mean of next to
no known values is left out.

Legend: N examples, d coordinates, C classes, B bins, T = sum of t, Q = sum of t^2 - 1/2, K known values.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.errors import DataError
from fedclaw.protocol.frozen import Frozen

Doubles = NDArray[np.float64]
Kind = Literal["count", "labels", "missing", "levels", "value", "square", "bins"]

STEPS = 1 << 20
"""Steps from the middle of a column's bounds to either end."""

_CHUNK = 1 << 16
# Examples worked on at a time; as many squares of STEPS add up without leaving 64 bits.
_MARGIN = 1 - 2.0**-40
# Off every weight, so that rounding the weights cannot lift the norm over 1.


@dataclass(frozen=True)
class StatisticColumn:
    """A column to ask about, as the schema declares it: numbers within `bounds`, or one of `levels`."""

    name: str
    bounds: tuple[float, float] | None = None
    """Smallest and largest value; None: not declared, or the column has levels."""
    levels: tuple[str, ...] = ()
    """None for numbers."""

    @property
    def middle(self) -> float:
        """Halfway between the bounds: t = 0."""
        low, high = self._bounds()
        return low / 2 + high / 2

    @property
    def half(self) -> float:
        """From the middle to either bound: t = 1."""
        low, high = self._bounds()
        return high / 2 - low / 2

    def _bounds(self) -> tuple[float, float]:
        assert self.bounds is not None
        return self.bounds


@dataclass(frozen=True)
class Records:
    """N examples: by column (N,) numbers, or numbers of levels, NaN where missing; labels (N,) in [0, C)."""

    columns: Mapping[str, Doubles]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Coordinates [start, start + size) of the vector: what they hold of one column, and by what it is multiplied."""

    kind: Kind
    column: str
    """Empty for count and labels."""
    start: int
    size: int
    weight: float
    unit: int = 1
    """By what the integers that are added up are divided."""

    @property
    def where(self) -> slice:
        """The coordinates."""
        return slice(self.start, self.start + self.size)


class VectorDesign(Protocol):
    """What both sides have to know of a vector (d,) of statistics."""

    @property
    def rows_per_person(self) -> int | None:
        """How many rows of a person are used, the first ones of the file; None: as many as the schema says."""

    @property
    def dimension(self) -> int:
        """d."""

    @property
    def sensitivity(self) -> float:
        """How far one unit, there or not, moves the vector in the L2 norm."""

    def vector(self, records: Iterable[Records]) -> Doubles:
        """The sum over all rows, (d,), without noise."""


class Design:
    """Which coordinate is what: made from the schema and the request alone, equal at all sites and at the server."""

    rows_per_person: ClassVar[None] = None

    def __init__(
        self, columns: Sequence[StatisticColumn], classes: Sequence[str], bins: int, examples_of_unit: int = 1
    ) -> None:
        """Ask about `columns`, about the labels if there are `classes`, with histograms of `bins` bins if not 0.

        `examples_of_unit`: how many of the examples that are added up are of one unit, at most.

        Raises DataError for numbers without declared bounds.
        """
        boundless = [repr(column.name) for column in columns if column.bounds is None and not column.levels]
        if boundless:
            raise DataError(
                f"no bounds are declared of {', '.join(boundless)}, and noise is scaled by them: add range: [smallest, "
                "largest] to each in the schema file, from what is known of such values and not from the data, or "
                "leave them out of columns="
            )
        self.columns = tuple(columns)
        self.classes = tuple(classes)
        self.bins = bins
        self.sensitivity = float(examples_of_unit)
        """How far one unit, there or not, moves the vector in the L2 norm."""
        self.blocks: dict[tuple[Kind, str], Block] = {}
        self.dimension = 0
        share = 1 / (1 + bool(classes) + len(columns))
        self._add("count", "", 1, share)
        if classes:
            self._add("labels", "", len(classes), share)
        for column in columns:
            self._add("missing", column.name, 1, share)
            if column.levels:
                self._add("levels", column.name, len(column.levels), share)
            else:
                self._add_numeric(column.name, share)

    def vector(self, records: Iterable[Records]) -> Doubles:
        """v, (d,): the sum of phi over all examples, without noise."""
        total = [0] * self.dimension
        for part in records:
            for start in range(0, len(part.labels), _CHUNK):
                self._count(part, slice(start, start + _CHUNK), total)
        vector = np.empty(self.dimension)
        for block in self.blocks.values():
            vector[block.where] = [block.weight * (number / block.unit) for number in total[block.where]]
        return vector

    def _add(self, kind: Kind, column: str, size: int, square: float, unit: int = 1) -> None:
        weight = math.sqrt(square) * _MARGIN
        self.blocks[kind, column] = Block(kind, column, self.dimension, size, weight, unit)
        self.dimension += size

    def _add_numeric(self, name: str, share: float) -> None:
        moments = share / (3 if self.bins else 2)
        self._add("value", name, 1, moments, STEPS)
        self._add("square", name, 1, 4 * moments, STEPS**2)
        if self.bins:
            self._add("bins", name, self.bins, share - 2 * moments)

    def _count(self, records: Records, rows: slice, total: list[int]) -> None:
        labels = records.labels[rows]
        self._take(total, "count", "", [len(labels)])
        if self.classes:
            self._take(total, "labels", "", np.bincount(labels, minlength=len(self.classes)))
        for column in self.columns:
            values = records.columns[column.name][rows]
            known = values[~np.isnan(values)]
            self._take(total, "missing", column.name, [len(values) - len(known)])
            if column.levels:
                levels = np.bincount(known.astype(np.int64), minlength=len(column.levels))
                self._take(total, "levels", column.name, levels)
            else:
                self._count_numeric(column, known, total)

    def _count_numeric(self, column: StatisticColumn, known: Doubles, total: list[int]) -> None:
        steps = _steps(column, known)
        self._take(total, "value", column.name, [steps.sum()])
        self._take(total, "square", column.name, [(steps**2 - STEPS**2 // 2).sum()])
        if self.bins:
            self._take(total, "bins", column.name, np.bincount(_bins(steps, self.bins), minlength=self.bins))

    def _take(self, total: list[int], kind: Kind, column: str, numbers: Iterable[np.int64 | int]) -> None:
        start = self.blocks[kind, column].start
        for offset, number in enumerate(numbers):
            total[start + offset] += int(number)


def bins_of(column: StatisticColumn, values: Doubles, bins: int) -> NDArray[np.int64]:
    """In which of the equal bins between the bounds each number (n,) is counted; out of bounds, in the outer ones."""
    return _bins(_steps(column, values), bins)


def bin_edges(column: StatisticColumn, bins: int) -> Doubles:
    """Where the equal bins begin and end, (B + 1,)."""
    edges: Doubles = column.middle + column.half * np.linspace(-1.0, 1.0, bins + 1)
    return edges


def _bins(steps: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    return np.minimum((steps + STEPS) * bins // (2 * STEPS), bins - 1)


def _steps(column: StatisticColumn, values: Doubles) -> NDArray[np.int64]:
    """t in whole steps, (n,) in [-STEPS, STEPS]; a value out of bounds counts as the bound."""
    low, high = column._bounds()
    t = (np.clip(values, low, high) - column.middle) / column.half
    return np.rint(np.clip(t, -1.0, 1.0) * STEPS).astype(np.int64)


ENOUGH = 3.0
"""Standard errors that the number of known values has to be away from 0 for anything to be divided by it."""


class Estimate(Frozen):
    """A figure and its standard error."""

    value: float
    error: float


class Histogram(Frozen):
    """Numbers of examples in equal bins from the smallest to the largest declared value, as they came: noise may have
    put some below 0."""

    counts: tuple[float, ...] = Field(min_length=1)
    error: float = Field(ge=0)
    """Standard error of each."""


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
    histogram: Histogram | None = None
    """What the quantiles are read from. None: none was asked for, or the column has levels."""


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
    found: dict[str, Any] = {"mean": mean, "variance": variance}
    if reading.design.bins:
        found |= {
            "quantiles": _quantiles(reading, column, probabilities),
            "histogram": Histogram(
                counts=tuple(reading.values("bins", column.name).tolist()), error=reading.error("bins", column.name)
            ),
        }
    return told.model_copy(update=found)


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
    edges = bin_edges(column, len(noisy))
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
