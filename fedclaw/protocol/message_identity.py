"""Message identity and metadata, by Flower's internals.

`Message(...)` reads process-wide identities that Flower's own executables set, and offers no public way to
rebuild a message that came over another wire. No other file uses internals, but for `fedclaw.protocol.records`
(`array_record`). Checked by tests/protocol/test_flower_internals.py.
"""

import hashlib
import uuid
from dataclasses import dataclass

from flwr.app import Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1
SILENT = frozenset([ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE])
"""Codes of the errors that Flower's own services answer in place of a node that did not."""


@dataclass(frozen=True)
class Envelope:
    """A message's metadata. Times are in seconds, `created_at` since the epoch."""

    run_id: int
    message_id: str
    reply_to_message_id: str
    src_node_id: int
    dst_node_id: int
    group_id: str
    message_type: str
    created_at: float
    ttl: float


def number_of(name: str) -> int:
    """A stable positive 63-bit number for the name of a run or a site (Flower identifies both by number)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1 or 1


def assume_server_identity(run_id: int) -> None:
    """Make this process the server of `run_id`, so that `Message(...)` can be constructed in it."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID
    TaskIdentity.task_id = SERVER_NODE_ID


def empty_run(run_id: int) -> Run:
    """Flower's run record for a run that Flower's own services do not know."""
    return Run.create_empty(run_id)


def envelope_of(message: Message) -> Envelope:
    """The message's metadata."""
    meta = message.metadata
    return Envelope(
        run_id=meta.run_id,
        message_id=meta.message_id,
        reply_to_message_id=meta.reply_to_message_id,
        src_node_id=meta.src_node_id,
        dst_node_id=meta.dst_node_id,
        group_id=meta.group_id,
        message_type=meta.message_type,
        created_at=meta.created_at,
        ttl=meta.ttl,
    )


def rebuild(envelope: Envelope, content: RecordDict | Error) -> Message:
    """The message that `envelope` and `content` describe."""
    metadata = Metadata(
        run_id=envelope.run_id,
        message_id=envelope.message_id,
        src_node_id=envelope.src_node_id,
        dst_node_id=envelope.dst_node_id,
        reply_to_message_id=envelope.reply_to_message_id,
        group_id=envelope.group_id,
        created_at=envelope.created_at,
        ttl=envelope.ttl,
        message_type=envelope.message_type,
    )
    metadata.delivered_at = ""
    if isinstance(content, Error):
        return Message(metadata=metadata, error=content)  # type: ignore[call-overload, no-any-return]
    return Message(metadata=metadata, content=content)  # type: ignore[call-overload, no-any-return]


def assign_message_id(message: Message, message_id: str | None = None) -> str:
    """Give `message` an identity: the given one, the one it has, or a fresh random one."""
    identity = message_id or message.metadata.message_id or uuid.uuid4().hex
    message.metadata.__dict__["_message_id"] = identity
    return identity


def expires_at(message: Message) -> float:
    """When nobody waits for a reply to `message` any more, in seconds since the epoch."""
    return float(message.metadata.created_at + message.metadata.ttl)
