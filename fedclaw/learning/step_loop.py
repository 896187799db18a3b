"""The step loop: sites, simulated clients and distillation all take their local steps in it.

The loop asks `Steps` for the gradients of a batch, lets the strategy correct them, and has the parameters moved. How a
gradient is made is no concern of the loop: of one model (`ModelSteps`) or of many clients' models side by side
(`fedclaw.learning.stacked.steps`), with or without differential privacy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.protocol.terms import LocalTraining

Batch = TypeVar("Batch")
Batch_contra = TypeVar("Batch_contra", contravariant=True)
Correction = Callable[[Sequence[torch.Tensor], int], None]
"""Changes the parameters' `.grad` in place before a step, whose number (from 0) it is told; sees no data."""


def load_parameters(model: torch.nn.Module, parameters: Mapping[str, NDArray[np.float32]]) -> None:
    """Put `parameters`, by name, into `model`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(parameters[name])))


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
