"""conf/heart_disease.yaml, checked, and the cells of the tables that it describes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue

from experiments.heart_disease.sites import Standardise
from fedclaw.errors import UsageError
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import LocalTraining, SecureRequest, Weighting

Who = Literal["federation", "pooled", "each", "first"]
"""Who trains: the hospitals together; one site with everybody's rows; each hospital by itself, tested on its own rows;
the first hospital by itself, tested on all."""

Placement = Literal["distributed", "local"]
"""Who adds the noise: all hospitals together, in shares, in a secure sum; or each one all that it needs by itself."""

QUICK_STEPS, QUICK_ROUNDS = 20, 2


class Method(Frozen):
    """How one row of the tables without privacy trains."""

    who: Who = "federation"
    strategy: dict[str, JsonValue] = {"name": "fedavg"}
    rounds: int = Field(default=1, ge=1)
    training: LocalTraining
    weighting: Weighting = "examples"


class StatisticsSettings(Frozen):
    """The release of statistics that shared standardisation comes from."""

    epsilon: float = Field(gt=0)
    """Of a release for a run without privacy."""
    share: float = Field(gt=0, lt=1)
    """Of a release for a private run: its epsilon is this share of the whole budget's."""
    delta: float = Field(gt=0, lt=1)


class PrivateMethod(Frozen):
    """How one row of the private table trains: gradient steps, one a round, each example's gradient clipped."""

    rounds: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    clip: float = Field(gt=0)
    """L2 bound of an example's gradient."""
    sample_rate: float = Field(default=1.0, gt=0, le=1)
    """Rate at which a step samples examples; with local noise always 1."""


class PrivateSettings(Frozen):
    """The table with differential privacy."""

    epsilons: tuple[float, ...] = Field(min_length=1)
    delta: float = Field(gt=0, lt=1)
    methods: dict[Placement, PrivateMethod] = Field(min_length=1)


class RecipeSearch(Frozen):
    """Cross-validation inside the hospitals' training rows: every strategy, learning rate and weighting with each."""

    folds: int = Field(ge=2)
    repeats: int = Field(ge=1)
    """How often the rows are dealt into folds; each fold of each has another initial model."""
    rounds: int = Field(ge=1)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    strategies: dict[str, dict[str, JsonValue]]
    learning_rates: tuple[float, ...]
    weightings: tuple[Weighting, ...]

    def candidates(self) -> dict[str, Method]:
        """By a name in words."""
        return {
            f"{name}, learning rate {rate:g}, weighting {weighting}": Method(
                strategy=strategy,
                rounds=self.rounds,
                training=LocalTraining(steps=self.steps, batch_size=self.batch_size, learning_rate=rate),
                weighting=weighting,
            )
            for name, strategy in self.strategies.items()
            for rate in self.learning_rates
            for weighting in self.weightings
        }


class PrivateSearch(Frozen):
    """Private runs over made-up hospitals: every number of rounds and learning rate with each."""

    epsilon: float = Field(gt=0)
    seeds: tuple[int, ...] = Field(min_length=1)
    """Each makes up other hospitals."""
    rounds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    clip: float = Field(gt=0)

    def candidates(self) -> dict[str, PrivateMethod]:
        """By a name in words."""
        return {
            f"{rounds} rounds, learning rate {rate:g}": PrivateMethod(rounds=rounds, learning_rate=rate, clip=self.clip)
            for rounds in self.rounds
            for rate in self.learning_rates
        }


class SearchSettings(Frozen):
    """Where settings were looked for, without any test row of a hospital."""

    recipe: RecipeSearch
    private: PrivateSearch


class HeartSettings(Frozen):
    """conf/heart_disease.yaml."""

    data: Path
    """The directory of the four files."""
    output: Path
    """Where heart_disease.json, heart_disease.md and heart_disease.png go."""
    verify: bool
    """Whether the files must be those of the published figures."""
    quick: bool
    """One seed, and a few steps of everything: to see that it runs."""
    rows: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Rows to run, each as TABLE or TABLE.NAME (published.fedavg, private.local); null: all."""
    workers: int = Field(ge=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    secure: SecureRequest
    statistics: StatisticsSettings
    published: dict[str, Method]
    """The rows of the published table, each hospital standardised by itself."""
    shared: dict[str, Method]
    """Rows with one standardisation for all."""
    private: PrivateSettings | None
    search: SearchSettings


@dataclass(frozen=True)
class Budget:
    """What a private row may cost each hospital, statistics included, and how it spends it."""

    placement: Placement
    method: PrivateMethod
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Cell:
    """One run of a table: everything but the data that its result depends on."""

    table: Literal["published", "shared", "private"]
    name: str
    seed: int
    standardise: Standardise
    method: Method
    statistics: StatisticsSettings
    secure: SecureRequest
    budget: Budget | None = None

    @property
    def label(self) -> str:
        """The cell in a few words."""
        return f"{self.table} {self.name}, seed {self.seed}"


def cells(settings: HeartSettings) -> Iterator[Cell]:
    """Every run of the rows that are wanted, row by row. Raises UsageError for a row that there is not."""
    rows = list(_rows(quickened(settings) if settings.quick else settings))
    for wanted in settings.rows or ():
        if not any(wanted in _called(row) for row in rows):
            names = dict.fromkeys(name for row in rows for name in _called(row))
            raise UsageError(f"rows={wanted!r}: there is no such row; there are {', '.join(names)}")
    for row in rows:
        if settings.rows is None or any(name in settings.rows for name in _called(row)):
            for seed in settings.seeds[:1] if settings.quick else settings.seeds:
                yield replace(row, seed=seed)


def _called(row: Cell) -> tuple[str, ...]:
    """What a row may be called in `rows`."""
    placement = row.budget.placement if row.budget else row.name
    return row.table, f"{row.table}.{placement}", f"{row.table}.{row.name}"


def quickened(settings: HeartSettings) -> HeartSettings:
    """The same rows with a few steps of everything."""

    def short(methods: Mapping[str, Method]) -> dict[str, Method]:
        return {name: _shortened(method) for name, method in methods.items()}

    private = settings.private
    if private is not None:
        few = {name: one.model_copy(update={"rounds": min(one.rounds, 2)}) for name, one in private.methods.items()}
        private = private.model_copy(update={"methods": few})
    return settings.model_copy(
        update={"published": short(settings.published), "shared": short(settings.shared), "private": private}
    )


def _shortened(method: Method) -> Method:
    training = method.training
    changed = {"epochs": 1.0} if training.steps is None else {"steps": min(training.steps, QUICK_STEPS)}
    rounds = min(method.rounds, QUICK_ROUNDS)
    return method.model_copy(update={"rounds": rounds, "training": training.model_copy(update=changed)})


def private_name(placement: Placement, epsilon: float) -> str:
    """The row's name in the private table."""
    return f"{placement} {epsilon:g}"


def private_cell(settings: HeartSettings, placement: Placement, method: PrivateMethod, epsilon: float) -> Cell:
    """A private run with the first seed."""
    assert settings.private is not None
    return Cell(
        table="private",
        name=private_name(placement, epsilon),
        seed=settings.seeds[0],
        standardise="federated",
        method=_one_step(method),
        statistics=settings.statistics,
        secure=settings.secure,
        budget=Budget(placement, method, epsilon, settings.private.delta),
    )


def plain_cell(settings: HeartSettings, table: Literal["published", "shared"], name: str, method: Method) -> Cell:
    """A run without privacy with the first seed."""
    return Cell(
        table=table,
        name=name,
        seed=settings.seeds[0],
        standardise="site" if table == "published" else "federated",
        method=method,
        statistics=settings.statistics,
        secure=settings.secure,
    )


def _rows(settings: HeartSettings) -> Iterator[Cell]:
    tables: Mapping[Literal["published", "shared"], Mapping[str, Method]] = {
        "published": settings.published,
        "shared": settings.shared,
    }
    for table, methods in tables.items():
        for name, method in methods.items():
            yield plain_cell(settings, table, name, method)
    if settings.private is not None:
        for placement, private in settings.private.methods.items():
            for epsilon in settings.private.epsilons:
                yield private_cell(settings, placement, private, epsilon)


def _one_step(method: PrivateMethod) -> Method:
    training = LocalTraining(steps=1, batch_size=1, learning_rate=method.learning_rate)
    return Method(rounds=method.rounds, training=training)
