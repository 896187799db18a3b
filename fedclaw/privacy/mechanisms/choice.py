"""Which mechanism is asked for: the one place that looks at whose noise it is."""

from fedclaw.privacy.mechanisms.in_the_open import InTheOpen
from fedclaw.privacy.mechanisms.local_noise import LocalNoise
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.privacy.mechanisms.server_noise import ServerNoise
from fedclaw.privacy.mechanisms.shared_noise import SharedNoise
from fedclaw.protocol.plan import Terms


def mechanism_of(asked: Terms) -> Mechanism:
    """That of a run's record, or of a round's plan."""
    onward = _on_the_sum(asked)
    return onward if asked.privacy is None else LocalNoise(asked, asked.privacy, onward)


def _on_the_sum(asked: Terms) -> Mechanism:
    central = asked.central
    if central is None:
        return InTheOpen(asked)
    return (SharedNoise if central.noise_by == "sites" else ServerNoise)(asked, central)
