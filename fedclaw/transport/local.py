"""A Grid over sites in this process: it calls their handlers directly."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from flwr.app import Message
from flwr.supercore.run import Run

from fedclaw.errors import TransportError
from fedclaw.protocol.message_identity import assign_message_id, empty_run, number_of
from fedclaw.server.grids import StreamingGrid
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
