"""The aggregation server: waits for its sites, runs rounds, leaves a model and what it cost.

    python -m fedclaw.server federation=DIR workload.schema_file=schema.yaml rounds=10 privacy.epsilon=4
    python -m fedclaw.server federation=DIR resume=runs/NAME              go on with a run that was interrupted
                             (sites.new_cohort=true when a site that its last round asked will not come back)
    python -m fedclaw.server ... encryption.key=file:run.key   keep checkpoints and model encrypted (docs/encryption.md)
    python -m fedclaw.server federation=DIR app=package.module:app        run a plain Flower ServerApp instead

Groups: workload=tabular|vision  strategy=fedavg|fedavgm|fedprox|fedadagrad|fedadam|fedyogi  privacy=dp|none
        tracking=sqlite|none     (conf/ holds every setting with its default and what it means)
Examples:
    python -m fedclaw.server federation=DIR workload=vision workload.schema_file=digits.yaml strategy=fedadam
    python -m fedclaw.server federation=DIR workload.schema_file=schema.yaml sites.minimum=3 sites.deadline=120
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.server", __doc__, plugins=True)

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from fedclaw import startup
from fedclaw.cli import make_console, naming, run_main, settings_of
from fedclaw.errors import UsageError
from fedclaw.identity.data_keys import EncryptionSettings
from fedclaw.identity.federation_home import FederationHome
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.report.late import late_notes
from fedclaw.report.tracking import MlflowTracker, TrackingSettings, check_reachable, make_tracker
from fedclaw.server.early_checks import check_early, run_name
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.settings import ListenAddress, RunSettings
from fedclaw.server.waiting import SitesSettings, wait_for_cohort
from fedclaw.transport.grpc.limits import Limits

if TYPE_CHECKING:
    from fedclaw.report.terminal import TerminalProgress

log = logging.getLogger("fedclaw.server")

_LIBRARIES = "torch and Flower"

WITH_RESUME = (
    "federation",
    "resume",
    "address",
    "runs",
    "tracking",
    "limits",
    "encryption",
    "sites.wait",
    "sites.new_cohort",
)
"""Settings that a resumed run may be given; everything else is what the run was begun with."""


class ServerSettings(RunSettings):
    """conf/server.yaml, checked."""

    federation: Path
    address: ListenAddress | None = None
    app: str | None = None
    runs: Path = Path("runs")
    run: str | None = None
    run_config: dict[str, str | int | float | bool] = {}
    resume: Path | None = None
    limits: Limits = Limits()
    encryption: EncryptionSettings = EncryptionSettings()
    sites: SitesSettings = SitesSettings()
    tracking: TrackingSettings = TrackingSettings()


def main(arguments: Sequence[str]) -> None:
    """Run the server as the command line says."""
    settings = settings_of(arguments, "server", ServerSettings)
    with naming(federation=settings.federation):
        home = FederationHome.open(settings.federation)
    if settings.app is not None:
        serve_app(settings, home, settings.app)
        return
    if settings.resume is not None:
        directory = RunDirectory.open(settings.resume, settings.encryption.keyring())
        directory.check()
        _only_resume_settings(arguments)
        record = directory.record()
    else:
        record, directory = new_run(settings, home)
    coordinate(settings, home, record, directory)


def new_run(settings: ServerSettings, home: FederationHome) -> tuple[RunRecord, RunDirectory]:
    """The record of a run that is to begin, and the directory that it will have. Raises FedClawError.

    All that can be wrong without a model is told before torch is loaded.
    """
    rules, name = settings.sites.rules(), run_name(settings.run)
    check_early(settings, name, rules)
    directory = RunDirectory(settings.runs / name, settings.encryption.keyring())
    directory.require_new()
    check_reachable(settings.tracking)
    with startup.loading(_LIBRARIES):
        from fedclaw.server.session import make_record
    return make_record(settings, home.name, name, rules), directory


def coordinate(settings: ServerSettings, home: FederationHome, record: RunRecord, directory: RunDirectory) -> None:
    """Listen, begin or take up the run in `directory`, wait for the cohort, and run the rounds that are left."""
    from fedclaw.report.terminal import TerminalProgress, receipt_table

    if record.distillation is not None:
        raise UsageError(f"{directory.root} is a compression's recovery; begin the same fedclaw.compress command again")
    if record.federation != home.name:
        raise UsageError(f"{directory.root} is a run of federation {record.federation!r}, not of {home.name!r}")
    progress = TerminalProgress(make_console())
    if directory.model_path.is_file():
        progress.console.print(f"run {record.run} is finished: {directory.model_path}", markup=False)
        progress.console.print(receipt_table(directory.read_receipts()))
        _say_who_is_behind(directory, record, progress)
        return
    with startup.loading(_LIBRARIES):
        from fedclaw.protocol.message_identity import number_of
        from fedclaw.server.coordinator import run_rounds
        from fedclaw.server.round_report import Observer
        from fedclaw.server.session import initial_parameters
        from fedclaw.transport.grpc.grid import GrpcGrid
    tracker: MlflowTracker | None = None
    try:
        with ExitStack() as run:
            if settings.resume is not None:
                run.enter_context(directory.held())
            run_id = number_of(record.run)
            grid = run.enter_context(GrpcGrid(home, address=settings.address, run_id=run_id, limits=settings.limits))
            tracker = make_tracker(settings.tracking, directory)
            # Not before: a server that cannot start leaves no run behind.
            if settings.resume is None:
                RunDirectory.create(directory.root, record)
                run.enter_context(directory.held())
            startup.next_step(f"continue with resume={directory.root}")
            log.info("listening on %s", settings.address or home.descriptor.address)
            wait_for_cohort(grid, directory, settings.sites)
            observers: list[Observer] = [progress, tracker] if tracker else [progress]
            run_rounds(grid, directory, initial_parameters(record), observers=observers)
            _say_who_is_behind(directory, record, progress)
    except BaseException as error:
        if tracker:
            tracker.failed(error)
        raise
    finally:
        progress.close()


def _say_who_is_behind(directory: RunDirectory, record: RunRecord, progress: "TerminalProgress") -> None:
    for note in late_notes(directory.read_metrics()) if mechanism_of(record).claims_privacy else ():
        progress.console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=False)


def serve_app(settings: ServerSettings, home: FederationHome, app: str) -> None:
    """Run a Flower ServerApp that knows nothing of FedClaw over FedClaw's wires."""
    with startup.loading("Flower"):
        from flwr.serverapp import ServerApp

        from fedclaw.protocol.message_identity import number_of
        from fedclaw.transport.grpc.apps import load_app, run_server_app
        from fedclaw.transport.grpc.grid import GrpcGrid
    server_app = load_app(app, ServerApp)
    run_id = number_of(f"{home.name}/{app}")
    with GrpcGrid(home, address=settings.address, run_id=run_id, limits=settings.limits) as grid:
        grid.wait_for_sites(settings.sites.wait_for or settings.sites.minimum, settings.sites.wait)
        run_server_app(server_app, grid, {"num-server-rounds": settings.rounds, **settings.run_config})


def _only_resume_settings(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in WITH_RESUME):
            raise UsageError(f"{key} cannot be changed on resume: a run goes on with what it was begun with")


if __name__ == "__main__":
    run_main("fedclaw.server", __doc__ or "", main)
