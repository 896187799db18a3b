"""Runs FedClaw's rounds over a stock Flower Grid, with plans, checkpoints, resumption, evaluation and receipts.

`NamedGrid` adds what they need to a stock Grid: site names, lasting identities, replies as they arrive.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedclaw.errors import TransportError
from fedclaw.protocol.message_identity import SILENT, assign_message_id, envelope_of, number_of, rebuild
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.grids import StreamingGrid
from fedclaw.server.round_report import Observer, Outcome
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.server.waiting import CohortWaiting, poll, wait_for_cohort
from fedclaw.transport.flower import FLOWER_RECORD, IDENTITY, NAME_QUERY, SITE
from fedclaw.transport.flower.settings import check

log = logging.getLogger(__name__)

LOOK_AGAIN = 0.2
"""Seconds between two polls for replies; each is a request to the SuperLink."""
INTRODUCTION = 60.0
"""Seconds that a new node has to give its name before the round begins without it."""
_PATIENCE = 5
"""After this many times `INTRODUCTION` a node is asked for its name again."""


@dataclass(frozen=True)
class _Asked:
    """A message that has been sent: FedClaw's identity of it, and the site that it went to."""

    identity: str
    site: int


class NamedGrid(StreamingGrid):
    """`grid` with nodes numbered by their sites' names, as on FedClaw's own runtimes.

    A node's name is the one that its site gives. Flower authenticates a node's key at most, never a name: of two
    connected nodes with one name the newer is asked, and that is logged. A node that gives no name takes no part.
    """

    def __init__(self, grid: Grid, look_again: float = LOOK_AGAIN, introduction: float = INTRODUCTION) -> None:
        self._grid = grid
        self._look_again = look_again
        self._introduction = introduction
        self._names: dict[int, str] = {}
        self._nodes: dict[int, int] = {}
        """Flower's node by the site's number."""
        self._met: dict[int, float] = {}
        """When each of Flower's nodes was asked for its name."""
        self._introducing: dict[str, int] = {}
        """Flower's nodes by the id of the message that asks for their name, until they answer."""
        self._pending: dict[str, _Asked] = {}

    def set_run(self, run: Run) -> None:
        """Take over Flower's run record."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Flower's run record."""
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        """The connected sites, by the numbers of their names. Waits for new nodes to give theirs."""
        present = set(self._grid.get_node_ids())
        self._introduce(sorted(present - self._met.keys()))
        return [site for site, node in self._nodes.items() if node in present]

    def site_name(self, node_id: int) -> str:
        """The name that the site gave. Raises TransportError for an unknown number."""
        if node_id not in self._names:
            raise TransportError(f"no site has node id {node_id}; known: {sorted(self._names.values())}")
        return self._names[node_id]

    def wait_for_sites(self, count: int, timeout: float) -> tuple[str, ...]:
        """Names of the connected sites, once there are `count` or `timeout` seconds have passed."""
        present = poll(lambda: tuple(self.get_node_ids()), count, timeout, self._look_again)
        return tuple(sorted(self._names[site] for site in present))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass the messages to Flower. Returns FedClaw's identities of all of them.

        A site that is not connected, or has not given its name since the server started, is left out.
        """
        identities, pushed = [], {}
        for message in messages:
            asked = _Asked(assign_message_id(message), message.metadata.dst_node_id)
            identities.append(asked.identity)
            if asked.site in self._nodes:
                pushed[asked] = self._for_flower(message, asked)
        taken = set(self._grid.push_messages(list(pushed.values()))) if pushed else set()
        for asked, message in pushed.items():
            if message.metadata.message_id in taken:
                self._pending[message.metadata.message_id] = asked
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have arrived to messages of these identities, however often they were sent."""
        wanted = set(message_ids)
        carriers = [carrier for carrier, asked in self._pending.items() if asked.identity in wanted]
        replies = []
        for reply in self._grid.pull_messages(carriers) if carriers else ():
            asked = self._pending.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None and not self._is_lost(reply, asked):
                replies.append(_from_flower(reply, asked))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send `messages`, then yield replies as they arrive. Ends when none is left, or after `timeout` seconds."""
        return self._replies(set(self.push_messages(messages)), math.inf if timeout is None else timeout)

    def _replies(self, waiting: set[str], timeout: float) -> Iterator[Message]:
        end = time.monotonic() + timeout
        while waiting:
            for reply in self.pull_messages(waiting):
                identity = reply.metadata.reply_to_message_id
                if identity in waiting:
                    waiting.discard(identity)
                    yield reply
            waiting &= {asked.identity for asked in self._pending.values()}
            if not waiting or time.monotonic() >= end:
                return
            time.sleep(self._look_again)

    def _for_flower(self, message: Message, asked: _Asked) -> Message:
        meta = message.metadata
        content = RecordDict({**message.content, FLOWER_RECORD: ConfigRecord({IDENTITY: asked.identity})})
        return Message(content, self._nodes[asked.site], meta.message_type, ttl=meta.ttl, group_id=meta.group_id)

    def _is_lost(self, reply: Message, asked: _Asked) -> bool:
        """Whether the reply is Flower's own error for a node that went away, so that asking again may help."""
        if not reply.has_error() or reply.error.code not in SILENT:
            return False
        log.warning("%s was not reached (%s)", self._names[asked.site], reply.error.reason)
        return True

    def _introduce(self, nodes: list[int]) -> None:
        """Ask `nodes` for their names, and wait for those that may still give one."""
        questions = [Message(RecordDict(), node, NAME_QUERY, ttl=_PATIENCE * self._introduction) for node in nodes]
        taken = set(self._grid.push_messages(questions)) if questions else set()
        now = time.monotonic()
        for node, question in zip(nodes, questions, strict=True):
            self._met[node] = now
            if question.metadata.message_id in taken:
                self._introducing[question.metadata.message_id] = node
            else:
                del self._met[node]
        while self._introducing:
            for reply in self._grid.pull_messages(list(self._introducing)):
                self._greet(self._introducing.pop(reply.metadata.reply_to_message_id), reply)
            late = time.monotonic() - self._introduction
            if all(self._met[node] < late for node in self._introducing.values()):
                return
            time.sleep(self._look_again)

    def _greet(self, node: int, reply: Message) -> None:
        if reply.has_error() and reply.error.code in SILENT:
            # It went away, or needs longer to start than anybody listened: to be asked again.
            del self._met[node]
            return
        name = None if reply.has_error() else reply.content.config_records.get(FLOWER_RECORD, ConfigRecord()).get(SITE)
        if not isinstance(name, str) or not name:
            reason = f"{reply.error.code}: {reply.error.reason}" if reply.has_error() else "it answers something else"
            log.warning("node %d does not say which site it is and takes no part (%s)", node, reason)
            return
        site = number_of(name)
        if site in self._nodes:
            log.warning("node %d says it is %s and is asked instead of node %d", node, name, self._nodes[site])
        self._names[site], self._nodes[site] = name, node


def _from_flower(reply: Message, asked: _Asked) -> Message:
    """The reply as FedClaw's own transports deliver it."""
    content: RecordDict | Error = reply.error if reply.has_error() else reply.content
    envelope = replace(envelope_of(reply), src_node_id=asked.site, reply_to_message_id=asked.identity)
    return rebuild(envelope, content)


def run_over(
    grid: Grid,
    directory: RunDirectory,
    waiting: CohortWaiting,
    observers: Sequence[Observer] = (),
    look_again: float = LOOK_AGAIN,
) -> Outcome:
    """Run or resume the run in `directory` over Flower's `grid`, polling for replies every `look_again` seconds.

    Raises UsageError for a run that Flower's runtimes do not support, and RoundError as `run_rounds` does.
    """
    record = directory.record()
    check(record)
    named = NamedGrid(grid, look_again)
    wait_for_cohort(named, directory, waiting)
    return run_rounds(named, directory, initial_parameters(record), observers=observers)
