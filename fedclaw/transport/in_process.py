"""Runs the real server loop and the real site code in one process."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedclaw.privacy.secure_aggregation import Sessions, local_identities
from fedclaw.protocol.message_identity import assume_server_identity, number_of
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.round_report import Observer, Outcome
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.site.directory import open_service
from fedclaw.site.secure import SecureIdentity
from fedclaw.site.service import SiteService
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.base import SiteHandler
from fedclaw.transport.local import LocalGrid


def open_sites(directories: Iterable[Path], federation: str) -> dict[str, SiteService]:
    """The sites in `directories` by name, each with an empty ledger in memory and its own certificate.

    The sites' informational log is silenced, because all of them share one terminal.
    """
    logging.getLogger("fedclaw.site").setLevel(logging.WARNING)
    services = {}
    for directory in directories:
        settings = load_site_settings(directory)
        services[settings.name] = open_service(directory, settings, federation, durable=False)
    identities, verifier = local_identities(federation, sorted(services))
    for name, service in services.items():
        service.secure = SecureIdentity(identities[name], verifier, Sessions())
    return services


def local_grid(sites: Mapping[str, SiteHandler], run: str) -> LocalGrid:
    """A grid over `sites` for the run of that name. From now on this process is the run's server.

    It trusts the authority that `open_sites` created, as a server trusts its federation's.
    """
    run_id = number_of(run)
    assume_server_identity(run_id)
    identities = (getattr(site, "secure", None) for site in sites.values())
    verifier = next((known.verifier for known in identities if known is not None), None)
    return LocalGrid(sites, run_id, verifier)


def simulate(directory: RunDirectory, sites: Mapping[str, SiteHandler], observers: Sequence[Observer] = ()) -> Outcome:
    """Run the rounds of `directory` over `sites`."""
    record = directory.record()
    return run_rounds(local_grid(sites, record.run), directory, initial_parameters(record), observers=observers)
