"""The local steps of a stack of clients without privacy: gradients, a correction, the local optimiser."""

from collections.abc import Callable, Sequence

import torch

from fedclaw.learning.stacked.batched import BatchedModel
from fedclaw.learning.stacked.engines import Engine
from fedclaw.learning.stacked.optimizers import row_optimizer
from fedclaw.learning.stacked.packing import Packing
from fedclaw.protocol.plan import LocalTraining

Examples = Callable[[Packing], tuple[torch.Tensor, torch.Tensor]]
"""The inputs (N, *D) and targets (N, ...) of a step."""
Change = Callable[[torch.Tensor, torch.Tensor, int, int], None]
"""(parameters (k, D), gradients (k, D), step, steps): changes the gradients in place."""


def take_plain_steps(
    engine: Engine,
    packings: Sequence[Packing],
    training: LocalTraining,
    stack: torch.Tensor,
    gradients: torch.Tensor,
    examples: Examples,
    change: Change | None = None,
) -> None:
    """Take the steps of rows (K, D) that `engine` is bound to.

    Where a step is nothing but the gradient times the learning rate, it is taken as the gradient is made.
    """
    if change is None and training.optimizer == "sgd" and not training.momentum and isinstance(engine, BatchedModel):
        decay = 1.0 - training.learning_rate * training.weight_decay
        for packing in packings:
            engine.descend(packing, *examples(packing), training.learning_rate, decay)
        return
    optimizer = row_optimizer(training)
    for step, packing in enumerate(packings):
        own, changes = stack[: packing.clients], gradients[: packing.clients]
        engine.gradients(packing, *examples(packing))
        if change is not None:
            change(own, changes, step, len(packings))
        optimizer.step(own, changes)
