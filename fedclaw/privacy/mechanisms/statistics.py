"""Noise on a release of statistics: the site's own, or every site's share of it inside a secure sum."""

from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import calibrate
from fedclaw.privacy.distributed import Shares, share_noise
from fedclaw.privacy.mechanisms.shared_noise import RANGE_BESIDE_NOISE
from fedclaw.protocol.statistics import StatisticsRequest


def noise_of(epsilon: float, delta: float) -> float:
    """The noise multiplier that keeps one release within epsilon and delta. Raises PrivacyError when none does."""
    return calibrate(epsilon, delta, 1.0, 1)


def shares_of(request: StatisticsRequest) -> Shares:
    """Each site's share of the noise in a secure sum. Raises PrivacyError when the request's figures allow none."""
    secure = request.secure
    assert secure is not None
    if secure.value_range is not None:
        raise PrivacyError(RANGE_BESIDE_NOISE)
    return share_noise(
        1.0,
        secure.length,
        len(secure.sites),
        noise_of(request.epsilon, request.delta),
        tolerated=secure.tolerated,
        colluding=secure.colluding,
        step=secure.step,
    )
