"""conf/privacy_table.yaml, checked, and the cells of the table that it describes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from experiments.datasets import SitePolicy
from experiments.sources import DatasetSettings, with_content
from fedclaw.audit.findings import AuditOptions
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import CentralRequest, DataUnit, LocalTraining, PrivacyRequest, SecureRequest, Unit
from fedclaw.server.settings import RunSettings, WorkloadChoice
from fedclaw.simulation.partitions.settings import PartitionSettings

Placement = Literal["none", "local", "central", "distributed", "site"]
"""Who adds the noise: nobody; each site to its own steps; the server to the sum; all sites together, in shares. `site`:
the server again, with whole sites as the unit."""


class PlacementSettings(Frozen):
    """How one placement of noise is trained."""

    rounds: int = Field(ge=1)
    training: LocalTraining
    clip: float = Field(default=1.0, gt=0)
    """L2 bound of a unit's gradient, of an example or a person; of a site's update where the unit is a site. Nothing
    for `none`."""
    sample_rate: float = Field(default=1.0, gt=0, le=1)
    """Poisson rate of the units for one step on the pooled data: `central` and `distributed` only."""


class Grid(Frozen):
    """Values that `search` tries, each with each; an empty list keeps what is set."""

    rounds: tuple[int, ...] = ()
    epochs: tuple[float, ...] = ()
    batch_size: tuple[int, ...] = ()
    learning_rate: tuple[float, ...] = ()
    sample_rate: tuple[float, ...] = ()


class TaskSettings(Frozen):
    """One data set: how it is dealt out, which model learns it, and how each placement trains."""

    dataset: DatasetSettings
    partition: PartitionSettings
    workload: WorkloadChoice
    placements: dict[Placement, PlacementSettings]
    search: dict[Placement, Grid] = {}

    @property
    def unit(self) -> DataUnit:
        """What the guarantees protect, but where the unit is a site."""
        return self.dataset.persons.unit if self.dataset.persons else "example"


class ByPersons(Frozen):
    """Guarantees for rows, attacked by persons, whom they do not cover."""

    rows: int = Field(ge=2)
    """Of each person."""
    placements: tuple[Placement, ...]


class TableSettings(Frozen):
    """conf/privacy_table.yaml."""

    output: Path
    """Where privacy_table.md and privacy_table.png go."""
    runs: Path
    """Where finished cells are kept, and table.json."""
    workers: int = Field(ge=1)
    seeds: int = Field(ge=1)
    """Seeds 1 .. N of deal and initial model. Seed 0 is the one that the search used."""
    search_epsilon: float = Field(gt=0)
    """The epsilon at which settings are looked for."""
    search_repeats: int = Field(ge=1)
    epsilons: tuple[float, ...] = Field(min_length=1)
    delta: float = Field(gt=0, lt=1)
    secure: SecureRequest
    """For `distributed`: how many sites its noise does not count on."""
    audit: AuditOptions | None
    """null: no audit."""
    by_persons: ByPersons | None = None
    """null: guarantees are attacked by what they are for alone."""
    tasks: dict[str, TaskSettings]

    @property
    def audit_by_persons(self) -> AuditOptions | None:
        """How guarantees for rows are attacked by persons, if they are."""
        if self.audit is None or self.by_persons is None:
            return None
        return self.audit.model_copy(update={"rows_together": self.by_persons.rows})

    def is_attacked_by_persons(self, cell: "Cell") -> bool:
        """Whether it guarantees something for rows, some of which belong to one person, and persons attack it."""
        persons, by = cell.dataset.persons, self.by_persons
        if by is None or persons is None or cell.placement not in by.placements:
            return False
        return cell.epsilon is not None and persons.unit == "example"

    @property
    def data_sets(self) -> dict[str, tuple[str, ...]]:
        """The tasks by the name of their data set; those of one data set differ in the unit."""
        found: dict[str, tuple[str, ...]] = {}
        for name, task in self.tasks.items():
            found[task.dataset.name] = (*found.get(task.dataset.name, ()), name)
        return found

    @model_validator(mode="after")
    def _units_are_compared(self) -> Self:
        for names in self.data_sets.values():
            tasks = [self.tasks[name] for name in names]
            if len({task.unit for task in tasks}) < len(tasks):
                raise ValueError(f"tasks {', '.join(names)}: of one data set, so each needs another unit")
            if any(_dealt(task) != _dealt(tasks[0]) for task in tasks):
                raise ValueError(f"tasks {', '.join(names)}: of one data set, so they have the same deal and model")
        return self

    @model_validator(mode="after")
    def _distributed_as_central(self) -> Self:
        for name, task in self.tasks.items():
            both = task.placements.get("central"), task.placements.get("distributed")
            if None not in both and both[0] != both[1]:
                raise ValueError(f"tasks.{name}: central and distributed are compared, so they train alike")
        return self


def _dealt(task: TaskSettings) -> tuple[DatasetSettings, PartitionSettings, WorkloadChoice]:
    """What does not depend on the unit."""
    dataset = task.dataset
    if dataset.persons is not None:
        dataset = dataset.model_copy(update={"persons": dataset.persons.model_copy(update={"unit": "example"})})
    return dataset, task.partition, task.workload


@dataclass(frozen=True)
class Cell:
    """One run of the table: everything that its result depends on."""

    task: str
    placement: Placement
    epsilon: float | None
    seed: int
    dataset: DatasetSettings
    partition: PartitionSettings
    policy: SitePolicy
    run: RunSettings

    @property
    def label(self) -> str:
        """The cell in a few words, fit for a file's name."""
        epsilon = "none" if self.epsilon is None else f"{self.epsilon:g}"
        return f"{self.task}-{self.placement}-epsilon-{epsilon}-seed-{self.seed}"

    def configuration(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {
            "task": self.task,
            "placement": self.placement,
            "seed": self.seed,
            "dataset": self.dataset.model_dump(mode="json"),
            "partition": self.partition.model_dump(mode="json"),
            "policy": asdict(self.policy),
            "run": self.run.model_dump(mode="json"),
        }


def rows(settings: TableSettings) -> Iterator[tuple[Cell, ...]]:
    """The table's rows, top to bottom: a cell for each seed."""
    for task, described in settings.tasks.items():
        for placement in described.placements:
            for epsilon in (None,) if placement == "none" else settings.epsilons:
                seeds = range(1, settings.seeds + 1)
                yield tuple(make_cell(settings, task, placement, epsilon, seed) for seed in seeds)


def audits(settings: TableSettings) -> Iterator[tuple[Cell, AuditOptions]]:
    """The first cell of each row, and how it is attacked: as its unit, and where that is a row by whole persons too."""
    first = [row[0] for row in rows(settings)]
    if settings.audit is not None:
        yield from ((cell, settings.audit) for cell in first)
    if settings.audit_by_persons is not None:
        yield from ((cell, settings.audit_by_persons) for cell in first if settings.is_attacked_by_persons(cell))


def make_cell(settings: TableSettings, task: str, placement: Placement, epsilon: float | None, seed: int) -> Cell:
    """The cell of that row and seed."""
    described = settings.tasks[task]
    policy = SitePolicy(
        # A site's budget is for examples or persons, whom the noise for whole sites costs more than the row's epsilon.
        epsilon=None if placement == "site" else epsilon,
        delta=settings.delta,
        allow_training_without_privacy=epsilon is None,
        trust_server_noise=placement in ("central", "site"),
    )
    return Cell(
        task=task,
        placement=placement,
        epsilon=epsilon,
        seed=seed,
        dataset=with_content(described.dataset.model_copy(update={"seed": seed})),
        partition=described.partition,
        policy=policy,
        run=_run(settings, described, placement, epsilon, seed),
    )


def _run(
    settings: TableSettings, task: TaskSettings, placement: Placement, epsilon: float | None, seed: int
) -> RunSettings:
    chosen = task.placements[placement]
    return RunSettings(
        workload=task.workload,
        strategy={"name": "fedavg"},
        training=chosen.training,
        privacy=_local(settings, chosen, epsilon) if placement == "local" else None,
        central=_central(settings, chosen, placement, epsilon),
        secure=settings.secure if placement == "distributed" else None,
        rounds=chosen.rounds,
        seed=seed,
        weighting="uniform" if placement == "site" else "examples",
        metrics=("accuracy",),
    )


def _local(settings: TableSettings, chosen: PlacementSettings, epsilon: float | None) -> PrivacyRequest | None:
    if epsilon is None:
        return None
    return PrivacyRequest(epsilon=epsilon, delta=settings.delta, max_grad_norm=chosen.clip)


def _central(
    settings: TableSettings, chosen: PlacementSettings, placement: Placement, epsilon: float | None
) -> CentralRequest | None:
    if epsilon is None or placement not in ("central", "distributed", "site"):
        return None
    unit: Unit = "site" if placement == "site" else "example"
    return CentralRequest(
        unit=unit,
        noise_by="sites" if placement == "distributed" else "server",
        epsilon=epsilon,
        delta=settings.delta,
        clip=chosen.clip,
        sample_rate=chosen.sample_rate,
    )
