"""The control experiments that a claim of recovery needs: the same shapes, trained in other ways.

- *fine-tuned without teacher*: the pruned net, trained on labels;
- *trained from scratch*: a net of the same shapes with random parameters, trained on the same labels;
- *distilled from scratch*: such a net, recovered from the teacher at the coordinator, by the same losses on the inputs
  that the pruned one's last recovery there saw. What a generator made is among them; none is trained against this net.

The first says what the teacher is worth, the second what a small model is worth by itself, the third what the pruned
parameters are worth. Labels are those of public data where there is such. Without it the teacher's own answers on the
inputs stand in, one label or value an input: nothing else knows any. Then the first two have seen the teacher's answers
but not its logits, and the report says so.
"""

from dataclasses import dataclass

import torch
from torch import nn

from fedclaw.compress.inputs import Inputs, PublicFile
from fedclaw.compress.models import Student, Teacher, predict_logits
from fedclaw.compress.proxy import Labelled, Recovered, mixing, recover_on, train
from fedclaw.compress.record import CompressSettings, ControlName, RecoverySettings
from fedclaw.errors import CompressionError

TEACHERS_LABELS = (
    "No labelled data was given (labelled=FILE), and nothing but the teacher knows any label: the controls without a "
    "teacher learnt its answers on the same inputs, but not its logits."
)


@dataclass(frozen=True)
class ControlModel:
    """A trained control."""

    name: ControlName
    data: str
    model: nn.Module


def labelled_of(file: PublicFile | None, teacher: Teacher) -> Labelled | None:
    """The labelled public data as tensors."""
    if file is None:
        return None
    return Labelled(file.inputs.values, torch.from_numpy(file.table.targets.copy()), teacher.workload.task)


def train_controls(
    settings: CompressSettings, teacher: Teacher, student: Student, pool: Inputs, labelled: Labelled | None
) -> tuple[ControlModel, ...]:
    """The controls, on the device that teacher and student are on. Raises CompressionError."""
    device = next(student.model.parameters()).device
    recovery, seed = mixing(settings.recovery, pool), settings.seed
    labels, data = _labels(teacher, pool, labelled)
    labels = labels.to(device)
    scratch = from_scratch(teacher, student, seed).to(device)
    tuned = _train_on_labels(student.model, labels, recovery, seed)
    small = _train_on_labels(scratch, labels, recovery, seed)
    distilled = recover_on(teacher, scratch, pool.values, recovery, seed, labelled)
    return (
        ControlModel("fine-tuned without teacher", data, tuned.model),
        ControlModel("trained from scratch", data, small.model),
        ControlModel("distilled from scratch", pool.description, distilled.model),
    )


def _labels(teacher: Teacher, pool: Inputs, labelled: Labelled | None) -> tuple[Labelled, str]:
    """What the controls without a teacher learn, and what it is in words."""
    if labelled is not None:
        return labelled, f"{len(labelled)} labelled public examples"
    task, device = teacher.workload.task, next(teacher.model.parameters()).device
    answers = task.answers(predict_logits(teacher.model, pool.values.to(device)))
    return Labelled(pool.values, torch.from_numpy(answers.copy()), task), f"{pool.description}, labelled by the teacher"


def from_scratch(teacher: Teacher, student: Student, seed: int) -> nn.Module:
    """The student's shapes with random parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return teacher.workload.build(student.spec)


def _train_on_labels(start: nn.Module, labels: Labelled, recovery: RecoverySettings, seed: int) -> Recovered:
    """A copy of `start`, trained on labels; stops early by held-out ones."""
    if len(labels) < 2:
        raise CompressionError(
            f"{len(labels)} labelled examples are too few for a control; give more, or controls=false"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.inputs.device)
    held = min(max(1, round(recovery.held_out * len(labels))), len(labels) - 1)
    kept, used = (
        Labelled(labels.inputs[rows], labels.targets[rows], labels.task) for rows in (order[:held], order[held:])
    )
    held_part = kept.inputs, labels.task.outputs_of(kept.targets)
    return train(start, len(used), used.loss, held_part, recovery, seed, labels.task)
