"""The local optimisers of a plan on rows of parameters (K, D): what torch.optim does, for all clients in one call.

All clients of a stack are at the same step. Clients drop off the end of the stack, so a step moves the first k rows.
"""

from typing import Protocol

import torch

from fedclaw.protocol.terms import LocalTraining

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class RowOptimizer(Protocol):
    """Moves the first k rows of a stack."""

    def step(self, parameters: torch.Tensor, gradients: torch.Tensor) -> None:
        """Rows (k, D), k never larger than in the step before; may overwrite `gradients`."""


class RowSgd:
    """torch.optim.SGD with momentum and weight decay."""

    def __init__(self, training: LocalTraining) -> None:
        self._training = training
        self._velocity: torch.Tensor | None = None

    def step(self, parameters: torch.Tensor, gradients: torch.Tensor) -> None:
        """See RowOptimizer."""
        training = self._training
        if training.weight_decay:
            gradients.add_(parameters, alpha=training.weight_decay)
        if training.momentum:
            if self._velocity is None:
                self._velocity = gradients.clone()
                gradients = self._velocity
            else:
                gradients = self._velocity[: len(parameters)].mul_(training.momentum).add_(gradients)
        parameters.add_(gradients, alpha=-training.learning_rate)


class RowAdam:
    """torch.optim.Adam with its default betas and epsilon."""

    def __init__(self, training: LocalTraining) -> None:
        self._training = training
        self._taken = 0
        self._mean = self._square = torch.empty(0)

    def step(self, parameters: torch.Tensor, gradients: torch.Tensor) -> None:
        """See RowOptimizer."""
        training, count = self._training, len(parameters)
        if self._taken == 0:
            self._mean, self._square = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self._taken += 1
        if training.weight_decay:
            gradients.add_(parameters, alpha=training.weight_decay)
        mean, square = self._mean[:count], self._square[:count]
        mean.lerp_(gradients, 1 - _BETAS[0])
        square.mul_(_BETAS[1]).addcmul_(gradients, gradients, value=1 - _BETAS[1])
        rate = training.learning_rate / (1 - _BETAS[0] ** self._taken)
        below = square.sqrt().div_((1 - _BETAS[1] ** self._taken) ** 0.5).add_(_EPSILON)
        parameters.addcdiv_(mean, below, value=-rate)


def row_optimizer(training: LocalTraining) -> RowOptimizer:
    """A fresh optimiser, for one round of one stack."""
    return RowAdam(training) if training.optimizer == "adam" else RowSgd(training)
