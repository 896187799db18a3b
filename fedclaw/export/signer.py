"""Who may sign a run's model."""

from pathlib import Path

from fedclaw.errors import BundleError
from fedclaw.identity.federation_home import FederationHome
from fedclaw.server.run_directory import RunRecord


def signing_home(record: RunRecord, federation: Path) -> FederationHome:
    """The coordinator's directory whose release key signs a model of this run.

    A run of sites is signed by its own federation; a simulation belongs to none, and whoever signs stands behind it.
    Raises ProvisionError for a directory that is no coordinator's, BundleError for that of another federation.
    """
    home = FederationHome.open(federation)
    if record.simulated is None and home.name != record.federation:
        raise BundleError(
            f"{record.run} is a run of the federation {record.federation!r}, but {federation} holds the keys of "
            f"{home.name!r}"
        )
    return home
