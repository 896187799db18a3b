"""Settings of a run on Flower's runtimes, and its directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedclaw import startup
from fedclaw.errors import UsageError
from fedclaw.identity.data_keys import EncryptionSettings
from fedclaw.report.tracking import MlflowTracker, TrackingSettings, check_reachable, make_tracker
from fedclaw.server.early_checks import check_early
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.settings import RunSettings
from fedclaw.server.waiting import SitesSettings

if TYPE_CHECKING:
    from fedclaw.server.round_report import Observer


class FlowerSettings(RunSettings):
    """conf/flower_app.yaml, checked."""

    federation: str
    runs: Path
    run: str | None = None
    resume: Path | None = None
    sites: SitesSettings = SitesSettings()
    tracking: TrackingSettings = TrackingSettings()
    encryption: EncryptionSettings = EncryptionSettings()


def open_run(settings: FlowerSettings) -> RunDirectory:
    """The run's directory: a new one, or the one to resume. Raises FedClawError for settings that cannot be run."""
    keys = settings.encryption.keyring()
    if settings.resume is not None:
        directory = RunDirectory.open(settings.resume, keys)
        directory.check()
        record = directory.record()
        if record.federation != settings.federation:
            raise UsageError(
                f"{settings.resume} is a run of federation {record.federation!r}, not of {settings.federation!r}"
            )
        return directory
    _refuse_secure(settings.secure is not None)
    check_early(settings, settings.run, settings.sites.rules())
    check_reachable(settings.tracking)
    with startup.loading("torch and Flower"):
        from fedclaw.server.session import make_record
    record = make_record(settings, settings.federation, settings.run, settings.sites.rules())
    check(record)
    return RunDirectory.create(settings.runs / record.run, record, keys)


def check(record: RunRecord) -> None:
    """Raises UsageError for a run that Flower's runtimes do not support."""
    _refuse_secure(record.secure is not None)
    if record.distillation is not None:
        raise UsageError("a recovery with a teacher belongs to python -m fedclaw.compress")


def _refuse_secure(secure: bool) -> None:
    if secure:
        raise UsageError(
            "secure aggregation keeps a round's keys in the site's memory from one message to the next, and on "
            "Flower's runtimes the next message may meet another process; run it with python -m fedclaw.server"
        )


@contextmanager
def observed(directory: RunDirectory, tracking: TrackingSettings) -> Iterator["list[Observer]"]:
    """The observers of the run in `directory`: the terminal and, if configured, MLflow, which records a failure."""
    from fedclaw.cli import make_console
    from fedclaw.report.terminal import TerminalProgress

    startup.next_step(f"continue with resume={directory.root}")
    progress = TerminalProgress(make_console())
    tracker: MlflowTracker | None = None
    try:
        tracker = make_tracker(tracking, directory)
        yield [progress, tracker] if tracker else [progress]
    except BaseException as error:
        if tracker:
            tracker.failed(error)
        raise
    finally:
        progress.close()
