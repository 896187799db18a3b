"""Updates as the integers that secure aggregation adds: the same rule, from the plan, at every site and the server."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.distributed import Shares, share_noise
from fedclaw.privacy.fixed_point import Encoding
from fedclaw.privacy.mechanisms.server_noise import unit_bound
from fedclaw.protocol.plan import CentralPrivacy, Plan, SecureAggregation, Unit

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource

log = logging.getLogger(__name__)

_told: set[str] = set()
"""Runs in which it was said that numbers were cut off."""

RANGE_BESIDE_NOISE = (
    "value_range is for secure sums without noise by the sites, and here the sites bring noise: only one can be meant"
)

Vector = NDArray[np.floating[Any]]


class Integers(Protocol):
    """How one site's vector (d,) becomes integers modulo 2^32, with its share of the noise if it brings one."""

    def encode(self, vector: Vector, source: "GaussianSource") -> NDArray[np.uint32]:
        """(d,) integers modulo 2^32."""


@dataclass(frozen=True)
class Nearest:
    """No noise: numbers cut off beyond `value_range` and rounded to the nearest step."""

    step: float
    value_range: float

    def encode(self, vector: Vector, source: "GaussianSource") -> NDArray[np.uint32]:
        """(d,) integers modulo 2^32; `source` is not used."""
        return Encoding(self.step).encode_nearest(vector, self.value_range)[0]


@dataclass(frozen=True)
class Noisy:
    """With this site's share of the noise. Unit `example`: the vector is a sum of which one example is a part, and
    `examples` are all there are."""

    shares: Shares
    unit: Unit
    examples: int | None = None
    run: str = ""

    def encode(self, vector: Vector, source: "GaussianSource") -> NDArray[np.uint32]:
        """(d,) integers modulo 2^32."""
        if self.unit == "site":
            return self.shares.encode(vector, source)
        encoded, beyond = self.shares.encode_sum(vector, source, self.examples)
        if beyond and self.run not in _told:
            _told.add(self.run)
            log.warning(
                "%d of %d numbers of the update were too large for the secure sum and cut off; in further rounds of "
                "this run that is not said again",
                *(beyond, len(vector)),
            )
        return encoded


def integers_of(plan: Plan, examples: int | None = None) -> Integers:
    """The rule of `plan`, which has secure aggregation, for a site with so many training examples.

    Raises PrivacyError for a plan whose noise is not enough.
    """
    secure, central = plan.secure, plan.central
    assert secure is not None
    if central is not None and plan.noised_by_sites:
        if secure.value_range is not None:
            raise PrivacyError(RANGE_BESIDE_NOISE)
        return Noisy(shares_of(plan, central, secure), central.unit, examples, plan.run)
    if secure.value_range is None:
        raise PrivacyError("secure aggregation without noise by the sites needs a range of values")
    return Nearest(secure.step, secure.value_range)


def shares_of(plan: Plan, central: CentralPrivacy, secure: SecureAggregation) -> Shares:
    """Each site's share of the noise. Raises PrivacyError if the plan's numbers do not add up to its multiplier."""
    return share_noise(
        unit_bound(plan, central),
        secure.length,
        len(secure.sites),
        central.noise_multiplier,
        tolerated=secure.tolerated,
        colluding=secure.colluding,
        step=secure.step,
    )


def distributed_mechanism(plan: Plan) -> NoiseEvent:
    """What one round under distributed noise costs, from the shares that the sites really add. Raises PrivacyError.

    The sum is a function of one Gaussian mechanism (`fedclaw.privacy.distributed.gaussian_multiplier`).
    """
    secure, central = plan.secure, plan.central
    assert secure is not None
    assert central is not None
    return example_mechanism(central, shares_of(plan, central, secure).noise_multiplier)


def example_mechanism(central: CentralPrivacy, noise_multiplier: float) -> NoiseEvent:
    """What a round with noise on the sum costs an example, by its multiplier for the unit that it was made for.

    Unit `site`: two data sets that differ in one example give two updates within the clipping bound, which may lie
    twice the bound apart, while a site's absence moves the sum by the bound: so an example has half the multiplier.
    That a site is asked only now and then is not counted, as its books hold only the rounds that asked it.
    """
    if central.unit == "example":
        return NoiseEvent(central.sample_rate, noise_multiplier, 1)
    return NoiseEvent(1.0, noise_multiplier / 2, 1)
