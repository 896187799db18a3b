"""One experiment, whoever asks for it: deal the data out, train on the runtime that was chosen, track."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from experiments.attacks.federation import simulate_attacked
from experiments.datasets import SitePolicy, names_of, write_sites
from experiments.partitions.dealing import deal_out
from experiments.partitions.record import RECORD, write_record
from experiments.settings import ExperimentSettings, SimulationRuntime, check_experiment, fewest
from experiments.simulated import deal_in_memory, run_simulated, write_root
from experiments.sweeps.identity import EXPERIMENT_FILE, identify
from experiments.sweeps.resume import remember
from fedclaw import startup
from fedclaw.cli import make_console
from fedclaw.files import write_atomic
from fedclaw.learning.tasks.classification import METRICS
from fedclaw.learning.tasks.regression import Regression
from fedclaw.protocol.terms import RoundRules
from fedclaw.report.terminal import TerminalProgress
from fedclaw.report.tracking import make_tracker
from fedclaw.server.round_report import Observer, Outcome
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import make_record
from fedclaw.simulation import simulated
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.in_process import open_sites, simulate
from fedclaw.transport.ray import RaySettings, simulate_on_ray

FEDERATION = "experiments"


def run_experiment(
    settings: ExperimentSettings, *, resume: bool = False, tags: Mapping[str, str] | None = None, quiet: bool = False
) -> Outcome:
    """Deal the data out, train, track. Raises FedClawError.

    With `resume`, a run of that name that was begun goes on where it stopped; `tags` are set on its MLflow run. A
    `quiet` one shows no rounds.
    """
    check_experiment(settings)
    dealt, root = None, cast(Path | None, None)
    if isinstance(settings.runtime, SimulationRuntime):
        dealt = deal_in_memory(settings.dataset, settings.partition, settings.runtime)
        identity = f"{settings.dataset.model_dump_json()} {settings.partition.model_dump_json()} {len(dealt.shares)}"
        root = write_root(dealt, settings.runs, identity)
    else:
        root = _data(settings) if settings.sites is None else None
    directory = _open_run(settings, root, 0 if dealt is None else len(dealt.shares), resume=resume)
    progress = None if quiet else TerminalProgress(make_console())
    kept = [name for name in RECORD if root is not None and (root / name).is_file()]
    for name in kept:
        assert root is not None
        write_atomic(directory.root / name, (root / name).read_bytes())
    tracker = make_tracker(settings.tracking, directory, tags, kept)
    if not (directory.root / EXPERIMENT_FILE).is_file():
        made = identify(settings.model_dump(mode="json"))
        write_atomic(directory.root / EXPERIMENT_FILE, made.model_dump_json(indent=2).encode())
    startup.next_step(f"continue with resume={directory.root}")
    observers: list[Observer] = [observer for observer in (progress, tracker) if observer]
    try:
        if dealt is not None and isinstance(settings.runtime, SimulationRuntime):
            return run_simulated(directory, dealt, settings.runtime, observers, settings.attack)
        directories = list(settings.sites or ()) if root is None else sorted((root / "sites").iterdir())
        if isinstance(settings.runtime, RaySettings):
            return simulate_on_ray(directory, directories, settings.runtime, observers)
        sites = open_sites(directories, FEDERATION)
        remember(sites, directory)
        if settings.attack.sites:
            return simulate_attacked(directory, sites, settings.attack, observers)
        return simulate(directory, sites, observers)
    except BaseException as error:
        if tracker:
            tracker.failed(error)
        raise
    finally:
        if progress:
            progress.close()


def _open_run(settings: ExperimentSettings, root: Path | None, simulated_clients: int, *, resume: bool) -> RunDirectory:
    """A new run's directory, or that of the run of that name. `simulated_clients`: 0 with sites."""
    if resume and settings.run and (settings.runs / settings.run / "run.json").is_file():
        directory = RunDirectory.open(settings.runs / settings.run)
        directory.check()
        return directory
    schema = _agreed(settings) if root is None else root / "schema.yaml"
    choice = settings.workload.model_copy(update={"schema_file": schema})
    rules = RoundRules(minimum=fewest(settings, simulated_clients), fraction=settings.fraction)
    record = make_record(settings.model_copy(update={"workload": choice}), FEDERATION, settings.run, rules)
    if isinstance(settings.runtime, SimulationRuntime):
        record = simulated(record, settings.runtime, simulated_clients)
    return RunDirectory.create(settings.runs / record.run, record)


def _agreed(settings: ExperimentSettings) -> Path:
    """The schema file of site directories: what the command names, or the first site's."""
    assert settings.sites
    return settings.workload.schema_file or load_site_settings(settings.sites[0]).schema_file


def _data(settings: ExperimentSettings) -> Path:
    """The sites' directories, and what was dealt to them, for these settings: written once, found again by name."""
    delta = max([asked.delta for asked in (settings.privacy, settings.central) if asked], default=1e-5)
    metrics = Regression.METRICS if settings.dataset.is_of_numbers else METRICS
    policy = SitePolicy(
        epsilon=None, delta=delta, allow_training_without_privacy=True, minimum_cohort=1, metrics=metrics
    )
    identity = hashlib.sha256(
        f"{settings.dataset.model_dump_json()} {settings.partition.model_dump_json()} {policy}".encode()
    ).hexdigest()[:12]
    root = settings.runs / "data" / f"{settings.dataset.name}-{identity}"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as draft:
            write_sites(Path(draft) / "sites", settings.dataset, policy, settings.partition)
            dealt = deal_out(settings.dataset, settings.partition)
            write_record(dealt.describe(names_of(dealt.source, settings.dataset.sites)), Path(draft) / "sites")
            _place(Path(draft) / "sites", root)
    return root


def _place(draft: Path, root: Path) -> None:
    """Rename `draft` to `root`, unless another process of a sweep has meanwhile written the same there."""
    try:
        draft.rename(root)
    except OSError:
        if not root.is_dir():
            raise
