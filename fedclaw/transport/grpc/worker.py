"""A site's tasks, from the first chunk to the reply in the outbox.

`TaskReassembler` puts a task together, chunk by chunk, across broken connections, and decodes it. `Worker` handles one
after the other on its own thread, so that the stream stays alive meanwhile.

The order is fixed. The handler answers; the answer is encoded, sealed and stored in the outbox; the handler releases
it; only then may a byte of it leave. A task whose reply is stored is never handed to the handler again.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flwr.app import Error, Message

from fedclaw.errors import FedClawError, TransportError
from fedclaw.identity.seal import Binding, Sealer
from fedclaw.protocol.buffers import JoinedBuffers
from fedclaw.protocol.message_identity import Envelope, envelope_of, rebuild
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.transport.base import SiteHandler
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.message_codec import decode, encode
from fedclaw.transport.grpc.outbox import Outbox, StoredReply
from fedclaw.transport.grpc.protocol import link_pb2 as pb

log = logging.getLogger(__name__)


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

    def add(self, chunk: frames.Chunk) -> ReceivedTask | None:
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


_NO_ANSWER = "the site could not keep or release its answer, so nothing leaves; its operator finds why in its log"


class Worker:
    """Turns tasks into stored, released replies, and passes them to `announce`.

    For a task that will have no reply, `give_up` is called with its id and a sentence for the server.
    """

    def __init__(
        self,
        handler: SiteHandler,
        outbox: Outbox,
        sealer: Sealer,
        federation: str,
        site: str,
        limits: Limits,
        announce: Callable[[StoredReply], None],
        give_up: Callable[[str, str], None] = lambda _message_id, _text: None,
    ) -> None:
        self._handler = handler
        self._outbox = outbox
        self._sealer = sealer
        self._federation = federation
        self._site = site
        self._limits = limits
        self._announce = announce
        self._give_up = give_up
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._waiting: OrderedDict[str, tuple[Message, float]] = OrderedDict()
        self._current: str | None = None
        self._stopping = False
        self._released: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="fedclaw-work", daemon=True)
        self.max_reply_bytes = limits.max_message_bytes

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, patience: float = 1.0) -> None:
        """Take no further task. The current one ends by itself, on a daemon thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._thread.join(patience)

    def holds(self, task: Envelope, expires: float) -> bool:
        """Whether the task is queued, being worked on, or answered; then its content is not needed again.

        A stored reply is announced once more. A queued task now expires at `expires`.
        """
        with self._lock:
            identity = task.message_id
            if identity == self._current:
                return True
            if identity in self._waiting:
                self._waiting[identity] = (self._waiting[identity][0], expires)
                return True
            entry = self._outbox.find(task)
            if entry is None:
                return False
            if identity in self._released:
                self._announce(entry)
            else:
                # Without its content: only its stored reply is needed.
                self.submit(rebuild(task, Error(0)), expires)
            return True

    def has_room(self) -> bool:
        """Whether one more task may be queued."""
        now = time.monotonic()
        with self._lock:
            for identity in [key for key, (_, expires) in self._waiting.items() if expires <= now]:
                self._expired(identity)
                del self._waiting[identity]
            return len(self._waiting) < self._limits.queued_tasks

    def submit(self, task: Message, expires: float) -> None:
        """Queue a task that `holds` does not know. It is dropped at `expires`, on the monotonic clock."""
        with self._wake:
            self._waiting[task.metadata.message_id] = (task, expires)
            self._wake.notify_all()

    def drop(self, message_id: str) -> bool:
        """Remove that task from the queue. Returns whether it was there."""
        with self._lock:
            return self._waiting.pop(message_id, None) is not None

    def _next(self) -> tuple[Message, float] | None:
        with self._wake:
            self._current = None
            while not self._waiting and not self._stopping:
                self._wake.wait()
            if self._stopping:
                return None
            self._current, found = self._waiting.popitem(last=False)
            return found

    def _work(self) -> None:
        while (found := self._next()) is not None:
            task, expires = found
            identity = task.metadata.message_id
            try:
                self._do(task, expires)
            except FedClawError as error:
                log.error("task %s is left unanswered: %s", identity, error)
                self._give_up(identity, _NO_ANSWER)
            except Exception:
                log.exception("task %s is left unanswered", identity)
                self._give_up(identity, _NO_ANSWER)
            # Do not keep it in memory while waiting for the next one.
            del task, found

    def _expired(self, identity: str) -> None:
        log.warning("task %s expired before its turn", identity)

    def _do(self, task: Message, expires: float) -> None:
        envelope = envelope_of(task)
        with self._lock:
            entry = self._outbox.find(envelope)
        if entry is not None:
            reply = rebuild(entry.reply, decode(entry.summary))
        elif task.has_error():
            log.warning(
                "the stored reply to task %s is gone; it waits until the server asks again", envelope.message_id
            )
            return
        elif expires <= time.monotonic():
            self._expired(envelope.message_id)
            return
        else:
            reply = self._answer(task)
            entry = self._store(envelope, reply)
        self._handler.release(task, reply, entry.size, entry.digest)
        with self._lock:
            self._released.add(envelope.message_id)
            self._current = None
        self._announce(entry)
        # Last, because removing large files takes time and nobody waits for it.
        with self._lock:
            self._outbox.prune(entry)

    def _answer(self, task: Message) -> Message:
        try:
            return self._handler.answer(task)
        except Exception:
            # The handler should not raise. The server learns that it failed, not why.
            log.exception("the site failed on task %s", task.metadata.message_id)
            return Message(Error(RefusalCode.FAILED, "the site failed on this task"), reply_to=task)

    def _store(self, task: Envelope, reply: Message) -> StoredReply:
        content = reply.content if reply.has_content() else reply.error
        try:
            body = encode(content)
            if body.size > self.max_reply_bytes:
                text = f"the reply has {body.size} bytes, the limit is {self.max_reply_bytes}"
                raise TransportError(text)
        except TransportError as error:
            log.error("the reply to task %s cannot be sent: %s", task.message_id, error)
            content = Error(RefusalCode.UPDATE_SIZE, str(error))
            body = encode(content)
        return self._seal(task, envelope_of(reply), body, encode(content, arrays=False))

    def _seal(self, task: Envelope, reply: Envelope, body: JoinedBuffers, summary: JoinedBuffers) -> StoredReply:
        binding = Binding(
            federation=self._federation,
            run_id=task.run_id,
            group_id=task.group_id,
            message_id=task.message_id,
            site=self._site,
        )
        sealed = self._sealer.seal(body.parts, binding)
        # Not under the lock: a slow disk must not hold up the thread that reads the stream.
        return self._outbox.store(task, reply, sealed, b"".join(summary.parts))
