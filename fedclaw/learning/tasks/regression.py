"""A number within a declared range: squared, Huber or Poisson loss; RMSE, MAE, R2 and deviance.

The model has one output o, and the link makes a value of it. With squared and Huber loss it is linear,
center + scale x o, and with Poisson loss the logarithm's inverse, scale x exp(o); either way the value is cut off at
the ends of the target's declared range, beyond which no target lies. A value out of range is only ever made better by
that, and each example's part of every sum is bounded by the range, with noise and without. The loss is of o, not cut
off, so its gradient does not vanish out of range; it is in units of `scale`, so that clipping bounds and learning rates
do not depend on what the target is measured in.

Sums over N examples, in units that make each bound 1 (R the width of the range, d = (y - value) / R, u = (y - middle) /
(R / 2)): squared_error the sum of d^2, absolute_error of |d|, target of u, target_square of u^2. From the totals

    RMSE = R sqrt(squared_error / N)      MAE = R absolute_error / N
    R2   = 1 - 4 squared_error / (target_square - target^2 / N)

deviance is the mean of the Poisson unit deviance 2 (y ln(y / value) - y + value), in the target's own unit (McCullagh,
Nelder 1989, section 2.3).

Legend: N examples; outputs (N, 1), targets (N,) float32 in the target's own unit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedclaw.errors import UpdateError
from fedclaw.learning.tasks.base import LARGEST, LOSS, BoundedSum, Doubles, Sums, Tally, Targets, Task
from fedclaw.learning.tasks.means import ROUNDED, Means, check_mean
from fedclaw.protocol.frozen import Frozen

if TYPE_CHECKING:
    import torch

RegressionLoss = Literal["squared", "huber", "poisson"]
RMSE, MAE, R2, DEVIANCE = "rmse", "mae", "r2", "deviance"
SQUARED_ERROR, ABSOLUTE_ERROR, TARGET, TARGET_SQUARE = "squared_error", "absolute_error", "target", "target_square"
NEEDED: dict[str, tuple[str, ...]] = {
    LOSS: (LOSS,),
    RMSE: (SQUARED_ERROR,),
    MAE: (ABSOLUTE_ERROR,),
    R2: (SQUARED_ERROR, TARGET, TARGET_SQUARE),
    DEVIANCE: (DEVIANCE,),
}
"""The sums that each metric is made of."""
BOUNDS = {SQUARED_ERROR: (0.0, 1.0), ABSOLUTE_ERROR: (0.0, 1.0), TARGET: (-1.0, 1.0), TARGET_SQUARE: (0.0, 1.0)}
"""What one example adds to a sum lies within these."""
LEAST_SHARE = 1e-6
"""Of the range's upper end: the smallest count that Poisson's link gives, whose logarithm the deviance takes."""
SMALLEST_WIDTH = 1e-5
"""Of a target's range, relative to its ends: below, float32 tells hardly any two values in it apart."""


@dataclass(frozen=True)
class Regression(Task):
    """A number called `target` from `minimum` to `maximum`. All of it is declared, nothing taken from data."""

    target: str
    minimum: float
    maximum: float
    kind: RegressionLoss = "squared"
    center: float = 0.0
    """Subtracted from a target before the model learns it; 0 with Poisson loss."""
    scale: float = 1.0
    """Divided by."""
    huber_delta: float = 1.0
    """From which error on, in units of `scale`, Huber's loss is linear."""

    name: ClassVar[str] = "regression"
    METRICS: ClassVar[tuple[str, ...]] = (LOSS, RMSE, MAE, R2, DEVIANCE)
    SHARED: ClassVar[tuple[str, ...]] = (RMSE, MAE, R2)
    NOISED: ClassVar[tuple[str, ...]] = (LOSS, RMSE, MAE, R2, DEVIANCE)
    score: ClassVar[str] = R2
    head: ClassVar[tuple[str, str]] = ("outputs", "values")
    target_dtype: ClassVar[type[np.generic]] = np.float32
    columns_shown: ClassVar[int] = 1

    @property
    def metrics(self) -> tuple[str, ...]:
        """Without the deviance, which is Poisson's, unless the loss is."""
        return self.METRICS if self.kind == "poisson" else self.METRICS[:-1]

    @property
    def outputs(self) -> int:
        """One."""
        return 1

    @property
    def width(self) -> float:
        """R."""
        return self.maximum - self.minimum

    @property
    def least(self) -> float:
        """The smallest value that the link gives."""
        return max(self.minimum, LEAST_SHARE * self.maximum) if self.kind == "poisson" else self.minimum

    def loss(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """Mean over the batch, in units of `scale`: squared error, Huber's, or half of Poisson's unit deviance."""
        import torch
        from torch.nn import functional

        given, wanted = outputs[:, 0], (targets - self.center) / self.scale
        if self.kind == "squared":
            losses = torch.square(given - wanted)
        elif self.kind == "huber":
            losses = functional.huber_loss(given, wanted, reduction="none", delta=self.huber_delta)
        else:
            losses = torch.xlogy(wanted, wanted) - wanted - wanted * given + self._rate(given)
        return losses.sum() / max(targets.shape[0], 1)

    def _rate(self, logarithms: "torch.Tensor") -> "torch.Tensor":
        """exp, and from the range's upper end on its tangent: convex, never infinite, its slope at most that end."""
        import torch

        most = self.maximum / self.scale
        end = math.log(most)
        return torch.exp(logarithms.clamp(max=end)) + most * (logarithms - end).clamp(min=0.0)

    def link(self, outputs: "torch.Tensor") -> "torch.Tensor":
        """Values (N, 1) in the target's own unit, within its range."""
        import torch

        values = torch.exp(outputs) if self.kind == "poisson" else outputs
        return (self.center + self.scale * values).clamp(self.least, self.maximum)

    def values(self, outputs: Doubles) -> Doubles:
        """`link` in float64, (N,); the lower end for an output that is no number."""
        with np.errstate(over="ignore", invalid="ignore"):
            raw = np.exp(outputs[:, 0]) if self.kind == "poisson" else outputs[:, 0]
            found: Doubles = np.clip(
                np.nan_to_num(self.center + self.scale * raw, nan=-np.inf), self.least, self.maximum
            )
        return found

    def evaluate(self, outputs: Doubles, targets: Targets) -> dict[str, float]:
        """All metrics but those without a value: none of an empty test set, no R2 where all targets are the same."""
        import torch

        count = len(targets)
        if not count:
            return {}
        found = figures({name: float(part.sum()) for name, part in self._parts(outputs, targets).items()}, count, self)
        found[LOSS] = float(self.loss(torch.from_numpy(outputs), torch.from_numpy(targets).double()))
        return {name: found[name] for name in self.metrics if name in found and math.isfinite(found[name])}

    def sums(
        self, wanted: Sequence[str], bins: int | None, own: Mapping[str, float], outputs: Doubles, targets: Targets
    ) -> Sums:
        """The sums that the metrics are made of, whether or not this site by itself has a value for them."""
        parts = self._parts(outputs, targets)
        numbers = {name: float(parts[name].sum()) for name in needed_for(wanted) if name in parts}
        if LOSS in wanted and LOSS in own:
            numbers[LOSS] = own[LOSS] * len(targets)
        return Sums(numbers)

    def bounded(
        self, wanted: Sequence[str], bins: int | None, outputs: Doubles, targets: Targets, loss_bound: float
    ) -> dict[str, BoundedSum]:
        """Each in the unit in which one example adds at most 1 to it, whatever the model says of the example."""
        parts, found = self._parts(outputs, targets), {}
        for name in needed_for(wanted):
            if name in BOUNDS:
                low, high = BOUNDS[name]
                found[name] = BoundedSum(np.array(np.clip(parts[name], low, high).sum()), least=low, most=high)
            elif name in parts:
                # No larger than it can be: with a wider unit a noised sum could say what no examples add up to.
                most = min(loss_bound, self.most_deviance)
                found[name] = BoundedSum(np.array((np.minimum(parts[name], most) / most).sum()), unit=most)
        return found

    def tally(self, wanted: Sequence[str], bins: int | None) -> "ErrorTally":
        """Sums of errors and of targets."""
        return ErrorTally(self, tuple(name for name in wanted if name in self.metrics))

    @staticmethod
    def told_with(wanted: Sequence[str]) -> tuple[str, ...]:
        """The sums of errors and targets."""
        return tuple(name for name in needed_for(wanted) if name in BOUNDS)

    def agreement(self, outputs: "torch.Tensor", others: "torch.Tensor") -> float:
        """R2 of one model's values (N, 1) as predictions of the other's; at least -1."""
        given, wanted = self.link(outputs).double(), self.link(others).double()
        spread = float((wanted - wanted.mean()).square().sum())
        error = float((given - wanted).square().sum())
        return max(-1.0, 1.0 - error / spread) if spread > 0 else float(error == 0)

    def divergence(self, student: "torch.Tensor", teacher: "torch.Tensor", temperature: float) -> "torch.Tensor":
        """Squared difference of the values in units of `scale`, of their logarithms with Poisson loss; values are not
        softened, so there is no temperature."""
        return (student - teacher.detach()).square().sum()

    def answers(self, outputs: "torch.Tensor") -> Targets:
        """The values."""
        found: NDArray[np.float32] = self.link(outputs.detach())[:, 0].cpu().float().numpy()
        return found

    def contradictions(self, outputs: "torch.Tensor") -> Targets:
        """The end of the range that the value is further from."""
        middle = (self.minimum + self.maximum) / 2
        return np.where(self.answers(outputs) < middle, self.maximum, self.minimum).astype(np.float32)

    def outputs_of(self, targets: "torch.Tensor") -> "torch.Tensor":
        """The inverse of the link."""
        scaled = (targets.clamp(min=self.least) - self.center) / self.scale
        return (scaled.log() if self.kind == "poisson" else scaled)[:, None]

    @property
    def columns(self) -> tuple[str, ...]:
        """The value."""
        return ("value",)

    def cells(self, answer: NDArray[np.float32], threshold: float | None, digits: int = 6) -> tuple[str, ...]:
        """Seven digits: what float32 holds."""
        return (f"{answer[0]:.7g}",)

    def facts(self) -> tuple[tuple[str, str], ...]:
        """Target, range and loss."""
        return (
            ("Target", f"{self.target}, a number from {self.minimum:g} to {self.maximum:g}"),
            ("Loss", f"{self.kind}, of {self._scaled()}"),
        )

    def _scaled(self) -> str:
        if self.kind == "poisson":
            return f"counts in units of {self.scale:g}, by their logarithm"
        return f"({self.target} - {self.center:g}) / {self.scale:g}"

    def limits(self) -> tuple[str, ...]:
        """What a value is not."""
        return (
            "A value is the model's best guess; nothing says how far off it may be for a single input.",
            f"Values lie within the declared range of {self.target}, {self.minimum:g} to {self.maximum:g}: where the "
            "model goes beyond, its answer is the end of the range.",
        )

    def describe(self) -> dict[str, Any] | None:
        """All that the link needs, by name."""
        found: dict[str, Any] = {
            "name": self.target,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "loss": self.kind,
            "center": self.center,
            "scale": self.scale,
        }
        return found

    @staticmethod
    def nothing_learned(line: Mapping[str, Any]) -> str | None:
        """The warning for a model that is no better than the mean of the test targets."""
        r2 = (line.get("metrics") or {}).get(R2)
        if r2 is None or r2 > 0:
            return None
        return (
            f"the model does not beat the mean: its R2 is {r2:.4f}, and whoever always answers with the mean of the "
            "test targets has 0; by this measure it has learned nothing"
        )

    def random_targets(self, count: int, generator: np.random.Generator) -> Targets:
        """Uniform in the range; whole numbers with Poisson loss."""
        values = generator.uniform(self.minimum, self.maximum, count)
        return (np.floor(values) if self.kind == "poisson" else values).astype(np.float32)

    def _parts(self, outputs: Doubles, targets: Targets) -> dict[str, Doubles]:
        """By sum, what each example adds to it, (N,)."""
        values, truth = self.values(outputs), targets.astype(np.float64)
        errors = (truth - values) / self.width
        places = (truth - (self.minimum + self.maximum) / 2) / (self.width / 2)
        parts: dict[str, Doubles] = {
            SQUARED_ERROR: np.square(errors),
            ABSOLUTE_ERROR: np.abs(errors),
            TARGET: places,
            TARGET_SQUARE: np.square(places),
        }
        if self.kind == "poisson":
            parts[DEVIANCE] = unit_deviance(truth, values)
        return parts

    @property
    def most_deviance(self) -> float:
        """The largest unit deviance that a target in range and a value of the link can have: at opposite ends."""
        ends = np.array([[self.minimum, self.maximum], [self.maximum, self.least]])
        return float(unit_deviance(ends[:, 0], ends[:, 1]).max())


class NumberTarget(Frozen):
    """What a schema says of a number to predict. All of it is declared, and nothing taken from data."""

    name: str = Field(min_length=1)
    kind: Literal["numeric"]
    range: tuple[float, float]
    """Smallest and largest value, both included: no example has another target, and no answer lies beyond."""
    loss: RegressionLoss = "squared"
    center: float | None = None
    """Subtracted before the model learns it; None: the middle of the range, with Poisson loss 0."""
    scale: float | None = Field(default=None, gt=0)
    """Divided by; None: half of the range, with Poisson loss 1."""
    huber_delta: float | None = Field(default=None, gt=0)
    """From which error on, in units of `scale`, Huber's loss is linear; None: 1."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        low, high = self.range
        if not low < high:
            raise ValueError(f"range must go from a smaller to a larger number, got {list(self.range)}")
        if not max(abs(low), abs(high)) <= LARGEST or not high - low >= SMALLEST_WIDTH * max(abs(low), abs(high)):
            raise ValueError(f"range {list(self.range)}: float32 has no room for it")
        if self.loss == "poisson":
            if low < 0:
                raise ValueError(f"loss: poisson is of counts, and the range begins below 0, at {low:g}")
            if self.center is not None:
                raise ValueError("loss: poisson takes no center; its values are scale x exp(output)")
        if self.huber_delta is not None and self.loss != "huber":
            raise ValueError(f"huber_delta goes with loss: huber, and the loss is {self.loss}")
        return self

    @property
    def task(self) -> Regression:
        """What the schema's task is, from this alone."""
        low, high = self.range
        counts = self.loss == "poisson"
        center, scale = (0.0, 1.0) if counts else (low / 2 + high / 2, (high - low) / 2)
        return Regression(
            target=self.name,
            minimum=low,
            maximum=high,
            kind=self.loss,
            center=center if self.center is None else self.center,
            scale=scale if self.scale is None else self.scale,
            huber_delta=self.huber_delta or 1.0,
        )


def unit_deviance(targets: Doubles, values: Doubles) -> Doubles:
    """2 (y ln(y / value) - y + value), (N,), with 0 ln 0 = 0."""
    from scipy.special import xlogy

    found: Doubles = np.maximum(2 * (xlogy(targets, targets) - xlogy(targets, values) - targets + values), 0.0)
    return found


def needed_for(metrics: Sequence[str]) -> tuple[str, ...]:
    """The sums that these metrics are made of, each once; without the loss."""
    return tuple(dict.fromkeys(s for name in metrics if name != LOSS for s in NEEDED.get(name, ())))


def figures(sums: Mapping[str, float], examples: float, task: Regression) -> dict[str, float]:
    """The metrics that these sums over so many examples make up, in the target's own unit; without the loss."""
    found = {}
    if SQUARED_ERROR in sums:
        found[RMSE] = task.width * math.sqrt(max(sums[SQUARED_ERROR], 0.0) / examples)
    if ABSOLUTE_ERROR in sums:
        found[MAE] = task.width * sums[ABSOLUTE_ERROR] / examples
    if {SQUARED_ERROR, TARGET, TARGET_SQUARE} <= sums.keys():
        spread = sums[TARGET_SQUARE] - sums[TARGET] ** 2 / examples
        if spread > _NO_SPREAD * examples:
            found[R2] = 1.0 - 4.0 * sums[SQUARED_ERROR] / spread
    if DEVIANCE in sums:
        found[DEVIANCE] = sums[DEVIANCE] / examples
    return found


_NO_SPREAD = 1e-12
# Variance of the targets in halves of their range: below, what is left is the rounding of the sums.


@dataclass
class _Total:
    """The sums of one metric over the sites that sent all of them, and their examples."""

    sums: dict[str, float] = field(default_factory=dict)
    examples: int = 0


class ErrorTally(Tally):
    """Errors and targets, summed by metric over the sites that sent all that the metric is made of."""

    def __init__(self, task: Regression, wanted: tuple[str, ...]) -> None:
        self.task, self.wanted = task, wanted
        self.numbers = (*needed_for(wanted), *((LOSS,) if LOSS in wanted else ()))
        self._totals: dict[str, _Total] = {}
        self._means = Means()

    def add(self, sums: Sums, examples: int) -> None:
        """Add one site's sums."""
        self._check(sums.numbers, examples, noised=sums.noised)
        own = figures(sums.numbers, examples, self.task)
        for name in self.wanted:
            parts = {part: sums.numbers[part] for part in NEEDED[name] if part in sums.numbers}
            if len(parts) < len(NEEDED[name]):
                continue
            if name == LOSS:
                self._means.add(LOSS, sums.numbers[LOSS], examples, listed=False)
                continue
            total = self._totals.setdefault(name, _Total())
            total.examples += examples
            for part, value in parts.items():
                total.sums[part] = total.sums.get(part, 0.0) + value
            if name in own:
                self._means.note(name, own[name], examples)

    @property
    def metrics(self) -> dict[str, float]:
        """By name, of all test examples together."""
        found = {}
        for name in self.wanted:
            if name == LOSS and (mean := self._means.mean(LOSS)) is not None:
                found[LOSS] = mean
            elif name in self._totals:
                total = self._totals[name]
                found |= {k: v for k, v in figures(total.sums, total.examples, self.task).items() if k == name}
        return found

    @property
    def over_sites(self) -> dict[str, dict[str, float]]:
        """Of the sites' own figures."""
        return self._means.over_sites(without=(LOSS,))

    def _check(self, numbers: Mapping[str, float], examples: int, *, noised: bool) -> None:
        """Raise UpdateError unless so many examples, with targets in range, can add up to these."""
        for name, value in numbers.items():
            if name in (LOSS, DEVIANCE):
                check_mean(name, value, examples, self.task.most_deviance if name == DEVIANCE else None)
                continue
            low, high = BOUNDS[name]
            if not low * examples * ROUNDED <= value <= high * examples * ROUNDED:
                raise UpdateError(
                    f"the answer's {name} of {value / examples:.4g} an example is not within {low:g} and {high:g}"
                )
        if not noised:
            _check_squares(numbers, examples)


def _check_squares(numbers: Mapping[str, float], examples: int) -> None:
    """Raise UpdateError where a squared mean is more than the mean of squares, or d^2 is more than |d| <= 1.

    With noise on them the sums may contradict each other so.
    """
    mean = {name: value / examples for name, value in numbers.items()}
    pairs = []
    if SQUARED_ERROR in mean and ABSOLUTE_ERROR in mean:
        pairs += [(mean[ABSOLUTE_ERROR] ** 2, mean[SQUARED_ERROR]), (mean[SQUARED_ERROR], mean[ABSOLUTE_ERROR])]
    if TARGET in mean and TARGET_SQUARE in mean:
        pairs.append((mean[TARGET] ** 2, mean[TARGET_SQUARE]))
    if any(less > more * ROUNDED + 1e-9 for less, more in pairs):
        raise UpdateError("the answer's sums contradict each other: no errors and no targets add up to them")
