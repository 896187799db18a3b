"""Recovery of a pruned model from its teacher, on public or synthetic inputs at the coordinator.

Nothing of a site's data is touched: teacher and inputs are public already, so what comes out is post-processing
and costs no privacy (Dwork and Roth 2014, proposition 2.1).

Legend: N examples, C classes, D input shape without the batch.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fedclaw.compress.distil import distillation_loss
from fedclaw.compress.measure import threads_for
from fedclaw.compress.prune import count_parameters
from fedclaw.errors import CompressionError
from fedclaw.frozen import Frozen

logger = logging.getLogger(__name__)

FEWEST_INPUTS = 10
SCORING_BATCH = 1024


class Recovery(Frozen):
    """How a pruned model is trained at the coordinator."""

    temperature: float = Field(default=2.0, gt=0)
    epochs: int = Field(default=150, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the inputs that is kept back to measure agreement and to stop early."""
    patience: int = Field(default=40, ge=1)
    """Epochs without a better agreement after which training stops."""


@dataclass(frozen=True)
class Recovered:
    """A trained model and how it got there; agreements are shares of held-out inputs with the same class."""

    model: nn.Module
    agreement_before: float
    agreement: float
    epochs: int
    """Epochs trained; the model is that of the best one."""


@dataclass(frozen=True)
class Split:
    """Proxy inputs (N, *D) with the teacher's logits (N, C), one part to train on and one to measure on."""

    train: torch.Tensor
    train_logits: torch.Tensor
    held: torch.Tensor
    held_logits: torch.Tensor


def predict_logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """(N, *D) -> (N, C) in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, SCORING_BATCH)])


def agreement(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Share of the rows of two (N, C) logits with the same most probable class."""
    return (logits.argmax(1) == others.argmax(1)).double().mean().item()


def split_inputs(teacher: nn.Module, inputs: torch.Tensor, held_out: float, seed: int) -> Split:
    """Shuffle (N, *D) proxy inputs, keep a share back, and let the teacher score all of them once.

    Raises CompressionError when there are too few inputs, or the teacher's logits are not finite.
    """
    if len(inputs) < FEWEST_INPUTS:
        raise CompressionError(f"there are {len(inputs)} proxy inputs; recovery needs at least {FEWEST_INPUTS}")
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed)).to(inputs.device)
    shuffled = inputs[order]
    logits = predict_logits(teacher, shuffled)
    if not torch.isfinite(logits).all():
        raise CompressionError("the teacher's logits on the proxy inputs are not all finite; is the run's model sound?")
    held = min(max(1, round(held_out * len(inputs))), len(inputs) - 1)
    return Split(shuffled[held:], logits[held:], shuffled[:held], logits[:held])


def distil(student: nn.Module, split: Split, recovery: Recovery, seed: int) -> Recovered:
    """A copy of `student` that imitates the teacher's logits on `split`; deterministic for a seed on one device."""

    def loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return distillation_loss(logits, split.train_logits[rows], None, recovery.temperature, 1.0)

    return train(student, split.train, loss, (split.held, split.held_logits), recovery, seed)


def train(
    student: nn.Module,
    inputs: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    held: tuple[torch.Tensor, torch.Tensor],
    recovery: Recovery,
    seed: int,
) -> Recovered:
    """Train a copy of `student` with Adam and keep the epoch that agrees best with the held-out logits.

    Args:
        student: (N, *D) -> (N, C); not changed.
        inputs: (N, *D).
        loss: a batch's logits (B, C) and its row numbers (B,) in `inputs` -> scalar.
        held: held-out inputs (M, *D) and the logits (M, C) to agree with.
        recovery: how to train.
        seed: of the batches' order.

    Raises:
        CompressionError: the loss is no longer finite.
    """
    model = copy.deepcopy(student)
    best = _Best(model, *held)
    first = best.agreement
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recovery.learning_rate)
    scheduler = _scheduler(optimizer, recovery)
    epoch = 0
    with threads_for(count_parameters(model)):
        for epoch in range(1, recovery.epochs + 1):
            _epoch(model, optimizer, inputs, loss, recovery.batch_size, generator)
            scheduler.step()
            if best.offer(model, epoch) >= recovery.patience:
                break
    logger.info("recovery: %d epochs, agreement %.4f -> %.4f (epoch %d)", epoch, first, best.agreement, best.epoch)
    model.load_state_dict(best.state)
    return Recovered(model.eval(), first, best.agreement, epoch)


def _scheduler(optimizer: torch.optim.Optimizer, recovery: Recovery) -> torch.optim.lr_scheduler.LRScheduler:
    if recovery.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recovery.epochs)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batch_size: int,
    generator: torch.Generator,
) -> None:
    model.train()
    order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    for rows in torch.split(order, batch_size):
        optimizer.zero_grad()
        value = loss(model(inputs[rows]), rows)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if not torch.isfinite(value):
        raise CompressionError("recovery diverged: the loss is no longer finite; try a smaller recovery.learning_rate")


class _Best:
    """The best state so far: higher agreement on the held-out inputs, then smaller distillation loss."""

    def __init__(self, model: nn.Module, held: torch.Tensor, logits: torch.Tensor) -> None:
        self._held = held
        self._logits = logits
        self.epoch = 0
        self._better = 0
        self._score = self._score_of(model)
        self.agreement = self._score[0]
        self.state = copy.deepcopy(model.state_dict())

    def offer(self, model: nn.Module, epoch: int) -> int:
        """Keep the model's state if it is better; epochs since the agreement last rose."""
        score = self._score_of(model)
        if score[0] > self.agreement:
            self._better = epoch
        if score > self._score:
            self._score = score
            self.agreement = score[0]
            self.epoch = epoch
            self.state = copy.deepcopy(model.state_dict())
        return epoch - self._better

    def _score_of(self, model: nn.Module) -> tuple[float, float]:
        logits = predict_logits(model, self._held)
        return agreement(logits, self._logits), -distillation_loss(logits, self._logits, None, 1.0, 1.0).item()
