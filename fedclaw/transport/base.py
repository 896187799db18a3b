"""The interface of a site, as a transport uses it."""

import hashlib
from typing import Protocol

from flwr.app import ArrayRecord, Message

from fedclaw.protocol.records import serialised


class SiteHandler(Protocol):
    """A site, as a transport sees it."""

    def answer(self, message: Message) -> Message:
        """The reply to `message`. A bad request is answered with an error, never raised."""

    def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
        """Called when the reply to `message` is durable at the site, before its first byte leaves.

        `size` is the number of bytes that leave, `digest` their SHA-256 (hexadecimal; `tree:` before it: that of the
        SHA-256 of each chunk). Called again with the same arguments when the same reply is sent again after a restart.
        If it raises, nothing is sent.
        """


def measure(reply: Message) -> tuple[int, str]:
    """Size in bytes and SHA-256 (hexadecimal) of the arrays in a reply, for a transport that does not seal."""
    digest, size = hashlib.sha256(), 0
    if reply.has_content():
        for record in reply.content.values():
            for array in record.values() if isinstance(record, ArrayRecord) else ():
                for data in serialised(array):
                    digest.update(data)
                    size += len(data)
    return size, digest.hexdigest()
