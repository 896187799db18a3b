"""Runs the real server loop and the real site code in one process: `LocalGrid` calls the handlers directly."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Message
from flwr.supercore.run import Run

from fedclaw.errors import TransportError
from fedclaw.privacy.secure_aggregation import Sessions, local_identities
from fedclaw.protocol.message_identity import assign_message_id, assume_server_identity, empty_run, number_of
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.grids import StreamingGrid
from fedclaw.server.round_report import Observer, Outcome
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.site.directory import open_service
from fedclaw.site.secure import SecureIdentity
from fedclaw.site.service import SiteService
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.base import SiteHandler, measure

if TYPE_CHECKING:
    from fedclaw.privacy.secure_aggregation import Verifier


class LocalGrid(StreamingGrid):
    """A Grid over `sites`, by name. Each reply is computed when it is read, one at a time.

    Nothing is copied: a handler gets the very arrays that the server packed, and must not write to them (the views
    that `fedclaw.protocol.arrays.unpack` returns are read-only).
    """

    def __init__(self, sites: Mapping[str, SiteHandler], run_id: int, verifier: "Verifier | None" = None) -> None:
        """`verifier` checks the sites' signatures, if an authority has certified the sites."""
        self._verifier = verifier
        self._sites = {number_of(name): (name, handler) for name, handler in sites.items()}
        self._run = empty_run(run_id)
        self._pushed: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set Flower's run record."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's run record."""
        return self._run

    @property
    def verifier(self) -> "Verifier | None":
        """Checks the sites' signatures."""
        return self._verifier

    def get_node_ids(self) -> Iterable[int]:
        """All sites; they are always connected."""
        return list(self._sites)

    def site_name(self, node_id: int) -> str:
        """The site's name. Raises TransportError for an unknown node."""
        return self._site(node_id)[0]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are pulled. Raises TransportError for an unknown node."""
        identities = []
        for message in messages:
            self._site(message.metadata.dst_node_id)
            identity = assign_message_id(message)
            self._pushed[identity] = message
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the sites answer, and return their replies."""
        return [self._answer(self._pushed.pop(identity)) for identity in message_ids if identity in self._pushed]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies one after another, each computed when the caller asks for it. `timeout` has no effect."""
        identities = list(self.push_messages(messages))
        return (self._answer(self._pushed.pop(identity)) for identity in identities)

    def _answer(self, message: Message) -> Message:
        handler = self._site(message.metadata.dst_node_id)[1]
        reply = handler.answer(message)
        assign_message_id(reply)
        size, digest = measure(reply)
        handler.release(message, reply, size, digest)
        return reply

    def _site(self, node_id: int) -> tuple[str, SiteHandler]:
        if node_id not in self._sites:
            raise TransportError(f"no site has node id {node_id}; known: {sorted(self._sites)}")
        return self._sites[node_id]


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
