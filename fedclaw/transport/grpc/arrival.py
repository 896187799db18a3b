"""One reply on its way in: what of it has arrived, what it holds, and whether it comes fast enough."""

import threading
import time
from dataclasses import dataclass, field
from typing import IO, Any

from fedclaw.identity.seal import SEGMENT, TAG, OpenStream
from fedclaw.transport.grpc.desk import Task
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.session import Session

_SOON = 1.0
"""Seconds in which a reply is at its end, at its rate, if it counts as fast."""
_PRESUMED = 0.5
"""Seconds for which a reply that memory could hold counts as fast before its rate is known."""
_FAIR_SHARE = 4
"""A reply that has been arriving for less than this part of its question's time is not judged by its rate."""


@dataclass
class Arrival:
    """One reply from its offer to its reader. Its pieces come from one thread; `lock` guards a change of session."""

    task: Task
    offer: pb.Offer
    session: Session | None
    stream: OpenStream | None = None
    spool: IO[bytes] | None = None
    """The sealed pieces for which there was no memory, one after the other, in a file without a name."""
    received: int = 0
    to_disk: bool = False
    """When it began there was no memory for all of it."""
    in_memory: int = 0
    """Bytes of it that `stream` has opened."""
    complete: bool = False
    in_turn: bool = True
    """Complete: whether it lies in memory, or is being read into it."""
    offered: float = field(default_factory=time.monotonic)
    began: float = 0.0
    left: float = 0.0
    """Without a session: when it went."""
    earlier: tuple[float, int] = (0.0, 0)
    """Of other offers in answer to the same task: when the first was accepted, and what came of them all."""
    mark: tuple[float, int] = (0.0, 0)
    """When its rate was last found good, and what had arrived by then."""
    site: str = ""
    gone: bool = False
    """It was dropped; whoever works on it lets go of what it holds."""
    lock: Any = field(default_factory=threading.RLock)

    @property
    def cost(self) -> int:
        """Bytes of memory that it takes when it is whole."""
        return int(self.offer.plain_size)

    @property
    def memory(self) -> int:
        """Bytes of memory that it takes now."""
        return self.cost if self.complete and self.in_turn else self.in_memory

    def is_fast(self, now: float, room: int) -> bool:
        """Whether it will be whole, and gone, before it pays to make room for others in `room` bytes of memory."""
        if self.complete or self.to_disk or self.spool is not None or self.session is None:
            return False
        age = now - self.began
        # Of one offer to a task; another in its place has to show its rate.
        presumed = age < _PRESUMED and self.cost <= room and not self.earlier[0]
        return presumed or self.received * (age + _SOON) >= self.offer.size * age

    def forfeits(self, now: float) -> str | None:
        """What is wrong with its rate, if it could not have arrived in all the time that its question had."""
        first, before = self.earlier
        # A site that went away is judged by the time until then: a crash is no bad rate, and going away no excuse.
        until = now if self.session is not None else self.left
        whole, age = min(self.task.expires, now) - self.task.asked, until - (first or self.began)
        received = before + self.received
        if self.complete or not self.began or age < whole / _FAIR_SHARE or received * whole >= self.offer.size * age:
            return None
        return (
            f"its reply of {self.offer.size} bytes came at {received / age:.0f} bytes/s: {received} bytes had arrived "
            f"when its {whole:.0f} s were over"
        )

    def close(self) -> None:
        """Let go of what it holds."""
        self.stream = None
        if self.spool is not None:
            self.spool.close()

    def read_back(self) -> OpenStream:
        """The stream with what lay on disk as well. Raises SealError, OSError."""
        assert self.stream is not None
        assert self.spool is not None
        self.spool.seek(0)
        left = self.offer.size - self.in_memory
        while left:
            segment = self.spool.read(min(left, SEGMENT + TAG))
            if not segment:
                raise OSError("what was written is not there any more")
            self.stream.feed(segment)
            left -= len(segment)
        return self.stream
