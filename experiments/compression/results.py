"""The table's rows: what the cells of all folds come to together."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from pydantic import Field

from experiments.compression.cells import Arm, CellResult, Store
from experiments.compression.settings import ExperimentSettings, Mode, StudentCell, TeacherKind, reference, students
from experiments.results_file import ResultsFile
from fedclaw.compress.intervals import Difference, Interval, of_paired, of_proportion
from fedclaw.protocol.frozen import Frozen


class Model(Frozen):
    """One model of each fold, on the test rows of all folds: each row of the data set once."""

    accuracy: float = Field(ge=0, le=1)
    interval: Interval
    kept: float = Field(ge=0)
    """Its accuracy as a share of the reference teacher's, on the same rows."""
    by_fold: tuple[float, ...]
    parameters: int
    """The most of any fold."""
    epsilon: float | None
    """The most of any site of any fold, teacher included; None: unbounded, or nothing was asked of the sites."""

    @classmethod
    def of(cls, arms: Sequence[Arm], reference: float | None = None) -> Self:
        """Of each fold's arm, against the reference's accuracy."""
        right = _right(arms)
        accuracy = float(right.mean())
        return cls(
            accuracy=accuracy,
            interval=of_proportion(float(right.sum()), len(right)),
            kept=accuracy / (reference or accuracy),
            by_fold=tuple(round(arm.accuracy, 6) for arm in arms),
            parameters=max(arm.parameters for arm in arms),
            epsilon=max((arm.epsilon for arm in arms if arm.epsilon is not None), default=None),
        )


class Row(Frozen):
    """One fraction of one task, teacher and mode."""

    task: str
    kind: TeacherKind
    mode: Mode
    fraction: float
    recovered: Model
    pruned: Model
    controls: dict[str, Model]
    learnt_from: str
    better_control: str | None
    """The name of the control with the higher accuracy; None: there is none."""
    difference: Difference | None
    """Recovered less that control, on the same rows."""

    @property
    def verdict(self) -> str:
        """Whether there is a gain."""
        if self.difference is None:
            return "-"
        return {1: "a gain", 0: "no gain", -1: "worse"}[self.difference.sign]


class Reference(Frozen):
    """The teachers of all folds of one kind."""

    task: str
    kind: TeacherKind
    teacher: Model


class Results(ResultsFile):
    """All of it."""

    rows: tuple[Row, ...]
    references: tuple[Reference, ...]
    seconds: float
    """Of all cells together, each on one thread."""

    def reference(self, task: str, kind: TeacherKind) -> Model:
        """The teacher that rows of this task and kind are compared with."""
        return next(item.teacher for item in self.references if (item.task, item.kind) == (task, kind))


def collect(settings: ExperimentSettings, store: Store) -> Results:
    """The finished cells as a table; all have to be there."""
    cells = list(students(settings))
    references, rows, seconds = [], [], 0.0
    for task in settings.tasks:
        for kind in settings.kinds:
            teachers = [store.finished(reference(settings, task, kind, fold)) for fold in range(settings.folds)]
            teacher = Model.of([result.arms["teacher"] for result in teachers])
            references.append(Reference(task=task, kind=kind, teacher=teacher))
            seconds += sum(result.seconds for result in teachers)
            mine = [cell for cell in cells if (cell.teacher.task, cell.teacher.kind) == (task, kind)]
            for mode in settings.modes:
                for fraction in settings.fractions:
                    folds = [cell for cell in mine if (cell.mode, cell.fraction) == (mode, fraction)]
                    found = [store.finished(cell) for cell in folds]
                    rows.append(_row(folds[0], found, teacher.accuracy))
                    seconds += sum(result.seconds for result in found)
    return Results(rows=tuple(rows), references=tuple(references), seconds=round(seconds, 1))


def _row(cell: StudentCell, found: Sequence[CellResult], reference: float) -> Row:
    names = list(found[0].arms)
    arms = {name: [result.arms[name] for result in found] for name in names}
    models = {name: Model.of(arms[name], reference) for name in names}
    controls = {name: model for name, model in models.items() if name not in ("recovered", "pruned")}
    better = max(controls, key=lambda name: controls[name].accuracy, default=None)
    return Row(
        task=cell.teacher.task,
        kind=cell.teacher.kind,
        mode=cell.mode,
        fraction=cell.fraction,
        recovered=models["recovered"],
        pruned=models["pruned"],
        controls=controls,
        learnt_from=found[0].learnt_from,
        better_control=better,
        difference=None if better is None else of_paired(_right(arms["recovered"]), _right(arms[better])),
    )


def _right(arms: Sequence[Arm]) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """(N,) of all folds, one after the other."""
    return np.array([mark == "1" for arm in arms for mark in arm.right], np.bool_)
