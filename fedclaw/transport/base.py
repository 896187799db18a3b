"""What a site offers a transport."""

import hashlib
from typing import TYPE_CHECKING, Protocol

from flwr.app import ArrayRecord, Message

from fedclaw.protocol.records import serialised

if TYPE_CHECKING:
    pass


class SiteHandler(Protocol):
    """A site, as a runtime sees it."""

    def answer(self, message: Message) -> Message:
        """Do what `message` asks and return the reply; never raises for a bad request."""

    def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
        """Called when the reply to `message` is durable at the site and before its first byte leaves.

        `size` is in bytes and `digest` the SHA-256 (hexadecimal) of what leaves. Called again, with the same
        arguments, when the same reply is sent again after a restart. If it raises, nothing is sent.
        """


def measure(reply: Message) -> tuple[int, str]:
    """Bytes and SHA-256 of the arrays in a reply, for a runtime that does not seal."""
    digest, size = hashlib.sha256(), 0
    if reply.has_content():
        for record in reply.content.values():
            for array in record.values() if isinstance(record, ArrayRecord) else ():
                data = serialised(array)
                digest.update(data)
                size += len(data)
    return size, digest.hexdigest()
