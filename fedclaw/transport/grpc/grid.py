"""Flower's `Grid` over the server's gRPC connections."""

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
from fedclaw.protocol.buffers import JoinedBuffers
from fedclaw.protocol.message_identity import (
    assign_message_id,
    assume_server_identity,
    empty_run,
    envelope_of,
    expires_at,
)
from fedclaw.protocol.records import MessageRecords
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.server.grids import StreamingGrid
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.connection_manager import ConnectionManager
from fedclaw.transport.grpc.limits import CHUNK_BYTES, INLINE_BYTES, Limits
from fedclaw.transport.grpc.message_codec import encode
from fedclaw.transport.grpc.pending_requests import PendingRequest, PendingRequests
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.reply_receiver import error_reply
from fedclaw.transport.grpc.sender import OutgoingTransfer

log = logging.getLogger(__name__)

_LOOK_AGAIN = 1.0


class GrpcGrid(StreamingGrid):
    """Sites over mutually authenticated gRPC. A context manager: it listens while the `with` block runs.

    A message that carries an id keeps it, so that a site recognises a repeated request. Any other message gets a
    random id when it is pushed.
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

        `on_event(kind, site, text)` is called when a site joins, leaves or is refused. `spool` is the directory for
        replies that memory does not hold (default: the federation's). From now on this process is the run's server.
        Raises ProvisionError.
        """
        self._limits = limits or Limits()
        self._run = empty_run(run_id)
        self._pending = PendingRequests(self._limits.gone)
        self._verifier = CertificateVerifier(home.descriptor)
        where = address or home.descriptor.address
        self._connections = ConnectionManager(
            home, where, run_id, self._pending, self._limits, on_event, spool or home.root
        )
        assume_server_identity(run_id)

    def __enter__(self) -> Self:
        self._connections.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connections.stop(finished=kind is None)

    @property
    def verifier(self) -> CertificateVerifier:
        """Checks certificates against the federation's CA. Revoked sites are not connected."""
        return self._verifier

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return self._connections.port

    @property
    def run(self) -> Any:
        """Flower's record of the run. Only its id is used."""
        return self._run

    def set_run(self, run: Any) -> None:
        """Raises TransportError for any run but the one that the grid was made for."""
        if run.run_id != self._run.run_id:
            raise TransportError(f"this grid serves run {self._run.run_id}, not {run.run_id}")
        self._run = run

    def get_node_ids(self) -> Iterable[int]:
        """The sites that are connected now."""
        return sorted(self._connections.connected())

    def site_name(self, node_id: int) -> str:
        """The certified name of a site that is or was connected; `node N` for any other."""
        return self._connections.site_name(node_id) or f"node {node_id}"

    def excluded_nodes(self) -> Mapping[int, str]:
        """See StreamingGrid."""
        return self._connections.replies.excluded_nodes()

    def wait_for_sites(self, count: int, timeout: float) -> tuple[str, ...]:
        """Names of the connected sites, as soon as there are `count` of them or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._connections.changed:
            while len(self._connections.connected()) < count and (left := deadline - time.monotonic()) > 0:
                self._connections.changed.wait(left)
        return tuple(sorted(self._connections.connected().values()))

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        """Send `messages` and return their ids. Content that goes to many sites is encoded once.

        A reply larger than its request's `MessageRecords.reply_bytes` is refused. Raises TransportError for a message
        of another run, or one larger than the limit.
        """
        bodies: dict[int, tuple[RecordDict, JoinedBuffers, bytes]] = {}
        requests = [self._request(message, bodies) for message in messages]
        for request in requests:
            self._pending.add(request)
        for request in requests:
            self._connections.dispatch(request)
        return [request.envelope.message_id for request in requests]

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """The replies to `message_ids` that have arrived and were not returned before."""
        wanted = frozenset(message_ids)
        replies = []
        while (reply := self._pending.take(wanted)) is not None:
            self._pending.read(reply)
            replies.append(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send now, then yield replies in order of arrival (see StreamingGrid for when it ends).

        A disconnected site may come back until `timeout`; without a timeout, until it has been away for `Limits.gone`
        seconds. A reply that was refused, or came too slowly, is yielded as an error.
        """
        began = time.monotonic()
        ids = frozenset(self.push_messages(messages))
        return self._replies(ids, None if timeout is None else began + timeout)

    def _replies(self, ids: frozenset[str], deadline: float | None) -> Iterator[Message]:
        try:
            while True:
                reply = self._pending.take(ids)
                if reply is None and not self._wait(ids, deadline):
                    break
                if reply is not None:
                    yield reply
                    # By asking for the next reply the reader says that it is done with this one.
                    self._pending.read(reply)
                    reply = None
            if deadline is not None:
                self._connections.replies.record_late(ids)
        finally:
            self._end(ids)
        for request, text in self._connections.replies.take_late(ids):
            yield error_reply(request, RefusalCode.SLOW, text)

    def _end(self, ids: frozenset[str]) -> None:
        for request in self._pending.cancel(ids):
            self._connections.recall(request)

    def _wait(self, ids: frozenset[str], deadline: float | None) -> bool:
        """Wait for a change. Returns False when there is nothing left to wait for."""
        with self._pending.changed:
            if self._pending.has_reply(ids):
                return True
            unanswered = self._pending.unanswered(ids)
            if deadline is None:
                unanswered = [request for request in unanswered if self._reachable(request)]
            left = _LOOK_AGAIN if deadline is None else deadline - time.monotonic()
            if not unanswered or left <= 0:
                return False
            self._pending.changed.wait(min(left, _LOOK_AGAIN))
            return True

    def _reachable(self, request: PendingRequest) -> bool:
        seconds_away = min(self._connections.seconds_away(request.node_id), time.monotonic() - request.asked)
        return seconds_away < self._limits.gone

    def _request(self, message: Message, bodies: dict[int, tuple[RecordDict, JoinedBuffers, bytes]]) -> PendingRequest:
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
            transfer_id=envelope.message_id, envelope=frames.envelope_to_proto(envelope), size=body.size, stamp=stamp
        )
        if body.size <= INLINE_BYTES:
            offer.inline = b"".join(body.read(0, INLINE_BYTES))
        now = time.monotonic()
        expires = now + expires_at(message) - time.time()
        outgoing = OutgoingTransfer(offer, lambda offset: body.read(offset, CHUNK_BYTES), expires)
        most = content.reply_bytes if isinstance(content, MessageRecords) else None
        return PendingRequest(envelope, outgoing, asked=now, expires=expires, reply_bytes=most)
