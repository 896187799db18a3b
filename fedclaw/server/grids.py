"""What the server asks of a `Grid` beyond Flower's own interface; transports and the simulation implement it."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

if TYPE_CHECKING:
    from fedclaw.privacy.secure_aggregation import Verifier


class StreamingGrid(Grid):
    """A Grid that yields replies as they arrive instead of collecting them.

    `send_and_receive` sends its messages before it returns, then yields each reply once. It ends when all sites have
    answered, or after `timeout` seconds; a disconnected site may come back until then. Without a timeout it ends when
    all sites that have not answered have been unreachable for a while.
    """

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message from this run's server."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @abstractmethod
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send `messages`, then yield replies in order of arrival."""

    @abstractmethod
    def site_name(self, node_id: int) -> str:
        """The site's name, from its certificate or the simulation."""

    def excluded_nodes(self) -> Mapping[int, str]:
        """Nodes not to be asked again in this run, and why: they sent more than was asked for, or too slowly."""
        return {}

    @property
    def verifier(self) -> "Verifier | None":
        """Checks the sites' signatures; None where no authority has certified the sites."""
        return None


def site_name(grid: Grid, node_id: int) -> str:
    """The certified name where the runtime knows one, else the node's number."""
    return grid.site_name(node_id) if isinstance(grid, StreamingGrid) else str(node_id)
