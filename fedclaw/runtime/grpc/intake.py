"""Tasks on their way in to a site: collected chunk by chunk, kept across a broken connection, then decoded."""

from dataclasses import dataclass

import numpy as np
from flwr.app import Error, Message

from fedclaw.errors import TransportError
from fedclaw.runtime.flower import Envelope, rebuild
from fedclaw.runtime.grpc import wire
from fedclaw.runtime.grpc.codec import decode
from fedclaw.runtime.grpc.pieces import Piece
from fedclaw.runtime.grpc.protocol import link_pb2 as pb


@dataclass
class _Partial:
    envelope: Envelope
    stamp: bytes
    buffer: memoryview
    received: int = 0


class Intake:
    """Partly received tasks of one site, by transfer id. Used by the reading thread alone."""

    def __init__(self) -> None:
        self._partials: dict[str, _Partial] = {}

    def begin(self, offer: pb.Offer) -> int:
        """Get ready for a task; returns the offset from which it is still missing. Raises TransportError."""
        envelope = wire.envelope_from_proto(offer.envelope)
        if envelope.message_id != offer.transfer_id or not offer.transfer_id or offer.size == 0:
            raise TransportError("the offer's envelope is not of this task")
        if offer.inline and len(offer.inline) != offer.size:
            raise TransportError("the offer's content is not of the size that it says")
        held = self._partials.get(offer.transfer_id)
        if held is not None and held.stamp == offer.stamp and len(held.buffer) == offer.size:
            return held.received
        # numpy.empty: memory is touched, and so taken, only as bytes arrive.
        buffer = np.empty(offer.size, dtype=np.uint8).data
        self._partials[offer.transfer_id] = _Partial(envelope, offer.stamp, buffer)
        return 0

    def pending(self) -> int:
        """How many tasks are on their way."""
        return len(self._partials)

    def add(self, chunk: Piece) -> Message | None:
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
        return rebuild(partial.envelope, content)
