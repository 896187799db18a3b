"""What a sequence of private mechanisms costs: privacy loss distributions, or Renyi divergences where there are none.

A mechanism is what was really done: noise on a sum of bounded contributions, each of which takes part independently
with probability q (Poisson sampling), a number of times, empty samples included. Unit: what is bounded and sampled,
one example or person (DP-SGD) or one site (noise on the sum of the sites' updates). Relation: one unit is there or is
not, in both directions, while rate, number of steps and noise are the same for both. Where these follow from the number
of units, that number is public and the unit is replaced by nothing (zero-out), which has the same distributions.
Costs of different units are never composed with each other.

Family "gaussian": Gaussian noise, composed by privacy loss distributions. Family "discrete": discrete Gaussian noise
or a sum of it, accounted as concentrated differential privacy with rho = 1 / (2 noise_multiplier^2) and composed by
Renyi divergences (Canonne, Kamath, Steinke 2020; Kairouz, Liu, Steinke 2021). Shares of some steps or more may be
accounted as the Gaussian mechanism behind them instead (`fedclaw.privacy.distributed`).

Composition: Koskela, Jalko, Honkela 2020 ("Computing Tight Differential Privacy Guarantees Using FFT") as dp_accounting
implements it, with the 'connect the dots' discretisation of Doroshenko et al. 2022, which is pessimistic: a coarser
grid gives a larger epsilon, never one below the true value. The grid is chosen here so that this costs some tenths
of a per cent.

Renyi accounting is looser than privacy loss distributions, but it needs no more than bounds on the divergence. Sums of
discrete Gaussians have such bounds (concentrated differential privacy) and no exact distribution in many dimensions,
so it is what they are accounted by; and it is the way out where a distribution's grid gives no answer.

A curve is an array (K,): upper bounds on the divergences of ORDERS between neighbouring data sets, which differ in one
unit being there or not, in both directions.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from fedclaw.errors import PrivacyError
from fedclaw.protocol.terms import CentralNoise

Curve = NDArray[np.float64]

_INTEGERS: Curve = np.unique(np.concatenate([np.arange(2.0, 25.0), np.geomspace(25, 1024, 24).round()]))
# Orders at which sampled mechanisms are computed; their work grows with the order.
ORDERS: Curve = np.unique(np.concatenate([1.0 + np.geomspace(0.02, 1e6, 150), _INTEGERS]))
"""The orders alpha of a curve. Neighbours of alpha - 1 differ by an eighth: the best of them costs at most 0.2% more
epsilon than the best of all."""


@lru_cache(maxsize=1024)
def sampled_curve(rate: float, rho: float) -> Curve:
    """One release of noise added to a Poisson sample with probability `rate`; rho-concentrated when all take part.

    Valid for noise that is symmetric about zero and whose divergence of order alpha, without sampling, is at most
    alpha rho: Gaussian noise and any sum of discrete Gaussians, reduced to a modulus or not.

    P, Q: the outputs with and without the unit; S = (1 - rate) Q + rate P. At integer orders the binomial theorem
    gives D(S || Q) from the divergences of P from Q. D(Q || S) is never larger, as the reflection that swaps P and Q
    is a symmetry of the noise (Mironov, Talwar, Zhang 2019, "Renyi Differential Privacy of the Sampled Gaussian
    Mechanism", theorem 5; it asks no more of the noise than this). The general bound of Zhu and Wang 2019 ("Poisson
    Subsampled Renyi Differential Privacy", theorem 5) does without the symmetry, at several times the epsilon.
    """
    if rate == 1:
        return ORDERS * rho
    return _at_orders(np.array([_sampled(rate, rho, int(order)) for order in _INTEGERS]), rho)


def epsilon_from(curve: Curve, delta: float) -> float:
    """Epsilon at `delta` (Canonne, Kamath, Steinke 2020, proposition 12, by dp_accounting)."""
    from dp_accounting.rdp import compute_epsilon

    epsilon, _ = compute_epsilon(ORDERS.tolist(), curve.tolist(), delta)
    return float(epsilon)


def _at_orders(at_integers: Curve, rho: float) -> Curve:
    """A sampled mechanism's curve, from its divergences at `_INTEGERS` and the rho of the mechanism without sampling.

    (alpha - 1) x divergence is convex in alpha and zero at 1 (van Erven and Harremoes 2014, corollary 2), so a
    straight line between two orders bounds it. Sampling never adds divergence (quasi-convexity, theorem 13 there), so
    that alpha rho bounds every order, those above the largest integer too.
    """
    products = np.interp(ORDERS, [1.0, *_INTEGERS], [0.0, *((_INTEGERS - 1) * at_integers)], right=np.inf)
    curve: Curve = np.minimum(products / (ORDERS - 1), ORDERS * rho)
    return curve


def _sampled(rate: float, rho: float, order: int) -> float:
    """log(sum over l of b(l) exp(l (l - 1) rho)) / (order - 1), b the binomial probabilities of `order` and `rate`.

    Written as log(1 + sum of b(l) (exp(...) - 1)), as the b(l) sum to 1: all terms are positive, none cancels.
    """
    terms = np.arange(2, order + 1, dtype=np.float64)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, order + 1)))])
    binomial = log_factorial[order] - log_factorial[2:] - log_factorial[order - 2 :: -1]
    binomial += terms * math.log(rate) + (order - terms) * math.log1p(-rate)
    growth = terms * (terms - 1) * rho
    excess = growth + np.log(-np.expm1(-growth))
    return float(np.logaddexp(0.0, np.logaddexp.reduce(binomial + excess))) / (order - 1)


SMALLEST_NOISE = 0.01
"""Noise multipliers below this are counted as no noise; calibration never goes below it."""

LARGEST_NOISE = 1e5
"""Calibration gives up above this: no signal is left."""

_GRID_PER_DEVIATION = 1 / 16
# The relative excess of the discretised epsilon is about 0.08 (interval / deviation of one step's loss)^2, found by
# trying over q in [0.001, 1], sigma in [0.6, 20] and up to 100000 steps: 0.03% at a sixteenth.
_MOST_POINTS = 1 << 16
# Grid points of one distribution at most; beyond this the grid is coarsened, which costs accuracy, not soundness.
_TAIL = 10.0
# Deviations of the noise that dp_accounting keeps (exp(-50) of mass).
_COARSEST = 8.0
# A grid as coarse as this means an epsilon in the tens of thousands or more, where only its being large matters.
_TOLERANCE = 1.005
_LARGEST_DISCRETE = 1e100
# Beyond, 1 / multiplier^2 leaves the range in which a double is exact to its last bit.

Family = Literal["gaussian", "discrete"]


@dataclass(frozen=True)
class NoiseEvent:
    """What was run, as a ledger counts it: `steps` Poisson-sampled mechanisms of one family.

    `sample_rate` is q in (0, 1], `noise_multiplier` the standard deviation of the noise over the sensitivity (for
    family "discrete" the effective one), `steps` the steps or rounds taken. Raises PrivacyError for values outside
    their range.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int
    family: Family = "gaussian"

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise PrivacyError(f"a sample rate lies in (0, 1], not {self.sample_rate}")
        if not 0 <= self.noise_multiplier < math.inf:
            raise PrivacyError(f"a noise multiplier is a number of at least 0, not {self.noise_multiplier}")
        if self.steps < 0:
            raise PrivacyError(f"a number of steps is at least 0, not {self.steps}")
        if self.family not in ("gaussian", "discrete"):
            raise PrivacyError(f"a family of mechanisms is gaussian or discrete, not {self.family!r}")
        if self.family == "discrete" and not SMALLEST_NOISE <= self.noise_multiplier <= _LARGEST_DISCRETE:
            raise PrivacyError(
                f"the noise multiplier of a discrete mechanism is at least {SMALLEST_NOISE:g}, "
                f"not {self.noise_multiplier}"
            )

    @property
    def rho(self) -> float:
        """rho = 1 / (2 noise_multiplier^2) of one step without sampling, correctly rounded; infinite without noise.

        Two different noise multipliers have two different rho, so that a ledger can store either.
        """
        if self.noise_multiplier == 0:
            return math.inf
        return float(1 / (2 * Fraction(self.noise_multiplier) ** 2))


def event_to_json(mechanism: NoiseEvent | None) -> dict[str, JsonValue]:
    """The mechanism in dp_accounting's vocabulary: each event by its class's name, and its fields by theirs.

    None is training without privacy.
    """
    if mechanism is None:
        return {"event": "NonPrivateDpEvent"}
    noise = (
        _event("GaussianDpEvent", noise_multiplier=mechanism.noise_multiplier)
        if mechanism.family == "gaussian"
        else _event("ZCDpEvent", rho=mechanism.rho, xi=0.0)
    )
    step = _event("PoissonSampledDpEvent", sampling_probability=mechanism.sample_rate, event=noise)
    return _event("SelfComposedDpEvent", event=step, count=mechanism.steps)


def _event(name: str, **fields: JsonValue) -> dict[str, JsonValue]:
    return {"event": name, "fields": fields}


def event_from_json(plain: Mapping[str, Any]) -> NoiseEvent | None:
    """The mechanism that `event_to_json` wrote. Raises PrivacyError for any other event."""
    try:
        if plain == {"event": "NonPrivateDpEvent"}:
            return None
        step, count = plain["fields"]["event"], plain["fields"]["count"]
        rate, event = step["fields"]["sampling_probability"], step["fields"]["event"]
        family: Family = "gaussian" if event["event"] == "GaussianDpEvent" else "discrete"
        fields = event["fields"]
        noise = float(fields["noise_multiplier"]) if family == "gaussian" else _multiplier_of(float(fields["rho"]))
        mechanism = NoiseEvent(float(rate), noise, int(count), family)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise PrivacyError(f"this version of FedClaw cannot account for the mechanism {plain!r:.200}") from error
    if event_to_json(mechanism) != plain:
        raise PrivacyError(f"this version of FedClaw cannot account for the mechanism {plain!r:.200}")
    return mechanism


def _multiplier_of(rho: float) -> float:
    """The noise multiplier whose rho this is, to the last bit; one nearby if there is none."""
    noise = math.sqrt(1 / (2 * rho))
    nearby = (noise, math.nextafter(noise, 0), math.nextafter(noise, math.inf))
    return next((near for near in nearby if NoiseEvent(1.0, near, 1, "discrete").rho == rho), noise)


def epsilon_of_sum(central: CentralNoise, rounds: int) -> float:
    """What `rounds` of noise on the sum come to, at the delta that was asked for."""
    return epsilon_of([NoiseEvent(central.sample_rate, central.noise_multiplier, rounds)], central.delta)


def largest(epsilons: Iterable[float | None]) -> float | None:
    """Of what several sites spent (None: unbounded) the most; None where one is unbounded, or there is none."""
    values = list(epsilons)
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def epsilon_of(mechanisms: Iterable[NoiseEvent], delta: float) -> float:
    """The epsilon at `delta` of all `mechanisms` together, in any order; infinite if one has no noise.

    Never below the true epsilon. For Gaussian mechanisms it is above it by some tenths of a per cent; where `delta` is
    too small for the distributions (below about 1e-12), or epsilon is in the tens of thousands, the larger epsilon
    of Renyi accounting is returned. Discrete mechanisms are always accounted by Renyi. For both in one history it is
    the smaller of two bounds: Renyi divergences of everything added up, or half of delta for each family and the sum
    of the two epsilons. Raises PrivacyError for a delta outside (0, 1).
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta lies in (0, 1), not {delta}")
    steps: Counter[tuple[float, float, Family]] = Counter()
    for mechanism in mechanisms:
        if mechanism.steps:
            steps[mechanism.sample_rate, mechanism.noise_multiplier, mechanism.family] += mechanism.steps
    groups = [NoiseEvent(rate, noise, count, family) for (rate, noise, family), count in sorted(steps.items())]
    gaussian = tuple(group for group in groups if group.family == "gaussian")
    discrete = tuple(group for group in groups if group.family == "discrete")
    if not discrete:
        return _epsilon(gaussian, delta)
    if not gaussian or any(group.noise_multiplier < SMALLEST_NOISE for group in gaussian):
        return _renyi_epsilon(discrete, delta) if not gaussian else math.inf
    apart = _epsilon(gaussian, delta / 2) + _renyi_epsilon(discrete, delta / 2)
    return min(apart, _renyi_epsilon(gaussian + discrete, delta))


@lru_cache(maxsize=64)
def calibrate(epsilon: float, delta: float, sample_rate: float, steps: int, family: Family = "gaussian") -> float:
    """The smallest noise multiplier, within 1%, with which `steps` steps cost at most `epsilon` at `delta`.

    The result is checked with `epsilon_of`, so it never spends more than `epsilon`; it is at least SMALLEST_NOISE.
    Raises PrivacyError if no noise multiplier up to LARGEST_NOISE is enough.
    """
    if not 0 < epsilon < math.inf:
        raise PrivacyError(f"epsilon is a number above 0, not {epsilon}")

    def cost(noise: float) -> float:
        return epsilon_of([NoiseEvent(sample_rate, noise, steps, family)], delta)

    if cost(SMALLEST_NOISE) <= epsilon:
        return SMALLEST_NOISE
    high = _renyi_bracket(epsilon, delta, sample_rate, steps, family)
    cost_high = cost(high)
    if cost_high > epsilon:
        raise PrivacyError(
            f"no noise multiplier up to {LARGEST_NOISE:g} keeps {steps} steps at sample rate {sample_rate:g} within "
            f"epsilon {epsilon:g} at delta {delta:g}; ask for fewer steps, smaller batches or a larger epsilon"
        )
    low = _below(high, cost_high, epsilon)
    while low > SMALLEST_NOISE and (cost_low := cost(low)) <= epsilon:
        high, cost_high, low = low, cost_low, _below(low, cost_low, epsilon)
    return _narrow(cost, epsilon, low, high)


def _below(noise: float, cost: float, epsilon: float) -> float:
    """Where to look for a noise multiplier that is not enough: epsilon falls at least as fast as 1 / noise."""
    return max(SMALLEST_NOISE, noise * min(max(cost / epsilon, 0.2), 0.8))


def _narrow(cost: Callable[[float], float], epsilon: float, low: float, high: float) -> float:
    """Shrink low < wanted <= high to within the tolerance: interpolation in the logarithms, kept off the ends."""
    cost_low, cost_high = cost(low), cost(high)
    while high > low * _TOLERANCE:
        middle = math.sqrt(low * high)
        if 0 < cost_high < cost_low < math.inf:
            share = math.log(cost_low / epsilon) / math.log(cost_low / cost_high)
            # Aim a little above the root: the upper end is the one that has to close in.
            middle = low * (high / low) ** min(max(share, 0.1), 0.9)
            middle = min(middle * math.sqrt(_TOLERANCE), math.sqrt(middle * high))
        cost_middle = cost(middle)
        if cost_middle <= epsilon:
            high, cost_high = middle, cost_middle
            if high / _TOLERANCE > low and (cost_below := cost(high / _TOLERANCE)) > epsilon:
                low, cost_low = high / _TOLERANCE, cost_below
        else:
            low, cost_low = middle, cost_middle
    return float(high)


@lru_cache(maxsize=4096)
def _epsilon(groups: tuple[NoiseEvent, ...], delta: float) -> float:
    if not groups:
        return 0.0
    if any(group.noise_multiplier < SMALLEST_NOISE for group in groups):
        return math.inf
    interval = _interval(groups)
    if interval > _COARSEST:
        return _renyi_epsilon(groups, delta)
    total = _distribution(groups[0], interval)
    for group in groups[1:]:
        total = total.compose(_distribution(group, interval))
    epsilon = float(total.get_epsilon_for_delta(delta))
    return epsilon if math.isfinite(epsilon) else _renyi_epsilon(groups, delta)


@lru_cache(maxsize=128)
def _distribution(group: NoiseEvent, interval: float) -> Any:
    """The privacy loss distribution of one group, on a grid of `interval`."""
    # Takes seconds to import: not before something is accounted for.
    from dp_accounting.pld import privacy_loss_distribution

    if group.sample_rate == 1:
        # n Gaussian mechanisms are one with sqrt(n) less noise (Dong, Roth, Su 2022, corollary 3.3).
        return privacy_loss_distribution.from_gaussian_mechanism(
            group.noise_multiplier / math.sqrt(group.steps), value_discretization_interval=interval
        )
    return _step_distribution(group.sample_rate, group.noise_multiplier, interval).self_compose(group.steps)


@lru_cache(maxsize=128)
def _step_distribution(rate: float, noise: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=interval
    )


def _interval(groups: tuple[NoiseEvent, ...]) -> float:
    """A power of two: fine against one step's loss, and coarse enough for the number of points to stay bounded."""
    variance, count, width = 0.0, 0, 0.0
    for group in groups:
        noise, steps = group.noise_multiplier, group.steps
        if group.sample_rate == 1:
            noise, steps = noise / math.sqrt(steps), 1
        chi_square = group.sample_rate * math.sqrt(math.expm1(min(1 / noise**2, 100.0)))
        deviation = min(chi_square, 1 / noise)
        variance += steps * deviation**2
        count += steps
        width = max(width, _TAIL / noise + min(1 / noise**2, _TAIL / noise))
    fine = _GRID_PER_DEVIATION * math.sqrt(variance / count)
    coarse = max(width, variance, 2 * _TAIL * math.sqrt(variance)) / _MOST_POINTS
    return 2.0 ** math.floor(math.log2(fine)) if fine > coarse else 2.0 ** math.ceil(math.log2(coarse))


def _renyi_epsilon(groups: tuple[NoiseEvent, ...], delta: float) -> float:
    total = np.zeros_like(ORDERS)
    for group in groups:
        total += group.steps * sampled_curve(group.sample_rate, group.rho)
    return epsilon_from(total, delta)


def _renyi_bracket(epsilon: float, delta: float, rate: float, steps: int, family: Family) -> float:
    """A noise multiplier that is certainly enough by Renyi accounting, within 5%, or LARGEST_NOISE."""
    low, high = math.log(SMALLEST_NOISE), math.log(LARGEST_NOISE)
    while high - low > 0.05:
        middle = (low + high) / 2
        if _renyi_epsilon((NoiseEvent(rate, math.exp(middle), steps, family),), delta) <= epsilon:
            high = middle
        else:
            low = middle
    return math.exp(high)
