"""The sending half of a stream: control frames first, then chunks of accepted transfers.

gRPC asks for the next frame when it has room for it, so nothing piles up here: each chunk is read from its source only
when it leaves.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedclaw.errors import TransportError
from fedclaw.transport.grpc.frames import MAX_CONFIRMATIONS, Buffer, encode_chunk
from fedclaw.transport.grpc.protocol import link_pb2 as pb

log = logging.getLogger(__name__)

_MAX_CONTROL_FRAMES = 4096
_MOMENT = 0.001
"""Seconds left, as sent for a task whose time is over: zero would mean that it is unknown."""
_NOTHING = pb.Frame(heartbeat=pb.Heartbeat()).SerializeToString()


@dataclass(frozen=True)
class OutgoingTransfer:
    """A message to send: `offer` announces it, `read(offset)` returns the chunk that begins there, as buffers.

    For a task, nobody waits for its reply after `expires`, on this process's monotonic clock.
    """

    offer: pb.Offer
    read: Callable[[int], Sequence[Buffer]]
    expires: float | None = None

    @property
    def transfer_id(self) -> str:
        """The id that both ends use for it."""
        return self.offer.transfer_id


class Sender:
    """The frames of one stream, in the order in which they leave. Safe for several threads; `frames` for one."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._control: deque[pb.Frame] = deque()
        self._offered: dict[str, OutgoingTransfer] = {}
        self._running: dict[str, int] = {}
        """The offset at which each accepted transfer goes on, by its id; the first is next."""
        self._confirmed: list[str] = []
        self._closed = False

    def post(self, frame: pb.Frame) -> None:
        """Send a control frame before any chunk. A peer that makes us send but does not read loses the stream."""
        with self._wake:
            if len(self._control) >= _MAX_CONTROL_FRAMES:
                self._closed = True
            elif not self._closed:
                self._control.append(frame)
            self._wake.notify()

    def confirm(self, transfer_id: str) -> None:
        """Tell the peer that a transfer has arrived: along with the next control frame, a heartbeat at the latest.

        Nobody waits for it: until it comes, the peer only remembers what it sent. A frame of its own would cost as
        much as the reply to a small question.
        """
        with self._wake:
            if not self._closed and len(self._confirmed) < MAX_CONFIRMATIONS:
                self._confirmed.append(transfer_id)
                return
        self.post(pb.Frame(done=pb.Done(transfer_id=transfer_id)))

    def offer(self, outgoing: OutgoingTransfer) -> None:
        """Announce a transfer, unless it is announced already."""
        with self._wake:
            if outgoing.transfer_id in self._offered:
                return
            self._offered[outgoing.transfer_id] = outgoing
        frame = pb.Frame(offer=outgoing.offer)
        if outgoing.expires is not None:
            frame.offer.seconds_left = max(outgoing.expires - time.monotonic(), _MOMENT)
        self.post(frame)

    def start(self, transfer_id: str, offset: int) -> None:
        """The peer has accepted: send from `offset` on. Raises TransportError for an offset outside the transfer."""
        with self._wake:
            outgoing = self._offered.get(transfer_id)
            if outgoing is None:
                return
            if offset >= outgoing.offer.size:
                raise TransportError(f"the peer accepted from byte {offset} of {outgoing.offer.size}")
            self._running[transfer_id] = offset
            self._wake.notify()

    def withdraw(self, transfer_id: str) -> OutgoingTransfer | None:
        """Stop sending that transfer. Returns it if it had been offered."""
        with self._wake:
            self._running.pop(transfer_id, None)
            return self._offered.pop(transfer_id, None)

    def close(self, last: pb.Frame | None = None) -> None:
        """End the stream after the control frames and `last`. Chunks that wait are dropped."""
        with self._wake:
            if last is not None and not self._closed:
                self._control.append(last)
            self._closed = True
            self._wake.notify()

    def frames(self) -> Iterator[bytes]:
        """The frames to send, serialised, until `close`."""
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> bytes | None:
        with self._wake:
            while not (self._control or self._running or self._closed):
                self._wake.wait()
            if self._control:
                frame = self._control.popleft()
                if self._confirmed:
                    frame.also_done.extend(self._confirmed)
                    self._confirmed.clear()
                return frame.SerializeToString()
            if self._closed:
                return None
            identity = next(iter(self._running))
            offset, outgoing = self._running.pop(identity), self._offered[identity]
        # Read outside the lock: it may touch the disk.
        try:
            data = outgoing.read(offset)
        except OSError as error:
            log.error("a message that was being sent cannot be read any more: %s", error)
            self.withdraw(identity)
            return _NOTHING
        after = offset + sum(map(len, data))
        with self._wake:
            # Meanwhile it may have been withdrawn, or accepted anew from elsewhere.
            if after < outgoing.offer.size and self._offered.get(identity) is outgoing:
                self._running.setdefault(identity, after)
        return encode_chunk(identity, offset, data)
