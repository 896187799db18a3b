"""The server's side of one site's stream."""

import threading
import time
from typing import Any

from fedclaw.transport.grpc.connection_limiter import endpoint_of
from fedclaw.transport.grpc.peer import Peer
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.sender import Sender


class Session:
    """One stream of a site: its identity, the frames that go to it, and when it was last heard from."""

    def __init__(self, peer: Peer, context: Any) -> None:
        self.peer = peer
        self.endpoint = endpoint_of(context.peer())
        self.sender = Sender()
        self.opened = self.heard = time.monotonic()
        self.welcomed = False
        self.idle_offers = 0
        """Offers of replies that were not asked for, or are arriving on this stream already."""
        self.closed_at: float | None = None
        self._context = context
        self._lock = threading.Lock()
        context.add_callback(self.sender.close)

    def close(self, last: pb.Frame | None = None) -> None:
        """Send `last`, then end the stream."""
        with self._lock:
            if self.closed_at is None:
                self.closed_at = time.monotonic()
        self.sender.close(last)

    def abort(self) -> None:
        """End the stream now, even if the peer does not read."""
        self.sender.close()
        self._context.cancel()
