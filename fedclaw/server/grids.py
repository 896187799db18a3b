"""What the server asks of a `Grid` beyond Flower's own interface; transports and the simulation implement it."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedclaw.protocol.plan import Plan
from fedclaw.protocol.questions import Outgoing

if TYPE_CHECKING:
    from fedclaw.privacy.secure_aggregation import Verifier
    from fedclaw.server.exchange import Evaluated, Trained


class StreamingGrid(Grid):
    """A Grid that hands out replies as they arrive instead of collecting them.

    `send_and_receive` pushes its messages before it returns, then yields each reply once; it ends when all have
    answered or when `timeout` seconds have passed. A site that is away may come back until then; without a timeout
    it ends when no site that still owes a reply has been reachable for a while.
    """

    @abstractmethod
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Push `messages`, then yield replies in order of arrival."""

    @abstractmethod
    def site_name(self, node_id: int) -> str:
        """The site's name as its certificate (or the simulation) has it."""

    def set_aside(self) -> Mapping[int, str]:
        """Nodes that the runtime advises not to ask again in this run, and why: what they sent cost too much."""
        return {}

    @property
    def verifier(self) -> "Verifier | None":
        """Who checks what sites sign; None where there is no authority at hand that has certified them."""
        return None


class CohortGrid(StreamingGrid):
    """A Grid that answers for a whole cohort at once, without messages: a simulation."""

    @abstractmethod
    def train_cohort(self, nodes: Sequence[int], plan: Plan, outgoing: Outgoing, trained: "Trained") -> None:
        """Train as `plan` asks, and put into `trained` what the answers of `nodes` would."""

    @abstractmethod
    def evaluate_cohort(
        self, nodes: Sequence[int], plan: Plan, parameters: Mapping[str, NDArray[np.float32]], evaluated: "Evaluated"
    ) -> None:
        """The same for an evaluation of `parameters`."""
