"""No noise at all: an update leaves as it is, where a site's policy allows training without privacy."""

from dataclasses import dataclass

from fedclaw.privacy.mechanisms.mechanism import Mechanism


@dataclass(frozen=True)
class InTheOpen(Mechanism):
    """No promise but that of a secure sum, if there is one."""

    @property
    def claims_privacy(self) -> bool:
        """See Mechanism."""
        return False
