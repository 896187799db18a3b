"""A site's answers on Flower's runtimes, stored so that a repeated question gets the same answer at no further cost.

Flower has no outbox: a lost reply is lost. So an answer is stored at the site, under the question's identity, before
it is settled as released and before a byte of it leaves. Any process that is asked the same question finds it there;
without it, a question asked twice would be trained, and paid for, twice.

A file holds the answer as `fedclaw.transport.grpc.message_codec` encodes it, with mode 0600.
"""

import hashlib
import logging
from pathlib import Path

from flwr.app import Array, ArrayRecord, RecordDict

from fedclaw.errors import TransportError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.transport.grpc.message_codec import decode, encode

log = logging.getLogger(__name__)

KEPT = 8
"""Answers kept: four rounds of one run (train and evaluate), or one round of four runs."""
_SUFFIX = ".answer"


class AnswerStore:
    """The newest answers of one site, in `directory`. Its user holds the site's lock."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, identity: str) -> RecordDict | None:
        """The answer to that question, or None. A damaged one is removed; its question is paid for anew."""
        path = self._path(identity)
        try:
            content = decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except TransportError as error:
            log.error("%s is damaged and dropped (%s); its question will be answered again", path, error)
            path.unlink()
            return None
        return content if isinstance(content, RecordDict) else None

    def store(self, identity: str, answer: RecordDict) -> None:
        """Store `answer`, durable on return, and remove the oldest ones. Raises OSError if it cannot be written."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(self._path(identity), b"".join(encode(answer).parts), PRIVATE_MODE)
        stored = sorted(self._directory.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in stored[:-KEPT]:
            path.unlink(missing_ok=True)

    def _path(self, identity: str) -> Path:
        return self._directory / (hashlib.sha256(identity.encode()).hexdigest()[:40] + _SUFFIX)


def for_flower(content: RecordDict) -> RecordDict:
    """`content` made of Flower's own classes only: Flower rebuilds an object by the name of its class."""
    return RecordDict(
        {
            name: ArrayRecord({key: _plain(array) for key, array in record.items()})
            if isinstance(record, ArrayRecord)
            else record
            for name, record in content.items()
        }
    )


def _plain(array: Array) -> Array:
    if type(array) is Array:
        return array
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data)
