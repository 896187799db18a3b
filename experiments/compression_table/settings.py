"""conf/compression_table.yaml, checked, and the runs that it describes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from experiments.sources import DatasetSettings, with_content
from experiments.sweeps.identity import digest_of
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import Compression, LocalTraining
from fedclaw.server.settings import RunSettings, WorkloadChoice
from fedclaw.simulation.partitions.settings import PartitionSettings


class TaskSettings(Frozen):
    """One data set: how it is dealt out, which model learns it, and how."""

    dataset: DatasetSettings
    partition: PartitionSettings
    workload: WorkloadChoice
    rounds: int = Field(ge=1)
    training: LocalTraining
    target: float = Field(gt=0, lt=1)
    """The accuracy up to which bytes are counted."""


class TableSettings(Frozen):
    """conf/compression_table.yaml."""

    output: Path
    """Where update_compression.md and update_compression.png go."""
    runs: Path
    """Where finished runs are kept."""
    seeds: int = Field(ge=1)
    """Seeds 1 .. N, of the deal, of the initial model and of random positions."""
    methods: dict[str, Compression | None]
    """By the name in the table; the first one is what the others are compared with: null."""
    tasks: dict[str, TaskSettings]

    @model_validator(mode="after")
    def _compared(self) -> "TableSettings":
        if next(iter(self.methods.values()), True) is not None:
            raise ValueError("the first of methods has to be null: updates as they are")
        return self


@dataclass(frozen=True)
class Cell:
    """One run: everything that its result depends on."""

    task: str
    method: str
    seed: int
    dataset: DatasetSettings
    partition: PartitionSettings
    run: RunSettings

    @property
    def name(self) -> str:
        """Fit for a file's name; two cells of one name have the same configuration."""
        return f"{self.task}-{self.run.seed}-{digest_of(self.configuration())}"

    def configuration(self) -> list[Any]:
        """What the result depends on, as plain JSON values."""
        return [part.model_dump(mode="json") for part in (self.dataset, self.partition, self.run)]


def cells(settings: TableSettings) -> Iterator[Cell]:
    """All runs of the table, seed by seed, so that an interrupted table has every method."""
    for seed in range(1, settings.seeds + 1):
        for task, described in settings.tasks.items():
            for method, compression in settings.methods.items():
                run = RunSettings(
                    workload=described.workload,
                    strategy={"name": "fedavg"},
                    training=described.training,
                    privacy=None,
                    compression=_seeded(compression, seed),
                    rounds=described.rounds,
                    seed=seed,
                    metrics=("accuracy", "loss"),
                )
                dataset = with_content(described.dataset.model_copy(update={"seed": seed}))
                yield Cell(task, method, seed, dataset, described.partition, run)


def _seeded(compression: Compression | None, seed: int) -> Compression | None:
    if compression is not None and compression.method == "randk":
        return compression.model_copy(update={"seed": seed})
    return compression
