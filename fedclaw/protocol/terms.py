"""What is asked of the sites in every round of a run, as a run's record and a round's plan both say it."""

from dataclasses import dataclass

from pydantic import Field, JsonValue

from fedclaw.protocol.compression import Compression
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.plan import (
    CentralPrivacy,
    Distillation,
    LocalTraining,
    ModelSpec,
    Plan,
    PrivacyRequest,
    Weighting,
)


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


_MANY = RoundRules(minimum=10**9)
"""Of a plan's `Terms`: how many answers a round needs is the server's to see to, and touches nothing at a site."""


@dataclass(frozen=True)
class Terms:
    """What is asked of the sites in every round of a run, as far as a record and a plan both say it."""

    strategy: StrategyRecord
    model: ModelSpec
    rounds: int
    training: LocalTraining
    privacy: PrivacyRequest | None
    central: CentralPrivacy | None
    secure: SecureRequest | None
    distillation: Distillation | None
    compression: Compression | None
    weighting: Weighting
    weight_cap: int | None
    rules: RoundRules
    """At a site, which is not told them, such as no round has too few answers for."""

    @classmethod
    def of_plan(cls, plan: Plan) -> "Terms":
        """Those that a site is asked under."""
        return cls(
            strategy=StrategyRecord(name=plan.strategy, settings=plan.strategy_settings),
            model=plan.model,
            rounds=plan.rounds,
            training=plan.training,
            privacy=plan.privacy,
            central=plan.central,
            secure=_secure(plan),
            distillation=plan.distillation,
            compression=plan.compression,
            weighting=plan.weighting,
            weight_cap=plan.weight_cap,
            rules=_MANY,
        )


def _secure(plan: Plan) -> SecureRequest | None:
    """What the session of `plan` was made from, as far as it says."""
    secure = plan.secure
    if secure is None:
        return None
    if secure.value_range is None:
        return SecureRequest()
    heaviest = plan.weight_cap or (secure.largest_weight if plan.weighting == "examples" else None) or 1.0
    return SecureRequest.model_construct(
        value_range=secure.value_range / heaviest, largest_weight=secure.largest_weight
    )
