"""Recovery at the coordinator, with the control experiments that a claim about it needs.

Legend: N examples, C classes, D input shape without the batch.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedclaw.compress.record import Control, ProxyReport
from fedclaw.compress.recover import Recovered, Split, distil, predict_logits, split_inputs, train
from fedclaw.compress.settings import CompressSettings
from fedclaw.compress.source import Teacher
from fedclaw.compress.student import Accuracies, Student, StudentOutcome, compare_on, evaluate
from fedclaw.errors import CompressionError
from fedclaw.learning.workload import Table
from fedclaw.site.device import choose_device


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
