"""Tasks on their way in to a site: collected chunk by chunk, kept across a broken connection, then decoded."""

import time
from dataclasses import dataclass

import numpy as np
from flwr.app import Error, Message

from fedclaw.errors import TransportError
from fedclaw.protocol.message_identity import Envelope, rebuild
from fedclaw.transport.grpc import wire
from fedclaw.transport.grpc.codec import decode
from fedclaw.transport.grpc.pieces import Piece
from fedclaw.transport.grpc.protocol import link_pb2 as pb


@dataclass(frozen=True)
class Arrived:
    """A whole task. `expires`, on the monotonic clock, is when nobody waits for its reply any more."""

    message: Message
    expires: float


@dataclass
class _Partial:
    envelope: Envelope
    expires: float
    stamp: bytes
    buffer: memoryview
    received: int = 0


class Intake:
    """Partly received tasks of one site, by transfer id. Used by the reading thread alone."""

    def __init__(self, room: int) -> None:
        """`room` is how many bytes of tasks may be on their way at one time; a single larger one comes alone."""
        self._room = room
        self._partials: dict[str, _Partial] = {}

    def begin(self, offer: pb.Offer, envelope: Envelope, expires: float) -> int:
        """Get ready for a task; returns the offset from which it is still missing. Raises TransportError.

        `envelope` is the offer's by this machine's clock; at `expires`, on the monotonic one, the task is forgotten.
        """
        if envelope.message_id != offer.transfer_id or not offer.transfer_id or offer.size == 0:
            raise TransportError("the offer's envelope is not of this task")
        wire.check_offer(offer)
        held = self._partials.get(offer.transfer_id)
        if held is not None and held.stamp == offer.stamp and len(held.buffer) == offer.size:
            held.envelope, held.expires = envelope, expires
            return held.received
        # numpy.empty: memory is touched, and so taken, only as bytes arrive.
        buffer = np.empty(offer.size, dtype=np.uint8).data
        self._partials[offer.transfer_id] = _Partial(envelope, expires, offer.stamp, buffer)
        return 0

    def has_room(self, size: int, tasks: int) -> bool:
        """Whether one more task of `size` bytes may come beside those on their way, which are `tasks` at most."""
        now = time.monotonic()
        for identity in [key for key, partial in self._partials.items() if partial.expires <= now]:
            del self._partials[identity]
        used = sum(len(partial.buffer) for partial in self._partials.values())
        return len(self._partials) < tasks and (not used or used + size <= self._room)

    def drop(self, transfer_id: str) -> bool:
        """Nobody wants that task any more. Whether it was on its way."""
        return self._partials.pop(transfer_id, None) is not None

    def holds(self, transfer_id: str, size: int) -> bool:
        """Whether that task, of `size` bytes, is on its way."""
        held = self._partials.get(transfer_id)
        return held is not None and len(held.buffer) == size

    def add(self, chunk: Piece) -> Arrived | None:
        """The next piece; the task when it is whole. Raises TransportError, and the task is dropped."""
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
        return Arrived(rebuild(partial.envelope, content), partial.expires)
