"""Requests that have not been answered yet, and replies that have not been read yet."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from flwr.app import Message

from fedclaw.protocol.message_identity import Envelope
from fedclaw.transport.grpc.sender import OutgoingTransfer

_REMEMBERED = 4096


@dataclass
class PendingRequest:
    """One message to one site. `asked` and `expires` are on the monotonic clock."""

    envelope: Envelope
    outgoing: OutgoingTransfer
    asked: float
    expires: float
    reply_bytes: int | None = None
    """Bytes that its reply has at most; None: not known."""

    @property
    def node_id(self) -> int:
        """The site that was asked."""
        return self.envelope.dst_node_id


class PendingRequests:
    """Open requests and unread replies, by message id; safe for use by several threads.

    `changed` is notified at every change. `on_released` is called with the ids of replies
    that need no more memory here.
    """

    def __init__(self, unread: float = 120.0) -> None:
        """An unread reply is kept until its request expires, and for `unread` seconds at least."""
        self._unread = unread
        self.changed = threading.Condition()
        self.on_released: Callable[[Collection[str]], None] = lambda _ids: None
        self._open: dict[str, PendingRequest] = {}
        self._ready: dict[str, tuple[Message, float]] = {}
        """Unread replies, oldest first, and until when each is kept."""
        self._answered: OrderedDict[str, int] = OrderedDict()

    def add(self, request: PendingRequest) -> None:
        """Add a request, unless one of the same id is open."""
        with self.changed:
            self._open.setdefault(request.envelope.message_id, request)

    def open_for(self, node_id: int) -> list[PendingRequest]:
        """The open requests to that site, oldest first."""
        now = time.monotonic()
        with self.changed:
            return [request for request in self._open.values() if request.node_id == node_id and request.expires > now]

    def find(self, node_id: int, message_id: str) -> PendingRequest | None:
        """The open request of that id; None if it went to another site or has expired."""
        with self.changed:
            request = self._open.get(message_id)
        if request is None or request.node_id != node_id or request.expires <= time.monotonic():
            return None
        return request

    def was_answered(self, node_id: int, message_id: str) -> bool:
        """Whether that site's reply to it has arrived before."""
        with self.changed:
            return self._answered.get(message_id) == node_id

    def finish(self, request: PendingRequest, reply: Message) -> bool:
        """The reply to `request` has arrived. Returns False, and drops it, if nobody waits for it any more."""
        with self.changed:
            identity = request.envelope.message_id
            if self._open.pop(identity, None) is None:
                return False
            self._ready[identity] = reply, max(request.expires, time.monotonic() + self._unread)
            self._answered[identity] = request.node_id
            while len(self._answered) > _REMEMBERED:
                self._answered.popitem(last=False)
            self.changed.notify_all()
            return True

    def take(self, ids: Collection[str]) -> Message | None:
        """The earliest unread reply to one of `ids`, or None. The reader calls `read` when it is done with it."""
        with self.changed:
            identity = next((identity for identity in self._ready if identity in ids), None)
            return None if identity is None else self._ready.pop(identity)[0]

    def read(self, reply: Message) -> None:
        """The reader is done with `reply`: it is no longer charged to the server's memory."""
        self.on_released([reply.metadata.reply_to_message_id])

    def has_reply(self, ids: Collection[str]) -> bool:
        """Whether one of `ids` has an unread reply."""
        with self.changed:
            return any(identity in ids for identity in self._ready)

    def unanswered(self, ids: Collection[str]) -> list[PendingRequest]:
        """The requests of `ids` that are open and have not expired."""
        now = time.monotonic()
        with self.changed:
            return [
                request
                for identity in ids
                if (request := self._open.get(identity)) is not None and request.expires > now
            ]

    def cancel(self, ids: Collection[str]) -> list[PendingRequest]:
        """Forget requests and their unread replies. Returns the requests that were open."""
        with self.changed:
            dropped = [request for identity in ids if (request := self._open.pop(identity, None)) is not None]
            for identity in ids:
                self._ready.pop(identity, None)
            self.changed.notify_all()
        self.on_released(ids)
        return dropped

    def expired(self) -> list[str]:
        """Ids of expired requests, and of replies that nobody has read in time. The caller cancels them."""
        now = time.monotonic()
        with self.changed:
            unread = [identity for identity, (_, until) in self._ready.items() if until <= now]
            return [identity for identity, request in self._open.items() if request.expires <= now] + unread
