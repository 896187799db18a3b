"""Shares of noise inside a secure sum: every site brings its own, and no site's is enough by itself.

On an update, for the unit example or site as the sum is bounded (`fedclaw.privacy.mechanisms.sum_noise`), or on a
vector of statistics. The noise, and what it is worth, is that of `fedclaw.privacy.distributed`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.distributed import Integers, Shares, SumWithShare, WithShare, choose_step, share_noise
from fedclaw.privacy.fixed_point import Vector
from fedclaw.privacy.mechanisms.local_noise import Doubles
from fedclaw.privacy.mechanisms.mechanism import Charge, T
from fedclaw.privacy.mechanisms.sum_noise import SumNoise
from fedclaw.privacy.provenance import Bounded, Part, Permitted, Raw, Released
from fedclaw.protocol.terms import Plan, SecureAggregation, SecureRequest

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource

_EXACT = 1 + 1e-9
# For products of the same numbers in another order.


@dataclass(frozen=True)
class SharedNoise(SumNoise):
    """A site trusts only that enough other sites add their shares: as many as the session counts on."""

    shares_noise: ClassVar[bool] = True

    @property
    def shares(self) -> Shares:
        """Each site's share of the noise. Raises PrivacyError if the plan's numbers do not add up to its multiplier."""
        return session_shares(self.session, self.sum_sensitivity, self.request.noise_multiplier)

    def contradiction(self) -> str | None:
        """See Mechanism."""
        if self.request.adaptive:
            return "an adaptive clipping bound goes with unit: site and noise_by: server"
        if self.site_rate < 1:
            return "distributed noise for the unit site asks every site: sample_rate is 1"
        if self.asked.hidden is False:
            return "noise by the sites is enough only in their sum: it needs secure aggregation"
        if not self.takes_one_step and self.asked.weighting == "examples":
            return "a site has to know the largest weight before it adds its noise: weighting: uniform or capped"
        return super().contradiction()

    def charge(self, examples: int, *, trust_server_noise: bool) -> Charge:
        """What one round costs, from the shares that the sites really add. Raises PrivacyError.

        The sum is a function of one Gaussian mechanism (`fedclaw.privacy.distributed.gaussian_multiplier`).
        """
        return Charge("distributed", self.event(self.shares.noise_multiplier), "aggregation")

    def integers(self, present: int | None = None) -> Integers:
        """See Mechanism."""
        if not self.takes_one_step:
            return WithShare(self.shares)
        return SumWithShare(self.shares, present, self.asked.run if isinstance(self.asked, Plan) else "")

    def let_out(self, part: Part[T], charge: Charge) -> Released[T] | Permitted[T]:
        """See Mechanism."""
        raise PrivacyError("noise by the sites is enough only in their sum, and this was to leave by itself")

    def encode(
        self, vector: Part[Vector], integers: Integers, charge: Charge, source: "GaussianSource"
    ) -> Released[NDArray[np.uint32]] | Permitted[NDArray[np.uint32]]:
        """See Mechanism."""
        return with_share(self.covered(vector), self.shares, integers, source)

    def scale(self, request: SecureRequest, length: int, sites: int, honest: int) -> tuple[float, float | None]:
        """See Mechanism. No range of values: nothing is cut off but what noise by the sites has no room for."""
        return choose_step(self.sum_sensitivity, length, sites, self.request.noise_multiplier, honest=honest), None


def with_share(
    vector: Part[Vector], shares: Shares, integers: Integers, source: "GaussianSource"
) -> Released[NDArray[np.uint32]]:
    """`vector` (d,) with its share of the noise. Raises PrivacyError for one beyond the bound that it is made for."""
    if isinstance(vector, Raw) or (isinstance(vector, Bounded) and vector.sensitivity > shares.clip * _EXACT):
        raise PrivacyError("what leaves is not within the bound that the sites' noise is made for")
    return Released(integers.encode(vector.value, source))


def session_shares(secure: SecureAggregation, sensitivity: float, noise_multiplier: float) -> Shares:
    """Each site's share of noise of that multiplier in the sum of a session. Raises PrivacyError."""
    if secure.value_range is not None:
        raise PrivacyError(
            "value_range is for secure sums without noise by the sites, and here the sites bring noise: only one can "
            "be meant"
        )
    return share_noise(
        sensitivity,
        secure.length,
        len(secure.sites),
        noise_multiplier,
        tolerated=secure.tolerated,
        colluding=secure.colluding,
        step=secure.step,
    )


@dataclass(frozen=True)
class SharedStatistics:
    """A share of noise in the sum of a session."""

    shares: Shares
    trust: ClassVar[Literal["aggregation"]] = "aggregation"

    @property
    def event(self) -> NoiseEvent:
        """What the ledger is charged."""
        return NoiseEvent(1.0, self.shares.noise_multiplier, 1)

    def let_out(self, part: Part[Doubles], source: "GaussianSource") -> Released[Doubles]:
        """Raises PrivacyError: a share is enough only in the sum."""
        raise PrivacyError("noise by the sites is enough only in their sum, and this was to leave by itself")

    def encode(self, part: Part[Vector], source: "GaussianSource") -> Released[NDArray[np.uint32]]:
        """The vector (d,) as integers with this site's share. Raises PrivacyError for one without its bound."""
        return with_share(part, self.shares, SumWithShare(self.shares), source)
