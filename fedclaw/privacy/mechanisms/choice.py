"""Which mechanism is asked for: the one place that looks at whose noise it is."""

from fedclaw.errors import PrivacyError
from fedclaw.privacy.mechanisms.local_noise import LocalNoise, OwnNoise
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.privacy.mechanisms.shared_noise import SharedNoise, SharedStatistics, session_shares
from fedclaw.privacy.mechanisms.sum_noise import ServerNoise
from fedclaw.protocol.statistics import StatisticsRequest
from fedclaw.protocol.terms import Terms

StatisticsMechanism = OwnNoise | SharedStatistics


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


def mechanism_of_request(request: StatisticsRequest, sensitivity: float) -> StatisticsMechanism:
    """The mechanism for what is asked, of vectors with that sensitivity (`fedclaw.privacy.statistics.Design`).

    Raises PrivacyError when no noise keeps it within its epsilon and delta.
    """
    if request.secure is None:
        return OwnNoise.calibrated(request.epsilon, request.delta)
    return shared_of(request, sensitivity)


def shared_of(request: StatisticsRequest, sensitivity: float) -> SharedStatistics:
    """The mechanism for a request with a session. Raises PrivacyError."""
    if request.secure is None:
        raise PrivacyError("the request names no session")
    multiplier = OwnNoise.calibrated(request.epsilon, request.delta).noise_multiplier
    return SharedStatistics(session_shares(request.secure, sensitivity, multiplier))
