"""Receives the sites' replies side by side: opens each segment as it comes, and resumes after a broken connection.

A reply is received only if it answers an open request of the very site that offers it, and is no larger than the
answer to that request can be. Where its bytes are kept, and when it has to wait, is `reply_buffers`' part.

Slowness is measured by rate. A reply that comes at less than `Limits.least_rate` is given up. A site whose reply, at
the rate at which it came, could not have arrived in the time of its request is named and not asked again in the run.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path

from flwr.app import Error, Message

from fedclaw.errors import SealError, TransportError
from fedclaw.identity.seal import Binding, Opener, OpenStream, segment_count
from fedclaw.identity.stream import TAG
from fedclaw.protocol.message_identity import SERVER_NODE_ID, Envelope, rebuild
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.message_codec import decode
from fedclaw.transport.grpc.pending_requests import PendingRequest, PendingRequests
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.reply_buffers import BufferPool, IncomingReply, ReplyBuffers
from fedclaw.transport.grpc.session import Session

log = logging.getLogger(__name__)

_CODES = {
    pb.REASON_OVERSIZED: RefusalCode.UPDATE_SIZE,
    pb.REASON_STALLED: RefusalCode.SLOW,
    pb.REASON_UNAVAILABLE: RefusalCode.FAILED,
}

_LOOK_AGAIN = 0.05
"""Seconds between two looks while a reply waits for memory or for its Accept."""
_MAX_LATE = 4096
_MAX_IDLE_OFFERS = 256


class ReplyReceiver:
    """All replies that are offered, arriving or unread."""

    def __init__(
        self,
        federation: str,
        opener: Opener,
        pending: PendingRequests,
        limits: Limits,
        directory: Path | None = None,
    ) -> None:
        """`directory` is on the disk for replies that memory does not hold; None: the temporary directory."""
        self._federation = federation
        self._opener = opener
        self._pending = pending
        self._limits = limits
        self._buffers = ReplyBuffers(limits, directory)
        self._memory = BufferPool(limits.inbound_bytes)
        self._late: OrderedDict[str, tuple[PendingRequest, str]] = OrderedDict()
        self._excluded: dict[int, str] = {}
        self._due = threading.Event()
        self._accepting = threading.local()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fedclaw-replies", daemon=True)
        pending.on_released = self.release

    def start(self) -> None:
        """Start the thread that accepts waiting replies and reads back those on disk."""
        self._thread.start()

    def stop(self) -> None:
        """Receive nothing more, and close all files."""
        self._stopping = True
        self._due.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._buffers.lock:
            for identity in list(self._buffers.accepted):
                self._buffers.drop(identity)

    def excluded_nodes(self) -> Mapping[int, str]:
        """Nodes not to ask again, and why: they sent more than was asked for, or too slowly."""
        with self._buffers.lock:
            return dict(self._excluded)

    def take_late(self, ids: Collection[str]) -> list[tuple[PendingRequest, str]]:
        """Those of `ids` whose reply was given up as too slow, and how slow it was. Each is returned once."""
        with self._buffers.lock:
            return [item for identity in ids if (item := self._late.pop(identity, None)) is not None]

    def on_offer(self, session: Session, offer: pb.Offer) -> None:
        """A site offers a reply. Raises TransportError when a stream makes too many offers that change nothing."""
        identity, node_id = offer.transfer_id, session.peer.node_id
        request = self._pending.find(node_id, identity)
        if request is None:
            _count_idle(session)
            if self._pending.was_answered(node_id, identity):
                session.sender.confirm(identity)
            else:
                self._refuse(session, pb.REASON_NOT_ASKED, "this reply was not asked for, or came too late", identity)
            return
        try:
            self._check(request, offer)
        except TransportError as error:
            oversized = offer.plain_size > self._largest(request)
            if oversized:
                self._exclude(node_id, session.peer.site, str(error))
            self._fail(session, request, pb.REASON_OVERSIZED if oversized else pb.REASON_MALFORMED, str(error))
            return
        buffers = self._buffers
        with buffers.lock:
            held = buffers.accepted.get(identity)
        if held is not None and held.offer.stamp == offer.stamp and held.offer.size == offer.size:
            if held.session is session:
                _count_idle(session)
            self._resume(session, held)
            return
        with buffers.lock:
            previous = (0.0, 0)
            if (former := buffers.accepted.get(identity) or buffers.waiting.get(identity)) is not None:
                # A site that keeps offering other replies is judged by the bytes of all of them.
                first, before = former.previous_offers
                previous = (first or former.accepted_at, before + former.received)
            buffers.drop(identity)
            buffers.waiting[identity] = IncomingReply(
                request, offer, session, site=session.peer.site, previous_offers=previous
            )
        self._accept_waiting()
        # A reply that has to wait takes no memory: its site sends the content again after the Accept.
        with buffers.lock:
            if identity in buffers.waiting:
                offer.ClearField("inline")
                self._due.set()

    def on_chunk(self, session: Session, chunk: frames.Chunk) -> None:
        """The next chunk of a reply. Raises TransportError for one at another offset than the next."""
        with self._buffers.lock:
            reply = self._buffers.accepted.get(chunk.transfer_id)
        if reply is None:
            # Its transfer was refused or cancelled while the chunk was on its way.
            return
        try:
            with reply.lock:
                stream = reply.stream
                if reply.session is not session or stream is None or reply.complete or reply.dropped:
                    return
                if chunk.offset != reply.received:
                    raise TransportError(f"chunk at byte {chunk.offset}, expected {reply.received}")
                self._take(session, reply, stream, chunk)
        finally:
            if reply.dropped:
                reply.close()

    def on_disconnect(self, session: Session) -> None:
        """The stream has ended. What has arrived by it is kept for resumption."""
        buffers = self._buffers
        with buffers.lock:
            for identity in [key for key, reply in buffers.waiting.items() if reply.session is session]:
                del buffers.waiting[identity]
            for reply in buffers.accepted.values():
                if reply.session is session and not reply.complete:
                    reply.session, reply.disconnected_at = None, time.monotonic()
        self._accept_waiting()

    def release(self, ids: Collection[str]) -> None:
        """Those replies were read, or are not wanted any more: free what they hold, and accept others."""
        now = time.monotonic()
        buffers = self._buffers
        with buffers.lock:
            if not (buffers.accepted or buffers.waiting):
                return
            self.record_late([key for key in ids if (one := buffers.accepted.get(key)) and one.request.expires <= now])
            for identity in ids:
                buffers.drop(identity)
                buffers.waiting.pop(identity, None)
        self._accept_waiting()
        if buffers.waiting or buffers.any_on_disk():
            self._due.set()

    def record_late(self, ids: Collection[str]) -> None:
        """The time of those requests is over: remember the sites that are still sending, if their rate is to blame."""
        now = time.monotonic()
        with self._buffers.lock:
            for identity in ids:
                reply = self._buffers.accepted.get(identity)
                if reply is not None and (slow := reply.too_slow(now)) is not None:
                    self._late[reply.request.envelope.message_id] = (reply.request, slow)
                    while len(self._late) > _MAX_LATE:
                        self._late.popitem(last=False)
                    self._exclude(reply.request.node_id, reply.site, slow)

    def drop_slow(self) -> None:
        """Give up replies of which less than `least_rate` bytes a second arrived for `stall` seconds."""
        now, window = time.monotonic(), self._limits.stall
        with self._buffers.lock:
            moving = [reply for reply in self._buffers.accepted.values() if not reply.complete and reply.session]
        for reply in moving:
            with reply.lock:
                since, before = reply.rate_checkpoint
                if now - since < window or reply.complete or (session := reply.session) is None:
                    continue
                rate = (reply.received - before) / (now - since)
                if rate >= self._limits.least_rate:
                    reply.rate_checkpoint = (now, reply.received)
                    continue
                text = (
                    f"its reply came at {rate:.0f} bytes/s for {now - since:.0f} s, the least is "
                    f"{self._limits.least_rate}; {reply.received} of {reply.offer.size} bytes had arrived"
                )
                self._exclude(reply.request.node_id, reply.site, text)
                self._fail(session, reply.request, pb.REASON_STALLED, text)

    def _largest(self, request: PendingRequest) -> int:
        """Bytes that a reply to `request` may have."""
        most = self._limits.max_message_bytes
        return most if request.reply_bytes is None else min(most, request.reply_bytes)

    def _check(self, request: PendingRequest, offer: pb.Offer) -> None:
        if offer.plain_size > self._largest(request):
            raise TransportError(f"the reply is oversized: {offer.plain_size} bytes, limit {self._largest(request)}")
        if offer.size != offer.plain_size + TAG * segment_count(offer.plain_size):
            raise TransportError("the offer's sizes do not belong together")
        frames.check_offer(offer)
        asked, envelope = request.envelope, frames.envelope_from_proto(offer.envelope)
        if (envelope.reply_to_message_id, envelope.run_id) != (asked.message_id, asked.run_id):
            raise TransportError("the offer's envelope is not of a reply to this task")

    def _resume(self, session: Session, held: IncomingReply) -> None:
        """The site offers again the very reply of which a part is here."""
        with held.lock:
            held.session, held.rate_checkpoint = session, (time.monotonic(), held.received)
            if held.complete:
                # Its Done follows when it has been decoded.
                return
            if held.received:
                log.info("%s resumes its reply at byte %d of %d", session.peer.site, held.received, held.offer.size)
            session.sender.post(frames.accept(held.offer.transfer_id, held.received))

    def _accept_waiting(self) -> None:
        """Accept waiting replies in order. One loop per thread, however many of them fail on the way."""
        if getattr(self._accepting, "now", False):
            return
        self._accepting.now = True
        try:
            while (accepted := self._buffers.accept_next()) is not None:
                self._accept(*accepted)
        finally:
            self._accepting.now = False

    def _accept(self, reply: IncomingReply, session: Session) -> None:
        request, offer = reply.request, reply.offer
        binding = Binding(
            federation=self._federation,
            run_id=request.envelope.run_id,
            group_id=request.envelope.group_id,
            message_id=request.envelope.message_id,
            site=session.peer.site,
        )
        try:
            reply.stream = self._opener.open(offer.seal_header, binding, offer.plain_size, self._memory.take)
        except SealError as error:
            self._fail(session, request, pb.REASON_SEAL, str(error))
            return
        if offer.inline:
            self.on_chunk(session, frames.Chunk(offer.transfer_id, 0, offer.inline))
            offer.ClearField("inline")
        else:
            session.sender.post(frames.accept(offer.transfer_id, 0))

    def _take(self, session: Session, reply: IncomingReply, stream: OpenStream, chunk: frames.Chunk) -> None:
        try:
            spooling = reply.memory_was_short or reply.spool is not None
            if not spooling and self._buffers.charge(reply, len(chunk.data)):
                stream.feed(chunk.data)
            else:
                self._buffers.spool(reply, chunk)
            reply.received += len(chunk.data)
            if reply.received < reply.offer.size:
                return
            if reply.spool is not None:
                with self._buffers.lock:
                    # Its stream may end at this very moment; a complete reply is read all the same.
                    reply.session, reply.in_memory, reply.complete = session, False, True
                self._due.set()
                return
            reply.complete = True
            self._finish(session, reply, stream)
        except Exception as error:
            self._failed_on(session, reply, error)

    def _finish(self, session: Session, reply: IncomingReply, stream: OpenStream) -> None:
        """All chunks have been fed: hand the reply to whoever waits. Raises SealError, TransportError."""
        content = decode(stream.finish())
        reply.stream = None
        identity = reply.offer.transfer_id
        envelope = _reply_envelope(reply.request, frames.envelope_from_proto(reply.offer.envelope))
        session.sender.confirm(identity)
        # Last, for it wakes a thread that wants the interpreter.
        if not self._pending.finish(reply.request, rebuild(envelope, content)):
            self.release([identity])

    def _run(self) -> None:
        """Accept what is due by time alone, and read back what is on disk."""
        while not self._stopping:
            self._due.wait(_LOOK_AGAIN if self._buffers.waiting or self._buffers.any_on_disk() else None)
            self._due.clear()
            try:
                while not self._stopping and (reply := self._buffers.load_next()) is not None:
                    self._read_back(reply)
                self._accept_waiting()
            except Exception:
                log.exception("the server failed on a reply that waited")

    def _read_back(self, reply: IncomingReply) -> None:
        session = reply.session
        assert session is not None, "a complete reply has a session"
        try:
            with reply.lock:
                if not reply.dropped:
                    self._finish(session, reply, reply.read_back())
        except Exception as error:
            self._failed_on(session, reply, error)
        finally:
            reply.close()

    def _failed_on(self, session: Session, reply: IncomingReply, error: Exception) -> None:
        """Turn what `error` says of a reply into a refusal. Raises `error` if it is the server's own fault."""
        request = reply.request
        if isinstance(error, SealError):
            self._fail(session, request, pb.REASON_SEAL, str(error))
        elif isinstance(error, TransportError):
            self._fail(session, request, pb.REASON_MALFORMED, str(error))
        elif isinstance(error, OSError):
            self._ask_again(session, reply, error)
        else:
            # What the reply holds is free for others, and whoever waits for it is told.
            self._fail(session, request, pb.REASON_UNAVAILABLE, "the server failed on it")
            raise error

    def _ask_again(self, session: Session, reply: IncomingReply, error: OSError) -> None:
        """There is no disk for a reply: its site is to offer it again, and it is accepted when there is memory."""
        self._buffers.disk_failed(error)
        identity = reply.offer.transfer_id
        with self._buffers.lock:
            self._buffers.drop(identity)
        self._refuse(session, pb.REASON_STALLED, "the server has no room for it now; offer it again", identity)
        self._accept_waiting()

    def _exclude(self, node_id: int, site: str, text: str) -> None:
        with self._buffers.lock:
            known = node_id in self._excluded
            self._excluded[node_id] = text
        if not known:
            log.warning("%s is not asked again in this run: %s", site, text)

    def _fail(self, session: Session, request: PendingRequest, reason: pb.Reason, text: str) -> None:
        """Refuse a reply for good: its site is told, and whoever waits gets an error in its place."""
        identity = request.envelope.message_id
        # A site offers a stalled transfer again; this one is over.
        told = pb.REASON_NOT_ASKED if reason == pb.REASON_STALLED else reason
        self._refuse(session, told, text, identity)
        code = _CODES.get(reason, RefusalCode.MALFORMED)
        self._pending.finish(request, error_reply(request, code, f"the reply was refused: {text}"))
        self.release([identity])

    def _refuse(self, session: Session, reason: pb.Reason, text: str, identity: str) -> None:
        log.warning("refused a reply of %s (%s): %s", session.peer.site, frames.reason_name(reason), text)
        session.sender.post(frames.refuse(reason, text, identity))


def _count_idle(session: Session) -> None:
    """Each such offer is answered and logged, so a stream may make a few by accident, and no more."""
    session.idle_offers += 1
    if session.idle_offers > _MAX_IDLE_OFFERS:
        raise TransportError(f"more than {_MAX_IDLE_OFFERS} offers of replies that are not asked for, or on their way")


def error_reply(request: PendingRequest, code: int, reason: str) -> Message:
    """What the reader gets when no usable reply will come."""
    return rebuild(_reply_envelope(request, request.envelope), Error(int(code), reason))


def _reply_envelope(request: PendingRequest, said: Envelope) -> Envelope:
    """The reply's envelope. Only its time is taken from what the site said; its identity follows from the request."""
    asked = request.envelope
    return Envelope(
        run_id=asked.run_id,
        message_id=f"reply-{asked.message_id}",
        reply_to_message_id=asked.message_id,
        src_node_id=asked.dst_node_id,
        dst_node_id=SERVER_NODE_ID,
        group_id=asked.group_id,
        message_type=asked.message_type,
        created_at=said.created_at,
        ttl=said.ttl,
    )
