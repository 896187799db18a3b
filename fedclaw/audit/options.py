"""How thorough an audit is."""

from pydantic import Field

from fedclaw.protocol.frozen import Frozen


class AuditOptions(Frozen):
    """How much an audit does. More of each makes larger bounds, and takes longer."""

    canaries: int = Field(default=200, ge=8)
    """Canaries of the one-run audit, over all sites."""
    examples: int = Field(default=300, ge=1)
    """Most of each site's own examples that the attacked run uses; each is in by the toss of a coin."""
    attacked_rounds: int | None = Field(default=5, ge=1)
    """Most rounds of the attacked run; null: the configuration's own number."""
    trials: int = Field(default=300, ge=20)
    """Most releases of each probed mechanism."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """With which all bounds hold together."""
    alarm: float = Field(default=1e-4, gt=0, lt=1)
    """The probability that a configuration that keeps its claims is flagged."""
