"""Hostile sites: real ones, that lie about their data or about what they made of them."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from experiments.attacks.base import Attack, Round, Vector
from fedclaw.errors import UsageError
from fedclaw.protocol.arrays import pack, unpack
from fedclaw.protocol.messages import SUM
from fedclaw.server.cohort_question import weights_in
from fedclaw.site.service import SiteService

LARGEST = 1e30
"""No number that leaves is larger: a server refuses what is not finite, and would know."""


class Gang:
    """What the hostile sites of a federation tell each other, and overhear, in one round."""

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        self._known: list[Vector] = []
        self._asked = self._hostile = 0

    def begin(self, asked: int, hostile: int) -> None:
        """So many sites are asked, so many of them hostile; nothing is known of the round."""
        self._known.clear()
        self._asked, self._hostile = asked, hostile

    def learn(self, reply: Message) -> None:
        """Take note of an honest answer, if it holds an update."""
        if reply.has_content() and SUM in reply.content.array_records:
            self._known.append(delta_in(reply.content))

    def round(self) -> Round:
        """What is known now; at least one update."""
        return Round(np.stack(self._known), self._asked, self._hostile)


class HostileSite:
    """A `SiteService` with an attack. Implements `fedclaw.transport.base.SiteHandler`.

    `prepare` has the site train, and tells its gang; `answer` then sends what the attack makes of that. Its policy, its
    ledger and all that is not an update are those of the real site.
    """

    def __init__(self, service: SiteService, gang: Gang, generator: np.random.Generator) -> None:
        """Raises UsageError for data that the attack cannot change."""
        self._service, self._gang, self._generator = service, gang, generator
        self._prepared: dict[str, Message] = {}
        if gang.attack.poisons:
            self._poison()

    def prepare(self, message: Message) -> None:
        """Train honestly (on what data there are) as `message` asks, before anybody hostile answers."""
        reply = self._service.answer(message)
        self._prepared[message.metadata.message_id] = reply
        self._gang.learn(reply)

    def answer(self, message: Message) -> Message:
        """See SiteHandler."""
        reply = self._prepared.pop(message.metadata.message_id, None) or self._service.answer(message)
        if not self._gang.attack.forges or reply.has_error() or SUM not in reply.content.array_records:
            return reply
        return Message(self._forged(reply.content), reply_to=message)

    def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
        """See SiteHandler."""
        self._service.release(message, reply, size, digest)

    def _forged(self, content: RecordDict) -> RecordDict:
        delta = self._gang.attack.forge(delta_in(content), self._gang.round(), self._generator)
        sent = np.clip(delta * weights_in(content)[0], -LARGEST, LARGEST).astype(np.float32)
        forged = RecordDict(dict(content))
        forged[SUM] = pack(_shaped(sent, unpack(content.array_records[SUM])))
        return forged

    def _poison(self) -> None:
        service = self._service
        schema = service.workload.schema
        if schema.needs_constants:
            raise UsageError("attack: a site reads its data anew when standardise: federated, so they stay as they are")
        try:
            table = self._gang.attack.poison(service.data.train, len(schema.labels), self._generator)
        except ValueError as error:
            raise UsageError(f"attack: {error}") from error
        service.data = replace(service.data, train=table)


def delta_in(content: RecordDict) -> Vector:
    """The parameter delta (d,) of an answer to train: its weighted sum over its weight."""
    arrays = unpack(content.array_records[SUM])
    flat = np.concatenate([array.reshape(-1) for array in arrays.values()]).astype(np.float64)
    return flat / weights_in(content)[0]


def _shaped(flat: NDArray[np.float32], like: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    ends = np.cumsum([array.size for array in like.values()])
    parts = np.split(flat, ends[:-1])
    return {name: part.reshape(array.shape) for (name, array), part in zip(like.items(), parts, strict=True)}
