"""One cell of the table: the teacher of a fold, or what is left of it after pruning and one way of recovery.

No model is chosen by the test rows: rounds at the sites end where they end, and training at the coordinator keeps the
state that does best on inputs that it held back (`fedclaw.compress.proxy.train`).
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import nn

from experiments.cell_files import read_result, write_result
from experiments.compression.dealing import Fold, deal_fold
from experiments.compression.settings import Mode, StudentCell, TeacherCell
from experiments.compression.sites import open_sites, record_of, spent
from experiments.sweeps.identity import digest_of
from fedclaw.compress.controls import from_scratch
from fedclaw.compress.federated import recover_by_rounds
from fedclaw.compress.inputs import Inputs, PublicData, schema_inputs
from fedclaw.compress.models import Student, Teacher, arrays_of, load_arrays, load_teacher, predict_logits
from fedclaw.compress.record import CompressSettings, SiteRecovery
from fedclaw.compress.record import Mode as KindOfRecovery
from fedclaw.compress.stage import Given, controls_of, recover, student_of
from fedclaw.errors import UsageError
from fedclaw.protocol.frozen import Frozen
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.run_directory import RunDirectory
from fedclaw.transport.in_process import local_grid, simulate

_MODES: Mapping[Mode, tuple[KindOfRecovery, ...]] = {
    "none": ("none",),
    "proxy": ("proxy",),
    "synthetic": ("synthetic",),
    "federated": ("federated",),
    "proxy, federated": ("proxy", "federated"),
}
RUN, LEDGERS = "run", "ledgers"
FINE_TUNED, SCRATCH = "fine-tuned without teacher", "trained from scratch"


class Arm(Frozen):
    """One model, as its training left it."""

    right: str
    """A 1 or 0 for each row of the fold's test part, in their order: whether the model is right about it."""
    parameters: int = Field(ge=1)
    epsilon: float | None = None
    """All that the site spent which spent most, by its ledger; None: unbounded, or the sites did not take part."""

    @property
    def accuracy(self) -> float:
        """On the fold's test part."""
        return self.right.count("1") / len(self.right)


class CellResult(Frozen):
    """The models of a cell by name: `teacher`; or `pruned`, `recovered` and the controls."""

    arms: dict[str, Arm]
    learnt_from: str = ""
    """What the controls were trained on."""
    seconds: float


class Store:
    """Finished cells, one file each, and teachers, one directory each, found again by their whole configuration."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, cell: TeacherCell | StudentCell) -> Path:
        """The file of the cell's result."""
        return self._root / "cells" / f"{cell.label}-{digest_of(cell.configuration())}.json"

    def teacher(self, cell: TeacherCell) -> Path:
        """The directory of a teacher's run and its sites' ledgers."""
        return self._root / "teachers" / self.path(cell).stem

    def result(self, cell: TeacherCell | StudentCell) -> CellResult | None:
        """The cell's result, if it is there and whole."""
        return read_result(self.path(cell), CellResult)

    def finished(self, cell: TeacherCell | StudentCell) -> CellResult:
        """The cell's result. Raises UsageError when it is not there."""
        found = self.result(cell)
        if found is None:
            raise UsageError(f"{self.path(cell)} is not there: run the experiment first")
        return found

    def write(self, cell: TeacherCell | StudentCell, result: CellResult) -> None:
        """Keep a result beside its configuration."""
        write_result(self.path(cell), cell.configuration(), result)


def train_teacher(item: tuple[TeacherCell, Path]) -> CellResult:
    """Train the teacher at its fold's sites, and keep run and ledgers in the directory. Raises FedClawError."""
    cell, root = item
    with _at_work() as began:
        fold, task = _fold(cell), cell.described
        shutil.rmtree(root, ignore_errors=True)
        (root / LEDGERS).mkdir(parents=True)
        sites = open_sites(task, fold, cell.epsilon, cell.delta, root / LEDGERS)
        record = record_of(task, fold, task.teachers[cell.kind], cell.epsilon, cell.delta, cell.seed)
        simulate(RunDirectory.create(root / RUN, record), sites)
        used = None if cell.epsilon is None else spent(sites, cell.delta)
        teacher = load_teacher(root / RUN)
        arm = _arm(teacher, teacher.model, fold, used)
    return CellResult(arms={"teacher": arm}, seconds=round(time.monotonic() - began, 2))


def compress_teacher(item: tuple[StudentCell, Path]) -> CellResult:
    """Prune the teacher that the directory has, recover it, and train its controls. Raises FedClawError."""
    cell, root = item
    with _at_work() as began, tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / RUN
        shutil.copytree(root / RUN, run)
        settings = _settings(cell, run)
        teacher = load_teacher(run)
        fold = _fold(cell.teacher)
        given = _given(settings, teacher, fold)
        student = student_of(settings, teacher, given)
        if cell.mode.endswith("federated"):
            arms, learnt_from = _at_sites(cell, settings, teacher, student, fold, given, root / LEDGERS)
        else:
            arms, learnt_from = _at_coordinator(settings, teacher, student, fold, given)
        arms["pruned"] = _arm(teacher, student.model, fold)
    return CellResult(arms=arms, learnt_from=learnt_from, seconds=round(time.monotonic() - began, 2))


def _settings(cell: StudentCell, run: Path) -> CompressSettings:
    training = cell.teacher.described.students[cell.teacher.kind]
    return CompressSettings(
        run=run,
        mode=_MODES[cell.mode],
        fraction=cell.fraction,
        pruning=cell.teacher.described.pruning,
        recovery=cell.teacher.described.recovery,
        generator=cell.teacher.described.generator,
        federation=run,
        sites=SiteRecovery(rounds=training.rounds, epsilon=cell.recovery_epsilon),
        device="cpu",
        seed=cell.teacher.seed,
    )


def _given(settings: CompressSettings, teacher: Teacher, fold: Fold) -> Given:
    """The unlabelled public inputs, and those made of the schema; nothing to measure on."""
    public = Inputs(torch.from_numpy(fold.inputs), "public", f"{len(fold.inputs)} public inputs")
    made_up = schema_inputs(teacher, settings.synthetic, settings.seed)
    return Given(PublicData(), None, public, made_up, None)


def _at_coordinator(
    settings: CompressSettings, teacher: Teacher, student: Student, fold: Fold, given: Given
) -> tuple[dict[str, Arm], str]:
    """On unlabelled public inputs, on inputs made at the coordinator, or not at all."""
    made = recover(settings, teacher, student, given)
    arms = {"recovered": _arm(teacher, made.model, fold)}
    controls = () if "none" in settings.mode else controls_of(settings, teacher, student, given, made)
    for control in controls:
        arms[control.name] = _arm(teacher, control.model, fold)
    return arms, next((control.data for control in controls if control.name == FINE_TUNED), "")


def _at_sites(
    cell: StudentCell,
    settings: CompressSettings,
    teacher: Teacher,
    student: Student,
    fold: Fold,
    given: Given,
    ledgers: Path,
) -> tuple[dict[str, Arm], str]:
    """At the sites, which go on from the teacher's ledgers; the net from scratch has the whole budget for itself."""
    task, delta, arms = cell.teacher.described, cell.teacher.delta, dict[str, Arm]()
    begun = student.model
    if before := tuple(mode for mode in settings.mode if mode != "federated"):
        at_coordinator = settings.model_copy(update={"mode": before, "federation": None})
        begun = recover(at_coordinator, teacher, student, given).model
    # What came before the sites is part of a recovery's name: under one name the second would be taken for the first.
    for name, mode, start, weight in (
        ("recovered", settings.mode, begun, cell.weight),
        (FINE_TUNED, _MODES["federated"], student.model, 0.0),
    ):
        sites = open_sites(task, fold, cell.epsilon, delta, ledgers, copied=True)
        at_sites = settings.sites.model_copy(update={"weight": weight})
        asked = settings.model_copy(update={"mode": mode, "sites": at_sites})
        grid = local_grid(sites, f"{settings.run}-{name}")
        found = recover_by_rounds(grid, asked, teacher, student, start, measured=False)
        arms[name] = _arm(teacher, found.model, fold, None if cell.epsilon is None else spent(sites, delta))
    small = task.model_copy(update={"model": student.spec})
    record = record_of(small, fold, task.students[cell.teacher.kind], cell.epsilon, delta, cell.teacher.seed)
    directory = settings.run.parent / "scratch"
    (directory / LEDGERS).mkdir(parents=True)
    sites = open_sites(task, fold, cell.epsilon, delta, directory / LEDGERS)
    begin = from_scratch(teacher, student, cell.teacher.seed)
    grid = local_grid(sites, record.run)
    outcome = run_rounds(grid, RunDirectory.create(directory / RUN, record), arrays_of(begin))
    load_arrays(begin, outcome.parameters)
    arms[SCRATCH] = _arm(teacher, begin, fold, None if cell.epsilon is None else spent(sites, delta))
    return arms, "the sites' own examples"


def _arm(teacher: Teacher, model: nn.Module, fold: Fold, epsilon: float | None = None) -> Arm:
    answers = teacher.workload.task.answers(predict_logits(model, torch.from_numpy(fold.test.inputs)))
    right = np.asarray(answers) == fold.test.targets
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Arm(right="".join("01"[int(flag)] for flag in right), parameters=parameters, epsilon=epsilon)


def _fold(cell: TeacherCell) -> Fold:
    return deal_fold(cell.described, cell.folds, cell.fold, cell.seed)


@contextmanager
def _at_work() -> Iterator[float]:
    """One thread, without a line for each round; gives the time of its beginning."""
    logging.getLogger("fedclaw").setLevel(logging.WARNING)
    logging.getLogger("fedclaw.site").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    yield time.monotonic()
