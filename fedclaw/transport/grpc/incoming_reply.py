"""A reply that is being received: how much has arrived, what memory it takes, and whether its rate is good enough."""

import threading
import time
from dataclasses import dataclass, field
from typing import IO, Any

from fedclaw.identity.seal import SEGMENT, TAG, OpenStream
from fedclaw.transport.grpc.pending_requests import PendingRequest
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.session import Session

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
