"""conf/run.yaml, checked: what `experiments.run` can be told, and what can be wrong with it before torch is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from experiments.attacks.settings import AttackSettings, NoAttack
from experiments.sources import DatasetSettings, count_sites, with_content
from fedclaw.errors import UsageError
from fedclaw.learning.registry import strategy_class
from fedclaw.learning.strategy import Buffered
from fedclaw.protocol.frozen import Frozen, check_settings
from fedclaw.protocol.terms import RoundRules
from fedclaw.report.tracking import TrackingSettings, check_reachable
from fedclaw.server.early_checks import check_terms
from fedclaw.server.settings import RunSettings
from fedclaw.simulation.partitions.settings import PartitionSettings
from fedclaw.simulation.settings import SimulationSettings, refuse_secure
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.ray.settings import RaySettings, require_ray


class SitesRuntime(Frozen):
    """conf/runtime/sites.yaml."""

    name: Literal["sites"] = "sites"


class SimulationRuntime(SimulationSettings):
    """conf/runtime/simulation.yaml."""

    name: Literal["simulation"] = "simulation"
    clients: int | None = Field(default=None, ge=1)
    """None: as many as the data set's sites."""


RuntimeSettings = Annotated[SitesRuntime | SimulationRuntime | RaySettings, Field(discriminator="name")]


class ExperimentSettings(RunSettings):
    """conf/run.yaml, checked."""

    dataset: DatasetSettings
    partition: PartitionSettings
    runtime: RuntimeSettings = SitesRuntime()
    attack: AttackSettings = NoAttack()
    fraction: float = Field(default=1.0, gt=0, le=1)
    runs: Path = Path("runs")
    run: str | None = None
    data: Path | None = None
    """Data of one's own: `dataset.data`."""
    sites: tuple[Path, ...] | None = None
    """Directories of sites, whose data, schema and policy are taken as they are. As a number or a name it is what
    `dataset.sites` or `dataset.site_column` says."""
    resume: Path | None = None
    """The directory of a run to go on with, which has its settings."""
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, plain: Any) -> Any:
        """data= and sites= of the command line, put where they belong."""
        if not isinstance(plain, dict) or not isinstance(plain.get("dataset"), dict):
            return plain
        dataset, sites = dict(plain["dataset"]), plain.get("sites")
        changed: dict[str, Any] = {"data": None}
        if plain.get("data") is not None:
            dataset["data"] = plain["data"]
        if isinstance(sites, int):
            dataset["sites"] = sites
        elif isinstance(sites, str):
            dataset["site_column"] = sites
        if isinstance(sites, int | str):
            changed["sites"] = None
        if dataset.get("site_column") is not None:
            changed["partition"] = {"name": "natural"}
        return {**plain, **changed, "dataset": dataset}


def with_own_data(settings: ExperimentSettings) -> ExperimentSettings:
    """`settings` with what is read of data of one's own: a digest of it, and how many sites its column names.

    The one place where settings look at data: whoever runs or identifies an experiment calls it first. Raises
    UsageError for data that is not there, or has no such column, and DataError for a table that cannot be read.
    """
    dataset = with_content(settings.dataset)
    if dataset.site_column is not None:
        counted = {**dataset.model_dump(), "sites": count_sites(dataset, dataset.site_column)}
        dataset = check_settings(counted, DatasetSettings)
    return settings.model_copy(update={"dataset": dataset})


def check_experiment(settings: ExperimentSettings) -> None:
    """Look at all that can be wrong and that needs no model and no data. Raises UsageError, PluginError."""
    if settings.attack.sites and isinstance(settings.runtime, RaySettings):
        raise UsageError("attack: hostile sites need to know of each other; take runtime=sites or runtime=simulation")
    if isinstance(settings.runtime, RaySettings):
        require_ray()
    if settings.sites is not None:
        _check_directories(settings, settings.sites)
    elif settings.workload.name != settings.dataset.workload:
        wanted = f"dataset={settings.dataset.name} is for workload={settings.dataset.workload}"
        raise UsageError(f"workload={settings.workload.name}: {wanted}; choose another of the two")
    if isinstance(settings.runtime, SimulationRuntime):
        refuse_secure(settings.secure is not None)
    check_terms(settings, settings.run, RoundRules(minimum=fewest(settings), fraction=settings.fraction))
    check_reachable(settings.tracking)


def _check_directories(settings: ExperimentSettings, sites: Sequence[Path]) -> None:
    if not sites:
        raise UsageError("sites= is empty: give directories of sites, or leave it out")
    if isinstance(settings.runtime, SimulationRuntime):
        raise UsageError("sites= are directories, and runtime=simulation deals in memory; take runtime=sites")
    for site in sites:
        if (of := load_site_settings(site).workload) != settings.workload.name:
            raise UsageError(f"{site} is a site of workload={of}, not of workload={settings.workload.name}")


def fewest(settings: ExperimentSettings, simulated_clients: int | None = None) -> int:
    """Answers that make a round: one, or all that are asked for, where a strategy looks at each, or counts them.

    `simulated_clients`: how many were dealt; None: as many as are asked for.
    """
    strategy = strategy_class(str(settings.strategy.get("name")))
    clients = settings.dataset.sites if settings.sites is None else len(settings.sites)
    if isinstance(settings.runtime, SimulationRuntime):
        clients = simulated_clients or settings.runtime.clients or clients
    asked = round(settings.fraction * clients)
    return max(1, asked) if strategy.needs_single_updates or issubclass(strategy, Buffered) else 1
