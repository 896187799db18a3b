"""An A/B test whose shares follow what is learnt: Thompson sampling over rewards in [0, 1].

Unit: the routing key. A key gets its version once, when it first comes, and keeps it (`StateStore.assign`). Its reward
is the mean over its answers that feedback was given on, so that a key that calls often counts as one.

Posterior: Beta(1 + r, 1 + n - r) of each version's mean reward, with n keys and r the sum of their rewards. Of rewards
that are 0 or 1 that is Bayes' rule for a uniform prior. Of others it is the fractional update: the mean is the same,
and the variance is that of 0 and 1 with this mean, the largest that there is, so it explores more, never less. (Agrawal
and Goyal, COLT 2012, algorithm 2, toss a coin for each reward instead; the expectation of that is this.) It is computed
from the feedback in the state store, all of it, each time: whoever does it, and however often, nothing counts twice.

Propensity of version k of K for a new key: floor + (1 - K floor) P(k is the best), where the probability is

    P(k is the best) = integral over u in [0, 1] of the product over j != k of F_j(F_k^-1(u))

by the midpoint rule on `_NODES` points, F_j being the posteriors' distribution functions; then scaled to add up to 1. A
key's version is drawn from just these numbers, by its hash, so the propensity that is logged is the one that was used,
whatever the error of the integral, which `tests/` bounds by 0.001.

Estimates by inverse propensity (Horvitz and Thompson 1952): (1/n) sum of reward [version = k] / propensity over all n
keys is unbiased for version k's mean, though propensities depend on earlier rewards: a key's hash does not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from fedclaw.serve.routing.plan import RoutingPlan

_NODES = 2048


class CreditedFeedback(Protocol):
    """What is read of a credited answer."""

    @property
    def version(self) -> str: ...  # noqa: D102
    @property
    def body(self) -> Mapping[str, JsonValue]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class ArmRewards:
    """What became of one version's keys."""

    keys: int = 0
    """With feedback."""
    rewards: float = 0.0
    """Sum of the keys' mean rewards, each in [0, 1]."""

    @property
    def posterior(self) -> tuple[float, float]:
        """The two parameters of the Beta distribution of its mean."""
        return 1.0 + self.rewards, 1.0 + self.keys - self.rewards


def sum_rewards(arms: Sequence[str], feedback: Iterable[CreditedFeedback], since: float = 0.0) -> dict[str, ArmRewards]:
    """By version. Not counted are answers from before `since`, those that were not drawn for their key (propensity 0),
    and feedback without a reward."""
    by_key: dict[tuple[str, str], list[float]] = {}
    for one in feedback:
        reward, key, issued = _number(one, "reward"), one.body.get("key"), _number(one, "issued") or 0.0
        drawn = one.version in arms and (_number(one, "propensity") or 0.0) > 0
        if drawn and reward is not None and 0 <= reward <= 1 and isinstance(key, str) and issued >= since:
            by_key.setdefault((one.version, key), []).append(reward)
    sums: dict[str, list[float]] = {arm: [] for arm in arms}
    for (version, _), rewards in by_key.items():
        sums[version].append(sum(rewards) / len(rewards))
    return {arm: ArmRewards(len(means), math.fsum(means)) for arm, means in sums.items()}


def chances_of_being_best(posteriors: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """Of each arm, by the parameters of its Beta posterior; they add up to 1."""
    from scipy.stats import beta  # Not for a worker.

    u = (np.arange(_NODES) + 0.5) / _NODES
    chances = np.empty(len(posteriors))
    for arm, (a, b) in enumerate(posteriors):
        reached = beta.ppf(u, a, b)
        others = [beta.cdf(reached, c, d) for other, (c, d) in enumerate(posteriors) if other != arm]
        chances[arm] = np.prod(others, axis=0).mean()
    return np.asarray(chances / chances.sum(), np.float64)


def propensities(posteriors: Sequence[tuple[float, float]], floor: float) -> tuple[float, ...]:
    """The chance of each arm for a new key: at least `floor`, and 1 together."""
    best = chances_of_being_best(posteriors)
    mixed = floor + (1.0 - floor * len(best)) * best
    mixed = np.maximum(np.round(mixed, 6), floor)
    mixed[int(np.argmax(mixed))] += 1.0 - mixed.sum()
    return tuple(map(float, mixed))


def updated_propensities(plan: RoutingPlan, sums: Mapping[str, ArmRewards]) -> tuple[float, ...]:
    """Of the plan's arms, in order."""
    return propensities([sums[arm].posterior for arm in plan.arms], plan.floor)


def _number(feedback: CreditedFeedback, name: str) -> float | None:
    value = feedback.body.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
