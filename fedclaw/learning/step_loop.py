"""The step loop: sites, simulated clients and distillation all take their local steps in it.

The loop asks `Steps` for the gradients of a batch, lets the strategy correct them, and has the parameters moved. How a
gradient is made is no concern of the loop: of one model (`ModelSteps`) or of many clients' models side by side
(`fedclaw.learning.stacked.steps`), with or without differential privacy.

Of a student the loss is that of knowledge distillation: one formula, for the coordinator's proxy recovery and for the
sites' rounds.

Legend: N examples, C classes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import torch

from fedclaw.errors import CompressionError
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import Classification
from fedclaw.protocol.terms import LocalTraining

CLASSES = Classification()

Batch = TypeVar("Batch")
Batch_contra = TypeVar("Batch_contra", contravariant=True)
Correction = Callable[[Sequence[torch.Tensor], int], None]
"""Changes the parameters' `.grad` in place before a step, whose number (from 0) it is told; sees no data."""


class Steps(Protocol[Batch_contra]):
    """A way of taking local steps."""

    def gradients(self, batch: Batch_contra) -> Sequence[torch.Tensor]:
        """The parameters that the next `update` moves, each with the gradient of `batch` in its `.grad`."""

    def update(self) -> None:
        """Move the parameters along their gradients."""


def take_steps(
    batches: Iterable[Batch],
    steps: Steps[Batch],
    correct: Correction | None = None,
    stop: Callable[[int], bool] | None = None,
) -> int:
    """Take one step for each batch, an empty one too, and return how many were taken.

    `correct` comes after gradients were clipped and noised, so it is post-processing. `stop` is told the number of
    steps taken so far after each one; True ends the loop.
    """
    taken = 0
    for batch in batches:
        parameters = steps.gradients(batch)
        if correct is not None:
            correct(parameters, taken)
        steps.update()
        taken += 1
        if stop is not None and stop(taken):
            break
    return taken


class ModelSteps:
    """Steps of one model, by a torch optimiser. A batch is the row indices (B,) of its examples."""

    def __init__(
        self,
        gradients: Callable[[torch.Tensor], None],
        parameters: Sequence[torch.Tensor],
        update: Callable[[], object],
    ) -> None:
        """`gradients` leaves those of a batch in the `.grad` of `parameters`; `update` moves these."""
        self._gradients = gradients
        self._parameters = parameters
        self._update = update

    def gradients(self, batch: torch.Tensor) -> Sequence[torch.Tensor]:
        """See Steps."""
        self._gradients(batch)
        return self._parameters

    def update(self) -> None:
        """See Steps."""
        self._update()


def make_optimizer(parameters: Sequence[torch.Tensor], training: LocalTraining) -> torch.optim.Optimizer:
    """The local optimiser of a plan."""
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=training.learning_rate, weight_decay=training.weight_decay, foreach=True)
    return torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        foreach=True,
    )


def distilled(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets_loss: Callable[[torch.Tensor], torch.Tensor],
    temperature: float,
    weight: float,
    task: Task = CLASSES,
) -> torch.Tensor:
    """`distillation_loss`, whose gradient for one example does not depend on how many there are, not by a rounding.

    `targets_loss` makes the workload's mean loss of the student's logits (N, C). The factors of the two parts are put
    on each example's gradient, behind the division by N: N (1 - weight) / N is not (1 - weight), and with parameters
    that leave nothing but rounding, one example more would turn the gradients of the others.
    """
    scale = weight * task.divergence_scale(temperature)
    divergence = _divergence(task, _times(student_logits, scale), teacher_logits, temperature)
    divergence = divergence / max(len(student_logits), 1)
    own = targets_loss(_times(student_logits, 1 - weight))
    value = scale * divergence.detach() + (1 - weight) * own.detach()
    return value + (divergence - divergence.detach()) + (own - own.detach())


def _divergence(
    task: Task, student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The task's, summed over the batch."""
    if student_logits.shape != teacher_logits.shape:
        raise CompressionError(
            f"the student's logits have shape {tuple(student_logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}; both must score the same examples and classes"
        )
    return task.divergence(student_logits, teacher_logits, temperature)


def _times(logits: torch.Tensor, factor: float) -> torch.Tensor:
    """The same logits, `factor` times whose gradient goes back."""
    constant = logits.detach()
    return constant + factor * (logits - constant)


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets_loss: torch.Tensor | None,
    temperature: float,
    weight: float,
    task: Task = CLASSES,
) -> torch.Tensor:
    """weight * T^2 * KL(teacher_T || student_T) + (1 - weight) * targets_loss, a scalar, for classes.

    Of another `task`, its divergence in the place of T^2 KL: of values their mean squared difference.

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2: both distributions
    are softmax(logits / T), the divergence is the mean over the batch, and T^2 keeps the size of its gradient
    comparable with that of the loss on targets when T changes.

    Args:
        student_logits: (N, C); gradients flow through these only.
        teacher_logits: (N, C); a constant.
        targets_loss: the workload's mean loss over the same batch, a scalar; None (no targets) needs weight 1.
        temperature: T > 0.
        weight: in [0, 1]; 1 learns from the teacher alone.

    An empty batch gives 0 with a zero gradient, as the workload's own loss does: a Poisson sample may be empty.

    Raises:
        CompressionError: the shapes differ, or there is no targets_loss although weight < 1.
    """
    divergence = _divergence(task, student_logits, teacher_logits, temperature)
    soft = divergence * (weight * task.divergence_scale(temperature) / max(len(student_logits), 1))
    if targets_loss is not None:
        return soft + (1.0 - weight) * targets_loss
    if weight < 1.0:
        raise CompressionError(f"a distillation weight of {weight} needs the loss on targets, and there are none")
    return soft
