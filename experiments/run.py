"""One experiment, or a sweep, in process: the code of the server and of the sites, without the wires.

    python -m experiments.run strategy=fedprox privacy.epsilon=4
    python -m experiments.run -m strategy=fedavg,fedadam privacy.epsilon=2,8
    python -m experiments.run +experiment=digits_dp rounds=40

Every run leaves a directory under runs/ and an MLflow run (mlflow ui --backend-store-uri sqlite:///runs/mlflow.db).
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from experiments.datasets import SitePolicy, write_sites
from experiments.partitions.settings import PartitionSettings
from experiments.sources import DatasetSettings
from fedclaw.cli import config_directory, report_failure, start_logging
from fedclaw.federation.coordinator import Observer, Outcome
from fedclaw.federation.plan import METRICS
from fedclaw.federation.run_directory import RoundRules, RunDirectory
from fedclaw.federation.session import make_record
from fedclaw.federation.settings import RunSettings
from fedclaw.frozen import check_settings
from fedclaw.report.console import make_console
from fedclaw.report.terminal import TerminalProgress
from fedclaw.report.tracking import TrackingSettings, make_tracker
from fedclaw.site.in_process import open_sites, simulate

FEDERATION = "experiments"


class ExperimentSettings(RunSettings):
    """conf/run.yaml, checked."""

    dataset: DatasetSettings
    partition: PartitionSettings
    fraction: float = Field(default=1.0, gt=0, le=1)
    runs: Path = Path("runs")
    run: str | None = None
    tracking: TrackingSettings = TrackingSettings()


def run_experiment(settings: ExperimentSettings) -> Outcome:
    """Deal the data out, train, track. Raises FedClawError."""
    root = _data(settings)
    choice = settings.workload.model_copy(update={"schema_file": root / "schema.yaml"})
    rules = RoundRules(minimum=1, fraction=settings.fraction)
    record = make_record(settings.model_copy(update={"workload": choice}), FEDERATION, settings.run, rules)
    directory = RunDirectory.create(settings.runs / record.run, record)
    progress = TerminalProgress()
    tracker = make_tracker(settings.tracking, directory)
    observers: list[Observer] = [progress, tracker] if tracker else [progress]
    try:
        return simulate(directory, open_sites(sorted((root / "sites").iterdir()), FEDERATION), observers)
    except BaseException:
        if tracker:
            tracker.failed()
        raise
    finally:
        progress.close()


def _data(settings: ExperimentSettings) -> Path:
    """The sites' directories for these settings, written once and found again by name."""
    delta = settings.privacy.delta if settings.privacy else 1e-5
    policy = SitePolicy(
        epsilon=None, delta=delta, allow_training_without_privacy=True, minimum_cohort=1, metrics=METRICS
    )
    identity = hashlib.sha256(
        f"{settings.dataset.model_dump_json()} {settings.partition.model_dump_json()} {policy}".encode()
    ).hexdigest()[:12]
    root = settings.runs / "data" / f"{settings.dataset.name}-{identity}"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as draft:
            write_sites(Path(draft) / "sites", settings.dataset, policy, settings.partition)
            (Path(draft) / "sites").rename(root)
    return root


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="run")
def main(config: DictConfig) -> float:
    """Hydra's entry: the last accuracy is the objective that a sweeper maximises."""
    console = make_console(stderr=True)
    start_logging(console)
    try:
        settings = check_settings(OmegaConf.to_container(config, resolve=True), ExperimentSettings)
        return run_experiment(settings).metrics.get("accuracy", 0.0)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report_failure("experiments.run", error, console))


if __name__ == "__main__":
    main()
