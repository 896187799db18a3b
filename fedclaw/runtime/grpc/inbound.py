"""Replies on their way in: how many at a time, opened segment by segment, resumed where they broke off.

Memory is reserved for a reply only after it was found to answer an open task of the very site that offers it and when
it fits the budget; until then the site waits for its Accept. That is the server's backpressure: replies held unread
count against the same budget, so a slow reader slows the sites and not the other way round.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from flwr.app import Error, Message

from fedclaw.errors import SealError, TransportError
from fedclaw.federation.plan import RefusalCode
from fedclaw.runtime.flower import SERVER_NODE_ID, Envelope, rebuild
from fedclaw.runtime.grpc import wire
from fedclaw.runtime.grpc.codec import Content, decode
from fedclaw.runtime.grpc.desk import Desk, Task
from fedclaw.runtime.grpc.limits import Limits
from fedclaw.runtime.grpc.pieces import Piece
from fedclaw.runtime.grpc.protocol import link_pb2 as pb
from fedclaw.runtime.grpc.session import Session
from fedclaw.security.seal import TAG, Binding, Opener, OpenStream, segment_count

log = logging.getLogger(__name__)

_CODES = {pb.REASON_OVERSIZED: RefusalCode.UPDATE_SIZE}


@dataclass
class _Arrival:
    """One reply from its offer to its reader."""

    task: Task
    offer: pb.Offer
    session: Session | None
    stream: OpenStream | None = None
    received: int = 0
    complete: bool = False
    moved: float = field(default_factory=time.monotonic)

    @property
    def cost(self) -> int:
        return int(self.offer.plain_size)


class Arrivals:
    """All replies that are offered, arriving or unread."""

    def __init__(self, federation: str, opener: Opener, desk: Desk, limits: Limits) -> None:
        self._federation = federation
        self._opener = opener
        self._desk = desk
        self._limits = limits
        self._lock = threading.RLock()
        self._admitted: dict[str, _Arrival] = {}
        self._waiting: OrderedDict[str, _Arrival] = OrderedDict()
        desk.on_read = self.forget

    def offered(self, session: Session, offer: pb.Offer) -> None:
        """A site has a reply."""
        identity, node_id = offer.transfer_id, session.peer.node_id
        task = self._desk.find(node_id, identity)
        if task is None:
            if self._desk.was_answered(node_id, identity):
                session.sender.post(wire.done(identity))
            else:
                self._say_no(session, pb.REASON_NOT_ASKED, "this reply was not asked for, or came too late", identity)
            return
        try:
            self._check(task, offer)
        except TransportError as error:
            reason = pb.REASON_OVERSIZED if offer.plain_size > self._limits.max_message_bytes else pb.REASON_MALFORMED
            self._fail(session, task, reason, str(error))
            return
        with self._lock:
            held = self._admitted.get(identity)
            if held is not None and held.offer.stamp == offer.stamp and held.offer.size == offer.size:
                held.session, held.moved = session, time.monotonic()
                if held.received:
                    log.info("%s resumes its reply at byte %d of %d", session.peer.site, held.received, offer.size)
                session.sender.post(wire.accept(identity, held.received))
                return
            self._admitted.pop(identity, None)
            self._waiting[identity] = _Arrival(task, offer, session)
        self._admit()
        # What has to wait is sent again when its turn comes; until then it takes no memory here.
        with self._lock:
            if identity in self._waiting:
                offer.ClearField("inline")

    def chunk(self, session: Session, chunk: Piece) -> None:
        """The next piece of a reply. Raises TransportError for a piece that was not accepted from there."""
        with self._lock:
            arrival = self._admitted.get(chunk.transfer_id)
        if arrival is None or arrival.session is not session or arrival.stream is None or arrival.complete:
            # Of a transfer that was refused or withdrawn while this piece was on its way.
            return
        if chunk.offset != arrival.received:
            raise TransportError(f"chunk at byte {chunk.offset}, expected {arrival.received}")
        task = arrival.task
        try:
            arrival.stream.feed(chunk.data)
            arrival.received += len(chunk.data)
            arrival.moved = time.monotonic()
            if arrival.received < arrival.offer.size:
                return
            arrival.complete = True
            content = decode(arrival.stream.finish())
        except SealError as error:
            self._fail(session, task, pb.REASON_SEAL, str(error))
        except TransportError as error:
            self._fail(session, task, pb.REASON_MALFORMED, str(error))
        else:
            arrival.stream = None
            self._finish(session, arrival, content)

    def forget(self, ids: Collection[str]) -> None:
        """Those replies were read, or are not wanted any more; others may come."""
        with self._lock:
            for identity in ids:
                self._admitted.pop(identity, None)
                self._waiting.pop(identity, None)
        self._admit()

    def detach(self, session: Session) -> None:
        """The stream is gone; what has arrived by it is kept for resumption while nobody needs the room."""
        with self._lock:
            for identity in [key for key, arrival in self._waiting.items() if arrival.session is session]:
                del self._waiting[identity]
            for arrival in self._admitted.values():
                if arrival.session is session and not arrival.complete:
                    arrival.session = None
        self._admit()

    def drop_stalled(self) -> None:
        """Take the place of a transfer that does not move while others wait."""
        oldest = time.monotonic() - self._limits.stall
        with self._lock:
            stalled = [
                arrival
                for arrival in self._admitted.values()
                if self._waiting and not arrival.complete and arrival.session is not None and arrival.moved < oldest
            ]
            for arrival in stalled:
                self._admitted.pop(arrival.offer.transfer_id)
        for arrival in stalled:
            assert arrival.session is not None
            text = f"nothing arrived for {self._limits.stall:g} s while others waited"
            self._say_no(arrival.session, pb.REASON_STALLED, text, arrival.offer.transfer_id)
        if stalled:
            self._admit()

    def _check(self, task: Task, offer: pb.Offer) -> None:
        limit = self._limits.max_message_bytes
        if offer.plain_size > limit:
            raise TransportError(f"the reply is oversized: {offer.plain_size} bytes, limit {limit}")
        if offer.size != offer.plain_size + TAG * segment_count(offer.plain_size) or not offer.stamp:
            raise TransportError("the offer's sizes do not belong together")
        if offer.inline and len(offer.inline) != offer.size:
            raise TransportError("the offer's content is not of the size that it says")
        asked, envelope = task.envelope, wire.envelope_from_proto(offer.envelope)
        if (envelope.reply_to_message_id, envelope.run_id) != (asked.message_id, asked.run_id):
            raise TransportError("the offer's envelope is not of a reply to this task")

    def _admit(self) -> None:
        """Accept those that wait, in order, as far as the budget goes."""
        while (arrival := self._next_admitted()) is not None:
            session, task, offer = arrival.session, arrival.task, arrival.offer
            assert session is not None
            binding = Binding(
                federation=self._federation,
                run_id=task.envelope.run_id,
                group_id=task.envelope.group_id,
                message_id=task.envelope.message_id,
                site=session.peer.site,
            )
            try:
                arrival.stream = self._opener.open(offer.seal_header, binding, offer.plain_size)
            except SealError as error:
                self._fail(session, task, pb.REASON_SEAL, str(error))
            else:
                if offer.inline:
                    self.chunk(session, Piece(offer.transfer_id, 0, offer.inline))
                else:
                    session.sender.post(wire.accept(offer.transfer_id, 0))

    def _next_admitted(self) -> _Arrival | None:
        with self._lock:
            if not self._waiting:
                return None
            identity, arrival = next(iter(self._waiting.items()))
            used = sum(item.cost for item in self._admitted.values())
            if used and used + arrival.cost > self._limits.inbound_bytes:
                broken_off = [key for key, item in self._admitted.items() if item.session is None and not item.complete]
                if not broken_off:
                    return None
                # Whoever is connected goes before the remains of a broken connection.
                for key in broken_off:
                    del self._admitted[key]
                return self._next_admitted()
            del self._waiting[identity]
            self._admitted[identity] = arrival
            arrival.moved = time.monotonic()
            return arrival

    def _finish(self, session: Session, arrival: _Arrival, content: Content) -> None:
        identity = arrival.offer.transfer_id
        reply = rebuild(_reply_envelope(arrival.task, wire.envelope_from_proto(arrival.offer.envelope)), content)
        if not self._desk.finish(arrival.task, reply):
            self.forget([identity])
        session.sender.post(wire.done(identity))

    def _fail(self, session: Session, task: Task, reason: pb.Reason, text: str) -> None:
        """Refuse a reply for good: the site is told, and whoever waits gets an error in its place."""
        identity = task.envelope.message_id
        self._say_no(session, reason, text, identity)
        self.forget([identity])
        code = _CODES.get(reason, RefusalCode.MALFORMED)
        self._desk.finish(task, error_reply(task, code, f"the reply was refused: {text}"))

    def _say_no(self, session: Session, reason: pb.Reason, text: str, identity: str) -> None:
        log.warning("refused a reply of %s (%s): %s", session.peer.site, wire.reason_name(reason), text)
        session.sender.post(wire.refuse(reason, text, identity))


def error_reply(task: Task, code: int, reason: str) -> Message:
    """What the reader gets when no usable reply will come."""
    envelope = task.envelope
    made = _reply_envelope(task, envelope)
    return rebuild(made, Error(int(code), reason))


def _reply_envelope(task: Task, said: Envelope) -> Envelope:
    """The reply's envelope: identity from what was asked, only its time from what the site said."""
    asked = task.envelope
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
