"""The one epoch loop: batches, a way of taking gradients, the strategy's correction, a step."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from fedclaw.privacy.steps import StepTaker
from fedclaw.protocol.plan import LocalTraining

Correction = Callable[[Sequence[torch.Tensor], int], None]
"""Changes the parameters' `.grad` in place before a step, whose number (from 0) it is told; sees no data."""


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


def train(
    steps: StepTaker,
    batches: Iterable[torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.Tensor],
    correction: Correction,
    precision: AbstractContextManager[object] | None = None,
) -> int:
    """Take one step for each batch of row indices, an empty one too, and return how many were taken.

    inputs (N, *D) and targets (N,) lie on the model's device. The correction comes after the step taker has
    clipped and noised, so it is post-processing.
    """
    taken = 0
    with precision or nullcontext():
        for rows in batches:
            steps.gradients(inputs[rows], targets[rows])
            correction(parameters, taken)
            optimizer.step()
            taken += 1
    return taken
