"""What pruning is told, and what it says of itself in compression.json.

Legend: a *group* is the channels of coupled layers, which can only go together; a *width* is how many of them are left
within each part that must shrink alike (the groups of a normalisation or a convolution, the heads of an attention).
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from fedclaw.protocol.frozen import Frozen

Importance = Literal["magnitude", "group_norm", "taylor", "teacher"]
"""How channels of a group are ranked; `fedclaw.compress.importance` has the formulas."""
Spread = Literal["uniform", "balanced", "sensitivity"]
"""How the cut is spread over the groups; `fedclaw.compress.spread`."""
TargetKind = Literal["parameters", "multiply_adds", "latency"]
Runtime = Literal["onnxruntime", "torch"]


class Target(Frozen):
    """How small a model is to become: at most `share` of what the unpruned one has of `kind`."""

    kind: TargetKind = "parameters"
    share: float = Field(gt=0, lt=1)


class PruningSettings(Frozen):
    """How a model is made narrower."""

    importance: Importance = "group_norm"
    steps: int = Field(default=1, ge=1, le=100)
    """Prune in so many steps, and recover after each; importance is found anew at each step."""
    schedule: Literal["geometric", "linear", "cubic"] = "geometric"
    """How much is left after each step: the same share of what there was (geometric), the same number of parameters
    less (linear), or much at first and little at last (cubic; Zhu and Gupta 2017, "To prune, or not to prune", section
    3, equation 1)."""
    spread: Spread = "uniform"
    multiply_adds: float | None = Field(default=None, gt=0, lt=1)
    """Largest share of the multiply-adds that may be left, in place of `fraction` of the parameters."""
    latency: float | None = Field(default=None, gt=0, lt=1)
    """Largest share of the latency at batch 1 that may be left, in place of `fraction` of the parameters."""
    runtime: Runtime = "onnxruntime"
    """Where latency is measured."""
    examples: int = Field(default=256, ge=1)
    """How many of the inputs importance and sensitivity look at, at most."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.multiply_adds is not None and self.latency is not None:
            raise ValueError("multiply_adds= and latency= are two targets; give one of them")
        return self

    def target(self, fraction: float) -> Target:
        """The one that is set, else `fraction` of the parameters."""
        if self.multiply_adds is not None:
            return Target(kind="multiply_adds", share=self.multiply_adds)
        if self.latency is not None:
            return Target(kind="latency", share=self.latency)
        return Target(share=fraction)

    @property
    def needs_inputs(self) -> bool:
        """Whether it looks at inputs; the weights alone otherwise."""
        return self.importance in ("taylor", "teacher") or self.spread == "sensitivity"


class Narrowed(Frozen):
    """What one group alone, narrowed to a share of its width, costs; nothing is retrained."""

    share: float
    """Of the channels that are left."""
    agreement: float
    """With the unpruned model, 1 if fully (`Task.agreement`)."""
    divergence: float
    """The distillation loss against the unpruned model."""


class GroupReport(Frozen):
    """One group of coupled layers."""

    layer: str
    """Its first one, by name."""
    parts: int = Field(default=1, ge=1)
    """Groups of a normalisation or of a convolution, or heads, that each have the widths below."""
    before: int
    after: int
    sensitivity: tuple[Narrowed, ...] = ()
    """Measured, from little narrowed to much; empty where it was not asked for."""


class PruningReport(Frozen):
    """What was decided. The shares are of the target's kind."""

    importance: Importance
    spread: Spread
    target: Target
    reached: float
    """The share that came out."""
    measured_on: str | None = None
    """Where a latency was measured, and how."""
    steps: tuple[float, ...]
    """The share of the parameters that was left after each step."""
    groups: tuple[GroupReport, ...]
    kept: tuple[str, ...] = ()
    """First layers of groups that cannot be narrowed: the model does not run without all of their channels."""
