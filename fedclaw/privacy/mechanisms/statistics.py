"""Noise on a release of statistics: the site's own, or every site's share of it inside a secure sum."""

from fedclaw.privacy.accounting import calibrate
from fedclaw.privacy.distributed import Shares
from fedclaw.privacy.mechanisms.shared_noise import session_shares
from fedclaw.protocol.statistics import StatisticsRequest


def noise_of(epsilon: float, delta: float) -> float:
    """The noise multiplier that keeps one release within epsilon and delta. Raises PrivacyError when none does."""
    return calibrate(epsilon, delta, 1.0, 1)


def shares_of(request: StatisticsRequest) -> Shares:
    """Each site's share of the noise in a secure sum. Raises PrivacyError when the request's figures allow none."""
    assert request.secure is not None
    return session_shares(request.secure, 1.0, noise_of(request.epsilon, request.delta))
