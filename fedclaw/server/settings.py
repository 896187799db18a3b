"""What determines a run, and where a server may be told to listen, as conf/ says it.

Imports nothing heavy: a wrong setting is told at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue, field_validator

from fedclaw.learning.tasks.installed import metrics_and_clauses, unknown
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.limits import Name
from fedclaw.protocol.terms import CentralRequest, SecureRequest, SharedTerms

_LARGEST_PORT = 65535


def check_listening(address: str) -> str:
    """`address`, if it is HOST:PORT; any interface ("0.0.0.0", "[::]") will do here. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > _LARGEST_PORT:
        raise ValueError(f"{address!r} is not HOST:PORT with a port up to {_LARGEST_PORT}")
    return address


ListenAddress = Annotated[str, AfterValidator(check_listening)]
"""HOST:PORT, checked."""


ALL_METRICS = ("all",)


class ModelChoice(Frozen):
    """conf/workload/*.yaml: model. A null name takes the workload's default model."""

    name: str | None = None
    args: dict[str, JsonValue] | None = None


class WorkloadChoice(Frozen):
    """conf/workload/*.yaml."""

    name: str
    schema_file: Path | None = None
    model: ModelChoice = ModelChoice()


class RunSettings(SharedTerms):
    """What determines a run, whatever carries its messages."""

    workload: WorkloadChoice
    strategy: dict[str, JsonValue]
    """The strategy's name, and its own settings beside it."""
    central: CentralRequest | None = None
    secure: SecureRequest | None = None
    seed: int = Field(ge=0)
    metrics: tuple[Name, ...] = Field(default=ALL_METRICS, max_length=64)
    """By name, or [all]: every one that the task has."""
    score_bins: int | None = Field(default=2048, ge=2, le=4096)
    statistics: Path | None = None
    """A statistics.json, for a schema that says standardise: federated."""

    @field_validator("privacy", "central", "secure", "compression", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """privacy=none, and its like, is a group of nulls; everything else must be complete."""
        return None if isinstance(value, Mapping) and all(item is None for item in value.values()) else value

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value != ALL_METRICS and (strange := sorted(unknown(value))):
            raise ValueError(f"unknown metrics {', '.join(strange)}; known: {', '.join(metrics_and_clauses())}")
        return value
