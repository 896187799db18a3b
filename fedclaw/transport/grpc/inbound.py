"""Replies on their way in: side by side, opened segment by segment, resumed where they broke off.

Nothing is reserved for a reply before it was found to answer an open task of the very site that offers it, and to be no
larger than that question can yield. Memory is charged as bytes arrive, never as they are promised. Beyond
`Limits.inbound_bytes` the pieces of a reply go to disk, sealed as they came, and are opened from there one reply after
the other as the reader gets on. So a site that promises much and sends little takes nothing from anybody, and a slow
reader costs disk and no memory.

While memory is short and replies arrive fast, the next one waits for its Accept, for `_PATIENCE` seconds at most: to go
one after the other through memory is faster then than all at once through the disk.

Who is slow is measured by rate: a reply of which too little arrives is given up, and a site whose reply could not have
arrived in the time of its question, at the rate at which it came, is named, and not to be asked again.
"""

import logging
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path

from flwr.app import Error, Message

from fedclaw.errors import SealError, TransportError
from fedclaw.identity.seal import SEGMENT, TAG, Binding, Opener, OpenStream, segment_count
from fedclaw.protocol.message_identity import SERVER_NODE_ID, Envelope, rebuild
from fedclaw.protocol.plan import RefusalCode
from fedclaw.transport.grpc import wire
from fedclaw.transport.grpc.arrival import Arrival
from fedclaw.transport.grpc.codec import Content, decode
from fedclaw.transport.grpc.desk import Desk, Task
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.pieces import Piece
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.session import Session

log = logging.getLogger(__name__)

_CODES = {
    pb.REASON_OVERSIZED: RefusalCode.UPDATE_SIZE,
    pb.REASON_STALLED: RefusalCode.SLOW,
    pb.REASON_UNAVAILABLE: RefusalCode.FAILED,
}

_PATIENCE = 4.0
"""Seconds that a reply waits at most for its Accept."""
_LOOK_AGAIN = 0.05
_DISK_REST = 30.0
"""Seconds for which nothing is written to a disk that refused."""
_REMEMBERED = 4096
_IDLE_OFFERS = 256


class Arrivals:
    """All replies that are offered, arriving or unread."""

    def __init__(
        self, federation: str, opener: Opener, desk: Desk, limits: Limits, directory: Path | None = None
    ) -> None:
        """`directory` is where there is disk for replies that memory does not hold; None: the temporary directory."""
        self._federation = federation
        self._opener = opener
        self._desk = desk
        self._limits = limits
        self._directory = directory
        self._lock = threading.RLock()
        self._due = threading.Event()
        self._admitted: dict[str, Arrival] = {}
        self._waiting: OrderedDict[str, Arrival] = OrderedDict()
        self._late: OrderedDict[str, tuple[Task, str]] = OrderedDict()
        self._set_aside: dict[int, str] = {}
        self._no_disk_until = 0.0
        self._admitting = threading.local()
        self._stopping = False
        self._thread = threading.Thread(target=self._pace, name="fedclaw-spool", daemon=True)
        desk.on_read = self.forget

    def start(self) -> None:
        """Begin to admit those that wait, and to read back what went to disk."""
        self._thread.start()

    def stop(self) -> None:
        """Take nothing more, and let go of all files."""
        self._stopping = True
        self._due.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            for identity in list(self._admitted):
                self._drop(identity)

    def held_bytes(self) -> int:
        """Memory that replies take now."""
        with self._lock:
            return sum(arrival.memory for arrival in self._admitted.values())

    def set_aside(self) -> Mapping[int, str]:
        """Nodes not to be asked again, and why: they sent more than was asked for, or too slowly."""
        with self._lock:
            return dict(self._set_aside)

    def late(self, ids: Collection[str]) -> list[tuple[Task, str]]:
        """Those of `ids` whose reply was given up because it came too slowly, and how slowly. Told once."""
        with self._lock:
            return [item for identity in ids if (item := self._late.pop(identity, None)) is not None]

    def offered(self, session: Session, offer: pb.Offer) -> None:
        """A site has a reply. Raises TransportError for one offer too many that changes nothing."""
        identity, node_id = offer.transfer_id, session.peer.node_id
        task = self._desk.find(node_id, identity)
        if task is None:
            _count_idle(session)
            if self._desk.was_answered(node_id, identity):
                session.sender.post(wire.done(identity))
            else:
                self._say_no(session, pb.REASON_NOT_ASKED, "this reply was not asked for, or came too late", identity)
            return
        try:
            self._check(task, offer)
        except TransportError as error:
            oversized = offer.plain_size > self._most(task)
            if oversized:
                self._put_aside(node_id, session.peer.site, str(error))
            self._fail(session, task, pb.REASON_OVERSIZED if oversized else pb.REASON_MALFORMED, str(error))
            return
        with self._lock:
            held = self._admitted.get(identity)
        if held is not None and held.offer.stamp == offer.stamp and held.offer.size == offer.size:
            if held.session is session:
                _count_idle(session)
            self._resume(session, held)
            return
        with self._lock:
            earlier = (0.0, 0)
            if (former := self._admitted.get(identity) or self._waiting.get(identity)) is not None:
                # Who offers another reply again and again is judged by all that came.
                first, before = former.earlier
                earlier = (first or former.began, before + former.received)
            self._drop(identity)
            self._waiting[identity] = Arrival(task, offer, session, site=session.peer.site, earlier=earlier)
        self._admit()
        # What has to wait is sent again when its turn comes; until then it takes no memory here.
        with self._lock:
            if identity in self._waiting:
                offer.ClearField("inline")
                self._due.set()

    def chunk(self, session: Session, chunk: Piece) -> None:
        """The next piece of a reply. Raises TransportError for a piece that was not accepted from there."""
        with self._lock:
            arrival = self._admitted.get(chunk.transfer_id)
        if arrival is None:
            # Of a transfer that was refused or withdrawn while this piece was on its way.
            return
        try:
            with arrival.lock:
                stream = arrival.stream
                if arrival.session is not session or stream is None or arrival.complete or arrival.gone:
                    return
                if chunk.offset != arrival.received:
                    raise TransportError(f"chunk at byte {chunk.offset}, expected {arrival.received}")
                self._take(session, arrival, stream, chunk)
        finally:
            if arrival.gone:
                arrival.close()

    def _take(self, session: Session, arrival: Arrival, stream: OpenStream, chunk: Piece) -> None:
        try:
            if not arrival.to_disk and arrival.spool is None and self._charge(arrival, len(chunk.data)):
                stream.feed(chunk.data)
            else:
                self._spool(arrival, chunk)
            arrival.received += len(chunk.data)
            if arrival.received < arrival.offer.size:
                return
            if arrival.spool is not None:
                with self._lock:
                    # Its stream may end at this very moment; whole, it is read all the same.
                    arrival.session, arrival.in_turn, arrival.complete = session, False, True
                self._due.set()
                return
            arrival.complete = True
            self._open(session, arrival, stream)
        except SealError as error:
            self._fail(session, arrival.task, pb.REASON_SEAL, str(error))
        except TransportError as error:
            self._fail(session, arrival.task, pb.REASON_MALFORMED, str(error))
        except OSError as error:
            self._put_back(session, arrival, error)
        except Exception:
            self._give_up(session, arrival.task)
            raise

    def _open(self, session: Session, arrival: Arrival, stream: OpenStream) -> None:
        """All of it has been fed. Raises SealError, TransportError."""
        content = decode(stream.finish())
        arrival.stream = None
        self._finish(session, arrival, content)

    def forget(self, ids: Collection[str]) -> None:
        """Those replies were read, or are not wanted any more; others may come."""
        now = time.monotonic()
        with self._lock:
            self.judge([key for key in ids if (one := self._admitted.get(key)) and one.task.expires <= now])
            for identity in ids:
                self._drop(identity)
                self._waiting.pop(identity, None)
        self._admit()
        self._due.set()

    def judge(self, ids: Collection[str]) -> None:
        """The time of those questions is over: who is still sending is late, if it is its rate that is to blame."""
        now = time.monotonic()
        with self._lock:
            for identity in ids:
                arrival = self._admitted.get(identity)
                if arrival is not None and (slow := arrival.forfeits(now)) is not None:
                    self._note_late(arrival, slow)

    def detach(self, session: Session) -> None:
        """The stream is gone; what has arrived by it is kept for resumption."""
        with self._lock:
            for identity in [key for key, arrival in self._waiting.items() if arrival.session is session]:
                del self._waiting[identity]
            for arrival in self._admitted.values():
                if arrival.session is session and not arrival.complete:
                    arrival.session, arrival.left = None, time.monotonic()
        self._admit()

    def drop_slow(self) -> None:
        """Give up replies of which less than `least_rate` bytes a second arrived for `stall` seconds."""
        now, window = time.monotonic(), self._limits.stall
        with self._lock:
            moving = [arrival for arrival in self._admitted.values() if not arrival.complete and arrival.session]
        for arrival in moving:
            with arrival.lock:
                since, before = arrival.mark
                if now - since < window or arrival.complete or (session := arrival.session) is None:
                    continue
                rate = (arrival.received - before) / (now - since)
                if rate >= self._limits.least_rate:
                    arrival.mark = (now, arrival.received)
                    continue
                text = (
                    f"its reply came at {rate:.0f} bytes/s for {now - since:.0f} s, the least is "
                    f"{self._limits.least_rate}; {arrival.received} of {arrival.offer.size} bytes had arrived"
                )
                self._put_aside(arrival.task.node_id, arrival.site, text)
                self._fail(session, arrival.task, pb.REASON_STALLED, text)

    def _most(self, task: Task) -> int:
        """Bytes that a reply to `task` may have."""
        most = self._limits.max_message_bytes
        return most if task.reply_bytes is None else min(most, task.reply_bytes)

    def _check(self, task: Task, offer: pb.Offer) -> None:
        if offer.plain_size > self._most(task):
            raise TransportError(f"the reply is oversized: {offer.plain_size} bytes, limit {self._most(task)}")
        if offer.size != offer.plain_size + TAG * segment_count(offer.plain_size):
            raise TransportError("the offer's sizes do not belong together")
        wire.check_offer(offer)
        asked, envelope = task.envelope, wire.envelope_from_proto(offer.envelope)
        if (envelope.reply_to_message_id, envelope.run_id) != (asked.message_id, asked.run_id):
            raise TransportError("the offer's envelope is not of a reply to this task")

    def _resume(self, session: Session, held: Arrival) -> None:
        """The site is back, with the very reply of which a part is here."""
        with held.lock:
            held.session, held.mark = session, (time.monotonic(), held.received)
            if held.complete:
                # Its Done follows when it has been read.
                return
            if held.received:
                log.info("%s resumes its reply at byte %d of %d", session.peer.site, held.received, held.offer.size)
            session.sender.post(wire.accept(held.offer.transfer_id, held.received))

    def _admit(self) -> None:
        """Accept those that wait, in order. One loop for each thread, however many of them fail on the way."""
        if getattr(self._admitting, "now", False):
            return
        self._admitting.now = True
        try:
            while (admitted := self._next_admitted()) is not None:
                self._accept(*admitted)
        finally:
            self._admitting.now = False

    def _accept(self, arrival: Arrival, session: Session) -> None:
        task, offer = arrival.task, arrival.offer
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
            return
        if offer.inline:
            self.chunk(session, Piece(offer.transfer_id, 0, offer.inline))
            offer.ClearField("inline")
        else:
            session.sender.post(wire.accept(offer.transfer_id, 0))

    def _next_admitted(self) -> tuple[Arrival, Session] | None:
        """Whose turn has come, and by which stream it was offered, which may end at any moment."""
        now = time.monotonic()
        with self._lock:
            if not self._waiting:
                return None
            identity, arrival = next(iter(self._waiting.items()))
            session = arrival.session
            assert session is not None, "what waits has a stream"
            if not self._may_begin(arrival, now):
                return None
            del self._waiting[identity]
            arrival.to_disk = now >= self._no_disk_until and not self._fits(arrival, now)
            self._admitted[identity] = arrival
            arrival.began, arrival.mark = now, (now, 0)
            return arrival, session

    def _may_begin(self, arrival: Arrival, now: float) -> bool:
        others = self._admitted.values()
        if now < self._no_disk_until:
            # What is begun now has to end in memory.
            used = sum(other.cost for other in others)
            return not used or used + arrival.cost <= self._limits.inbound_bytes
        patient = now - arrival.offered < _PATIENCE and any(self._is_fast(other, now) for other in others)
        return not patient or self._fits(arrival, now)

    def _is_fast(self, arrival: Arrival, now: float) -> bool:
        return arrival.is_fast(now, self._limits.inbound_bytes)

    def _fits(self, arrival: Arrival, now: float) -> bool:
        """Whether memory has room for all of it, beside what others take and what the fast ones are about to."""
        used = sum(
            other.cost if self._is_fast(other, now) else other.memory
            for other in self._admitted.values()
            if other is not arrival
        )
        return not used or used + arrival.cost <= self._limits.inbound_bytes

    def _charge(self, arrival: Arrival, more: int) -> bool:
        """Take memory for that many bytes of it, if there is any; alone, it may have all that it needs."""
        with self._lock:
            others = sum(other.memory for other in self._admitted.values() if other is not arrival)
            if others and others + arrival.in_memory + more > self._limits.inbound_bytes:
                return False
            arrival.in_memory += more
            return True

    def _spool(self, arrival: Arrival, chunk: Piece) -> None:
        """Put a piece on disk as it is. Raises SealError for one that is no segment, OSError."""
        expected = min(SEGMENT, arrival.cost - arrival.received // (SEGMENT + TAG) * SEGMENT) + TAG
        if len(chunk.data) != expected:
            raise SealError(f"a segment has {len(chunk.data)} bytes instead of {expected}")
        if arrival.spool is None:
            # It has no name: nobody else can open it, and it is gone when this process is, however that ends.
            arrival.spool = tempfile.TemporaryFile(buffering=0, dir=self._directory)  # noqa: SIM115 - closed with it
        with self._lock:
            used = sum(other.received for other in self._admitted.values() if other.spool is not None)
        if used + expected > self._limits.spool_bytes:
            raise OSError(f"replies take {used} bytes of disk already, the limit is {self._limits.spool_bytes}")
        view = memoryview(chunk.data)
        while view:
            view = view[arrival.spool.write(view) :]

    def _put_back(self, session: Session, arrival: Arrival, error: OSError) -> None:
        """There is no disk for it: it is asked for again when there is memory."""
        self._no_disk_until = time.monotonic() + _DISK_REST
        place = self._directory or tempfile.gettempdir()
        log.error(
            "there is no room on disk for replies that wait, in %s: %s; they come one after the other now", place, error
        )
        identity = arrival.offer.transfer_id
        with self._lock:
            self._drop(identity)
        self._say_no(session, pb.REASON_STALLED, "the server has no room for it now; offer it again", identity)
        self._admit()

    def _pace(self) -> None:
        """What is due by time alone, and what is on disk. A fault in it costs nobody else anything."""
        while not self._stopping:
            self._due.wait(_LOOK_AGAIN if self._waiting or self._on_disk else None)
            self._due.clear()
            try:
                while not self._stopping and (arrival := self._next_spooled()) is not None:
                    self._read_back(arrival)
                self._admit()
            except Exception:
                log.exception("the server failed on a reply that waited")

    @property
    def _on_disk(self) -> bool:
        """Whether a whole reply waits there for memory."""
        with self._lock:
            return any(arrival.complete and not arrival.in_turn for arrival in self._admitted.values())

    def _next_spooled(self) -> Arrival | None:
        """The next reply on disk, if memory has room for it beside those that wait for their reader."""
        with self._lock:
            now, admitted = time.monotonic(), self._admitted.values()
            arrival = next((one for one in admitted if one.complete and not one.in_turn), None)
            if arrival is None:
                return None
            # One at least goes on, however much a slow one holds; what is fast or waits for its reader is soon gone.
            soon = any(self._is_fast(one, now) if not one.complete else one.in_turn for one in admitted)
            if soon and not self._fits(arrival, now):
                return None
            arrival.in_turn = True
            return arrival

    def _read_back(self, arrival: Arrival) -> None:
        session, task = arrival.session, arrival.task
        assert session is not None
        try:
            with arrival.lock:
                if not arrival.gone:
                    self._open(session, arrival, arrival.read_back())
        except SealError as error:
            self._fail(session, task, pb.REASON_SEAL, str(error))
        except TransportError as error:
            self._fail(session, task, pb.REASON_MALFORMED, str(error))
        except OSError as error:
            self._put_back(session, arrival, error)
        except Exception:
            self._give_up(session, task)
            raise
        finally:
            arrival.close()

    def _drop(self, identity: str) -> None:
        """Under the lock: forget a reply, and close its file unless somebody is at work on it, who will."""
        if (arrival := self._admitted.pop(identity, None)) is not None:
            arrival.gone = True
            if arrival.lock.acquire(blocking=False):
                try:
                    arrival.close()
                finally:
                    arrival.lock.release()

    def _finish(self, session: Session, arrival: Arrival, content: Content) -> None:
        identity = arrival.offer.transfer_id
        reply = rebuild(_reply_envelope(arrival.task, wire.envelope_from_proto(arrival.offer.envelope)), content)
        if not self._desk.finish(arrival.task, reply):
            self.forget([identity])
        session.sender.post(wire.done(identity))

    def _note_late(self, arrival: Arrival, text: str) -> None:
        self._late[arrival.task.envelope.message_id] = (arrival.task, text)
        while len(self._late) > _REMEMBERED:
            self._late.popitem(last=False)
        self._put_aside(arrival.task.node_id, arrival.site, text)

    def _put_aside(self, node_id: int, site: str, text: str) -> None:
        with self._lock:
            known = node_id in self._set_aside
            self._set_aside[node_id] = text
        if not known:
            log.warning("%s is not asked again in this run: %s", site, text)

    def _fail(self, session: Session, task: Task, reason: pb.Reason, text: str) -> None:
        """Refuse a reply for good: the site is told, and whoever waits gets an error in its place."""
        identity = task.envelope.message_id
        # A site offers a stalled transfer again; this one is over.
        told = pb.REASON_NOT_ASKED if reason == pb.REASON_STALLED else reason
        self._say_no(session, told, text, identity)
        code = _CODES.get(reason, RefusalCode.MALFORMED)
        self._desk.finish(task, error_reply(task, code, f"the reply was refused: {text}"))
        self.forget([identity])

    def _give_up(self, session: Session, task: Task) -> None:
        """A fault of the server's own: what the reply holds is free for others, and whoever waits for it is told."""
        self._fail(session, task, pb.REASON_UNAVAILABLE, "the server failed on it")

    def _say_no(self, session: Session, reason: pb.Reason, text: str, identity: str) -> None:
        log.warning("refused a reply of %s (%s): %s", session.peer.site, wire.reason_name(reason), text)
        session.sender.post(wire.refuse(reason, text, identity))


def _count_idle(session: Session) -> None:
    """Each is answered, and told of in the log: a stream may have some of them, by accident, and no more."""
    session.idle_offers += 1
    if session.idle_offers > _IDLE_OFFERS:
        raise TransportError(f"more than {_IDLE_OFFERS} offers of replies that are not asked for, or on their way")


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
