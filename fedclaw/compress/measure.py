"""How teacher, student and controls are compared: on the same examples, which no other step looked at.

Legend: N examples, K outputs, D input shape without the batch.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedclaw.compress.inputs import PublicFile
from fedclaw.compress.intervals import (
    Difference,
    Indices,
    Interval,
    Score,
    of_bootstrap,
    of_paired,
    of_paired_bootstrap,
    of_proportion,
)
from fedclaw.compress.models import Teacher, predict_logits
from fedclaw.compress.record import Control, Measure
from fedclaw.errors import CompressionError
from fedclaw.learning.tasks.base import Targets, Task
from fedclaw.learning.workload import doubles

ACCURACY = "accuracy"
"""The score that is a share of right answers; of any other, intervals are by resampling."""


@dataclass(frozen=True)
class Scored:
    """One model's figures; `outputs` (N, K) are there where it was measured at the coordinator."""

    metrics: dict[str, float]
    interval: Interval | None = None
    outputs: NDArray[np.float64] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Examples:
    """Inputs (N, *D) and targets (N,) that models are measured on."""

    measure: Measure
    inputs: torch.Tensor
    targets: Targets
    task: Task

    def __len__(self) -> int:
        return len(self.targets)

    def score(self, model: nn.Module) -> Scored:
        """The metrics of `model`. Raises CompressionError where it has no score on them."""
        device = next(model.parameters()).device
        return self.score_outputs(doubles(predict_logits(model, self.inputs.to(device))))

    def score_outputs(self, outputs: NDArray[np.float64]) -> Scored:
        """The metrics of a model that gave these outputs (N, K) for the inputs. Raises what `score` does."""
        found = self.task.evaluate(outputs, self.targets)
        if self.task.score not in found:
            what = "the evaluation data" if self.measure == "evaluation file" else "the teacher's answers on the inputs"
            raise CompressionError(
                f"no {self.task.score} can be had of {what}: the targets are all the same, or the model's outputs not "
                "finite"
            )
        if self.measure == "agreement with the teacher":
            found = {self.task.score: found[self.task.score]}
        return Scored(found, self._interval(found[self.task.score], outputs), outputs)

    def difference(self, first: Scored, second: Scored) -> Difference:
        """The first's score less the second's."""
        assert first.outputs is not None
        assert second.outputs is not None
        if self.task.score == ACCURACY:
            return of_paired(self._right(first.outputs), self._right(second.outputs))
        interval = of_paired_bootstrap(self._of(first.outputs), self._of(second.outputs), len(self))
        value = first.metrics[self.task.score] - second.metrics[self.task.score]
        return Difference(value=value, interval=interval, examples=len(self))

    def _interval(self, score: float, outputs: NDArray[np.float64]) -> Interval | None:
        if self.task.score == ACCURACY:
            return of_proportion(int(self._right(outputs).sum()), len(self))
        return of_bootstrap(self._of(outputs), len(self))

    def _right(self, outputs: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.asarray(outputs.argmax(axis=1) == self.targets)

    def _of(self, outputs: NDArray[np.float64]) -> Score:
        def score(rows: Indices) -> float | None:
            return self.task.evaluate(outputs[rows], self.targets[rows]).get(self.task.score)

        return score


def examples_of(file: PublicFile, teacher: Teacher) -> Examples:
    """The evaluation file's. Raises CompressionError when it is empty."""
    if len(file.table) == 0:
        raise CompressionError("the evaluation data holds no examples")
    return Examples("evaluation file", file.inputs.values, file.table.targets, teacher.workload.task)


def answered_by(teacher: Teacher, inputs: torch.Tensor) -> Examples:
    """Inputs (N, *D) with the teacher's answers for targets: what is measured is agreement with it."""
    task = teacher.workload.task
    answers = task.answers(predict_logits(teacher.model.cpu(), inputs))
    return Examples("agreement with the teacher", inputs, answers, task)


@dataclass(frozen=True)
class SitesFigures:
    """Teacher, pruned and recovered student in a federated evaluation: not example by example, so not paired."""

    examples: int
    before: Scored
    pruned: Scored
    after: Scored


def at_sites(metrics: dict[str, float], score: str, examples: int, noised: bool) -> Scored:
    """Figures of a federated evaluation over so many examples; an accuracy with noise on it has no interval, though it
    be a whole count because the noise was cut off at what there can be."""
    right = metrics[score] * examples
    whole = not noised and score == ACCURACY and 0 <= right <= examples and abs(right - round(right)) < 1e-6 * examples
    return Scored(metrics, of_proportion(round(right), examples) if whole else None)


def verdict(score: str, controls: tuple[Control, ...], asked: bool, at_sites: bool = False) -> str:
    """Whether recovery gained anything over the better control, in a sentence; `score` is what was measured.

    A gain is called one only where the interval of the paired difference to the better control lies above 0, and where
    the controls could have seen what the recovered model saw: `at_sites`, it learnt from the sites' data, too.
    """
    if not asked:
        return "No controls were trained (controls=false), so whether recovery gained anything is not known."
    known = [control for control in controls if control.accuracy is not None and control.difference is not None]
    if not known:
        return (
            "The controls were not measured on the same examples, so whether recovery gained anything is not known; "
            "evaluation=FILE measures all models on one file."
        )
    better = max(known, key=lambda control: control.accuracy or 0.0)
    assert better.difference is not None
    value, interval = better.difference.value, better.difference.interval
    told = f"{score} {value:+.3f}" + (f", 95% interval {interval.low:+.3f} to {interval.high:+.3f}" if interval else "")
    if better.difference.sign > 0 and at_sites:
        return (
            f"Better than the better control, {better.name} ({told}), but not called a gain: it learnt from the sites' "
            "data, which no control saw, and that may be all of it."
        )
    if better.difference.sign > 0:
        return f"A gain over the better control, {better.name}: {told}."
    if better.difference.sign < 0:
        return f"No gain: the better control, {better.name}, is the better model ({told})."
    return f"No gain shown: the better control, {better.name}, may reach as much ({told})."
