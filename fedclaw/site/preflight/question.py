"""A run that a site's operator wonders about, before any server asks for it."""

from typing import Self

from pydantic import Field, model_validator

from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.limits import MAX_BATCH, MAX_EPOCHS, MAX_ROUNDS, MAX_STEPS


class Question(Frozen):
    """A run with the site's own noise, or none, as conf/check.yaml has it."""

    epsilon: float | None = Field(default=None, gt=0)
    """null: without differential privacy."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """null: the policy's."""
    rounds: int = Field(default=10, ge=1, le=MAX_ROUNDS)
    epochs: float | None = Field(default=1.0, gt=0, le=MAX_EPOCHS)
    steps: int | None = Field(default=None, gt=0, le=MAX_STEPS)
    """Of one round, in the place of `epochs`."""
    batch_size: int = Field(default=32, gt=0, le=MAX_BATCH)
    strategy_name: str | None = None
    """null: the first one that the policy allows."""
    cohort: int | None = Field(default=None, ge=1)
    """null: as many sites as the policy asks for."""

    @model_validator(mode="after")
    def _some_length(self) -> Self:
        if self.epochs is None and self.steps is None:
            raise ValueError("set one of epochs and steps")
        return self
