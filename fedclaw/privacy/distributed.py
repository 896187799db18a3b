"""Noise in shares: sites that trust neither each other nor the server add up to one differentially private sum.

Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation". Each site scales its vector to whole steps, rounds it at random, adds discrete Gaussian noise, and hands
integers modulo 2^32 to secure aggregation; only their sum is ever seen. No site's noise is enough by itself: the shares
of those that take part are, after the drop-outs and without the colluding sites that the configuration allows for.

Formal guarantee of a sum of `Shares`. Unit: one site's whole vector (`encode`; neighbouring: it is there, or is
zero), or one part of a site's sum (`encode_sum`; neighbouring: a part of L2 norm at most `clip` is there or is not).
If at least `honest` sites that keep their noise to themselves are in the sum, then, towards everybody, the server
included, it is a function of a Gaussian mechanism with `noise_multiplier` (`gaussian_multiplier` says why), and it is
rho-concentrated differentially private, rho = 1 / (2 noise_multiplier^2), as the paper proves it. So it may be
accounted as a `NoiseEvent` of family "gaussian" or "discrete"; the first gives the smaller epsilon. What is computed
from the sum is post-processing, reduction modulo 2^32 too; more sites than `honest` only add independent noise. To be
added to delta: 2^-64 a sum for parts of sums (rounding, see `encode_sum`), and the distance of
`fedclaw.privacy.discrete_gaussian`, 2^-100 a number.

For whole vectors nothing in this rests on floating-point numbers behaving well (Mironov 2012): the norm that the
sensitivity rests on is checked on the integers that are sent, in integer arithmetic, and the noise is made of integers.
For parts of sums the noise is the same; that a part moves the sum before rounding by at most `clip` is as true
as float64 addition is exact.

No rotation. The paper first spreads a vector over its coordinates by a random Hadamard rotation, as otherwise one
large coordinate would have to fit into the few bits that it wants to send. With 32 bits a number and a step small
against the noise, the whole of every site's norm fits into one coordinate of the sum (`wrap_probability` assumes just
that), so a rotation would change nothing but cost d log d operations.

`Integers` are what a vector becomes inside a secure sum: rounded to the nearest step, or with a share of the noise.

Legend: d numbers in a vector; sigma, sensitivity and noise in steps where not said otherwise.
"""

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError
from fedclaw.privacy.discrete_gaussian import DiscreteGaussian
from fedclaw.privacy.fixed_point import Encoding, Vector, rounded_norm_squared

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource

log = logging.getLogger(__name__)

INFLATION = 1.001
"""What `choose_step` lets rounding add to the sensitivity: a thousandth more noise."""

WRAP = 2.0**-40
"""`choose_step` keeps the probability that any number of a sum leaves the range of the modulus below this."""

SMOOTHING = 2.5
"""What `gaussian_multiplier` takes off the sum's deviation, squared, in steps."""

_SMALLEST_SHARE = 3.6
# Steps. A sum of discrete Gaussians of this sigma is a discrete Gaussian to within a factor of 1 +- 2^-180.
_FINEST = 2.0**-30
# Of the clipping bound; finer steps do not fit into 32 bits.
_VALUES = 1 << 30
# Half of the range is for the sum of the values, the other half for the noise.
_MARGIN = 1 + 1e-9
# More noise than asked for, so that rounding in these formulas cannot make it less.


@dataclass(frozen=True)
class Price:
    """What distributed noise costs, beside a trusted server that adds Gaussian noise to exact numbers."""

    rounding_inflation: float
    """Sensitivity after rounding, as a multiple of the one before; so much more noise is added."""
    wrap_probability: float
    """That any number of the sum leaves the range of the modulus: bound, whatever the vectors are."""
    tau: float
    """How far a sum of discrete Gaussians is from one (Kairouz, Liu, Steinke 2021, theorem 1)."""
    smoothing: float
    """Noise variance that `noise_multiplier` does not count, as a share of what it counts."""
    extra_variance: float
    """Noise variance beyond the promised one when nobody drops out, as a share of the promised one."""


@dataclass(frozen=True)
class Shares:
    """Who adds how much noise to a sum. Made by `share_noise`; the same arguments give the same at every site.

    `sigma` is each site's share in steps, `honest` the number of shares that the guarantee counts.
    """

    clip: float
    step: float
    dimension: int
    sites: int
    honest: int
    sigma: float

    @property
    def sensitivity(self) -> float:
        """Largest L2 norm, in steps, of a vector that is sent."""
        return rounded_sensitivity(self.clip, self.step, self.dimension)

    @property
    def noise_multiplier(self) -> float:
        """What to account for, as family "gaussian" or as family "discrete"."""
        return min(
            gaussian_multiplier(self.sigma, self.honest, self.sensitivity),
            effective_multiplier(self.sigma, self.honest, self.sensitivity, self.dimension),
        )

    @property
    def price(self) -> Price:
        """What this costs, for the report."""
        return Price(
            rounding_inflation=self.sensitivity * self.step / self.clip,
            wrap_probability=wrap_probability(self.clip, self.step, self.dimension, self.sites, self.sigma),
            tau=closeness(self.sigma, self.honest),
            smoothing=(SMOOTHING / (self.noise_multiplier * self.sensitivity)) ** 2,
            extra_variance=self.sites / self.honest - 1,
        )

    @property
    def largest(self) -> int:
        """What a number of one site's sum is cut off at, in steps."""
        return _VALUES // self.sites

    def encode(self, vector: Vector, source: "GaussianSource") -> NDArray[np.uint32]:
        """What one site hands to secure aggregation: `vector` (d,), clipped, in steps, with this site's noise."""
        return with_noise(Encoding(self.step).encode(vector, self.clip, source), self.sigma, source)

    def encode_sum(
        self, vector: Vector, source: "GaussianSource", parts: int | None = None
    ) -> tuple[NDArray[np.uint32], int]:
        """The same for a sum (d,) of parts, each clipped before; and how many numbers were cut off at `largest`.

        `parts`: how many there can be, if that is known. Raises PrivacyError for a sum that is longer than they can be.
        """
        longest = math.inf if parts is None else parts * self.clip
        encoded, beyond = Encoding(self.step).encode_sum(vector, self.largest, source, longest)
        return with_noise(encoded, self.sigma, source), beyond

    def decode(self, total: NDArray[np.uint32]) -> NDArray[np.float64]:
        """The sum (d,) of what sites encoded, with their noise, as real numbers."""
        return Encoding(self.step).decode(total)


def share_noise(
    clip: float,
    dimension: int,
    sites: int,
    noise_multiplier: float,
    *,
    tolerated: int = 0,
    colluding: int = 0,
    step: float | None = None,
) -> Shares:
    """Shares with which a sum over `sites` sites has at least `noise_multiplier`, by either family.

    Up to `tolerated` of the sites may drop out before the sum is made, and up to `colluding` of those that remain may
    tell an adversary their noise; the sum of the others' noise is still enough. A sum with fewer than
    sites - tolerated sites must not be opened. `step` None: `choose_step`; a coarser one costs noise, never the
    guarantee. Raises PrivacyError if nobody is left to make the noise, and for values outside their range.
    """
    _check(clip, dimension, sites, noise_multiplier)
    honest = _honest(sites, tolerated, colluding)
    if step is None:
        step = choose_step(clip, dimension, sites, noise_multiplier, honest=honest)
    sensitivity = rounded_sensitivity(clip, step, dimension)
    total = math.hypot(noise_multiplier * sensitivity * _MARGIN, SMOOTHING)
    sigma = max(_SMALLEST_SHARE, total / math.sqrt(honest))
    DiscreteGaussian(sigma)
    return Shares(clip=clip, step=step, dimension=dimension, sites=sites, honest=honest, sigma=sigma)


def choose_step(
    clip: float, dimension: int, sites: int, noise_multiplier: float, *, honest: int | None = None
) -> float:
    """The largest power of two that costs next to nothing, as the size of a step for vectors of norm <= `clip`.

    Rounding inflates the sensitivity by at most INFLATION, each of `honest` shares (by default all sites') has a sigma
    of at least three steps, and the sum leaves the range of the modulus with a probability below WRAP. A power of
    two makes the division by it exact. Raises PrivacyError if no step does all three.
    """
    _check(clip, dimension, sites, noise_multiplier)
    parties = sites if honest is None else honest
    step = 2.0 ** math.floor(math.log2(clip))
    while step > clip * _FINEST:
        sensitivity = rounded_sensitivity(clip, step, dimension)
        sigma = noise_multiplier * sensitivity / math.sqrt(parties)
        if sensitivity * step <= INFLATION * clip and sigma >= _SMALLEST_SHARE:
            if wrap_probability(clip, step, dimension, sites, sigma) < WRAP:
                return step
            break
        step /= 2
    raise PrivacyError(
        f"no step suits sums of {dimension} numbers over {sites} sites with noise multiplier {noise_multiplier:g} "
        "modulo 2^32; take fewer sites at a time or a smaller model"
    )


def rounded_sensitivity(clip: float, step: float, dimension: int) -> float:
    """The largest L2 norm, in steps, that a vector of norm `clip` has after rounding."""
    return math.nextafter(math.sqrt(rounded_norm_squared(clip, step, dimension)), math.inf)


def closeness(sigma: float, shares: int) -> float:
    """tau = 10 sum_{k=1}^{shares-1} exp(-2 pi^2 sigma^2 k / (k + 1)) (Kairouz, Liu, Steinke 2021, theorem 1)."""
    first = min(shares - 1, 1000)
    tail = max(0, shares - 1 - first) * math.exp(-2 * (math.pi * sigma) ** 2 * first / (first + 1))
    return 10 * (sum(math.exp(-2 * (math.pi * sigma) ** 2 * k / (k + 1)) for k in range(1, first + 1)) + tail)


def effective_multiplier(sigma: float, shares: int, sensitivity: float, dimension: int) -> float:
    """1 / epsilon such that a sum with `shares` shares of `sigma` is (epsilon^2 / 2)-concentrated DP.

    Kairouz, Liu, Steinke 2021, proposition 14: the divergence of order alpha is at most alpha a^2 / 2 + tau d, and at
    most alpha (a + tau sqrt(d))^2 / 2, a = sensitivity / (sqrt(shares) sigma). As alpha >= 1, the first is within
    alpha epsilon^2 / 2 for epsilon^2 = a^2 + 2 tau d. The smaller of the two epsilons counts.
    """
    alone = sensitivity / (math.sqrt(shares) * sigma)
    tau = closeness(sigma, shares)
    return 1 / min(math.sqrt(alone**2 + 2 * tau * dimension), alone + tau * math.sqrt(dimension))


def gaussian_multiplier(sigma: float, shares: int, sensitivity: float) -> float:
    """sqrt(shares sigma^2 - s^2) / sensitivity, s = SMOOTHING: the multiplier of a Gaussian mechanism behind the sum.

    Add real Gaussian noise of variance V - s^2, V = shares sigma^2, to a vector of integers, and replace each number
    y of the result by an integer z with probability proportional to exp(-(z - y)^2 / (2 s^2)). By Poisson summation
    the normalising sum is the same for all y within a factor 1 +- e, e = 2.1 exp(-2 pi^2 s^2) (the smoothing of a
    lattice: Micciancio and Regev 2007), so integrating over y gives the vector plus N_Z(0, V), within a factor
    1 +- 3e; and the sum of the shares is that within 1 +- 5 shares exp(-pi^2 sigma^2) (by the same completed square as
    in `fedclaw.privacy.discrete_gaussian`). So what leaves is post-processing of a Gaussian mechanism. With s = 2.5
    and sigma >= 3.6 both factors are 1 +- 2^-170 for up to a thousand shares: over a thousand million numbers that
    moves epsilon by less than 10^-40. Raises PrivacyError for smaller shares.
    """
    if sigma < _SMALLEST_SHARE:
        raise PrivacyError(f"shares of {sigma:.3g} steps are too small to add up to a Gaussian; choose a smaller step")
    return math.sqrt(shares * sigma**2 - SMOOTHING**2) / sensitivity


def wrap_probability(clip: float, step: float, dimension: int, sites: int, sigma: float) -> float:
    """A bound on the probability that any of the sum's d numbers leaves [-2^31, 2^31) and comes back as another.

    For the worst vectors, all sites' whole norms (or sums up to `Shares.largest`) in the same coordinate, and with all
    sites' noise: a sum of discrete Gaussians is subgaussian (Canonne, Kamath, Steinke 2020, corollary 17). It
    concerns accuracy, not privacy.
    """
    if sites * (clip / step + 1) > _VALUES:
        return 1.0
    room = 2.0**31 - 1 - _VALUES
    return min(1.0, 2.0 * dimension * math.exp(-(room**2) / (2 * sites * sigma**2)))


def with_noise(encoded: NDArray[np.uint32], sigma: float, source: "GaussianSource") -> NDArray[np.uint32]:
    """`encoded` (d,) plus independent N_Z(0, sigma^2) noise, modulo 2^32."""
    noise = DiscreteGaussian(sigma).sample(len(encoded), source)
    return encoded + noise.astype(np.uint32)


def _honest(sites: int, tolerated: int, colluding: int) -> int:
    if min(tolerated, colluding) < 0:
        raise PrivacyError("numbers of drop-outs and of colluding sites are at least 0")
    honest = sites - tolerated - colluding
    if honest < 1:
        raise PrivacyError(
            f"of {sites} sites {tolerated} may drop out and {colluding} collude: nobody is left to make the noise"
        )
    return honest


def _check(clip: float, dimension: int, sites: int, noise_multiplier: float) -> None:
    if not 0 < clip < math.inf:
        raise PrivacyError(f"a clipping bound is a number above 0, not {clip}")
    if dimension < 1 or sites < 1:
        raise PrivacyError(f"a sum has at least one number and one site, not {dimension} and {sites}")
    if not 0 < noise_multiplier < math.inf:
        raise PrivacyError(f"the noise multiplier of shared noise is a number above 0, not {noise_multiplier}")


_told: set[str] = set()
"""Runs in which it was said that numbers were cut off."""


@dataclass(frozen=True)
class Nearest:
    """No noise: numbers cut off beyond `value_range` and rounded to the nearest step."""

    step: float
    value_range: float

    def encode(self, vector: Vector, source: "GaussianSource") -> NDArray[np.uint32]:
        """(d,) integers modulo 2^32; `source` is not used."""
        return Encoding(self.step).encode_nearest(vector, self.value_range)

    def hides_others(self, vector: Vector) -> bool:
        """Whether what this site adds to a sum could not be known beforehand: a known part hides nobody else's.

        False if all of it is 0 or cut off, or any of it is not finite.
        A server can choose parameters, or have a site keep something, that lead to such an update.
        """
        size = np.abs(vector)
        return bool(np.isfinite(size).all() and ((size > 0) & (size <= self.value_range)).any())


@dataclass(frozen=True)
class WithShare:
    """A site's whole vector, clipped, with its share of the noise."""

    shares: Shares

    def encode(self, vector: Vector, source: "GaussianSource") -> NDArray[np.uint32]:
        """(d,) integers modulo 2^32."""
        return self.shares.encode(vector, source)

    def hides_others(self, vector: Vector) -> bool:
        """Always: the noise does."""
        return True


@dataclass(frozen=True)
class SumWithShare(WithShare):
    """A sum of which one unit is a bounded part, with this site's share of the noise; `present` is how many there are
    (None: not known)."""

    present: int | None = None
    run: str = ""

    def encode(self, vector: Vector, source: "GaussianSource") -> NDArray[np.uint32]:
        """(d,) integers modulo 2^32."""
        encoded, beyond = self.shares.encode_sum(vector, source, self.present)
        if beyond and self.run not in _told:
            _told.add(self.run)
            log.warning(
                "%d of %d numbers of the update were too large for the secure sum and cut off; in further rounds of "
                "this run that is not said again",
                *(beyond, len(vector)),
            )
        return encoded


Integers = Nearest | WithShare
"""How one site's vector (d,) becomes integers modulo 2^32, with its share of the noise if it brings one."""
