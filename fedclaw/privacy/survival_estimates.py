"""Survival curves and the log-rank test from one noised histogram of times, with the noise in their bands and p-values.

All of it is made of the noised cells H, (G, K, 2), of `fedclaw.privacy.survival`, and costs nothing more. With
n_k = sum over j >= k of H[., j, .], the number at risk when bin k begins:

    S_k = product over j <= k of (1 - H[., j, 1] / n_j)                    Kaplan and Meier 1958
    Z_g = sum over k of (O_gk - n_gk O_k / n_k), and its covariance        Mantel 1966; Peto and Peto 1972

An event counts as before a censoring in the same bin. Where bins are the unit in which times are measured, this is what
the rows' own times give; with wider bins, it is what those times give that are rounded up to the end of their bin.

Noise. A cell's noise has standard deviation s, so that of n_k has s sqrt(2 (K - k)). A cell stays as it came, below 0
too: put back to 0 one by one, the many cells without an event would add up to events that nobody had. The product of
noised factors does not fall everywhere; the curve is the nearest one that does. It ends where the noise no longer tells
the number at risk from 0 (ENOUGH standard errors), or where fewer are at risk than may be shown. Both are read off the
noised numbers.

Bands are pointwise, by a parametric bootstrap: curves are made again from the estimated cells, with the chance of the
rows and of the noise, and their root mean square distance is taken on the scale of arcsin(sqrt(S)), on which a band
stays within [0, 1] (Nair 1984, "Confidence Bands for Survival Functions with Censored Data"). The log-rank test's
p-value is how often Z is as large if all groups have one hazard, with fresh noise. Without noise both are the usual
formulas: Greenwood's variance on the scale of log(-log S), and chi-squared.

Legend: G groups, K bins, D draws, k in [0, K), `end` bins that a curve reaches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedclaw.privacy.statistics import ENOUGH, Doubles
from fedclaw.protocol.frozen import Frozen

_DRAWS = 999
SMALLEST_P = 1 / (1 + _DRAWS)
"""No simulated p-value is below it: one that is at it may be far smaller."""
_HALF = 0.5 * (1 + 1e-12)
# A product that is one half but for rounding is one half.


class Curve(Frozen):
    """The survival of one group, one number for each bin that it reaches."""

    survival: tuple[float, ...]
    """Share without the event at the end of the bin."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    at_risk: tuple[float, ...]
    """Number at risk when the bin begins, noised."""

    def median(self, ends: Sequence[float]) -> tuple[float | None, float | None, float | None]:
        """The end of the first bin after which at most half are without the event, and its own band.

        The band is where those of the curve cross one half (Brookmeyer and Crowley 1982); None where none does.
        """
        return (_crossing(self.survival, ends), _crossing(self.low, ends), _crossing(self.high, ends))


class LogRank(Frozen):
    """Whether groups differ: the statistic, and how often it is as large where they do not."""

    statistic: float
    p_value: float
    bins: int
    """Bins that were compared: those in which the number at risk is known of every group."""


@dataclass(frozen=True)
class NoisedHistogram:
    """`cells` (G, K, 2) as released, with noise of standard deviation `deviation` in each; 0: exact."""

    cells: Doubles
    deviation: float
    smallest: float = 0.0
    """A curve ends where fewer than these are at risk."""


def curves(histogram: NoisedHistogram, *, level: float = 0.95, seed: int = 0) -> list[Curve]:
    """The curve of each group, with bands that hold the true share with probability `level` at each bin.

    `seed` makes the same bands of the same release.
    """
    random = np.random.default_rng(seed)
    return [_curve(cells, histogram, level, random) for cells in histogram.cells]


def log_rank(histogram: NoisedHistogram, *, seed: int = 0) -> LogRank | None:
    """Whether the hazard is the same in all groups; None with one group, or where too few are at risk to compare."""
    cells, deviation = histogram.cells, histogram.deviation
    end = min(_reach(_at_risk(group), deviation, histogram.smallest) for group in cells)
    if len(cells) < 2 or end == 0:
        return None
    statistic = float(_log_rank(cells[None, :, :], end)[0])
    if deviation == 0:
        from scipy.stats import chi2

        return LogRank(statistic=statistic, p_value=float(chi2.sf(statistic, len(cells) - 1)), bins=end)
    random = np.random.default_rng(seed)
    pooled = _hazards(_survival(cells.sum(axis=0)[None], end)[0])
    drawn = np.stack([_draw(*_shares(pooled, group), deviation, random) for group in cells], axis=1)
    larger = int((_log_rank(drawn, end) >= statistic).sum())
    return LogRank(statistic=statistic, p_value=(1 + larger) / (1 + _DRAWS), bins=end)


def _curve(cells: Doubles, histogram: NoisedHistogram, level: float, random: np.random.Generator) -> Curve:
    from scipy.stats import norm

    at_risk = _at_risk(cells)
    end = _reach(at_risk, histogram.deviation, histogram.smallest)
    survival = _survival(cells[None], end)[0]
    z = float(norm.ppf(0.5 + level / 2))
    if histogram.deviation == 0:
        low, high = _greenwood(cells[:end], at_risk[:end], survival, z)
    else:
        low, high = _bootstrap(cells, histogram, survival, z, random)
    return Curve(survival=tuple(survival), low=tuple(low), high=tuple(high), at_risk=tuple(at_risk[:end]))


def _crossing(shares: Sequence[float], ends: Sequence[float]) -> float | None:
    return next((end for end, share in zip(ends, shares, strict=False) if share <= _HALF), None)


def _at_risk(cells: Doubles) -> Doubles:
    """n_k of (..., K, 2), (..., K)."""
    return np.cumsum(cells.sum(axis=-1)[..., ::-1], axis=-1)[..., ::-1]


def _reach(at_risk: Doubles, deviation: float, smallest: float) -> int:
    """In how many bins from the first on the number at risk, (K,), is known well enough."""
    bins = len(at_risk)
    errors = deviation * np.sqrt(2.0 * (bins - np.arange(bins)))
    unknown = (at_risk <= ENOUGH * errors) | (at_risk < smallest)
    return int(np.argmax(unknown)) if unknown.any() else bins


def _survival(cells: Doubles, end: int) -> Doubles:
    """The curves of (D, K, 2), falling and within [0, 1], (D, end)."""
    from scipy.optimize import isotonic_regression

    at_risk, events = _at_risk(cells)[:, :end], cells[:, :end, 1]
    # Of a drawn curve, fewer may be at risk than of the one that says how far to go.
    hazards = np.clip(events / np.maximum(at_risk, 1.0), -1.0, 1.0)
    raw = np.cumprod(1 - hazards, axis=1)
    falling = np.array([isotonic_regression(curve, increasing=False).x for curve in raw] if end else raw)
    return np.clip(falling, 0.0, 1.0, out=falling)


def _greenwood(cells: Doubles, at_risk: Doubles, survival: Doubles, z: float) -> tuple[Doubles, Doubles]:
    """The usual band, (end,) and (end,), on the scale of log(-log S); a share of 1 or 0 is its own band."""
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.cumsum(cells[:, 1] / (at_risk * (at_risk - cells[:, 1])))
        factor = np.exp(z * np.sqrt(variance) / np.log(survival))
        low, high = survival ** (1 / factor), survival**factor
    inside = (survival > 0) & (survival < 1)
    return np.where(inside, low, survival), np.where(inside, high, survival)


def _bootstrap(
    cells: Doubles, histogram: NoisedHistogram, survival: Doubles, z: float, random: np.random.Generator
) -> tuple[Doubles, Doubles]:
    """The band around `survival` (end,) of which the rows' and the noise's chance are part."""
    end = len(survival)
    if end == 0:
        return survival, survival
    shares, size = _shares(_hazards(survival), cells)
    again = _scale(_survival(_draw(shares, size, histogram.deviation, random), end))
    truth = _scale(_survival(size * shares[None], end))
    error = np.maximum.accumulate(np.sqrt(np.square(again - truth).mean(axis=0)))
    low, high = (np.clip(_scale(survival) + side * z * error, 0, math.pi / 2) for side in (-1, 1))
    return np.sin(low) ** 2, np.sin(high) ** 2


def _scale(shares: Doubles) -> Doubles:
    return np.arcsin(np.sqrt(shares))


def _hazards(survival: Doubles) -> Doubles:
    """Share of those at risk who have the event in each bin, (end,), by a curve."""
    before = np.concatenate([[1.0], survival[:-1]])
    return 1 - survival / np.where(before > 0, before, 1.0)


def _shares(hazards: Doubles, cells: Doubles) -> tuple[Doubles, int]:
    """The estimated share of each cell, (K, 2), and the number of rows: by hazards (end,) and who stays on.

    That is read off the noised (K, 2) `cells`: the number at risk, made to fall, less the events that the hazards say.
    From bin `end` on nobody is told from nobody: who is left there is censored in the first of them.
    """
    from scipy.optimize import isotonic_regression

    end = len(hazards)
    at_risk = np.maximum(isotonic_regression(_at_risk(cells), increasing=False).x, 0.0)
    after = np.append(at_risk[1:], 0.0)
    estimated = np.zeros_like(cells)
    estimated[:end, 1] = np.minimum(at_risk[:end] * hazards, at_risk[:end] - after[:end])
    estimated[:end, 0] = at_risk[:end] - after[:end] - estimated[:end, 1]
    if end < len(cells):
        estimated[end, 0] = at_risk[end]
    size = max(1, round(float(at_risk[0])))
    return estimated / max(float(at_risk[0]), 1e-9), size


def _draw(shares: Doubles, size: int, deviation: float, random: np.random.Generator) -> Doubles:
    """Noised histograms of `size` rows that fall into cells (K, 2) by chance, (D, K, 2)."""
    counts = random.multinomial(size, shares.ravel() / shares.sum(), size=_DRAWS).reshape(-1, *shares.shape)
    return counts + deviation * random.standard_normal(counts.shape)


def _log_rank(cells: Doubles, end: int) -> Doubles:
    """The statistic of each of (D, G, K, 2) over the first `end` bins, (D,)."""
    at_risk, events = _at_risk(cells)[..., :end], cells[:, :, :end, 1]
    all_at_risk, all_events = np.maximum(at_risk.sum(axis=1), 1.0), events.sum(axis=1)
    share = at_risk / all_at_risk[:, None]
    excess = (events - share * all_events[:, None]).sum(axis=2)[:, :-1]
    # A hypergeometric distribution's variance for each bin; noise may push a number of events below 0.
    factor = all_events * (all_at_risk - all_events) / np.maximum(all_at_risk - 1, 1.0)
    covariance = -np.einsum("dk,dgk,dhk->dgh", factor, share, share)
    covariance += np.einsum("dk,dgk,gh->dgh", factor, share, np.eye(cells.shape[1]))
    inverse = np.linalg.pinv(covariance[:, :-1, :-1], hermitian=True)
    statistic: Doubles = np.abs(np.einsum("dg,dgh,dh->d", excess, inverse, excess))
    return statistic
