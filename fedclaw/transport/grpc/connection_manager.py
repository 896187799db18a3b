"""The server's gRPC connections: admits sites, reads their frames, sends heartbeats."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from fedclaw import __version__
from fedclaw.errors import TransportError
from fedclaw.identity.federation_home import FederationHome
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.allocator import tune_allocator
from fedclaw.transport.grpc.connection_limiter import INTERVAL, ConnectionLimiter
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.pending_requests import PendingRequest, PendingRequests
from fedclaw.transport.grpc.protocol import METHOD, PROTOCOL_VERSION, SERVICE
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.reply_receiver import ReplyReceiver, error_reply
from fedclaw.transport.grpc.session import NotAdmitted, Peer, Session, check_standing, peer_of

log = logging.getLogger(__name__)

_SPARE_STREAMS = 8
_STREAMS_OF_A_SITE = 3
"""Streams of one site beside its active one, so that no site takes the streams of others."""
_CODES = {pb.REASON_OVERSIZED: RefusalCode.UPDATE_SIZE, pb.REASON_UNANSWERED: RefusalCode.FAILED}

OnEvent = Callable[[str, str, str], None]
"""Called with (kind, site, text), from the server's threads; kind is joined, left or refused."""


class ConnectionManager:
    """A gRPC server with one active stream per site. `changed` is notified when a site joins or leaves."""

    def __init__(
        self,
        home: FederationHome,
        address: str,
        run_id: int,
        pending: PendingRequests,
        limits: Limits,
        on_event: OnEvent,
        spool: Path | None = None,
    ) -> None:
        """`spool` is the directory for replies that memory does not hold; None: the temporary directory."""
        self.changed = threading.Condition()
        self._home = home
        self._address = address
        self._run_id = run_id
        self._pending = pending
        self._limits = limits
        self._on_event = on_event
        self.replies = ReplyReceiver(home.name, home.opener(), pending, limits, spool)
        self._sessions: dict[int, Session] = {}
        self._streams: set[Session] = set()
        self._names: dict[int, str] = {}
        self._away: dict[int, float] = {}
        self._stopping = threading.Event()
        self._sequence = 0
        self._server: Any = None
        self._ticker = threading.Thread(target=self._heartbeat_loop, name="fedclaw-heartbeat", daemon=True)
        self._watcher = threading.Thread(target=self._limit_connections, name="fedclaw-connections", daemon=True)
        self.port = 0

    def start(self) -> None:
        """Listen. Raises TransportError if the address is taken or not this machine's."""
        tune_allocator()
        streams = self._limits.max_sites + _SPARE_STREAMS
        self._server = grpc.server(
            ThreadPoolExecutor(streams, thread_name_prefix="fedclaw-stream"),
            options=frames.server_options(self._limits),
            maximum_concurrent_rpcs=streams,
        )
        # Frames pass as bytes: they are parsed in _read, where a malformed one gets an answer.
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        tls = self._home.tls()
        credentials = grpc.ssl_server_credentials(
            [(tls.key, tls.certificate)], root_certificates=tls.ca, require_client_auth=True
        )
        try:
            self.port = self._server.add_secure_port(self._address, credentials)
        except RuntimeError as error:
            raise TransportError(
                f"cannot listen on {self._address}: the address is taken or not this machine's"
            ) from error
        self._server.start()
        self.replies.start()
        self._ticker.start()
        self._watcher.start()

    def stop(self, *, finished: bool = False) -> None:
        """Close all streams; if the run has `finished`, tell the sites."""
        self._stopping.set()
        farewell = frames.refuse(pb.REASON_FINISHED, "the run has finished") if finished else None
        for session in list(self._streams):
            session.close(farewell)
        if self._server is not None:
            self._server.stop(grace=0.5).wait()
        for thread in (self._ticker, self._watcher):
            if thread.is_alive():
                thread.join()
        self.replies.stop()

    def connected(self) -> dict[int, str]:
        """Names of the connected sites, by node id."""
        with self.changed:
            return {node_id: session.peer.site for node_id, session in self._sessions.items()}

    def site_name(self, node_id: int) -> str | None:
        """The name of a site that is or was connected; None for any other."""
        with self.changed:
            return self._names.get(node_id)

    def seconds_away(self, node_id: int) -> float:
        """Seconds since that site was last connected: 0 while it is, infinite if it never was."""
        with self.changed:
            if node_id in self._sessions:
                return 0.0
            return time.monotonic() - self._away[node_id] if node_id in self._away else float("inf")

    def dispatch(self, request: PendingRequest) -> None:
        """Offer `request` to its site now; if the site is not connected, when it connects."""
        with self.changed:
            session = self._sessions.get(request.node_id)
        if session is not None:
            session.sender.offer(request.outgoing)

    def recall(self, request: PendingRequest) -> None:
        """Stop sending `request`, and tell its site that nobody waits for the reply."""
        with self.changed:
            session = self._sessions.get(request.node_id)
        if session is not None:
            identity = request.outgoing.transfer_id
            session.sender.withdraw(identity)
            session.sender.post(frames.refuse(pb.REASON_RECALLED, "nobody waits for it any more", identity))

    def _serve(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        try:
            peer = peer_of(context, self._home)
        except NotAdmitted as error:
            self._event("refused", "", f"{frames.printable(context.peer())}: {error}")
            yield frames.refuse(error.reason, str(error)).SerializeToString()
            return
        session = Session(peer, context)
        self._register(session)
        threading.Thread(target=self._read, args=(session, requests), name=f"fedclaw-{peer.site}", daemon=True).start()
        try:
            yield from session.sender.frames()
        finally:
            self._detach(session)

    def _register(self, session: Session) -> None:
        """Add a stream. Beside its active one a site may have a few; of any more, the oldest are ended."""
        node_id = session.peer.node_id
        with self.changed:
            self._streams.add(session)
            active = self._sessions.get(node_id)
            own = [one for one in self._streams if one.peer.node_id == node_id and one is not active]
        for surplus in sorted(own, key=lambda one: one.opened)[:-_STREAMS_OF_A_SITE]:
            surplus.abort()

    def _read(self, session: Session, requests: Iterator[bytes]) -> None:
        try:
            for raw in requests:
                session.heard = time.monotonic()
                chunk = frames.decode_chunk(raw) if session.welcomed else None
                if chunk is not None:
                    self.replies.on_chunk(session, chunk)
                else:
                    self._handle(session, pb.Frame.FromString(raw))
        except NotAdmitted as error:
            self._refuse(session, error)
        except (TransportError, DecodeError) as error:
            text = str(error) if isinstance(error, TransportError) else "not a frame of this protocol"
            self._refuse(session, NotAdmitted(pb.REASON_PROTOCOL, text))
        except grpc.RpcError as error:
            log.debug("stream of %s ended: %s", session.peer.site, error)
        except Exception:
            # A fault of the server's own: it costs this stream, and no other.
            log.exception("the stream of %s failed", session.peer.site)
            session.close(frames.refuse(pb.REASON_UNAVAILABLE, "the server failed on this stream"))
        finally:
            session.close()

    def _handle(self, session: Session, frame: pb.Frame) -> None:
        frames.check_frame(frame)
        for identity in frame.also_done if session.welcomed else ():
            session.sender.withdraw(identity)
        kind = frame.WhichOneof("body")
        if not session.welcomed:
            if kind != "hello":
                raise TransportError("the first frame is not a hello")
            self._welcome(session, frame.hello)
        elif kind == "chunk":
            chunk = frame.chunk
            self.replies.on_chunk(session, frames.Chunk(chunk.transfer_id, chunk.offset, chunk.data))
        elif kind == "offer":
            self.replies.on_offer(session, frame.offer)
        elif kind == "accept":
            session.sender.start(frame.accept.transfer_id, frame.accept.offset)
        elif kind == "done":
            session.sender.withdraw(frame.done.transfer_id)
        elif kind == "refuse":
            self._refused_by_site(session, frame.refuse)
        elif kind != "heartbeat":
            raise TransportError(f"unexpected frame: {kind}")

    def _welcome(self, session: Session, hello: pb.Hello) -> None:
        peer = session.peer
        if hello.protocol != PROTOCOL_VERSION:
            text = (
                f"this server speaks protocol {PROTOCOL_VERSION} (fedclaw {__version__}), site {peer.site!r} protocol "
                f"{hello.protocol} ({frames.printable(hello.software)}); install the same version at both"
            )
            raise NotAdmitted(pb.REASON_VERSION, text)
        welcome = pb.Welcome(
            protocol=PROTOCOL_VERSION,
            federation=self._home.name,
            site=peer.site,
            node_id=peer.node_id,
            run_id=self._run_id,
            max_message_bytes=self._limits.max_message_bytes,
            heartbeat=self._limits.heartbeat,
            clock=time.time(),
        )
        if (trouble := frames.clock_trouble(hello.clock)) is not None:
            log.warning("this server's clock is %s that of %s; one of them is wrong", trouble, peer.site)
        replaced = self._activate(session, pb.Frame(welcome=welcome))
        if replaced is not None:
            text = f"another connection of site {peer.site!r} has taken this one's place"
            log.warning(text)
            self.replies.on_disconnect(replaced)
            replaced.close(frames.refuse(pb.REASON_REPLACED, text))
        else:
            self._event("joined", peer.site, frames.printable(hello.software))
        for request in self._pending.open_for(peer.node_id):
            session.sender.offer(request.outgoing)

    def _activate(self, session: Session, welcome: pb.Frame) -> Session | None:
        """Send the welcome and make this the site's active session. Returns the session that it replaces.

        Under one lock, because nothing may be sent to the site before the welcome. Raises NotAdmitted if the server
        is full.
        """
        peer = session.peer
        with self.changed:
            if session not in self._streams:
                # A stream that has ended would stay active for ever.
                raise NotAdmitted(pb.REASON_UNAVAILABLE, "it hung up before it was welcomed")
            replaced = self._sessions.get(peer.node_id)
            if replaced is None and len(self._sessions) >= self._limits.max_sites:
                text = f"this server serves {self._limits.max_sites} sites at one time, and they are all here"
                raise NotAdmitted(pb.REASON_UNAVAILABLE, text)
            session.welcomed = True
            session.sender.post(welcome)
            self._sessions[peer.node_id] = session
            self._names[peer.node_id] = peer.site
            self.changed.notify_all()
        return replaced

    def _refused_by_site(self, session: Session, refusal: pb.Refuse) -> None:
        request = self._pending.find(session.peer.node_id, refusal.transfer_id)
        if request is None:
            return
        on_its_way = session.sender.withdraw(refusal.transfer_id) is not None
        if not on_its_way and refusal.reason != pb.REASON_UNANSWERED:
            return
        text = f"the site refused the task ({frames.reason_name(refusal.reason)}): {frames.printable(refusal.text)}"
        log.warning("%s: %s", session.peer.site, text)
        self._pending.finish(request, error_reply(request, _CODES.get(refusal.reason, RefusalCode.MALFORMED), text))

    def _refuse(self, session: Session, error: NotAdmitted) -> None:
        self._event("refused", session.peer.site, str(error))
        session.close(frames.refuse(error.reason, str(error)))

    def _detach(self, session: Session) -> None:
        node_id = session.peer.node_id
        self.replies.on_disconnect(session)
        with self.changed:
            self._streams.discard(session)
            gone = self._sessions.get(node_id) is session
            if gone:
                del self._sessions[node_id]
                self._away[node_id] = time.monotonic()
                self.changed.notify_all()
        if gone and not self._stopping.is_set():
            self._event("left", session.peer.site, "the stream ended")
        with self._pending.changed:
            self._pending.changed.notify_all()

    def _event(self, kind: str, site: str, text: str) -> None:
        level = logging.WARNING if kind == "refused" else logging.INFO
        log.log(level, "%s %s: %s", site or "a peer", kind, text)
        self._on_event(kind, site, text)

    def _heartbeat_loop(self) -> None:
        while not self._stopping.wait(self._limits.heartbeat):
            self._sequence += 1
            with self.changed:
                sessions = list(self._streams)
            for session in sessions:
                self._guarded(self._check, session)
            self._guarded(self.replies.drop_slow)
            self._guarded(self._recall_expired)

    def _limit_connections(self) -> None:
        limiter = ConnectionLimiter(
            self.port, frames.unidentified_connections(self._limits), lambda text: self._event("refused", "", text)
        )
        while not self._stopping.wait(INTERVAL):
            with self.changed:
                peers = [session.endpoint for session in self._streams]
            self._guarded(limiter.enforce, frozenset(peer for peer in peers if peer is not None))

    def _guarded(self, step: Callable[..., None], *arguments: object) -> None:
        """Run one step of a heartbeat. Its failure costs no other site its heartbeats."""
        try:
            step(*arguments)
        except Exception:
            log.exception("a heartbeat failed")

    def _recall_expired(self) -> None:
        for request in self._pending.cancel(self._pending.expired()):
            self.recall(request)

    def _check(self, session: Session) -> None:
        """One heartbeat of one stream: check its certificate and its silence, and send ours."""
        now = time.monotonic()
        limits = self._limits
        if session.closed_at is not None:
            if now - session.closed_at > limits.handshake:
                session.abort()
            return
        try:
            check_standing(session.peer, self._home)
        except NotAdmitted as error:
            if error.reason != pb.REASON_UNAVAILABLE:
                self._cancel_requests_of(session.peer)
            self._refuse(session, error)
            return
        silent = limits.silence if session.welcomed else limits.handshake
        if now - session.heard > silent:
            self._event("refused", session.peer.site, f"nothing was heard from it for {silent:g} s")
            session.close(frames.refuse(pb.REASON_SILENT, "no heartbeat"))
            session.abort()
        elif session.welcomed:
            session.sender.post(frames.heartbeat(self._sequence))

    def _cancel_requests_of(self, peer: Peer) -> None:
        """An expelled site will not answer: stop waiting for it."""
        self._pending.cancel([request.envelope.message_id for request in self._pending.open_for(peer.node_id)])
