"""What determines a run, as conf/ says it. Imports nothing heavy: a wrong setting is told at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, field_validator

from fedclaw.federation.plan import METRICS, LocalTraining, PrivacyRequest
from fedclaw.frozen import Frozen


class ModelChoice(Frozen):
    """conf/workload/*.yaml: model. A null name takes the workload's default model."""

    name: str | None = None
    args: dict[str, JsonValue] | None = None


class WorkloadChoice(Frozen):
    """conf/workload/*.yaml."""

    name: str
    schema_file: Path | None = None
    model: ModelChoice = ModelChoice()


class RunSettings(Frozen):
    """What determines a run, whatever carries its messages."""

    workload: WorkloadChoice
    strategy: dict[str, JsonValue]
    """The strategy's name, and its own settings beside it."""
    training: LocalTraining
    privacy: PrivacyRequest | None
    rounds: int = Field(ge=1)
    seed: int = Field(ge=0)
    weighting: Literal["examples", "uniform"] = "examples"
    metrics: tuple[str, ...] = METRICS

    @field_validator("privacy", mode="before")
    @classmethod
    def _privacy_none(cls, value: Any) -> Any:
        """privacy=none is a group of nulls; everything else must be complete."""
        return None if isinstance(value, Mapping) and all(item is None for item in value.values()) else value

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(value) - set(METRICS)):
            raise ValueError(f"unknown metrics {', '.join(unknown)}; known: {', '.join(METRICS)}")
        return value
