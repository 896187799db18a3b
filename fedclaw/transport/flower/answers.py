"""The answers that a site has given on Flower's runtimes, kept so that a question asked again gets the same answer.

Flower has no outbox: a reply that is lost on the way is lost. An answer is therefore stored at the site, under the
question's identity, before it is paid for as released and before a byte of it leaves; another process that is asked
the same question finds it there. Without it, a question asked twice would be trained, and paid for, twice.

A file holds the answer as `fedclaw.transport.grpc.codec` encodes it, mode 0600: it is what leaves the site in any case.
"""

import hashlib
import logging
from pathlib import Path

from flwr.app import Array, ArrayRecord, RecordDict

from fedclaw.errors import TransportError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.transport.grpc.codec import decode, encode

log = logging.getLogger(__name__)

KEPT = 8
"""Answers: four rounds of one run, or one round of four runs."""
_SUFFIX = ".answer"


class Answers:
    """The newest answers of one site, in `directory`. Whoever uses it holds the site's lock."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, identity: str) -> RecordDict | None:
        """The answer given under that identity; a damaged one is dropped, and its question answered, and paid, anew."""
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
        """Keep `answer`, durable on return, and the newest others. Raises OSError if the disk will not have it."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(self._path(identity), b"".join(encode(answer).parts), PRIVATE_MODE)
        stored = sorted(self._directory.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in stored[:-KEPT]:
            path.unlink(missing_ok=True)

    def _path(self, identity: str) -> Path:
        return self._directory / (hashlib.sha256(identity.encode()).hexdigest()[:40] + _SUFFIX)


def for_flower(content: RecordDict) -> RecordDict:
    """`content` of Flower's own classes alone: Flower rebuilds an object by the name of its class."""
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
