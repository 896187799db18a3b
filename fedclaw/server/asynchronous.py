"""Buffered asynchronous rounds: a step as soon as enough sites have answered, whichever model they began with.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba 2022, "Federated Learning with Buffered Asynchronous Aggregation",
Algorithm 1 (https://arxiv.org/abs/2106.06639). All connected sites are at work all the time; a site that answers
waits for the step that its answer goes into and begins again with the new parameters, so that each is in a step once
at most. A site that is slow misses steps and holds nobody up; what it sends then counts by its staleness.

What is in flight when a server stops is lost to the run, and stays on its site's ledger: the step that was being
gathered is asked for anew, and a site that has answered its question already answers from its outbox.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedclaw.learning.strategy import Buffered
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.questions import Outgoing
from fedclaw.server.grids import site_name
from fedclaw.server.training import TrainingQuestion

log = logging.getLogger(__name__)

LOOK_AGAIN = 0.02
"""Seconds between two looks for answers: Flower's Grid has no way to wait for one."""


@dataclass(frozen=True)
class _Asked:
    """A question that a site is working on, and the step for which it was asked."""

    message_id: str
    step: int


class Buffer:
    """The sites that are working for one run, and their answers for the next step."""

    def __init__(self, grid: Grid, strategy: Buffered) -> None:
        self._grid = grid
        self._strategy = strategy
        self._in_flight: dict[int, _Asked] = {}
        self._gathered: TrainingQuestion | None = None
        self._asked: set[int] = set()

    @property
    def busy(self) -> frozenset[int]:
        """Nodes that are working; they answer further questions later."""
        return frozenset(self._in_flight)

    def train(self, plan: Plan, nodes: Sequence[int], outgoing: Outgoing, deadline: float) -> TrainingQuestion:
        """Have the idle ones of `nodes` train by `plan`, and gather answers of whoever is at work for its step.

        Returns when `Buffered.size` sites have answered, when nobody is left at work, or after `deadline` seconds;
        called again for the same step it goes on gathering. Nobody is `silent`: who is at work may answer later.
        """
        began = time.monotonic()
        gathered = self._gathered = self._gathered or TrainingQuestion(plan, outgoing)
        self._ask(gathered, nodes)
        while len(gathered.answered) < self._strategy.size and self._in_flight:
            if not self._take_arrived(gathered, plan.round):
                if time.monotonic() - began > deadline:
                    break
                time.sleep(LOOK_AGAIN)
        gathered.seconds += time.monotonic() - began
        if len(gathered.answered) >= self._strategy.size:
            self._gathered, self._asked = None, set()
        return gathered

    def _ask(self, question: TrainingQuestion, nodes: Sequence[int]) -> None:
        idle = [node for node in nodes if node not in self._in_flight and node not in self._asked]
        messages = question.messages(idle)
        for message, identity in zip(messages, self._grid.push_messages(messages), strict=True):
            self._in_flight[message.metadata.dst_node_id] = _Asked(identity, question.asked.round)
        self._asked.update(idle)

    def _take_arrived(self, gathered: TrainingQuestion, step: int) -> bool:
        """Add the answers that have arrived, as many as the step still needs. Whether any had arrived."""
        arrived = False
        for node, asked in list(self._in_flight.items()):
            if len(gathered.answered) >= self._strategy.size:
                break
            for reply in self._grid.pull_messages([asked.message_id]):
                arrived = True
                del self._in_flight[node]
                self._take(gathered, site_name(self._grid, node), reply, step - asked.step)
        return arrived

    def _take(self, gathered: TrainingQuestion, site: str, reply: Message, staleness: int) -> None:
        if staleness > self._strategy.oldest:
            log.info("%s answered %d steps late, which is dropped", site, staleness)
            return
        gathered.discount = self._strategy.discount(staleness)
        gathered.add_reply(site, reply)
        if staleness:
            log.info("%s answered %d steps late and counts by %.3g", site, staleness, gathered.discount)
