"""What the server has asked and not yet been answered, and the answers nobody has picked up yet."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from flwr.app import Message

from fedclaw.protocol.message_identity import Envelope
from fedclaw.transport.grpc.sender import Outgoing

_REMEMBERED = 4096


@dataclass
class Task:
    """One question to one site. `asked` and `expires` are on the monotonic clock."""

    envelope: Envelope
    outgoing: Outgoing
    asked: float
    expires: float
    delivered: bool = False
    """The site has confirmed that it holds the question."""
    reply_bytes: int | None = None
    """What its answer has at most, if that is known."""

    @property
    def node_id(self) -> int:
        """The site that was asked."""
        return self.envelope.dst_node_id


class Desk:
    """Open tasks and unread replies. `on_read` is called with the ids of replies that need no more memory here."""

    def __init__(self, unread: float = 120.0) -> None:
        """A reply that nobody has read is kept until its time is over, and for `unread` seconds at least."""
        self._unread = unread
        self.changed = threading.Condition()
        self.on_read: Callable[[Collection[str]], None] = lambda _ids: None
        self._open: dict[str, Task] = {}
        self._ready: OrderedDict[str, Message] = OrderedDict()
        self._kept_until: dict[str, float] = {}
        self._answered: OrderedDict[str, int] = OrderedDict()

    def add(self, task: Task) -> None:
        """A new question. One that is open already is not asked twice."""
        with self.changed:
            self._open.setdefault(task.envelope.message_id, task)

    def open_of(self, node_id: int) -> list[Task]:
        """What that site still owes, oldest first."""
        now = time.monotonic()
        with self.changed:
            return [task for task in self._open.values() if task.node_id == node_id and task.expires > now]

    def find(self, node_id: int, message_id: str) -> Task | None:
        """The open task of that id, if it was asked of that site and still counts."""
        with self.changed:
            task = self._open.get(message_id)
        if task is None or task.node_id != node_id or task.expires <= time.monotonic():
            return None
        return task

    def was_answered(self, node_id: int, message_id: str) -> bool:
        """Whether that site's reply has already arrived."""
        with self.changed:
            return self._answered.get(message_id) == node_id

    def finish(self, task: Task, reply: Message) -> bool:
        """The reply to `task` has arrived. False, and it is dropped, if nobody waits for it any more."""
        with self.changed:
            identity = task.envelope.message_id
            if self._open.pop(identity, None) is None:
                return False
            self._ready[identity] = reply
            self._kept_until[identity] = max(task.expires, time.monotonic() + self._unread)
            self._answered[identity] = task.node_id
            while len(self._answered) > _REMEMBERED:
                self._answered.popitem(last=False)
            self.changed.notify_all()
            return True

    def take(self, ids: Collection[str]) -> Message | None:
        """The earliest unread reply to one of `ids`; the reader says with `read` when it is done with it."""
        with self.changed:
            identity = next((identity for identity in self._ready if identity in ids), None)
            return None if identity is None else self._pop_ready(identity)

    def read(self, reply: Message) -> None:
        """The reader of `reply` is done with it, or keeps it at its own expense."""
        self.on_read([reply.metadata.reply_to_message_id])

    def ready(self, ids: Collection[str]) -> bool:
        """Whether one of `ids` has an unread reply."""
        with self.changed:
            return any(identity in ids for identity in self._ready)

    def owing(self, ids: Collection[str]) -> list[Task]:
        """Those of `ids` that are still to be answered in time."""
        now = time.monotonic()
        with self.changed:
            return [task for identity in ids if (task := self._open.get(identity)) is not None and task.expires > now]

    def withdraw(self, ids: Collection[str]) -> list[Task]:
        """Forget questions and unread answers; returns the tasks that were open."""
        with self.changed:
            dropped = [task for identity in ids if (task := self._open.pop(identity, None)) is not None]
            for identity in ids:
                self._pop_ready(identity)
            self.changed.notify_all()
        self.on_read(ids)
        return dropped

    def expired(self) -> list[str]:
        """Ids whose time is over, of questions and of replies that nobody came for; the caller withdraws them."""
        now = time.monotonic()
        with self.changed:
            unread = [identity for identity, until in self._kept_until.items() if until <= now]
            return [identity for identity, task in self._open.items() if task.expires <= now] + unread

    def _pop_ready(self, identity: str) -> Message | None:
        self._kept_until.pop(identity, None)
        return self._ready.pop(identity, None)
