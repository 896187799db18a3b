"""Which mechanism is asked for: the one place that looks at whose noise it is."""

from fedclaw.privacy.mechanisms.local_noise import LocalNoise
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.privacy.mechanisms.server_noise import ServerNoise
from fedclaw.privacy.mechanisms.shared_noise import SharedNoise
from fedclaw.protocol.terms import Terms


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
