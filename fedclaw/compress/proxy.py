"""Recovery of a pruned model from its teacher at the coordinator.

The inputs are public or synthetic. Nothing of a site's data is touched: teacher and inputs are public already, so what
comes out is post-processing and costs no privacy (Dwork and Roth 2014, proposition 2.1) beyond what the inputs cost.

Legend: N examples, C classes, D input shape without the batch.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from fedclaw.compress.features import FeatureLoss
from fedclaw.compress.generator import Generator
from fedclaw.compress.inputs import Inputs
from fedclaw.compress.models import Teacher, predict_logits, threads_for
from fedclaw.compress.record import CompressSettings, CoordinatorReport, RecoverySettings
from fedclaw.compress.size import count_parameters
from fedclaw.errors import CompressionError
from fedclaw.learning.step_loop import CLASSES, ModelSteps, distillation_loss, take_steps
from fedclaw.learning.tasks.base import Task
from fedclaw.progress import Progress

log = logging.getLogger(__name__)

FEWEST_INPUTS = 10
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


@dataclass(frozen=True)
class Labelled:
    """Public inputs (N, *D) with their targets (N,), or with a teacher's answers for such."""

    inputs: torch.Tensor
    targets: torch.Tensor
    task: Task = CLASSES

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "Labelled":
        """The same on a device."""
        return Labelled(self.inputs.to(device), self.targets.to(device), self.task)

    def take(self, rows: torch.Tensor) -> "Labelled":
        """These rows."""
        return Labelled(self.inputs[rows], self.targets[rows], self.task)

    def loss(self, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """Of the labels of these rows."""
        return self.task.loss(model(self.inputs[rows]), self.targets[rows])


def distil(
    student: nn.Module,
    teacher: nn.Module,
    split: Split,
    recovery: RecoverySettings,
    seed: int,
    labelled: Labelled | None = None,
    generator: Generator | None = None,
) -> Recovered:
    """A copy of `student` that imitates the teacher's logits; deterministic for a seed on one device.

    Mixing inputs and asking the teacher about the mixture makes few inputs go further: Beyer et al. 2022,
    "Knowledge distillation: A good teacher is patient and consistent", section 3.1 (function matching). With a
    `generator`, its share of each batch is made by it.
    """
    random = torch.Generator().manual_seed(seed)
    features = FeatureLoss(teacher, student, split.train, seed) if recovery.features else None

    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        inputs, logits = split.train[rows], split.train_logits[rows]
        made = 0 if generator is None else generator.part_of(len(rows))
        if generator is not None and made:
            inputs = torch.cat([inputs[made:], generator.inputs(model, made)])
        if recovery.mix:
            inputs = _mixed(inputs, random)
        if recovery.mix or made:
            logits = predict_logits(teacher, inputs)
        outputs, apart = (model(inputs), None) if features is None else features(model, inputs)
        own = None if labelled is None else labelled.loss(model, _any(len(labelled), len(rows), random, rows.device))
        weight = 1.0 if own is None else 1.0 - recovery.labels
        value = distillation_loss(outputs, logits, own, recovery.temperature, weight, split.task)
        return value if apart is None else value + recovery.features * apart

    if labelled is not None and not (len(labelled) and recovery.labels):
        labelled = None
    held, beside = (split.held, split.held_logits), features.projection.parameters() if features is not None else ()
    return train(student, len(split.train), loss, held, recovery, seed, split.task, beside)


def _any(count: int, size: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """`size` row numbers out of `count`, drawn with replacement."""
    return torch.randint(count, (size,), generator=generator).to(device)


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
    beside: Iterable[nn.Parameter] = (),
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
        beside: parameters that are trained with the model's and are no part of it.

    Raises:
        CompressionError: the loss is no longer finite.
    """
    model = copy.deepcopy(student)
    best = _Best(model, *held, task)
    first = best.agreement
    optimizer = torch.optim.Adam([*model.parameters(), *beside], lr=recovery.learning_rate)
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


@dataclass(frozen=True)
class CoordinatorRecovery:
    """A student recovered at the coordinator, on the device that the teacher is on."""

    recovered: Recovered
    report: CoordinatorReport
    pool: Inputs
    """The inputs that it saw."""


def recover_by_proxy(
    settings: CompressSettings,
    teacher: Teacher,
    student: nn.Module,
    inputs: Inputs,
    labelled: Labelled | None = None,
    mode: Literal["proxy", "synthetic"] = "proxy",
) -> CoordinatorRecovery:
    """Distil the teacher into a copy of `student` on public or synthetic inputs. Raises FedClawError.

    `labelled` adds the loss on labels; mode synthetic adds a generator, unless its share is 0. Both models stay on the
    device where they are.
    """
    recovery, made = mixing(settings.recovery, inputs), settings.generator
    generator = None
    if mode == "synthetic" and made.share:
        base = inputs.values.to(next(student.parameters()).device)
        generator = Generator(teacher.model, base, teacher.workload.task, made, settings.seed)
    recovered = recover_on(teacher, student, inputs.values, recovery, settings.seed, labelled, generator)
    if generator is not None and len(generator.kept()):
        told = f"{inputs.description}, and those of a generator trained against the teacher"
        values = torch.cat([inputs.values, generator.kept().cpu()])
        inputs = replace(inputs, values=values, description=told)
    report = CoordinatorReport(
        mode=mode,
        inputs=inputs.description,
        losses=losses_of(recovery, labelled),
        steps=recovered.steps,
        agreement_pruned=recovered.agreement_before,
        agreement_after=recovered.agreement,
    )
    return CoordinatorRecovery(recovered, report, inputs)


def recover_on(
    teacher: Teacher,
    student: nn.Module,
    inputs: torch.Tensor,
    recovery: RecoverySettings,
    seed: int,
    labelled: Labelled | None = None,
    generator: Generator | None = None,
) -> Recovered:
    """The loop of `recover_by_proxy`, on inputs (N, *D). Raises CompressionError."""
    device = next(student.parameters()).device
    split = split_inputs(teacher.model, inputs.to(device), recovery.held_out, seed, teacher.workload.task)
    return distil(student, teacher.model, split, recovery, seed, labelled and labelled.to(device), generator)


def mixing(recovery: RecoverySettings, inputs: Inputs) -> RecoverySettings:
    """The settings with `mix` decided: inputs that are few are mixed."""
    return recovery if recovery.mix is not None else recovery.model_copy(update={"mix": inputs.origin == "public"})


def losses_of(recovery: RecoverySettings, labelled: Labelled | None) -> tuple[str, ...]:
    """The parts of the loss, in words."""
    told = [f"the teacher's logits at temperature {recovery.temperature:g}"]
    if labelled is not None and recovery.labels:
        told.append(f"labels of {len(labelled)} public examples, weight {recovery.labels:g}")
    if recovery.features:
        told.append(f"the teacher's features before its output layer, weight {recovery.features:g}")
    return tuple(told)
