"""Recovery of a pruned model from its teacher, on public or synthetic inputs at the coordinator.

Nothing of a site's data is touched: teacher and inputs are public already, so what comes out is post-processing
and costs no privacy (Dwork and Roth 2014, proposition 2.1).

Legend: N examples, C classes, D input shape without the batch.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fedclaw.compress.measure import threads_for
from fedclaw.compress.prune import count_parameters
from fedclaw.compress.settings import RecoverySettings
from fedclaw.errors import CompressionError
from fedclaw.learning.distillation import CLASSES, distillation_loss
from fedclaw.learning.step_loop import ModelSteps, take_steps
from fedclaw.learning.tasks.base import Task
from fedclaw.progress import Progress

log = logging.getLogger(__name__)

FEWEST_INPUTS = 10
SCORING_BATCH = 1024
CHECK_EVERY = 50
"""Steps between two looks at the held-out inputs."""


@dataclass(frozen=True)
class Recovered:
    """A trained model and how it got there; agreements are the task's, on held-out inputs."""

    model: nn.Module
    agreement_before: float
    agreement: float
    steps: int
    """Steps taken; the model is the best one on the way."""


@dataclass(frozen=True)
class Split:
    """Proxy inputs (N, *D) with the teacher's logits (N, C), one part to train on and one to measure on."""

    train: torch.Tensor
    train_logits: torch.Tensor
    held: torch.Tensor
    held_logits: torch.Tensor
    task: Task = CLASSES


def predict_logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """(N, *D) -> (N, C) in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, SCORING_BATCH)])


def split_inputs(teacher: nn.Module, inputs: torch.Tensor, held_out: float, seed: int, task: Task = CLASSES) -> Split:
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
    return Split(shuffled[held:], logits[held:], shuffled[:held], logits[:held], task)


def distil(student: nn.Module, teacher: nn.Module, split: Split, recovery: RecoverySettings, seed: int) -> Recovered:
    """A copy of `student` that imitates the teacher's logits; deterministic for a seed on one device.

    Mixing inputs and asking the teacher about the mixture makes few inputs go further: Beyer et al. 2022,
    "Knowledge distillation: A good teacher is patient and consistent", section 3.1 (function matching).
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        inputs, logits = split.train[rows], split.train_logits[rows]
        if recovery.mix:
            inputs = _mixed(inputs, generator)
            logits = predict_logits(teacher, inputs)
        return distillation_loss(model(inputs), logits, None, recovery.temperature, 1.0, split.task)

    return train(student, len(split.train), loss, (split.held, split.held_logits), recovery, seed, split.task)


def _mixed(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each of (B, *D) mixed with a random other one, by a share uniform in [0, 1]."""
    partners = inputs[torch.randperm(len(inputs), generator=generator).to(inputs.device)]
    share = torch.rand(len(inputs), *[1] * (inputs.dim() - 1), generator=generator).to(inputs.device)
    return torch.lerp(partners, inputs, share)


def train(
    student: nn.Module,
    count: int,
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    held: tuple[torch.Tensor, torch.Tensor],
    recovery: RecoverySettings,
    seed: int,
    task: Task = CLASSES,
) -> Recovered:
    """Train a copy of `student` with Adam and keep what agrees best with the held-out logits on the way.

    Args:
        student: (N, *D) -> (N, C); not changed.
        count: number of training rows.
        loss: the model and a batch of row numbers (B,) -> scalar.
        held: held-out inputs (M, *D) and the logits (M, C) to agree with.
        recovery: how to train.
        seed: of the batches' order.
        task: what the outputs mean, and so what it is to agree.

    Raises:
        CompressionError: the loss is no longer finite.
    """
    model = copy.deepcopy(student)
    best = _Best(model, *held, task)
    first = best.agreement
    optimizer = torch.optim.Adam(model.parameters(), lr=recovery.learning_rate)
    scheduler = _scheduler(optimizer, recovery)
    progress, value = Progress(log, "recovery, steps", recovery.steps), torch.zeros(())

    def gradients(rows: torch.Tensor) -> None:
        nonlocal value
        model.train()
        optimizer.zero_grad()
        value = loss(model, rows)
        value.backward()  # type: ignore[no-untyped-call]

    def update() -> None:
        optimizer.step()
        scheduler.step()

    def stop(step: int) -> bool:
        if step % CHECK_EVERY and step < recovery.steps:
            return False
        if not torch.isfinite(value):
            raise CompressionError(
                "recovery diverged: the loss is no longer finite; try a smaller recovery.learning_rate"
            )
        if best.offer(model, step) >= recovery.patience:
            return True
        progress.done(step)
        return False

    with threads_for(count_parameters(model)):
        batches = _batches(count, recovery, seed, held[0].device)
        step = take_steps(batches, ModelSteps(gradients, list(model.parameters()), update), stop=stop)
    log.info("recovery: %d steps, agreement %.4f -> %.4f (step %d)", step, first, best.agreement, best.step)
    model.load_state_dict(best.state)
    return Recovered(model.eval(), first, best.agreement, step)


def _batches(count: int, recovery: RecoverySettings, seed: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Row numbers (B,) for each step, every row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    left = recovery.steps
    while left > 0:
        batches = torch.split(torch.randperm(count, generator=generator).to(device), recovery.batch_size)[:left]
        yield from batches
        left -= len(batches)


def _scheduler(optimizer: torch.optim.Optimizer, recovery: RecoverySettings) -> torch.optim.lr_scheduler.LRScheduler:
    if recovery.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recovery.steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


class _Best:
    """The best state so far: higher agreement on the held-out inputs, then smaller distillation loss there."""

    def __init__(self, model: nn.Module, held: torch.Tensor, logits: torch.Tensor, task: Task) -> None:
        self._task = task
        self._held = held
        self._logits = logits
        self._score = self._score_of(model)
        self.step = 0
        self.state = copy.deepcopy(model.state_dict())

    @property
    def agreement(self) -> float:
        """Of the best state, with the held-out logits."""
        return self._score[0]

    def offer(self, model: nn.Module, step: int) -> int:
        """Keep the model's state if it is better; steps since the last better one."""
        score = self._score_of(model)
        if score > self._score:
            self._score = score
            self.step = step
            self.state = copy.deepcopy(model.state_dict())
        return step - self.step

    def _score_of(self, model: nn.Module) -> tuple[float, float]:
        logits = predict_logits(model, self._held)
        loss = distillation_loss(logits, self._logits, None, 1.0, 1.0, self._task)
        return self._task.agreement(logits, self._logits), -loss.item()
