"""Questions as messages: what goes out with a plan, and the identity that a question has.

The identity is a digest of what is asked of whom. A resumed or repeated round therefore asks the same question, and a
site answers it from its outbox instead of training, and paying, again.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from fedclaw.protocol.arrays import Arrays, pack, payload
from fedclaw.protocol.message_identity import assign_message_id
from fedclaw.protocol.messages import ARRAYS, BROADCAST, HEADER_BYTES, JSON, PLAN, TEACHER
from fedclaw.protocol.records import MessageRecords, hash_of
from fedclaw.protocol.terms import Plan, SecureAggregation


class Asked(Protocol):
    """What every question says of itself, whatever it asks: `Plan`, `StatisticsRequest`. A frozen value."""

    federation: str
    run: str
    """The name under which sites charge it."""
    cohort: int
    """Number of sites asked, by the server's own word."""
    workload: str
    schema_digest: str
    secure: SecureAggregation | None
    """The session of its secure sum; None: answers are added in the open."""

    @property
    def round(self) -> int:
        """Of the run; 0 where there are none."""

    @property
    def rounds(self) -> int:
        """Of the whole run; 1 where there are none."""

    def model_dump_json(self) -> str:
        """All that is asked but arrays. Deterministic: the same question has the same text."""


@dataclass(frozen=True)
class Outgoing:
    """The arrays that go out with a plan, float32 by parameter name."""

    parameters: Mapping[str, NDArray[np.float32]]
    teacher: Mapping[str, NDArray[np.float32]] | None = None
    """Of the model that a plan distils from."""
    broadcast: Mapping[str, Mapping[str, NDArray[np.float32]]] = field(default_factory=dict)
    """By kind, what the strategy's server half broadcasts to its client half (`fedclaw.learning.strategy`)."""

    @property
    def nbytes(self) -> int:
        """Of all arrays that go to one site."""
        return payload(self.parameters) + payload(self.teacher or {}) + sum(map(payload, self.broadcast.values()))


def question(plan: Plan, outgoing: Outgoing | None = None, answer_bytes: int = 0) -> MessageRecords:
    """What is asked: the plan, and what goes with it. `answer_bytes` is what the arrays of an answer take."""
    content = MessageRecords({PLAN: ConfigRecord({JSON: plan.model_dump_json()})})
    content.reply_bytes = HEADER_BYTES + answer_bytes
    if outgoing is None:
        return content
    content[ARRAYS] = pack(outgoing.parameters)
    if outgoing.teacher is not None:
        content[TEACHER] = pack(outgoing.teacher)
    if outgoing.broadcast:
        content[BROADCAST] = pack(
            {f"{kind}/{name}": a for kind, arrays in outgoing.broadcast.items() for name, a in arrays.items()}
        )
    return content


def by_kind(arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, Arrays]:
    """What was sent of a strategy's state, from its record's arrays. Raises ValueError for a name without a kind."""
    found: dict[str, Arrays] = {}
    for label, array in arrays.items():
        kind, slash, name = label.partition("/")
        if not slash:
            raise ValueError(f"{label!r} has no kind")
        found.setdefault(kind, {})[name] = array
    return found


def questions(
    nodes: Sequence[int],
    round: int,
    kind: str,
    content: RecordDict,
    ttl: float | None = None,
    arrays: "hashlib._Hash | None" = None,
) -> list[Message]:
    """The same question to each of `nodes`; all messages share one content. `ttl` in seconds.

    `arrays` is what `hash_of` made of the content's arrays, which are large and may also go to other nodes.
    """
    digest = _digest(content, arrays or hash_of(content.array_records))
    messages = []
    for node in nodes:
        message = Message(content, dst_node_id=node, message_type=kind, group_id=str(round), ttl=ttl)
        assign_message_id(message, hashlib.sha256(f"{kind}|{node}|{digest}".encode()).hexdigest()[:32])
        messages.append(message)
    return messages


def _digest(content: RecordDict, arrays: "hashlib._Hash") -> str:
    """SHA-256 of everything that is asked: parameters, plan, and what a protocol says."""
    digest = arrays.copy()
    for key, values in sorted(content.config_records.items()):
        digest.update(f"{key}|{sorted(values.items())}|".encode())
    return digest.hexdigest()
