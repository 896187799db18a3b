"""The student before and after its recovery, and how the three models of a compression compare."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedclaw.compress.prune import prune_to_fraction
from fedclaw.compress.record import Measure, ProxyReport, SitesReport
from fedclaw.compress.recover import predict_logits
from fedclaw.compress.source import Teacher, rebuild
from fedclaw.errors import CompressionError
from fedclaw.learning.workload import Table, Workload
from fedclaw.protocol.terms import ModelSpec


@dataclass(frozen=True)
class Student:
    """A pruned teacher as the workload builds it, before recovery."""

    spec: ModelSpec
    model: nn.Module
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Accuracies:
    """Metrics of teacher, student before recovery and student after it, on the same examples; each has the score."""

    measure: Measure
    examples: int
    before: dict[str, float]
    pruned: dict[str, float]
    after: dict[str, float]
    score: str = "accuracy"
    """The task's metric by which models are compared."""


@dataclass(frozen=True)
class StudentOutcome:
    """The result of either kind of recovery; the model is on the CPU."""

    model: nn.Module
    accuracies: Accuracies
    report: ProxyReport | SitesReport


def make_student(teacher: Teacher, fraction: float) -> Student:
    """The teacher pruned to `fraction`, built from its spec. Raises CompressionError."""
    pruned = prune_to_fraction(teacher.model, teacher.input_shape, fraction)
    spec, model = rebuild(teacher.workload, pruned.model)
    return Student(spec, model, pruned.parameters_before, pruned.parameters_after)


def compare_on(table: Table, teacher: Teacher, student: Student, recovered: nn.Module) -> Accuracies:
    """Metrics of the three models on labelled public data."""
    models = (teacher.model, student.model, recovered)
    before, pruned, after = (evaluate(teacher.workload, model, table) for model in models)
    return Accuracies("evaluation file", len(table), before, pruned, after, teacher.workload.task.score)


def evaluate(workload: Workload, model: nn.Module, table: Table) -> dict[str, float]:
    """Metrics of `model` on labelled public data. Raises CompressionError when the table is empty, or has no score."""
    if len(table) == 0:
        raise CompressionError("the evaluation data holds no examples")
    device = next(model.parameters()).device
    logits = predict_logits(model, torch.from_numpy(np.array(table.inputs)).to(device)).cpu()
    found, score = workload.evaluate(logits, torch.from_numpy(np.array(table.targets))), workload.task.score
    if score not in found:
        raise CompressionError(
            f"the evaluation data gives no {score}: its targets are all the same, or the model's outputs not finite"
        )
    return found
