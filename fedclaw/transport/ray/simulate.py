"""One run on Flower's simulation engine: FedClaw's rounds on this machine, its sites in Ray's actors.

Flower passes a node's message to whichever actor is idle, so nothing of a site may live in an actor. Each simulated
site has its own directory (in `sites/` of the run's directory) with its ledger, log and answers, and a site.yaml that
points to the given site's data. So what a run has cost is in the files, whoever answered, and a run can be resumed. On
a cluster these directories and the data are on a file system that all machines see and that locks files (NFS 4 does).
"""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import yaml
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedclaw.errors import UsageError
from fedclaw.files import write_atomic
from fedclaw.server.round_report import Observer, Outcome
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.waiting import CohortWaiting
from fedclaw.site.settings import SITE_FILE, load_site_settings
from fedclaw.transport.flower.client import client_app
from fedclaw.transport.flower.rounds import run_over
from fedclaw.transport.flower.settings import check
from fedclaw.transport.flower.site_location import SiteLocation
from fedclaw.transport.ray.settings import RaySettings, require_ray

SITES = "sites"
LOOK_AGAIN = 0.02
"""Seconds between two polls for replies, which are in this process's memory."""


def simulate_on_ray(
    directory: RunDirectory,
    sites: Iterable[Path],
    settings: RaySettings | None = None,
    observers: Sequence[Observer] = (),
    waiting: CohortWaiting | None = None,
) -> Outcome:
    """Run or resume the run in `directory` over the sites whose directories are given.

    The given directories are only read. All sites are waited for, if `waiting` says no number. Raises UsageError
    without the extra `ray`, or for a run that Flower's runtimes do not support, and RoundError as `run_rounds` does.
    """
    record = directory.record()
    check(record)
    require_ray()
    locations = tuple(SiteLocation(own_directory(directory.root / SITES, site), record.federation) for site in sites)
    if not locations:
        raise UsageError("there is no site to simulate")
    settings, waiting = settings or RaySettings(), waiting or CohortWaiting()
    waiting = waiting if waiting.wait_for else waiting.model_copy(update={"wait_for": len(locations)})
    settings.prepare()
    # Imports Ray, and Flower's engine with it: not before it is needed.
    from flwr.simulation import run_simulation

    # Flower's own log tells each step of its engine, to whatever handlers there are.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    server_app = ServerApp()
    outcomes: list[Outcome] = []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 (Flower's signature)
        outcomes.append(run_over(grid, directory, waiting, observers, LOOK_AGAIN))

    run_simulation(
        server_app,
        client_app(partial(location_of, locations)),
        len(locations),
        backend_config=settings.backend(),
    )
    return outcomes[0]


def location_of(locations: tuple[SiteLocation, ...], context: Context) -> SiteLocation:
    """The simulated site of a node: Flower numbers its nodes."""
    return locations[int(context.node_config["partition-id"])]


def own_directory(parent: Path, source: Path) -> Path:
    """A directory for one run's ledger and logs of the site at `source`; its site.yaml points to that site's files."""
    settings = load_site_settings(source.resolve())
    root = parent.resolve() / settings.name
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    write_atomic(root / SITE_FILE, text.encode())
    return root
