"""The compression stage: a finished run in, a pruned and recovered model with both models' figures out."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from fedclaw.compress.controls import TEACHERS_LABELS, ControlModel, labelled_of, train_controls
from fedclaw.compress.inputs import Inputs, PublicData, read_public, schema_inputs, synthetic_inputs
from fedclaw.compress.intervals import Difference
from fedclaw.compress.latency import LATENCY_BATCHES
from fedclaw.compress.measure import Examples, Scored, SitesFigures, answered_by, examples_of, verdict
from fedclaw.compress.models import (
    Student,
    Teacher,
    arrays_of,
    compare_latency,
    load_teacher,
    make_student,
)
from fedclaw.compress.proxy import FEWEST_INPUTS, Labelled, recover_by_proxy
from fedclaw.compress.prune import Looked, Recover
from fedclaw.compress.record import (
    Compression,
    CompressSettings,
    Control,
    Measure,
    Mode,
    RecoveryReport,
    SearchChoice,
    Side,
    StepInputs,
    require_room,
    write_compressed,
)
from fedclaw.compress.size import count_parameters, multiply_adds
from fedclaw.errors import CompressionError
from fedclaw.protocol.arrays import arrays_to_npz
from fedclaw.server.round_report import Observer
from fedclaw.server.run_directory import RunDirectory
from fedclaw.site.device import choose_device

log = logging.getLogger(__name__)

MEASURED = 1000
"""Inputs made from the schema on which agreement is measured where there are no others."""


def compress(settings: CompressSettings, observers: Sequence[Observer] = ()) -> Compression:
    """Compress a run's model and write <run>/compressed; `observers` watch the rounds of federated mode.

    Raises FedClawError; then <run>/compressed is as it was.
    """
    require_room(RunDirectory.open(settings.run), settings.overwrite)
    teacher = load_teacher(settings.run, settings.encryption.keyring())
    given = read_given(settings, teacher)
    student = student_of(settings, teacher, given)
    made = recover(settings, teacher, student, given, observers)
    return finish(settings, teacher, student, given, made)


def student_of(settings: CompressSettings, teacher: Teacher, given: "Given") -> Student:
    """The pruned teacher. Raises CompressionError."""
    student = make_student(
        teacher,
        settings.fraction,
        settings.pruning,
        _looked(settings, teacher, given),
        _between(settings, teacher, given),
        seed=settings.seed,
    )
    log.info("pruned: %d of %d parameters left", student.parameters_after, student.parameters_before)
    return student


def finish(settings: CompressSettings, teacher: Teacher, student: Student, given: "Given", made: "Made") -> Compression:
    """Train the controls, measure everything, and write <run>/compressed."""
    controls = controls_of(settings, teacher, student, given, made)
    compared = compare(teacher, student, given, made, controls)
    record = _record(settings, teacher, student, given, made, compared)
    write_compressed(teacher.directory, record, arrays_of(made.model))
    return record


@dataclass(frozen=True)
class Given:
    """What a compression may look at: inputs and labels to train with, and, apart from them, what to measure on."""

    public: PublicData
    labelled: Labelled | None
    proxy: Inputs
    """Of mode proxy: public inputs where there are some, else made from the schema."""
    synthetic: Inputs
    measured: Inputs | None
    """Inputs on which agreement with the teacher is measured; None: there is an evaluation file."""

    def of(self, mode: Mode) -> Inputs:
        """What recovery in this mode sees at the coordinator; in others, what there is of synthetic ones."""
        return self.proxy if mode == "proxy" else self.synthetic


def read_given(settings: CompressSettings, teacher: Teacher) -> Given:
    """Read the files, before anything costs anybody anything. Raises DataError, UsageError, CompressionError."""
    public = read_public(settings, teacher)
    labelled = labelled_of(public.labelled, teacher)
    synthetic = synthetic_inputs(settings, teacher)
    proxy = schema_inputs(teacher, settings.synthetic, settings.seed) if settings.statistics else synthetic
    measured = schema_inputs(teacher, MEASURED, settings.seed + 1)
    if public.known is not None and "proxy" in settings.mode:
        proxy = public.known
        # Labels are learnt row by row: of rows that hold some, none could be set apart.
        if public.evaluation is None and labelled is None:
            proxy, measured = _set_apart(proxy, settings)
    return Given(public, labelled, proxy, synthetic, measured if public.evaluation is None else None)


def _set_apart(inputs: Inputs, settings: CompressSettings) -> tuple[Inputs, Inputs]:
    """Inputs to train on and, chosen at random, those to measure agreement on."""
    count = len(inputs.values)
    if count <= FEWEST_INPUTS:
        raise CompressionError(
            f"there are {count} proxy inputs; recovery needs at least {FEWEST_INPUTS}, and agreement with the teacher "
            "others to be measured on"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed + 1))
    apart = max(1, min(round(settings.recovery.held_out * count), count - FEWEST_INPUTS))
    return replace(inputs, values=inputs.values[order[apart:]]), replace(inputs, values=inputs.values[order[:apart]])


def _looked(settings: CompressSettings, teacher: Teacher, given: Given) -> Looked | None:
    """What pruning may look at: what the first recovery will, never the rows that are measured on."""
    if not settings.pruning.needs_inputs:
        return None
    inputs = given.of(settings.mode[0])
    return Looked(inputs.values, teacher.workload.task, inputs.looked_at_in("importance", "to rank channels by"))


def _between(settings: CompressSettings, teacher: Teacher, given: Given) -> Recover | None:
    """The first recovery at the coordinator, in a share of its steps, between two steps of pruning.

    None where there is but one, or no such recovery: the sites are asked once only, for the model that is left.
    """
    mode = next((mode for mode in settings.mode if mode in ("proxy", "synthetic")), None)
    if settings.pruning.steps == 1 or mode is None:
        return None
    steps = max(1, settings.recovery.steps // settings.pruning.steps)
    shorter = settings.model_copy(update={"recovery": settings.recovery.model_copy(update={"steps": steps})})

    def train(model: nn.Module) -> None:
        with on_device(settings, teacher.model, model):
            found = recover_by_proxy(shorter, teacher, model, given.of(mode), given.labelled, mode)
            model.load_state_dict(found.recovered.model.state_dict())

    return train


@dataclass(frozen=True)
class Made:
    """A recovered student, on the CPU, with what was done and looked at."""

    model: nn.Module
    reports: tuple[RecoveryReport, ...] = ()
    looked_at: tuple[StepInputs, ...] = ()
    pool: Inputs | None = None
    """What the last recovery at the coordinator saw; None: there was none."""
    at_sites: SitesFigures | None = None
    """Of the sites' evaluation, where that came last and there is no evaluation file."""
    search: SearchChoice | None = None
    """Of a search that chose it."""


def recover(
    settings: CompressSettings,
    teacher: Teacher,
    student: Student,
    given: Given,
    observers: Sequence[Observer] = (),
    *,
    measured: bool = True,
) -> Made:
    """Recover the student in the modes that are asked for, one after the other. Raises FedClawError.

    `measured`: sites that recover it last, and no evaluation file, measure it on their tests, which may cost them.
    """
    made = Made(student.model)
    for mode in settings.mode:
        if mode == "federated":
            made = _at_sites(settings, teacher, student, given, made, observers, measured)
        elif mode != "none":
            made = _at_coordinator(settings, teacher, given, made, mode)
    return made


def _at_coordinator(
    settings: CompressSettings, teacher: Teacher, given: Given, made: Made, mode: Literal["proxy", "synthetic"]
) -> Made:
    with on_device(settings, teacher.model, made.model):
        found = recover_by_proxy(settings, teacher, made.model, given.of(mode), given.labelled, mode)
        found.recovered.model.cpu()
    looked = [found.pool.looked_at_in("recovery", "to learn from and to stop by")]
    if given.public.labelled is not None and settings.recovery.labels:
        looked.append(given.public.labelled.inputs.looked_at_in("recovery", "whose labels it learnt"))
    return Made(found.recovered.model, (*made.reports, found.report), (*made.looked_at, *looked), found.pool)


def _at_sites(
    settings: CompressSettings,
    teacher: Teacher,
    student: Student,
    given: Given,
    made: Made,
    observers: Sequence[Observer],
    measured: bool,
) -> Made:
    from fedclaw.compress.federated import recover_at_sites

    measured = measured and settings.mode[-1] == "federated" and given.public.evaluation is None
    found = recover_at_sites(settings, teacher, student, made.model, observers, measured=measured)
    told = f"the sites' own training data, in {found.report.rounds} rounds of run {found.report.run} on their ledgers"
    looked = StepInputs(step="recovery", origin="sites", description=told)
    return Made(found.model, (*made.reports, found.report), (*made.looked_at, looked), made.pool, found.figures)


@contextmanager
def on_device(settings: CompressSettings, *models: nn.Module) -> Iterator[None]:
    """Inside, the models are on the device that the settings choose; afterwards on the CPU."""
    device = choose_device(settings.device)
    for model in models:
        model.to(device)
    try:
        yield
    finally:
        for model in models:
            model.cpu()


def controls_of(
    settings: CompressSettings, teacher: Teacher, student: Student, given: Given, made: Made
) -> tuple[ControlModel, ...]:
    """Trained at the coordinator, on what the last recovery there saw; without any, on synthetic inputs."""
    if not settings.controls:
        return ()
    with on_device(settings, teacher.model, student.model):
        found = train_controls(settings, teacher, student, made.pool or given.synthetic, given.labelled)
        for control in found:
            control.model.cpu()
    return found


@dataclass(frozen=True)
class Compared:
    """Figures of teacher, pruned and recovered student and controls, on the same examples where that could be."""

    measure: Measure
    examples: int
    before: Scored
    pruned: Scored
    after: Scored
    difference: Difference | None
    controls: tuple[Control, ...]


def compare(teacher: Teacher, student: Student, given: Given, made: Made, controls: Sequence[ControlModel]) -> Compared:
    """Measure all models: on the evaluation file, at the sites, or by agreement with the teacher."""
    if made.at_sites is not None:
        at = made.at_sites
        kept = tuple(Control(name=control.name, data=control.data, accuracy=None) for control in controls)
        return Compared("federated evaluation", at.examples, at.before, at.pruned, at.after, None, kept)
    examples = _examples(teacher, given)
    before, pruned, after = (examples.score(model) for model in (teacher.model, student.model, made.model))
    kept = tuple(_control(control, examples, after) for control in controls)
    difference = examples.difference(after, before)
    return Compared(examples.measure, len(examples), before, pruned, after, difference, kept)


def _examples(teacher: Teacher, given: Given) -> Examples:
    if given.public.evaluation is not None:
        return examples_of(given.public.evaluation, teacher)
    assert given.measured is not None
    return answered_by(teacher, given.measured.values)


def _control(control: ControlModel, examples: Examples, after: Scored) -> Control:
    scored = examples.score(control.model)
    return Control(
        name=control.name,
        data=control.data,
        accuracy=scored.metrics[examples.task.score],
        interval=scored.interval,
        difference=examples.difference(after, scored),
    )


def _looked_at(
    settings: CompressSettings, student: Student, given: Given, made: Made, compared: Compared
) -> tuple[StepInputs, ...]:
    """What each step looked at, in their order."""
    found = [*student.looked_at, *made.looked_at]
    if settings.controls:
        found.append((made.pool or given.synthetic).looked_at_in("controls", "to learn from and to stop by"))
        if given.public.labelled is not None:
            found.append(given.public.labelled.inputs.looked_at_in("controls", "whose labels they learnt"))
    return (*found, _measured_on(given, compared), _LATENCY)


_LATENCY = StepInputs(
    step="measurement",
    origin="synthetic",
    description="normally distributed random numbers, for the latency",
    examples=max(LATENCY_BATCHES),
)


def _measured_on(given: Given, compared: Compared) -> StepInputs:
    if compared.measure == "federated evaluation":
        told = "the sites' own test data, in metrics that their policies let out"
        return StepInputs(step="measurement", origin="sites", description=told, examples=compared.examples)
    if given.public.evaluation is not None:
        return given.public.evaluation.inputs.looked_at_in("measurement", "which no other step looked at")
    assert given.measured is not None
    return given.measured.looked_at_in("measurement", "which no other step looked at, for agreement with the teacher")


def _record(
    settings: CompressSettings, teacher: Teacher, student: Student, given: Given, made: Made, compared: Compared
) -> Compression:
    inputs = torch.randn(max(LATENCY_BATCHES), *teacher.input_shape, generator=torch.Generator().manual_seed(0))
    latency_before, latency_after = compare_latency(teacher.model, made.model, inputs, settings.latency_repeats)
    old_size = teacher.directory.model_path.stat().st_size
    new_size = len(arrays_to_npz(arrays_of(made.model)))
    score = teacher.workload.task.score
    return Compression(
        run=teacher.record.run,
        model=student.spec,
        teacher_sha256=teacher.sha256,
        fraction=settings.fraction
        if student.pruning.target.kind == "parameters"
        else student.parameters_after / student.parameters_before,
        parameters_before=student.parameters_before,
        parameters_after=student.parameters_after,
        score=score,
        accuracy_measure=compared.measure,
        accuracy_examples=compared.examples,
        accuracy_before=compared.before.metrics[score],
        accuracy_pruned=compared.pruned.metrics[score],
        accuracy_after=compared.after.metrics[score],
        before=_side(teacher, teacher.model, old_size, latency_before, compared.before),
        after=_side(teacher, made.model, new_size, latency_after, compared.after),
        recovery=made.reports,
        difference=compared.difference,
        controls=compared.controls,
        controls_note=TEACHERS_LABELS if settings.controls and given.labelled is None else "",
        verdict=verdict(
            compared.measure if compared.measure == "agreement with the teacher" else score,
            compared.controls,
            settings.controls,
            "federated" in settings.mode,
        ),
        pruning=student.pruning,
        looked_at=_looked_at(settings, student, given, made, compared),
        search=made.search,
        seed=settings.seed,
    )


def _side(teacher: Teacher, model: nn.Module, file_bytes: int, latency: dict[int, float], scored: Scored) -> Side:
    return Side(
        parameters=count_parameters(model),
        multiply_adds=multiply_adds(model, teacher.input_shape),
        file_bytes=file_bytes,
        latency_ms={str(batch): round(milliseconds, 5) for batch, milliseconds in latency.items()},
        metrics=scored.metrics,
        interval=scored.interval,
    )
