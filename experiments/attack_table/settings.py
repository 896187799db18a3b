"""conf/attack_table.yaml, checked, and the cells of the table that it describes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, JsonValue, model_validator

from experiments.attacks.settings import AttackSettings, NoAttack
from experiments.sources import DatasetSettings, with_content
from experiments.sweeps.identity import digest_of
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import LocalTraining
from fedclaw.server.settings import WorkloadChoice
from fedclaw.simulation.partitions.settings import PartitionSettings


class TableSettings(Frozen):
    """conf/attack_table.yaml."""

    output: Path
    """Where robust.md, robust.png and robust.json go."""
    runs: Path
    """Where finished cells are kept."""
    workers: int = Field(ge=1)
    seeds: int = Field(ge=1)
    """Seeds 1 .. N."""
    dataset: DatasetSettings
    partition: PartitionSettings
    workload: WorkloadChoice
    rounds: int = Field(ge=1)
    training: LocalTraining
    hostile: tuple[int, ...] = Field(min_length=1)
    """How many of the sites attack, one column each."""
    strategies: dict[str, dict[str, JsonValue]] = Field(min_length=1)
    """By name, the settings that it runs with, whoever attacks."""
    attacks: dict[str, AttackSettings] = Field(min_length=1)
    """By what the table calls them; `sites` is set from `hostile`."""

    @model_validator(mode="after")
    def _few_enough(self) -> Self:
        if wrong := [number for number in self.hostile if not 1 <= number < self.dataset.sites]:
            raise ValueError(f"hostile: {wrong[0]} of {self.dataset.sites} sites cannot be hostile here")
        return self


class Cell(Frozen):
    """One run of the table: everything that its result depends on."""

    dataset: DatasetSettings
    partition: PartitionSettings
    workload: WorkloadChoice
    rounds: int
    training: LocalTraining
    strategy: str
    strategy_settings: dict[str, JsonValue]
    attack: AttackSettings
    seed: int

    @property
    def label(self) -> str:
        """The cell in a few words, fit for a file's name."""
        return f"{self.attack.name}-{self.attack.sites}-{self.strategy}-seed-{self.seed}"

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that tell it from any other."""
        return digest_of(self.configuration())

    def configuration(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return self.model_dump(mode="json")


def attacks(settings: TableSettings) -> Iterator[tuple[str, AttackSettings]]:
    """The table's columns by the attack's name there: first nobody's, then each attack by each number of sites."""
    yield "none", NoAttack()
    for name, attack in settings.attacks.items():
        for number in settings.hostile:
            yield name, attack.model_copy(update={"sites": number})


def cells(settings: TableSettings, seed: int) -> Iterator[Cell]:
    """All cells of one seed."""
    for _, attack in attacks(settings):
        for strategy in settings.strategies:
            yield make_cell(settings, strategy, attack, seed)


def make_cell(settings: TableSettings, strategy: str, attack: AttackSettings, seed: int) -> Cell:
    """One cell."""
    return Cell(
        dataset=with_content(settings.dataset.model_copy(update={"seed": seed})),
        partition=settings.partition,
        workload=settings.workload,
        rounds=settings.rounds,
        training=settings.training,
        strategy=strategy,
        strategy_settings=settings.strategies[strategy],
        attack=attack,
        seed=seed,
    )
