"""Puts tasks together at a site, chunk by chunk, across broken connections, and decodes them."""

import time
from dataclasses import dataclass

import numpy as np
from flwr.app import Error, Message

from fedclaw.errors import TransportError
from fedclaw.protocol.message_identity import Envelope, rebuild
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.chunk_codec import Chunk
from fedclaw.transport.grpc.message_codec import decode
from fedclaw.transport.grpc.protocol import link_pb2 as pb


@dataclass(frozen=True)
class ReceivedTask:
    """A complete task. After `expires`, on the monotonic clock, nobody waits for its reply."""

    message: Message
    expires: float


@dataclass
class _Partial:
    envelope: Envelope
    expires: float
    stamp: bytes
    buffer: memoryview
    received: int = 0


class TaskReassembler:
    """The partly received tasks of one site, by transfer id. For use by the reading thread only."""

    def __init__(self, room: int) -> None:
        """`room` is how many bytes of tasks may arrive at one time; a larger one arrives alone."""
        self._room = room
        self._partials: dict[str, _Partial] = {}

    def begin(self, offer: pb.Offer, envelope: Envelope, expires: float) -> int:
        """Prepare to receive a task. Returns the offset of its first missing byte. Raises TransportError.

        `envelope` is the offer's, by this machine's clock. After `expires`, on the monotonic clock, it is dropped.
        """
        if envelope.message_id != offer.transfer_id or not offer.transfer_id or offer.size == 0:
            raise TransportError("the offer's envelope is not of this task")
        frames.check_offer(offer)
        held = self._partials.get(offer.transfer_id)
        if held is not None and held.stamp == offer.stamp and len(held.buffer) == offer.size:
            held.envelope, held.expires = envelope, expires
            return held.received
        # numpy.empty does not touch the memory, so it is taken only as bytes arrive.
        buffer = np.empty(offer.size, dtype=np.uint8).data
        self._partials[offer.transfer_id] = _Partial(envelope, expires, offer.stamp, buffer)
        return 0

    def has_room(self, size: int, tasks: int) -> bool:
        """Whether one more task of `size` bytes may arrive, with at most `tasks` arriving at one time."""
        now = time.monotonic()
        for identity in [key for key, partial in self._partials.items() if partial.expires <= now]:
            del self._partials[identity]
        used = sum(len(partial.buffer) for partial in self._partials.values())
        return len(self._partials) < tasks and (not used or used + size <= self._room)

    def drop(self, transfer_id: str) -> bool:
        """Forget that task. Returns whether it was arriving."""
        return self._partials.pop(transfer_id, None) is not None

    def holds(self, transfer_id: str, size: int) -> bool:
        """Whether that task, of `size` bytes, is arriving."""
        held = self._partials.get(transfer_id)
        return held is not None and len(held.buffer) == size

    def add(self, chunk: Chunk) -> ReceivedTask | None:
        """Add the next chunk; returns the task once complete. A wrong chunk drops it and raises TransportError."""
        partial = self._partials.get(chunk.transfer_id)
        if partial is None:
            return None
        end = chunk.offset + len(chunk.data)
        if chunk.offset != partial.received or end > len(partial.buffer):
            del self._partials[chunk.transfer_id]
            raise TransportError(f"chunk at byte {chunk.offset}, expected {partial.received}")
        partial.buffer[chunk.offset : end] = chunk.data
        partial.received = end
        if end < len(partial.buffer):
            return None
        del self._partials[chunk.transfer_id]
        content = decode(partial.buffer)
        if isinstance(content, Error):
            raise TransportError("the task has no content")
        return ReceivedTask(rebuild(partial.envelope, content), partial.expires)
