"""Whether what a node is asked differs from a baseline by more than chance and noise can.

The baseline of a feature is a distribution over cells: of the sites' training rows, from a charged question, with noise
of known deviation (marginals.json); or of the first rows served. What was served since is counted in the same cells.

Figures. PSI, the population stability index sum (p - q) ln(p / q) over merged cells, less what chance and noise alone
make of it on average; KS, the largest difference of the two distribution functions at the ends of bins.

Rule. A feature is an alarm if a test at the level alpha / m rejects that both are of one distribution, m being all
tests of a version, and the difference is large enough to matter. So a version without drift raises an alarm in a window
with a probability of at most alpha, whatever its number of features (Bonferroni), as long as rows are independent. The
tests, each with the noise of the baseline and the sizes of both samples in it:

    cells   chi-square of the merged cells, whose differences have the covariance
            (1/n + 1/N) (diag(q) - q q') + P S P',    P = I - q 1',  S the noise's variances
            (`P` because noised shares are made to sum to 1); each merged cell holds 5% of the baseline and is expected
            to have 10 rows at least
    steps   of numbers: at some end of a bin the distribution functions differ by more than the DKW bounds of both
            samples (Massart 1990, any distribution) and the noise there together
    share   of what is missing, of rows that are refused, of levels that the baseline has next to none of: disjoint
            Clopper-Pearson intervals, that of the baseline widened by its noise

Legend: n rows served, N rows of the baseline, B cells, K merged cells, p shares served, q shares of the baseline.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, chdtrc, ndtri

from fedclaw.export.marginals import ColumnMarginal, Marginals
from fedclaw.serve.monitoring.input_counts import MISSING, REFUSED, InputCounts, InputFeature, InputFeatures

Doubles = NDArray[np.float64]

LEAST_SHARE = 0.05
"""Of the baseline in a merged cell."""
LEAST_EXPECTED = 10.0
"""Rows expected in a merged cell."""
MOST_NOISE = 0.1
"""Standard error of the noised number of known values, as a part of it, at most: a column with more is not compared.
The tests' approximations hold below it, as the simulation in the tests shows, and not far above."""
TESTS_OF_A_FEATURE = 3


@dataclass(frozen=True)
class DriftRule:
    """When a difference is an alarm."""

    alpha: float = 0.01
    """Probability of a false alarm of a version in a window, at most."""
    least_rows: int = 200
    """Fewer are not compared."""
    psi: float = 0.1
    """The least PSI that matters; 0.1 to 0.25 is commonly called a moderate shift, more a large one."""
    ks: float = 0.1
    """The least difference of distribution functions that matters."""
    share: float = 0.05
    """The least change of a share that matters."""


@dataclass(frozen=True)
class BaselineShare:
    """A share of rows: what it was, the standard error that noise gives it, of how many rows."""

    share: float
    error: float = 0.0
    rows: float | None = None
    """None: it is a rule, and no estimate."""


@dataclass(frozen=True)
class BaselineFeature:
    """A feature's distribution over its B cells."""

    shares: Doubles
    """(B,), which sum to 1; noise may have put some below 0."""
    error: float
    """Standard error of each, before they were made to sum to 1."""
    rows: float
    """Known values that it is of."""
    missing: BaselineShare | None


@dataclass(frozen=True)
class DriftBaseline:
    """What a version's inputs are held against."""

    source: str
    """In words: which charged question, or how many of the first rows."""
    features: Mapping[str, BaselineFeature]
    refused: BaselineShare

    @classmethod
    def charged(cls, marginals: Marginals) -> "DriftBaseline":
        """The sites' training rows, none of which was refused. Columns that are mostly noise are left out."""
        rows = marginals.examples.value
        features = {
            name: _charged(column, rows)
            for name, column in marginals.columns.items()
            if column.error * math.sqrt(len(column.shares)) <= MOST_NOISE
        }
        return cls(f"the charged question {marginals.release}", features, BaselineShare(0.0))

    @classmethod
    def first_rows(cls, counts: InputCounts) -> "DriftBaseline":
        """The first rows served."""
        features = {name: _counted(found, counts.rows) for name, found in counts.features.items()}
        return cls(
            f"the first {counts.rows} sampled rows served",
            {name: found for name, found in features.items() if found is not None},
            BaselineShare(counts.refused / max(counts.rows, 1), 0.0, float(counts.rows)),
        )


@dataclass(frozen=True)
class FeatureDrift:
    """How one feature compares."""

    psi: float
    """Less what chance and noise make of it on average; at least 0."""
    ks: float | None
    """None of levels."""
    missing: float
    """Share of rows."""
    missing_before: float | None
    reasons: tuple[str, ...]
    """Why it is an alarm: `cells`, `steps`, `rare`, `missing`; none: it is not."""

    @property
    def alarm(self) -> bool:
        """Whether it is one."""
        return bool(self.reasons)


@dataclass(frozen=True)
class DriftReport:
    """How a version's inputs compare in a window."""

    baseline: str
    rows: int
    features: Mapping[str, FeatureDrift]
    refused: float
    refused_alarm: bool

    @property
    def alarms(self) -> tuple[str, ...]:
        """The features that drifted, and `refused rows`."""
        found = tuple(name for name, one in self.features.items() if one.alarm)
        return (*found, *(("refused rows",) if self.refused_alarm else ()))


def compare(
    features: InputFeatures, baseline: DriftBaseline, counts: InputCounts, rule: DriftRule
) -> DriftReport | None:
    """Hold the counts of a window against the baseline; None: too few rows."""
    if counts.rows < rule.least_rows:
        return None
    compared = [one for one in features.features if one.name in baseline.features]
    level = rule.alpha / (TESTS_OF_A_FEATURE * len(compared) + 1)
    found = {
        one.name: _feature(one, baseline.features[one.name], counts.features[one.name], level, rule) for one in compared
    }
    refused = counts.refused / counts.rows
    alarm = _moved(counts.refused, counts.rows, baseline.refused, level, rule)
    return DriftReport(baseline.source, counts.rows, found, refused, alarm)


def _feature(
    feature: InputFeature, baseline: BaselineFeature, counts: NDArray[np.int64], level: float, rule: DriftRule
) -> FeatureDrift:
    known = counts[: feature.cells].astype(np.float64)
    asked = float(counts.sum() - counts[REFUSED])
    missing = int(counts[MISSING])
    reasons = []
    psi, ks = 0.0, 0.0 if not feature.column.levels else None
    if known.sum() >= rule.least_rows / 2:
        ordered = not feature.column.levels
        psi, significant, rare = _cells(known, baseline, ordered, level, rule)
        if significant and psi >= rule.psi:
            reasons.append("cells")
        if rare:
            reasons.append("rare")
        if ordered:
            ks, beyond = _steps(known, baseline, level)
            if beyond and ks >= rule.ks:
                reasons.append("steps")
    before = baseline.missing
    if before is not None and asked > 0 and _moved(missing, int(asked), before, level, rule):
        reasons.append("missing")
    share = missing / asked if asked else 0.0
    return FeatureDrift(psi, ks, share, before.share if before else None, tuple(reasons))


def _cells(
    known: Doubles, baseline: BaselineFeature, ordered: bool, level: float, rule: DriftRule
) -> tuple[float, bool, bool]:
    """PSI without its mean, whether the chi-square test rejects, and whether a rare level is no longer rare."""
    n = float(known.sum())
    least = max(LEAST_SHARE, LEAST_EXPECTED / n)
    groups = _adjacent(baseline.shares, least) if ordered else _frequent(baseline.shares, least)
    rare = False
    told = _Grouped.of(known, baseline, groups)
    if baseline.shares[groups[-1]].sum() < least and len(groups) > 1:
        *groups, last = groups
        share = BaselineShare(float(told.q[-1]), baseline.error * math.sqrt(len(last)), baseline.rows)
        rare = _moved(int(known[last].sum()), int(n), share, level, rule)
        groups[-1] = groups[-1] + last
    tested = _Grouped.of(known, baseline, groups)
    return told.psi, tested.chance < level, rare


@dataclass(frozen=True)
class _Grouped:
    """Shares of merged cells, (K,), and the covariance of p - q where both are of one distribution, (K, K)."""

    n: float
    p: Doubles
    q: Doubles
    covariance: Doubles

    @classmethod
    def of(cls, known: Doubles, baseline: BaselineFeature, groups: Sequence[Sequence[int]]) -> "_Grouped":
        n = float(known.sum())
        p = np.array([known[group].sum() for group in groups]) / n
        q = np.array([baseline.shares[group].sum() for group in groups])
        q = np.clip(q, 0.5 / baseline.rows, 1.0)
        noise = baseline.error**2 * np.array([len(group) for group in groups], np.float64)
        return cls(n, p, q, _covariance(q, noise, 1 / n + 1 / baseline.rows))

    @property
    def psi(self) -> float:
        """Less its mean; at least 0."""
        held = np.maximum(self.p, 0.5 / self.n)
        raw = float(((held - self.q) * np.log(held / self.q)).sum())
        return max(raw - float((np.diag(self.covariance) / self.q).sum()), 0.0)

    @property
    def chance(self) -> float:
        """Of a difference as large as this one, by the chi-square test."""
        if len(self.p) < 2:
            return 1.0
        gap = (self.p - self.q)[:-1]
        statistic = float(gap @ np.linalg.solve(self.covariance[:-1, :-1], gap))
        return float(chdtrc(len(gap), statistic))


def _covariance(q: Doubles, noise: Doubles, sampling: float) -> Doubles:
    """(K, K) of p - q where both are of one distribution."""
    project = np.eye(len(q)) - np.outer(q, np.ones(len(q)))
    found: Doubles = sampling * (np.diag(q) - np.outer(q, q)) + project @ np.diag(noise) @ project.T
    return found


def _adjacent(shares: Doubles, least: float) -> list[list[int]]:
    """Neighbouring cells put together until each group has the least share."""
    groups: list[list[int]] = [[]]
    for cell in range(len(shares)):
        groups[-1].append(cell)
        if shares[groups[-1]].sum() >= least and cell + 1 < len(shares):
            groups.append([])
    if len(groups) > 1 and shares[groups[-1]].sum() < least:
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def _frequent(shares: Doubles, least: float) -> list[list[int]]:
    """The cells that have the least share, the most frequent first; the others are one group, the last."""
    order = np.argsort(-shares, kind="stable").tolist()
    groups = [[cell] for cell in order if shares[cell] >= least]
    rest = [cell for cell in order if shares[cell] < least]
    return [*groups, rest] if rest else groups


def _steps(known: Doubles, baseline: BaselineFeature, level: float) -> tuple[float, bool]:
    """The largest difference of the distribution functions, and whether one is beyond chance and noise."""
    n, bins = float(known.sum()), len(known)
    served, before = np.cumsum(known)[:-1] / n, np.cumsum(baseline.shares)[:-1]
    gaps = np.abs(served - before)
    below = np.arange(1, bins, dtype=np.float64)
    place = np.clip(before, 0.0, 1.0)
    noise = baseline.error * np.sqrt((1 - place) ** 2 * below + place**2 * (bins - below))
    part = level / 3
    chance = _dkw(n, part) + _dkw(baseline.rows, part)
    reach = -float(ndtri(part / (2 * max(bins - 1, 1)))) * noise
    return float(gaps.max(initial=0.0)), bool((gaps > chance + reach).any())


def _dkw(rows: float, level: float) -> float:
    """How far an empirical distribution function is from the true one, but with the probability `level`."""
    return math.sqrt(math.log(2 / level) / (2 * rows))


def _moved(found: int, rows: int, before: BaselineShare, level: float, rule: DriftRule) -> bool:
    """Whether a share changed by more than chance and noise, and enough to matter."""
    if rows == 0 or abs(found / rows - before.share) < rule.share:
        return False
    part = level / 6
    low, high = _interval(float(found), float(rows), part)
    reach = -float(ndtri(part)) * before.error
    least, most = max(before.share - reach, 0.0), min(before.share + reach, 1.0)
    if before.rows is not None:
        least, _ = _interval(least * before.rows, before.rows, part)
        _, most = _interval(most * before.rows, before.rows, part)
    return low > most or high < least


def _interval(found: float, rows: float, level: float) -> tuple[float, float]:
    """Clopper and Pearson's: each end is wrong with a probability of at most `level`."""
    low = 0.0 if found <= 0 else float(betaincinv(found, rows - found + 1, level))
    high = 1.0 if found >= rows else float(betaincinv(found + 1, rows - found, 1 - level))
    return low, high


def _charged(column: ColumnMarginal, rows: float) -> BaselineFeature:
    missing = column.missing
    known = rows * (1 - (missing.value if missing else 0.0))
    return BaselineFeature(
        np.array(column.shares),
        column.error,
        max(known, 1.0),
        None if missing is None else BaselineShare(missing.value, missing.error, max(rows, 1.0)),
    )


def _counted(counts: NDArray[np.int64], rows: int) -> BaselineFeature | None:
    known = counts[:MISSING].astype(np.float64)
    total = float(known.sum())
    if total < 1:
        return None
    missing = BaselineShare(float(counts[MISSING]) / rows, 0.0, float(rows))
    return BaselineFeature(known / total, 0.0, total, missing)


def fits(feature: InputFeature, column: ColumnMarginal) -> bool:
    """Whether a charged question counted in the same cells."""
    if feature.column.levels:
        return column.levels == feature.column.levels
    edges: Sequence[float] = column.edges
    return len(edges) == feature.bins + 1 and (edges[0], edges[-1]) == feature.column.bounds
