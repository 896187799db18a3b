"""Local steps of a stack of clients: rows of parameters (K, D), one a client, that move together.

Clients drop off the end of a stack when they have finished, so a step moves the first k rows; all of them are at the
same step. The optimisers are those of a plan: what torch.optim does, for all clients in one call.

Legend as in `layout`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fedclaw.learning.stacked.engines import BatchedModel, Engine
from fedclaw.learning.stacked.layout import Packing
from fedclaw.learning.step_loop import Steps
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


Examples = Callable[[Packing], tuple[torch.Tensor, torch.Tensor]]
"""The inputs (N, *D) and targets (N, ...) of a step."""


class ClientSteps(Steps[Packing], Protocol):
    """Steps of a stack, and what has become of the clients' parameters when they are taken."""

    def rows(self) -> torch.Tensor:
        """(K, D) the clients' parameters."""

    def change(self, weights: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The sum (D,) of weights (K,) times what each client's parameters are more than `start` (D,).

        Uses the rows up.
        """


class RowSteps:
    """Steps by an optimiser on rows, which a correction sees as one parameter (k, D)."""

    def __init__(
        self,
        write: Callable[[Packing], None],
        training: LocalTraining,
        stack: torch.Tensor,
        gradients: torch.Tensor,
    ) -> None:
        """`write` leaves the gradients of a step's clients in the first rows of `gradients` (K, D)."""
        self._write = write
        self._optimizer = row_optimizer(training)
        self._stack = stack
        self._gradients = gradients
        self._moving = stack[:0]
        self._changes = gradients[:0]

    def gradients(self, batch: Packing) -> Sequence[torch.Tensor]:
        """See Steps."""
        if len(self._moving) != batch.clients:
            self._moving, self._changes = self._stack[: batch.clients], self._gradients[: batch.clients]
            self._moving.grad = self._changes
        self._write(batch)
        return (self._moving,)

    def update(self) -> None:
        """See Steps."""
        self._optimizer.step(self._moving, self._changes)

    def rows(self) -> torch.Tensor:
        """See ClientSteps."""
        return self._stack

    def change(self, weights: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """See ClientSteps."""
        return torch.mv(self._stack.sub_(start).t(), weights)


class DescendingSteps:
    """Steps that are nothing but the gradient times the learning rate, taken as each gradient is made."""

    def __init__(
        self,
        engine: BatchedModel,
        training: LocalTraining,
        start: torch.Tensor | None,
        stack: torch.Tensor,
        packings: Sequence[Packing],
        examples: Examples,
    ) -> None:
        self._engine = engine
        self._stack = stack
        self._rate = training.learning_rate
        self._decay = 1.0 - training.learning_rate * training.weight_decay
        self._examples = examples
        if start is not None and self._decay != 1.0:
            # Factors would decay too; whole weights do as they are moved.
            stack.copy_(start.expand_as(stack))
            start = None
        engine.begin(start, packings)

    def gradients(self, batch: Packing) -> Sequence[torch.Tensor]:
        """See Steps. There are none left to be corrected."""
        self._engine.descend(batch, *self._examples(batch), self._rate, self._decay)
        return ()

    def update(self) -> None:
        """See Steps."""

    def rows(self) -> torch.Tensor:
        """See ClientSteps."""
        self._engine.write()
        return self._stack

    def change(self, weights: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """See ClientSteps."""
        return self._engine.change(weights, start)


def plain_steps(
    engine: Engine,
    training: LocalTraining,
    start: torch.Tensor | None,
    stack: torch.Tensor,
    gradients: torch.Tensor,
    packings: Sequence[Packing],
    examples: Examples,
    *,
    corrected: bool,
) -> ClientSteps:
    """Steps without privacy by `packings` of rows (K, D) that `engine` is bound to.

    `start` (D,) is what all clients begin with; None: they begin with their rows. `corrected`: whether a correction
    follows.
    """
    if not corrected and training.optimizer == "sgd" and not training.momentum and isinstance(engine, BatchedModel):
        return DescendingSteps(engine, training, start, stack, packings, examples)
    if start is not None:
        stack.copy_(start.expand_as(stack))
    return RowSteps(lambda packing: engine.gradients(packing, *examples(packing)), training, stack, gradients)
