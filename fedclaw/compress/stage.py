"""The compression stage: a finished run in, a pruned and recovered model with both models' figures out."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from fedclaw.compress.latency import LATENCY_BATCHES
from fedclaw.compress.models import (
    Student,
    StudentOutcome,
    Teacher,
    arrays_of,
    compare_latency,
    load_teacher,
    make_student,
)
from fedclaw.compress.proxy import proxy_inputs, recover_by_proxy
from fedclaw.compress.prune import Looked
from fedclaw.compress.record import Compression, CompressSettings, Side, StepInputs, require_room, write_compressed
from fedclaw.compress.size import count_parameters, multiply_adds
from fedclaw.protocol.arrays import arrays_to_npz
from fedclaw.server.round_report import Observer
from fedclaw.server.run_directory import RunDirectory

log = logging.getLogger(__name__)


def compress(settings: CompressSettings, observers: Sequence[Observer] = ()) -> Compression:
    """Compress a run's model and write <run>/compressed; `observers` watch the rounds of federated mode.

    Raises FedClawError; then <run>/compressed is as it was.
    """
    require_room(RunDirectory.open(settings.run), settings.overwrite)
    teacher = load_teacher(settings.run, settings.encryption.keyring())
    looked = _looked(settings, teacher) if settings.pruning.needs_inputs else None
    student = make_student(teacher, settings.fraction, settings.pruning, looked, seed=settings.seed)
    log.info("pruned: %d of %d parameters left", student.parameters_after, student.parameters_before)
    if settings.mode == "federated":
        from fedclaw.compress.federated import recover_at_sites

        outcome = recover_at_sites(settings, teacher, student, observers)
    else:
        outcome = recover_by_proxy(settings, teacher, student, *proxy_inputs(settings, teacher))
    record = _record(settings, teacher, student, outcome)
    write_compressed(teacher.directory, record, arrays_of(outcome.model))
    return record


def _looked(settings: CompressSettings, teacher: Teacher) -> Looked:
    """What pruning may look at: synthetic inputs, which are not among those that agreement is measured on."""
    made, origin = proxy_inputs(settings.model_copy(update={"inputs": None, "seed": settings.seed + 1}), teacher)
    source = StepInputs(step="importance", origin="synthetic", description=origin, examples=len(made))
    return Looked(made, teacher.workload.task, source)


def _record(settings: CompressSettings, teacher: Teacher, student: Student, outcome: StudentOutcome) -> Compression:
    accuracies = outcome.accuracies
    inputs = torch.randn(max(LATENCY_BATCHES), *teacher.input_shape, generator=torch.Generator().manual_seed(0))
    latency_before, latency_after = compare_latency(teacher.model, outcome.model, inputs, settings.latency_repeats)
    old_size = teacher.directory.model_path.stat().st_size
    new_size = len(arrays_to_npz(arrays_of(outcome.model)))
    return Compression(
        run=teacher.record.run,
        model=student.spec,
        teacher_sha256=teacher.sha256,
        fraction=settings.fraction
        if student.pruning.target.kind == "parameters"
        else student.parameters_after / student.parameters_before,
        parameters_before=student.parameters_before,
        parameters_after=student.parameters_after,
        score=accuracies.score,
        accuracy_measure=accuracies.measure,
        accuracy_examples=accuracies.examples,
        accuracy_before=accuracies.before[accuracies.score],
        accuracy_pruned=accuracies.pruned[accuracies.score],
        accuracy_after=accuracies.after[accuracies.score],
        before=_side(teacher, teacher.model, old_size, latency_before, accuracies.before),
        after=_side(teacher, outcome.model, new_size, latency_after, accuracies.after),
        recovery=outcome.report,
        pruning=student.pruning,
        looked_at=student.looked_at,
        seed=settings.seed,
    )


def _side(
    teacher: Teacher, model: nn.Module, file_bytes: int, latency: dict[int, float], metrics: dict[str, float]
) -> Side:
    return Side(
        parameters=count_parameters(model),
        multiply_adds=multiply_adds(model, teacher.input_shape),
        file_bytes=file_bytes,
        latency_ms={str(batch): round(milliseconds, 5) for batch, milliseconds in latency.items()},
        metrics=metrics,
    )
