"""conf/model_compression.yaml, checked, and the cells that it describes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from experiments.sources import DatasetSettings
from fedclaw.compress.pruning_record import PruningSettings
from fedclaw.compress.record import GeneratorSettings, RecoverySettings
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import LocalTraining, ModelSpec

TeacherKind = Literal["plain", "private"]
"""How the model that is compressed was trained: without privacy, or with the noise of each site's own."""
Mode = Literal["none", "proxy", "synthetic", "federated", "proxy, federated"]
"""As in `fedclaw.compress`; the last is one after the other."""


class SiteTraining(Frozen):
    """Rounds of training at the sites."""

    rounds: int = Field(ge=1)
    training: LocalTraining
    clip: float = Field(default=1.0, gt=0)
    """L2 bound of an example's gradient; without privacy it is not used."""


class TeacherWeights(Frozen):
    """The teacher's weight in the loss at the sites; the rest is the loss on their own targets."""

    federated: float = Field(default=0.7, gt=0, le=1)
    after_proxy: float = Field(default=0.7, ge=0, le=1)
    """Where the teacher was learnt from before, on the public inputs; with 0 the sites train on their targets alone."""


class TaskSettings(Frozen):
    """One data set, the model that learns it, and how it is trained at the sites."""

    dataset: DatasetSettings
    workload: str
    model: ModelSpec
    public: int = Field(ge=10)
    """Rows of each training part that no site gets: the unlabelled public inputs."""
    teachers: dict[TeacherKind, SiteTraining]
    students: dict[TeacherKind, SiteTraining]
    """Of a pruned model at the sites: recovery, and the controls in its place."""
    weights: dict[TeacherKind, TeacherWeights]
    pruning: PruningSettings
    recovery: RecoverySettings
    generator: GeneratorSettings


class ExperimentSettings(Frozen):
    """conf/model_compression.yaml."""

    output: Path
    """Where the page and the plot go."""
    runs: Path
    """Where teachers and finished cells are kept, and results.json."""
    workers: int = Field(ge=1)
    folds: int = Field(ge=2)
    seed: int = Field(ge=0)
    epsilon: float = Field(gt=0)
    """All that a site may spend: on the teacher; or on a teacher and its recovery together; or on a control."""
    teacher_epsilon: float = Field(gt=0)
    """Of the teacher that is recovered at the sites."""
    recovery_epsilon: float = Field(gt=0)
    """Of that recovery by itself. The ledger composes both, and refuses what would come to more than `epsilon`."""
    delta: float = Field(gt=0, lt=1)
    fractions: tuple[float, ...] = Field(min_length=1)
    modes: tuple[Mode, ...] = Field(min_length=1)
    kinds: tuple[TeacherKind, ...] = Field(min_length=1)
    tasks: dict[str, TaskSettings]


@dataclass(frozen=True)
class TeacherCell:
    """A teacher: of one task, of one kind, and of one fold."""

    task: str
    kind: TeacherKind
    epsilon: float | None
    fold: int
    folds: int
    seed: int
    delta: float
    described: TaskSettings

    @property
    def label(self) -> str:
        """The cell in a few words, fit for a file's name."""
        epsilon = "" if self.epsilon is None else f"-epsilon-{self.epsilon:g}"
        return f"{self.task}-{self.kind}{epsilon}-fold-{self.fold}"

    def configuration(self) -> dict[str, Any]:
        """All that its result depends on, as plain JSON values."""
        described = self.described.model_dump(
            mode="json", exclude={"students", "weights", "pruning", "recovery", "generator"}
        )
        described["teachers"] = described["teachers"][self.kind]
        return {**{name: value for name, value in vars(self).items() if name != "described"}, "described": described}


@dataclass(frozen=True)
class StudentCell:
    """What is made of a teacher: to which fraction of its parameters, recovered in which way."""

    teacher: TeacherCell
    fraction: float
    mode: Mode
    epsilon: float | None
    """All that a site may spend."""
    recovery_epsilon: float | None
    """Of the recovery at the sites."""

    @property
    def label(self) -> str:
        """The cell in a few words, fit for a file's name."""
        return f"{self.teacher.label}-{self.mode.replace(', ', '-')}-{self.fraction:g}"

    @property
    def weight(self) -> float:
        """The teacher's at the sites."""
        weights = self.teacher.described.weights[self.teacher.kind]
        return weights.after_proxy if self.mode == "proxy, federated" else weights.federated

    def configuration(self) -> dict[str, Any]:
        """All that its result depends on, as plain JSON values."""
        described = self.teacher.described
        own = {name: value for name, value in vars(self).items() if name != "teacher"}
        return {
            **own,
            "teacher": self.teacher.configuration(),
            "weight": self.weight if self.mode.endswith("federated") else None,
            "student": described.students[self.teacher.kind].model_dump(mode="json"),
            "pruning": described.pruning.model_dump(mode="json"),
            "recovery": described.recovery.model_dump(mode="json"),
            "generator": described.generator.model_dump(mode="json"),
        }


def reference(settings: ExperimentSettings, task: str, kind: TeacherKind, fold: int) -> TeacherCell:
    """The teacher that accuracies are compared with: with privacy, one that spends the whole budget."""
    return _teacher(settings, task, kind, fold, settings.epsilon)


def references(settings: ExperimentSettings) -> Iterator[TeacherCell]:
    """Those of all tasks, kinds and folds."""
    for task, kind, fold in itertools.product(settings.tasks, settings.kinds, range(settings.folds)):
        yield reference(settings, task, kind, fold)


def students(settings: ExperimentSettings) -> Iterator[StudentCell]:
    """All of them."""
    for task, kind, fold in itertools.product(settings.tasks, settings.kinds, range(settings.folds)):
        private = kind == "private"
        for mode, fraction in itertools.product(settings.modes, settings.fractions):
            at_sites = mode.endswith("federated")
            yield StudentCell(
                teacher=_teacher(
                    settings, task, kind, fold, settings.teacher_epsilon if at_sites else settings.epsilon
                ),
                fraction=fraction,
                mode=mode,
                epsilon=settings.epsilon if private else None,
                recovery_epsilon=settings.recovery_epsilon if private and at_sites else None,
            )


def _teacher(settings: ExperimentSettings, task: str, kind: TeacherKind, fold: int, epsilon: float) -> TeacherCell:
    return TeacherCell(
        task=task,
        kind=kind,
        epsilon=epsilon if kind == "private" else None,
        fold=fold,
        folds=settings.folds,
        seed=settings.seed,
        delta=settings.delta,
        described=settings.tasks[task],
    )
