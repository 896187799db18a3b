"""Recovery of a pruned model from its teacher at the coordinator, with the control experiments that a claim needs.

The inputs are public or synthetic. Nothing of a site's data is touched: teacher and inputs are public already, so what
comes out is post-processing and costs no privacy (Dwork and Roth 2014, proposition 2.1).

Legend: N examples, C classes, D input shape without the batch.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedclaw.compress.models import (
    Accuracies,
    Student,
    StudentOutcome,
    Teacher,
    compare_on,
    evaluate,
    predict_logits,
    threads_for,
)
from fedclaw.compress.record import CompressSettings, Control, ProxyReport, RecoverySettings
from fedclaw.compress.size import count_parameters
from fedclaw.errors import CompressionError
from fedclaw.learning.step_loop import CLASSES, ModelSteps, distillation_loss, take_steps
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.workload import Table
from fedclaw.progress import Progress
from fedclaw.site.device import choose_device

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


def recover_by_proxy(
    settings: CompressSettings, teacher: Teacher, student: Student, inputs: torch.Tensor, origin: str
) -> StudentOutcome:
    """Distil the teacher into the student on public or synthetic inputs (N, *D). Raises FedClawError.

    Without an evaluation file the accuracies are agreements with the teacher; the teacher's own is then 1.
    """
    if settings.recovery.mix is None:
        recovery = settings.recovery.model_copy(update={"mix": settings.inputs is not None})
        settings = settings.model_copy(update={"recovery": recovery})
    table = _read(teacher, settings.evaluation)
    labelled = _read(teacher, settings.labelled)
    device = choose_device(settings.device)
    share, task = settings.recovery.held_out, teacher.workload.task
    split = split_inputs(teacher.model.to(device), inputs.to(device), share, settings.seed, task)
    recovered = distil(student.model.to(device), teacher.model, split, settings.recovery, settings.seed)
    controls = _controls(settings, teacher, student, split, table, labelled) if settings.controls else ()
    for model in (teacher.model, student.model, recovered.model):
        model.cpu()
    report = ProxyReport(
        inputs=origin,
        steps=recovered.steps,
        agreement_pruned=recovered.agreement_before,
        agreement_after=recovered.agreement,
        controls=controls,
    )
    if table is not None:
        return StudentOutcome(recovered.model, compare_on(table, teacher, student, recovered.model), report)
    return StudentOutcome(recovered.model, _agreements(split, recovered), report)


def proxy_inputs(settings: CompressSettings, teacher: Teacher) -> tuple[torch.Tensor, str]:
    """The coordinator's inputs (N, *D) and a description of their origin. Raises DataError."""
    schema = teacher.workload.schema
    if settings.inputs is not None:
        inputs = schema.read_inputs(settings.inputs)
        origin = f"{len(inputs)} public inputs of {settings.inputs.name}"
    else:
        inputs = schema.synthetic_inputs(settings.synthetic, np.random.default_rng(settings.seed))
        origin = f"{len(inputs)} synthetic inputs made from the schema"
    return torch.from_numpy(np.array(inputs, dtype=np.float32)), origin


def _read(teacher: Teacher, path: Path | None) -> Table | None:
    return teacher.workload.schema.read_examples(path) if path is not None else None


def _agreements(split: Split, recovered: Recovered) -> Accuracies:
    return Accuracies(
        measure="agreement with the teacher",
        examples=len(split.held),
        score=split.task.score,
        before={split.task.score: 1.0},
        pruned={split.task.score: recovered.agreement_before},
        after={split.task.score: recovered.agreement},
    )


def _controls(
    settings: CompressSettings,
    teacher: Teacher,
    student: Student,
    split: Split,
    table: Table | None,
    labelled: Table | None,
) -> tuple[Control, ...]:
    """The two baselines of the same shapes to compare with; the first needs labelled data."""
    device = split.train.device

    def control(name: str, model: nn.Module) -> Control:
        accuracy = evaluate(teacher.workload, model, table)[split.task.score] if table is not None else None
        agreed = split.task.agreement(predict_logits(model, split.held), split.held_logits)
        return Control.model_validate({"name": name, "accuracy": accuracy, "agreement": agreed})

    scratch = _fresh(teacher, student, settings.seed).to(device)
    made = [
        control("distilled from scratch", distil(scratch, teacher.model, split, settings.recovery, settings.seed).model)
    ]
    if labelled is not None:
        tuned = _fine_tune(settings, teacher, student, split, labelled)
        made.insert(0, control("fine-tuned without teacher", tuned))
    return tuple(made)


def _fresh(teacher: Teacher, student: Student, seed: int) -> nn.Module:
    """The student's shapes with random parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return teacher.workload.build(student.spec)


def _fine_tune(
    settings: CompressSettings, teacher: Teacher, student: Student, split: Split, labelled: Table
) -> nn.Module:
    """The pruned student trained on labelled public data; stops early on held-out labels."""
    if len(labelled) < 2:
        raise CompressionError(f"labelled={settings.labelled} holds {len(labelled)} examples; the control needs more")
    device = split.train.device
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(settings.seed))
    inputs = torch.from_numpy(np.array(labelled.inputs))[order].to(device)
    targets = torch.from_numpy(np.array(labelled.targets))[order].to(device)
    held = max(1, round(settings.recovery.held_out * len(labelled)))
    held_logits = split.task.outputs_of(targets[:held])

    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return teacher.workload.loss(model(inputs[held:][rows]), targets[held:][rows])

    held_part = inputs[:held], held_logits
    tuned = train(student.model, len(inputs) - held, loss, held_part, settings.recovery, settings.seed, split.task)
    return tuned.model
