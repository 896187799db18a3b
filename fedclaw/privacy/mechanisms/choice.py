"""Which mechanism is asked for: the one place that looks at whose noise it is.

An update and a release of statistics leave alike: with the site's own noise, or every site's share of it inside a
secure sum; an update also with noise by the server.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.distributed import Shares, SumWithShare
from fedclaw.privacy.fixed_point import Vector
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.privacy.mechanisms.site_noise import Doubles, LocalNoise, OwnNoise, SharedNoise, session_shares, with_share
from fedclaw.privacy.mechanisms.sum_noise import ServerNoise
from fedclaw.privacy.provenance import Part, Released
from fedclaw.protocol.statistics import StatisticsRequest
from fedclaw.protocol.terms import Terms

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource

SENSITIVITY = 1.0
"""Of the vector (`fedclaw.privacy.statistics.Design`): one example moves it by at most that, in L2 norm."""


class LocalAndServerNoise(LocalNoise, ServerNoise):
    """What noised steps came to is clipped as a whole, and the server adds noise to the sum."""


class LocalAndSharedNoise(LocalNoise, SharedNoise):
    """What noised steps came to is clipped as a whole, and all sites add shares of noise to the sum."""


def mechanism_of(asked: Terms) -> Mechanism:
    """The mechanism for a run's record, or for a round's plan."""
    local, central = asked.privacy is not None, asked.central
    if central is None:
        return (LocalNoise if local else Mechanism)(asked)
    if central.noise_by == "sites":
        return (LocalAndSharedNoise if local else SharedNoise)(asked)
    return (LocalAndServerNoise if local else ServerNoise)(asked)


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


StatisticsMechanism = OwnNoise | SharedStatistics


def mechanism_of_request(request: StatisticsRequest) -> StatisticsMechanism:
    """The mechanism for what is asked. Raises PrivacyError when no noise keeps it within its epsilon and delta."""
    return OwnNoise.calibrated(request.epsilon, request.delta) if request.secure is None else shared_of(request)


def shared_of(request: StatisticsRequest) -> SharedStatistics:
    """The mechanism for a request with a session. Raises PrivacyError."""
    if request.secure is None:
        raise PrivacyError("the request names no session")
    multiplier = OwnNoise.calibrated(request.epsilon, request.delta).noise_multiplier
    return SharedStatistics(session_shares(request.secure, SENSITIVITY, multiplier))
