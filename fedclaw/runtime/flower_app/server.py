"""FedClaw's aggregation server as a Flower ServerApp: `flwr run` submits it to a stock SuperLink.

The run's configuration holds the settings that `python -m fedclaw.server` takes on its command line, each under its
own name ("" leaves one at its default); what TOML cannot say stands in `settings`, as on a command line:

    [tool.flwr.app.config]
    federation = "clinic"
    runs = "/srv/fedclaw/runs"
    rounds = 10
    strategy = "fedprox"
    workload.schema_file = "/srv/fedclaw/schema.yaml"
    settings = "strategy.mu=0.1 privacy.delta=1e-6"

    flwr run . --run-config 'rounds=20'
    flwr run . --run-config 'resume="/srv/fedclaw/runs/NAME"'       go on with a run that was interrupted

The app runs on the SuperLink's machine, in whatever directory Flower gives it, so paths are absolute. What is lost
beside FedClaw's own server: mutual TLS, the seal on the updates, and secure aggregation (which is refused).
"""

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, UserConfigValue
from flwr.serverapp import Grid, ServerApp
from pydantic import Field

from fedclaw.cli import compose_settings, start_logging
from fedclaw.errors import FedClawError, UsageError
from fedclaw.federation.coordinator import Observer
from fedclaw.federation.run_directory import RoundRules, RunDirectory
from fedclaw.federation.session import make_record
from fedclaw.federation.settings import RunSettings
from fedclaw.report.console import make_console
from fedclaw.report.terminal import TerminalProgress
from fedclaw.report.tracking import MlflowTracker, TrackingSettings, make_tracker
from fedclaw.runtime.flower_app.rounds import Waiting, check, run_over

log = logging.getLogger(__name__)

SETTINGS = "settings"
"""The key of the run's configuration that holds further settings, as a command line has them."""

app = ServerApp()


class SitesSettings(RoundRules):
    """conf/flower_app.yaml: sites."""

    wait_for: int | None = Field(default=None, ge=1)
    wait: float = Field(default=600, gt=0)
    new_cohort: bool = False


class FlowerSettings(RunSettings):
    """conf/flower_app.yaml, checked."""

    federation: str
    runs: Path
    run: str | None = None
    resume: Path | None = None
    sites: SitesSettings = SitesSettings()
    tracking: TrackingSettings = TrackingSettings()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run's configuration describes. Raises FedClawError; Flower then ends the run."""
    start_logging(make_console(stderr=True))
    try:
        settings = read_settings(context.run_config)
        coordinate(grid, settings, _directory(settings))
    except FedClawError as error:
        log.error("%s", error)
        raise


def read_settings(run_config: Mapping[str, UserConfigValue]) -> FlowerSettings:
    """The settings that a run's configuration holds. Raises UsageError."""
    try:
        further = shlex.split(str(run_config.get(SETTINGS, "")))
    except ValueError as error:
        raise UsageError(f"{SETTINGS} cannot be read as a command line: {error}") from error
    overrides = [f"{key}={_word(value)}" for key, value in run_config.items() if key != SETTINGS and value != ""]
    settings = compose_settings("flower_app", [*overrides, *further], FlowerSettings)
    paths = {
        "runs": settings.runs,
        "resume": settings.resume,
        "workload.schema_file": settings.workload.schema_file,
        "statistics": settings.statistics,
    }
    for name, path in paths.items():
        if path is not None and not path.is_absolute():
            raise UsageError(f"{name}={path} is not absolute: Flower runs the app in a directory of its own")
    return settings


def coordinate(grid: Grid, settings: FlowerSettings, directory: RunDirectory) -> None:
    """Wait for the sites, then run the rounds that are left, watched and tracked."""
    sites = settings.sites
    progress = TerminalProgress()
    tracker: MlflowTracker | None = None
    try:
        tracker = make_tracker(settings.tracking, directory)
        observers: list[Observer] = [progress, tracker] if tracker else [progress]
        run_over(grid, directory, Waiting(sites.wait_for, sites.wait, sites.new_cohort), observers)
    except BaseException:
        if tracker:
            tracker.failed()
        raise
    finally:
        progress.close()


def _directory(settings: FlowerSettings) -> RunDirectory:
    """The run's directory: one to go on with, or a new one."""
    if settings.resume is not None:
        directory = RunDirectory.open(settings.resume)
        directory.check()
        record = directory.record()
        if record.federation != settings.federation:
            raise UsageError(
                f"{settings.resume} is a run of federation {record.federation!r}, not of {settings.federation!r}"
            )
        return directory
    if settings.sites.new_cohort:
        raise UsageError("sites.new_cohort=true goes with resume=: a new run has no round in flight")
    rules = RoundRules(**settings.sites.model_dump(include=set(RoundRules.model_fields)))
    record = make_record(settings, settings.federation, settings.run, rules)
    check(record)
    return RunDirectory.create(settings.runs / record.run, record)


def _word(value: UserConfigValue) -> str:
    """A value of the run's configuration in the grammar of an override."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)
