"""Where the bytes of incoming replies are kept: in memory up to a limit, then on disk; the rest wait their turn.

Memory is charged as bytes arrive, never as they are promised. So a site that promises much and sends little takes
nothing from others. When memory is full, chunks are written to disk sealed, as they came, and opened from there one
reply after the other as the reader takes them. So a slow reader costs disk, not memory.

While memory is short but the replies under way are fast, the next one waits for its Accept, `_PATIENCE` seconds at
most: receiving one after the other in memory is then faster than all at once through the disk. `IncomingReply` knows
how much of a reply has arrived, what memory it takes, and whether its rate is good enough.

`BufferPool` keeps the memory of a reply that has been read for the next one: the kernel need not clear its pages again.
"""

import logging
import tempfile
import threading
import time
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import SealError
from fedclaw.identity.seal import SEGMENT, OpenStream, fresh_buffer
from fedclaw.identity.stream import TAG
from fedclaw.transport.grpc.frames import Chunk
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.pending_requests import PendingRequest
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.session import Session

log = logging.getLogger(__name__)

_SMALLEST = 1 << 20
"""Bytes: below, the allocator keeps the memory by itself."""


class BufferPool:
    """Hands out buffers, and keeps one that nobody looks into any more. Safe to use from several threads."""

    def __init__(self, largest: int) -> None:
        """No buffer of more than `largest` bytes is kept."""
        self._largest = largest
        # Appended to and popped from in one step each: buffers come back from whatever thread drops the last view.
        self._idle: deque[NDArray[np.uint8]] = deque(maxlen=1)

    def take(self, size: int) -> memoryview:
        """A buffer of `size` bytes, whose content is anything. It comes back by itself with the last view of it."""
        if not _SMALLEST <= size <= self._largest:
            return fresh_buffer(size)
        block = self._block(size)
        lease = block[:size]
        weakref.finalize(lease, self._idle.append, block).atexit = False
        return lease.data

    def _block(self, size: int) -> NDArray[np.uint8]:
        try:
            block = self._idle.pop()
        except IndexError:
            block = None
        return block if block is not None and size <= block.size <= 2 * size else np.empty(size, dtype=np.uint8)


_SOON = 1.0
"""A reply counts as fast if, at its rate, it is complete within this many seconds."""
_GRACE = 0.5
"""A reply that memory could hold counts as fast for this many seconds, before its rate is known."""
_FAIR_SHARE = 4
"""A reply that has been arriving for less than this fraction of its request's time is not judged by its rate."""


@dataclass
class IncomingReply:
    """One reply, from its offer until it is read. One thread delivers its chunks; `lock` guards a change of session.

    All times are seconds on the monotonic clock.
    """

    request: PendingRequest
    offer: pb.Offer
    session: Session | None
    stream: OpenStream | None = None
    spool: IO[bytes] | None = None
    """An unnamed file with the sealed chunks for which there was no memory, in order."""
    received: int = 0
    """Sealed bytes that have arrived."""
    memory_was_short: bool = False
    """When the reply was accepted, memory had no room for all of it."""
    opened: int = 0
    """Bytes that `stream` has opened, in memory."""
    complete: bool = False
    in_memory: bool = True
    """Of a complete reply: it is in memory, or being read into it. False: it waits on disk."""
    offered_at: float = field(default_factory=time.monotonic)
    accepted_at: float = 0.0
    disconnected_at: float = 0.0
    """Meaningful only while `session` is None."""
    previous_offers: tuple[float, int] = (0.0, 0)
    """Of earlier offers for the same request: when the first was accepted, and the bytes received of all of them."""
    rate_checkpoint: tuple[float, int] = (0.0, 0)
    """When the rate was last found good enough, and the bytes received by then."""
    site: str = ""
    dropped: bool = False
    """Nobody wants it any more; whoever is working on it closes it."""
    lock: Any = field(default_factory=threading.RLock)

    @property
    def full_memory(self) -> int:
        """Bytes of memory that the complete reply takes."""
        return int(self.offer.plain_size)

    @property
    def memory(self) -> int:
        """Bytes of memory that it takes now."""
        return self.full_memory if self.complete and self.in_memory else self.opened

    def is_fast(self, now: float, room: int) -> bool:
        """Whether it pays to wait for its end instead of making room for others within `room` bytes of memory."""
        if self.complete or self.memory_was_short or self.spool is not None or self.session is None:
            return False
        age = now - self.accepted_at
        # Grace for the first offer only: a site that offers another reply instead has to show its rate.
        in_grace = age < _GRACE and self.full_memory <= room and not self.previous_offers[0]
        return in_grace or self.received * (age + _SOON) >= self.offer.size * age

    def too_slow(self, now: float) -> str | None:
        """A sentence if, at its rate, the reply could not have arrived in all of its request's time; else None."""
        first, before = self.previous_offers
        # Time after a disconnection does not count: a crash is no bad rate. Disconnecting is no excuse either.
        until = now if self.session is not None else self.disconnected_at
        allowed = min(self.request.expires, now) - self.request.asked
        age = until - (first or self.accepted_at)
        received = before + self.received
        if self.complete or not self.accepted_at or age < allowed / _FAIR_SHARE:
            return None
        if received * allowed >= self.offer.size * age:
            return None
        return (
            f"its reply of {self.offer.size} bytes came at {received / age:.0f} bytes/s: {received} bytes had arrived "
            f"when its {allowed:.0f} s were over"
        )

    def close(self) -> None:
        """Release its memory and its file."""
        self.stream = None
        if self.spool is not None:
            self.spool.close()

    def read_back(self) -> OpenStream:
        """Feed the chunks on disk to the stream, and return it. Raises SealError, OSError."""
        assert self.stream is not None
        assert self.spool is not None
        self.spool.seek(0)
        left = self.offer.size - self.opened
        while left:
            segment = self.spool.read(min(left, SEGMENT + TAG))
            if not segment:
                raise OSError("what was written is not there any more")
            self.stream.feed(segment)
            left -= len(segment)
        return self.stream


_PATIENCE = 4.0
"""Seconds that an offered reply waits for its Accept at most."""
_DISK_REST = 30.0
"""Seconds without a write after a disk that refused one."""


class ReplyBuffers:
    """The replies that wait or arrive, by message id, and the memory and disk that they take.

    `lock` guards both collections; methods take it themselves unless they say that the caller holds it.
    """

    def __init__(self, limits: Limits, directory: Path | None) -> None:
        """`directory` is on the disk for what memory does not hold; None: the temporary directory."""
        self.lock = threading.RLock()
        self.waiting: OrderedDict[str, IncomingReply] = OrderedDict()
        """Offered and not accepted yet, oldest first."""
        self.accepted: dict[str, IncomingReply] = {}
        """Arriving, or complete and not read yet."""
        self.directory = directory
        self.no_disk_until = 0.0
        """Until then, on the monotonic clock, nothing is written to disk."""
        self._limits = limits

    def accept_next(self) -> tuple[IncomingReply, Session] | None:
        """Move the oldest waiting reply to the accepted ones, if it may begin.

        Returns it with the session that offered it, which may end at any moment.
        """
        now = time.monotonic()
        with self.lock:
            if not self.waiting:
                return None
            identity, reply = next(iter(self.waiting.items()))
            session = reply.session
            assert session is not None, "a waiting reply has a session"
            if not self._may_begin(reply, now):
                return None
            del self.waiting[identity]
            reply.memory_was_short = now >= self.no_disk_until and not self._fits(reply, now)
            self.accepted[identity] = reply
            reply.accepted_at, reply.rate_checkpoint = now, (now, 0)
            return reply, session

    def charge(self, reply: IncomingReply, more: int) -> bool:
        """Take memory for `more` bytes of `reply`. False if there is none; a reply that is alone takes all it needs."""
        with self.lock:
            others = sum(other.memory for other in self.accepted.values() if other is not reply)
            if others and others + reply.opened + more > self._limits.inbound_bytes:
                return False
            reply.opened += more
            return True

    def spool(self, reply: IncomingReply, chunk: Chunk) -> None:
        """Write a chunk to disk as it is. Raises SealError for a chunk that is not one sealed segment, OSError."""
        expected = min(SEGMENT, reply.full_memory - reply.received // (SEGMENT + TAG) * SEGMENT) + TAG
        if len(chunk.data) != expected:
            raise SealError(f"a segment has {len(chunk.data)} bytes instead of {expected}")
        if reply.spool is None:
            # An unnamed file: nobody else can open it, and it disappears with this process, however that ends.
            reply.spool = tempfile.TemporaryFile(buffering=0, dir=self.directory)  # noqa: SIM115 - closed with it
        with self.lock:
            used = sum(other.received for other in self.accepted.values() if other.spool is not None)
        if used + expected > self._limits.spool_bytes:
            raise OSError(f"replies take {used} bytes of disk already, the limit is {self._limits.spool_bytes}")
        view = memoryview(chunk.data)
        while view:
            view = view[reply.spool.write(view) :]

    def disk_failed(self, error: OSError) -> None:
        """A write failed: replies come through memory, one after the other, for a while."""
        self.no_disk_until = time.monotonic() + _DISK_REST
        place = self.directory or tempfile.gettempdir()
        log.error(
            "there is no room on disk for replies that wait, in %s: %s; they come one after the other now", place, error
        )

    def any_on_disk(self) -> bool:
        """Whether a complete reply waits on disk for memory."""
        with self.lock:
            return any(reply.complete and not reply.in_memory for reply in self.accepted.values())

    def load_next(self) -> IncomingReply | None:
        """The next complete reply on disk, if memory has room for it beside the ones that wait to be read."""
        with self.lock:
            now, accepted = time.monotonic(), self.accepted.values()
            reply = next((one for one in accepted if one.complete and not one.in_memory), None)
            if reply is None:
                return None
            # One at least goes on, however much a slow one holds; what is fast or waits to be read is gone soon.
            soon = any(self._is_fast(one, now) if not one.complete else one.in_memory for one in accepted)
            if soon and not self._fits(reply, now):
                return None
            reply.in_memory = True
            return reply

    def drop(self, identity: str) -> None:
        """Forget an accepted reply. It is closed, unless somebody is at work on it, who then closes it.

        The caller holds the lock.
        """
        if (reply := self.accepted.pop(identity, None)) is not None:
            reply.dropped = True
            if reply.lock.acquire(blocking=False):
                try:
                    reply.close()
                finally:
                    reply.lock.release()

    def _may_begin(self, reply: IncomingReply, now: float) -> bool:
        others = self.accepted.values()
        if now < self.no_disk_until:
            # What begins now has to end in memory.
            used = sum(other.full_memory for other in others)
            return not used or used + reply.full_memory <= self._limits.inbound_bytes
        patient = now - reply.offered_at < _PATIENCE and any(self._is_fast(other, now) for other in others)
        return not patient or self._fits(reply, now)

    def _is_fast(self, reply: IncomingReply, now: float) -> bool:
        return reply.is_fast(now, self._limits.inbound_bytes)

    def _fits(self, reply: IncomingReply, now: float) -> bool:
        """Whether memory has room for all of it, beside what others take and what the fast ones are about to take."""
        used = sum(
            other.full_memory if self._is_fast(other, now) else other.memory
            for other in self.accepted.values()
            if other is not reply
        )
        return not used or used + reply.full_memory <= self._limits.inbound_bytes
