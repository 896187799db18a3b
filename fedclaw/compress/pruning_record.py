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
    """How a model is made narrower.

    The defaults are what kept most of the accuracy on digits: a residual network of 115,234 parameters, pruned and then
    distilled with labels for 60 epochs. The figures below are of three folds, or one where it says so: enough to tell
    apart ways to spread the cut, not importances.
    """

    importance: Importance = "group_norm"
    """Needs no inputs. At 5% of the parameters, spread balanced, it kept 100.0% where `magnitude` kept 99.7, `teacher`
    99.4 and `taylor` 98.3 (one fold)."""
    steps: int = Field(default=1, ge=1, le=100)
    """Prune in so many steps, and recover between them; importance is found anew at each step. Three steps, with a
    quarter of the epochs between them, kept 99.7 and 99.4% where one kept 100.0 and 98.3 (two folds),
    for half as much training again: worth trying where much is cut."""
    schedule: Literal["geometric", "linear", "cubic"] = "geometric"
    """How much is left after each step: the same share of what there was (geometric), the same number of parameters
    less (linear), or much at first and little at last (cubic; Zhu and Gupta 2017, "To prune, or not to prune", section
    3, equation 1)."""
    spread: Spread = "sensitivity"
    """`uniform` and `balanced` need no inputs, but at 5% of the parameters they kept 97.5 and 97.9% where `sensitivity`
    kept 99.1: it leaves wide what all blocks add to. On inputs made from the schema it finds the same layers as on
    public ones, only less clearly."""
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


WEIGHTS_ALONE = PruningSettings(importance="group_norm", steps=1, spread="uniform")
"""Every group loses the same share of its channels, and no inputs are looked at."""


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
