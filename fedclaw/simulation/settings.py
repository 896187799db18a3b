"""How a simulation runs: nothing here changes what it computes, but for `repeatable_noise`, which says so."""

from typing import Literal

from pydantic import Field

from fedclaw.errors import UsageError
from fedclaw.protocol.frozen import Frozen

Mode = Literal["auto", "one", "many"]
Device = Literal["auto", "cpu", "cuda"]


class SimulationSettings(Frozen):
    """conf/runtime/simulation.yaml."""

    workers: int = Field(default=1, ge=1, le=256)
    """Processes that train, each with one thread; 1: this process alone. The result is the same to the last bit."""
    mode: Mode = "auto"
    """One client at a time, or many at once; `auto` takes what is faster for the model and the clients' data. The same
    up to rounding."""
    device: Device = "cpu"
    """Where clients are trained and evaluated; `auto` takes CUDA where there is one. The same up to rounding. Small
    models are faster on the CPU."""
    save_every: float = Field(default=5.0, ge=0)
    """Least seconds between two checkpoints. Nobody pays for a round of a simulation that has to be computed again."""
    repeatable_noise: bool = False
    """For research only: draw noise and Poisson samples from the run's seed, so that a private run can be repeated to
    the last bit. Such noise guarantees nothing: whoever knows the seed can subtract it. In the run's record."""


def refuse_secure(secure: bool) -> None:
    """Raise UsageError for a simulation with secure aggregation."""
    if secure:
        raise UsageError(
            "secure aggregation hides updates from a server, and a simulation has none: take secure=none, or "
            "runtime=sites, where sites mask for real"
        )
