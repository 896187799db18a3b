"""Flower's `Grid` on the server's end of the streams."""

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flwr.app import Message, RecordDict

from fedclaw.errors import TransportError
from fedclaw.identity.federation_home import FederationHome
from fedclaw.privacy.secure_aggregation import CertificateVerifier
from fedclaw.protocol.message_identity import (
    assign_message_id,
    assume_server_identity,
    empty_run,
    envelope_of,
    expires_at,
)
from fedclaw.protocol.plan import RefusalCode
from fedclaw.protocol.records import Records
from fedclaw.server.grids import StreamingGrid
from fedclaw.transport.grpc import wire
from fedclaw.transport.grpc.codec import Encoded, encode
from fedclaw.transport.grpc.desk import Desk, Task
from fedclaw.transport.grpc.inbound import error_reply
from fedclaw.transport.grpc.limits import CHUNK_BYTES, INLINE_BYTES, Limits
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.sender import Outgoing
from fedclaw.transport.grpc.station import Station

log = logging.getLogger(__name__)

_LOOK_AGAIN = 1.0


class GrpcGrid(StreamingGrid):
    """Sites over mutually authenticated gRPC. A context manager: it listens from `with` to its end.

    Message identity: a message that carries an id keeps it, so that a repeated question is recognised by the site;
    any other gets a random one when it is pushed.
    """

    def __init__(
        self,
        home: FederationHome,
        *,
        run_id: int,
        limits: Limits | None = None,
        address: str | None = None,
        on_event: Callable[[str, str, str], None] = lambda _kind, _site, _text: None,
        spool: Path | None = None,
    ) -> None:
        """`address` is "host:port" to listen on (default: the descriptor's; port 0: a free one, see `port`).

        `on_event(kind, site, text)` hears of sites that joined, left or were refused. `spool` is a directory on a disk
        for replies that memory does not hold (default: the federation's). Raises ProvisionError.
        """
        self._limits = limits or Limits()
        self._run = empty_run(run_id)
        self._desk = Desk(self._limits.gone)
        self._verifier = CertificateVerifier(home.descriptor)
        where = address or home.descriptor.address
        self._station = Station(home, where, run_id, self._desk, self._limits, on_event, spool or home.root)
        assume_server_identity(run_id)

    def __enter__(self) -> Self:
        self._station.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._station.stop(finished=kind is None)

    @property
    def verifier(self) -> CertificateVerifier:
        """By the federation's CA. Whom it has revoked is no longer connected."""
        return self._verifier

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._station.port

    @property
    def run(self) -> Any:
        """Flower's record of the run; only its id means something here."""
        return self._run

    def set_run(self, run: Any) -> None:
        """Raises TransportError: the run is what the grid was made for."""
        if run.run_id != self._run.run_id:
            raise TransportError(f"this grid serves run {self._run.run_id}, not {run.run_id}")
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a site, as in Flower's Grid."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The sites that are connected now."""
        return sorted(self._station.connected())

    def site_name(self, node_id: int) -> str:
        """The certified name of a site that is or was connected; its number in words if it never was."""
        return self._station.site_name(node_id) or f"node {node_id}"

    def set_aside(self) -> Mapping[int, str]:
        """See StreamingGrid."""
        return self._station.set_aside()

    def wait_for_sites(self, count: int, timeout: float) -> tuple[str, ...]:
        """Names of the connected sites, once there are `count` of them or `timeout` seconds have passed."""
        deadline = time.monotonic() + timeout
        with self._station.changed:
            while len(self._station.connected()) < count and (left := deadline - time.monotonic()) > 0:
                self._station.changed.wait(left)
        return tuple(sorted(self._station.connected().values()))

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        """Ask; returns the messages' ids. A content that is sent to many sites is encoded once.

        A reply larger than its content's `Records.reply_bytes` is refused. Raises TransportError for a message of
        another run, or larger than the limit.
        """
        bodies: dict[int, tuple[RecordDict, Encoded, bytes]] = {}
        tasks = [self._task(message, bodies) for message in messages]
        for task in tasks:
            self._desk.add(task)
        for task in tasks:
            self._station.dispatch(task)
        return [task.envelope.message_id for task in tasks]

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """The replies to `message_ids` that have arrived and were not handed out yet."""
        wanted = frozenset(message_ids)
        replies = []
        while (reply := self._desk.take(wanted)) is not None:
            self._desk.read(reply)
            replies.append(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Ask now, then yield replies in order of arrival (see StreamingGrid for when it ends).

        A disconnected site may come back until `timeout`. Without a timeout it is waited for until it has been away
        for `Limits.gone` seconds. A reply that had to be refused, or that came too slowly, appears as an error.
        """
        began = time.monotonic()
        ids = frozenset(self.push_messages(messages))
        return self._replies(ids, None if timeout is None else began + timeout)

    def _replies(self, ids: frozenset[str], deadline: float | None) -> Iterator[Message]:
        try:
            while True:
                reply = self._desk.take(ids)
                if reply is None and not self._wait(ids, deadline):
                    break
                if reply is not None:
                    yield reply
                    # Asking for the next one is how the reader says that it is done with this one.
                    self._desk.read(reply)
                    reply = None
            if deadline is not None:
                self._station.judge(ids)
            self._end(ids)
            for task, text in self._station.late(ids):
                yield error_reply(task, RefusalCode.SLOW, text)
        finally:
            self._end(ids)

    def _end(self, ids: frozenset[str]) -> None:
        for task in self._desk.withdraw(ids):
            self._station.recall(task)

    def _wait(self, ids: frozenset[str], deadline: float | None) -> bool:
        """Wait for a change. False when there is nothing left to wait for."""
        with self._desk.changed:
            if self._desk.ready(ids):
                return True
            owing = self._desk.owing(ids)
            if deadline is None:
                owing = [task for task in owing if self._reachable(task)]
            left = _LOOK_AGAIN if deadline is None else deadline - time.monotonic()
            if not owing or left <= 0:
                return False
            self._desk.changed.wait(min(left, _LOOK_AGAIN))
            return True

    def _reachable(self, task: Task) -> bool:
        away = min(self._station.away(task.node_id), time.monotonic() - task.asked)
        return away < self._limits.gone

    def _task(self, message: Message, bodies: dict[int, tuple[RecordDict, Encoded, bytes]]) -> Task:
        if message.metadata.run_id != self._run.run_id:
            raise TransportError(f"the message belongs to run {message.metadata.run_id}, not {self._run.run_id}")
        assign_message_id(message)
        content = message.content
        if id(content) not in bodies:
            # The content is kept with its encoding: an id is only an identity while the object lives.
            bodies[id(content)] = (content, encode(content), uuid.uuid4().bytes)
        _, body, stamp = bodies[id(content)]
        if body.size > self._limits.max_message_bytes:
            raise TransportError(f"the message has {body.size} bytes, the limit is {self._limits.max_message_bytes}")
        envelope = envelope_of(message)
        offer = pb.Offer(
            transfer_id=envelope.message_id, envelope=wire.envelope_to_proto(envelope), size=body.size, stamp=stamp
        )
        if body.size <= INLINE_BYTES:
            offer.inline = b"".join(body.read(0, INLINE_BYTES))
        now = time.monotonic()
        expires = now + expires_at(message) - time.time()
        outgoing = Outgoing(offer, lambda offset: body.read(offset, CHUNK_BYTES), expires)
        most = content.reply_bytes if isinstance(content, Records) else None
        return Task(envelope, outgoing, asked=now, expires=expires, reply_bytes=most)
