"""What a run's record says of its rounds that no plan repeats: the strategy's settings, when a round counts, and what
the sessions of secure aggregation are made from."""

from pydantic import Field, JsonValue

from fedclaw.protocol.frozen import Frozen


class StrategyRecord(Frozen):
    """A strategy by name and the settings it ran with."""

    name: str
    settings: dict[str, JsonValue] = {}


class RoundRules(Frozen):
    """When a round counts. None of these touches what a site computes or pays."""

    minimum: int = Field(default=2, ge=1)
    """Sites that must have trained for a round to count."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the connected sites asked in a round, sampled anew each time."""
    deadline: float = Field(default=600.0, gt=0)
    """Seconds that a site has to answer."""
    attempts: int = Field(default=3, ge=1)
    """How often the same question is asked before the run stops; a site that has answered pays nothing again."""


class SecureRequest(Frozen):
    """conf/secure/*.yaml: secure aggregation of the updates."""

    dropouts: float = Field(default=0.2, ge=0, lt=0.5)
    """Share of a round's sites that may drop out of it and leave a sum, with all its noise."""
    corrupt: float = Field(default=0.2, ge=0, lt=0.5)
    """Share of the sites that may tell the server all they know; what the others send stays hidden."""
    value_range: float = Field(default=8.0, gt=0)
    """Without noise by the sites: a coordinate of weight x delta / largest weight beyond it is cut off."""
    largest_weight: float | None = Field(default=None, ge=1)
    """With weighting: examples, a weight that no site exceeds: it sets what one integer stands for."""
