"""Sequential tests of a canary: right at every look, however often somebody looks, and whenever the test stops.

What is tested. y = 1 for a key whose first call in the epoch failed (errors) or was slow (latency), 0 for any other.
Keys are hashed to the versions, so the two versions' keys are two random samples. With p the stable version's mean of y
and q the canary's, in the same period, and a margin m:

    roll back   rejects  q <= p + m    at level alpha / (guards x steps)
    grow        rejects  q >= p + m    at level growth_alpha

Agreement has one sample: y = 1 if the versions disagree in the row that is looked at, and a fixed boundary, the allowed
rate, stands for p + m. So does m plus a bound on p from the step before (`ceiling`) when all keys are the canary's.

How. A look sees n_a keys of the stable version with x_a ones, and n_b with x_b of the canary. For a guess (p', q') made
before the look, let (t, t + m) be the point on the boundary that is nearest by Kullback-Leibler divergence, weighted by
n_a and n_b. The look's e-value is the likelihood ratio of (p', q') to (t, t + m):

    S = (p'/t)^x_a ((1-p')/(1-t))^(n_a-x_a) (q'/(t+m))^x_b ((1-q')/(1-t-m))^(n_b-x_b)

Theorem. Under the null hypothesis the expectation of S given the past is at most 1; so the product over looks, and any
average of such products, is a non-negative supermartingale that begins at 1. By Ville's inequality (Ville 1939) it ever
reaches 1/alpha with probability at most alpha, whatever rule says when to look and when to stop.
Proof. A factor is linear in y: 1 + s_a (y - t) with s_a = (p'-t)/(t(1-t)), and 1 + s_b (y - t - m) with s_b alike. As t
minimises the divergence, n_a s_a + n_b s_b = 0. Given the past, keys are independent, so with means p_i and q_j the
expectation is the product of all 1 + s_a (p_i - t) and 1 + s_b (q_j - t - m), by the arithmetic and geometric mean at
most (1 + n_b s_b (q - p - m)/n)^n, where p and q are the means over the look. s_b has the sign of q' - p' - m. QED
This is the E-variable of Turner, Ly and Gruenwald (Journal of Statistical Planning and Inference 230, 2024, Theorem 1)
with the margin of Turner and Gruenwald (arXiv 2203.09785). p and q may be others at each look (load, hour of the day)
and for each key. Guesses: p' is the mean so far; q' = p' + d for each of several d, with equal weight.

Sample size. If the canary's rate is q, about log(guards x steps x guesses / alpha) / KL(q, p + m) of its keys, where
KL(q, r) = q log(q/r) + (1-q) log((1-q)/(1-r)), if the stable version has many more keys than the canary. As many of
both count: with p near 0 that takes no more, else up to twice as many.

What is assumed: first calls of distinct keys, of one version and in one period, are independent, and equal versions
have equal means. Three things could break that, and are held in check where keys are counted (`unsent_counts.py`,
`counting.py`). Calls of one key: it counts once. Calls that are slow or fail together: in each quarter of a second and
worker one latency of a version counts, and the outcomes of at most four keys of a group. Keys of other clients or of
another second, of which one version has relatively more in such a sample: keys count in pairs. A principal may make up
thousands of keys; so all products are kept with each group of clients left out as well (`verdict`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, model_validator

from fedclaw.protocol.frozen import Frozen
from fedclaw.serve.routing.counting import GROUPS

Counts = NDArray[np.float64]
Says = Literal["roll_back", "hold", "wait", "grow"]
"""hold: the evidence against the canary is one group of clients' alone, and the others have not said enough."""
Seen = tuple[int, int, int, int]
"""Keys of the stable version and ones among them, keys of the canary and ones among them."""
EXCESS = (0.01, 0.03, 0.08, 0.2, 0.45, 0.8)
"""Guesses of what the canary's rate exceeds the boundary by."""
_WITHIN = (
    0.02,
    0.5,
)  # Guesses of the canary's excess, or rate, as a part of the margin or boundary: it is fit to grow.
_PRIOR_ONES, _PRIOR_KEYS = 0.05, 1.0  # What is guessed of a rate before anything is seen, and its weight.
_BORNE_OUT = 0.02
_TINY = 1e-9
_HALVINGS = 50
_MOST = 1e300
_NOTHING: tuple[Seen, ...] = ((0, 0, 0, 0),) * GROUPS


class GuardRecord(Frozen):
    """One guard's state, as it lies in the state store."""

    seen: tuple[Seen, ...] = _NOTHING
    """Of each group of clients."""
    against: tuple[tuple[float, ...], ...] = ((0.0,) * len(EXCESS),) * (GROUPS + 1)
    """Logarithms of the products that reject q <= p + m: with nobody left out, then with each group; by guess."""
    favour: tuple[tuple[float, ...], ...] = ((0.0,) * len(_WITHIN),) * (GROUPS + 1)
    """The same of those that reject q >= p + m."""
    crossed: float | None = None
    """Unix time at which the evidence of all clients together first sufficed against the canary."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        shapes = [(GROUPS + 1, len(EXCESS)), (GROUPS + 1, len(_WITHIN)), (GROUPS, 4)]
        for rows, (count, width) in zip((self.against, self.favour, self.seen), shapes, strict=True):
            if len(rows) != count or any(len(row) != width for row in rows):
                raise ValueError("not the groups or guesses of this release")
        return self

    @property
    def total(self) -> Seen:
        """Of all groups."""
        stable, ones, canary, canary_ones = (sum(column) for column in zip(*self.seen, strict=True))
        return stable, ones, canary, canary_ones


@dataclass(frozen=True, slots=True)
class Levels:
    """At which levels a guard's two hypotheses are rejected."""

    roll_back: float
    grow: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a guard says now, and from which numbers."""

    says: Says
    record: GuardRecord
    numbers: dict[str, JsonValue]


def look(record: GuardRecord, new: Sequence[Seen], margin: float, boundary: float | None = None) -> GuardRecord:
    """`record` after one more look, at which `new` was seen, by group. With `boundary` there is no stable version to
    compare with."""
    against, favour = log_e_values(_left_out(record.seen), _left_out(new), margin, boundary)
    return record.model_copy(
        update={
            "seen": tuple(tuple(map(sum, zip(*pair, strict=True))) for pair in zip(record.seen, new, strict=True)),
            "against": _rows(np.array(record.against) + against),
            "favour": _rows(np.array(record.favour) + favour),
        }
    )


def log_e_values(before: Counts, new: Counts, margin: float, boundary: float | None = None) -> tuple[Counts, Counts]:
    """log S of one look for R tests at once: (R, D) against the canary and (R, F) in its favour, by guess.

    `before`, from which guesses are made, and `new` are (R, 4) as `Seen`.
    """
    if boundary is not None:
        against = _log_ratio_to(new, boundary + np.array(EXCESS), boundary)
        return against, _log_ratio_to(new, boundary * np.array(_WITHIN), boundary)
    stable = _rate(before[:, 0], before[:, 1])
    pooled = _rate(before[:, 0] + before[:, 2], before[:, 1] + before[:, 3])
    against = _log_ratio(new, stable, np.minimum(stable + margin + np.array(EXCESS), 1 - _TINY), margin)
    favour = _log_ratio(new, pooled, np.minimum(pooled + margin * np.array(_WITHIN), 1 - _TINY), margin)
    # Where no rate exceeds the limit there is nothing to bet on.
    return np.where(stable + margin < 1 - _TINY, against, 0.0), favour


def verdict(record: GuardRecord, levels: Levels, least_keys: int, patience: float, now: float) -> Verdict:
    """What the evidence is enough for.

    Against the canary the others have to bear it out at level `_BORNE_OUT` when any one group of clients is left out,
    unless only one group uses the model. Evidence that hinges on one group holds the canary where it is. If the others
    then show by themselves that it is within the margin, that group is left out of the verdict; if they do not within
    `patience` seconds, it counts.
    """
    against, favour = _log_mean(np.array(record.against)), _log_mean(np.array(record.favour))
    enough, fine = math.log(1 / levels.roll_back), math.log(1 / levels.grow)
    present = [group for group, seen in enumerate(record.seen) if seen[0] or seen[2]]
    numbers = _numbers(record, float(against[0]), levels.roll_back, float(favour[0]), levels.grow)
    crossed = record.crossed
    if against[0] < enough and crossed is None:
        grows = favour[0] >= fine and record.total[2] >= least_keys
        return Verdict("grow" if grows else "wait", record, numbers)
    crossed = now if crossed is None else crossed
    record = record.model_copy(update={"crossed": crossed})
    alone = min(present, key=lambda group: float(against[group + 1]))
    numbers |= {"against_without_one_group": _finite(float(against[alone + 1]))}
    if len(present) == 1 or against[alone + 1] >= math.log(1 / _BORNE_OUT):
        return Verdict("roll_back", record, numbers)
    if favour[alone + 1] >= fine:
        keys = record.total[2] - record.seen[alone][2]
        return Verdict("grow" if keys >= least_keys else "wait", record, numbers | {"left_out": alone})
    return Verdict("roll_back" if now >= crossed + patience else "hold", record, numbers)


def ceiling(record: GuardRecord, level: float) -> float:
    """An upper bound of the stable version's rate that holds at any time with probability 1 - level.

    Where the mixture of binomial likelihoods over Beta(1/2, 1/2), divided by the likelihood of p, reaches 1/level
    (Robbins, Annals of Mathematical Statistics 41, 1970): it is a martingale that begins at 1 if p is the rate.
    """
    keys, ones, _, _ = record.total
    mixture = _log_beta(ones + 0.5, keys - ones + 0.5) - _log_beta(0.5, 0.5)
    low, high = min(ones / max(keys, 1), 1 - _TINY), 1.0 - _TINY
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        likelihood = ones * math.log(max(middle, _TINY)) + (keys - ones) * math.log1p(-middle)
        low, high = (middle, high) if mixture - likelihood < math.log(1 / level) else (low, middle)
    return high


def _log_ratio(seen: Counts, stable: Counts, canary: Counts, margin: float) -> Counts:
    """log S of each row of `seen` (G + 1, 4) and guess: `stable` (G + 1, 1) and `canary` (G + 1, D)."""
    stable_keys, stable_ones, keys, ones = (column[:, None] for column in seen.T)
    at = _nearest(np.maximum(stable_keys, 1), np.maximum(keys, 1), stable, canary, margin)
    ratio = _log_likelihood(stable_keys, stable_ones, stable, at) + _log_likelihood(keys, ones, canary, at + margin)
    return np.where((stable_keys > 0) & (keys > 0), ratio, 0.0)


def _log_ratio_to(seen: Counts, canary: Counts, boundary: float) -> Counts:
    keys, ones = seen[:, 2, None], seen[:, 3, None]
    return _log_likelihood(keys, ones, np.clip(canary, _TINY, 1 - _TINY), boundary)


def _log_likelihood(keys: Counts, ones: Counts, guess: Counts, null: Counts | float) -> Counts:
    """Of `guess`, less that of `null`."""
    return np.asarray(ones * np.log(guess / null) + (keys - ones) * np.log((1 - guess) / (1 - null)), np.float64)


def _nearest(stable_keys: Counts, keys: Counts, stable: Counts, canary: Counts, margin: float) -> Counts:
    """The t that minimises stable_keys KL(stable, t) + keys KL(canary, t + margin), which is convex in t."""
    low = np.maximum(np.minimum(stable, canary - margin), _TINY)
    high = np.minimum(np.maximum(stable, canary - margin), 1 - margin - _TINY)
    for _ in range(_HALVINGS):
        t = (low + high) / 2
        u = t + margin
        slope = stable_keys * (t - stable) / (t * (1 - t)) + keys * (u - canary) / (u * (1 - u))
        low, high = np.where(slope < 0, t, low), np.where(slope < 0, high, t)
    return np.asarray((low + high) / 2, np.float64)


def _left_out(seen: Sequence[Seen]) -> Counts:
    """Sums of `seen` over all groups, then over all but each: (GROUPS + 1, 4)."""
    groups = np.array(seen, np.float64)
    everyone = groups.sum(0)
    return np.vstack([everyone, everyone - groups])


def _rate(keys: Counts, ones: Counts) -> Counts:
    return np.asarray((ones + _PRIOR_ONES) / (keys + _PRIOR_KEYS) * (1 - _TINY), np.float64)[:, None]


def _log_mean(products: Counts) -> Counts:
    """The logarithm of the mean over guesses, of logarithms."""
    return np.asarray(np.logaddexp.reduce(products, -1) - math.log(products.shape[-1]), np.float64)


def _rows(values: Counts) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in values)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _finite(log_value: float) -> float:
    return float(f"{math.exp(min(log_value, math.log(_MOST))):.4g}")


def _numbers(record: GuardRecord, against: float, level: float, favour: float, growth: float) -> dict[str, JsonValue]:
    stable, ones, keys, canary_ones = record.total
    return {
        "stable_keys": stable,
        "stable_ones": ones,
        "canary_keys": keys,
        "canary_ones": canary_ones,
        "against": _finite(against),
        "rolls_back_at": round(1 / level, 1),
        "favour": _finite(favour),
        "grows_at": round(1 / growth, 1),
    }
