"""What a run on Flower's runtimes is told, and the directory that it leaves."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedclaw.errors import UsageError
from fedclaw.federation.coordinator import Observer
from fedclaw.federation.run_directory import RunDirectory
from fedclaw.federation.session import make_record
from fedclaw.federation.settings import RunSettings
from fedclaw.federation.sites_settings import SitesSettings
from fedclaw.report.terminal import TerminalProgress
from fedclaw.report.tracking import MlflowTracker, TrackingSettings, make_tracker
from fedclaw.runtime.flower_app.rounds import check


class FlowerSettings(RunSettings):
    """conf/flower_app.yaml, checked."""

    federation: str
    runs: Path
    run: str | None = None
    resume: Path | None = None
    sites: SitesSettings = SitesSettings()
    tracking: TrackingSettings = TrackingSettings()


def open_run(settings: FlowerSettings) -> RunDirectory:
    """The run's directory: one to go on with, or a new one. Raises FedClawError for settings that cannot be run."""
    if settings.resume is not None:
        directory = RunDirectory.open(settings.resume)
        directory.check()
        record = directory.record()
        if record.federation != settings.federation:
            raise UsageError(
                f"{settings.resume} is a run of federation {record.federation!r}, not of {settings.federation!r}"
            )
        return directory
    record = make_record(settings, settings.federation, settings.run, settings.sites.rules())
    check(record)
    return RunDirectory.create(settings.runs / record.run, record)


@contextmanager
def observed(directory: RunDirectory, tracking: TrackingSettings) -> Iterator[list[Observer]]:
    """Who watches the run in `directory`: the terminal, and MLflow if it is asked for, which hears of a failure."""
    progress = TerminalProgress()
    tracker: MlflowTracker | None = None
    try:
        tracker = make_tracker(tracking, directory)
        yield [progress, tracker] if tracker else [progress]
    except BaseException:
        if tracker:
            tracker.failed()
        raise
    finally:
        progress.close()
