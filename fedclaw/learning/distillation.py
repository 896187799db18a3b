"""The knowledge distillation loss: one formula, for the coordinator's proxy recovery and for the sites' rounds.

Legend: N examples, C classes.
"""

from collections.abc import Callable

import torch

from fedclaw.errors import CompressionError
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import Classification

CLASSES = Classification()


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
