"""Answers Flower's messages from a site's directory, in whatever process Flower asks.

All that lasts is in the directory: the ledger, the outbound log, the strategies' state, and the answers given. Any
number of processes may answer for a site, one at a time (by the directory's lock); each sees what the others have
paid and answered.

Answers are stored so that a repeated question gets the same answer at no further cost. Flower has no outbox: a lost
reply is lost. So an answer is stored at the site, under the question's identity, before it is settled as released and
before a byte of it leaves. Any process that is asked the same question finds it there; without it, a question asked
twice would be trained, and paid for, twice. A file holds the answer as `fedclaw.transport.grpc.message_codec` encodes
it, with mode 0600, encrypted where the site has a key for that.
"""

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedclaw.errors import FedClawError, TransportError, UsageError
from fedclaw.files import PRIVATE_MODE
from fedclaw.identity.at_rest import PLAIN, FileStore
from fedclaw.protocol.message_identity import envelope_of, expires_at, rebuild
from fedclaw.site.directory import only_client, open_service, state_directory
from fedclaw.site.service import SiteService
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.base import measure
from fedclaw.transport.flower import FLOWER_RECORD, IDENTITY
from fedclaw.transport.flower.site_location import SiteLocation, failure
from fedclaw.transport.grpc.message_codec import decode, encode

log = logging.getLogger(__name__)

KEPT = 8
"""Answers kept: four rounds of one run (train and evaluate), or one round of four runs."""
_SUFFIX = ".answer"


class AnswerStore:
    """The newest answers of one site, in `directory`. Its user holds the site's lock."""

    def __init__(self, directory: Path, store: FileStore = PLAIN) -> None:
        self._directory = directory
        self._store = store

    def find(self, identity: str) -> RecordDict | None:
        """The answer to that question, or None. A damaged one is removed; its question is paid for anew."""
        path = self._path(identity)
        try:
            content = decode(self._store.read(path, f"state/answers/{path.name}"))
        except FileNotFoundError:
            return None
        except TransportError as error:
            log.error("%s is damaged and dropped (%s); its question will be answered again", path, error)
            path.unlink()
            return None
        return content if isinstance(content, RecordDict) else None

    def store(self, identity: str, answer: RecordDict) -> None:
        """FileStore `answer`, durable on return, and remove the oldest ones. Raises OSError if it cannot be written."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(identity)
        self._store.write(path, b"".join(encode(answer).parts), PRIVATE_MODE, f"state/answers/{path.name}")
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


_LOOK_AGAIN = 0.05
OPEN_SITES = 16
"""How many sites a process keeps open, with their data, between two messages."""


_open: OrderedDict[SiteLocation, SiteService] = OrderedDict()


def answer_at(location: SiteLocation, message: Message) -> Message:
    """The answer of the site at `location`. A failure becomes an error reply; its reason is in the site's log.

    What is returned may leave: it is stored, settled in the ledger and entered in the outbound log.
    """
    try:
        with _turn(location.root, expires_at(message)):
            return _answer(location, message)
    except FedClawError as error:
        log.error("%s", error)
    except Exception:
        log.exception("the site failed to answer")
    _forget(location)
    return failure(message)


def _answer(location: SiteLocation, message: Message) -> Message:
    asked = _question(message)
    site = _service(location)
    answers = AnswerStore(state_directory(location.root) / "answers", site.states.store)
    stored = answers.find(asked.metadata.message_id)
    reply = site.answer(asked) if stored is None else Message(stored, reply_to=asked)
    if stored is None and reply.has_content():
        answers.store(asked.metadata.message_id, reply.content)
    site.release(asked, reply, *measure(reply))
    if reply.has_error():
        return Message(reply.error, reply_to=message)
    return Message(for_flower(reply.content), reply_to=message)


def _question(message: Message) -> Message:
    """The question as FedClaw asked it: under its own identity, without the record that carried it."""
    content = RecordDict({name: record for name, record in message.content.items() if name != FLOWER_RECORD})
    note = message.content.config_records.get(FLOWER_RECORD, ConfigRecord())
    identity = str(note.get(IDENTITY, "")) or message.metadata.message_id
    return rebuild(replace(envelope_of(message), message_id=identity), content)


def _service(location: SiteLocation) -> SiteService:
    """The opened site. Its ledger and its log follow what other processes write."""
    if location not in _open:
        _open[location] = open_service(location.root, load_site_settings(location.root), location.federation)
    _open.move_to_end(location)
    while len(_open) > OPEN_SITES:
        _close(_open.popitem(last=False)[1])
    return _open[location]


def _forget(location: SiteLocation) -> None:
    """Close the site; the next message opens it anew."""
    if (site := _open.pop(location, None)) is not None:
        _close(site)


def _close(site: SiteService) -> None:
    site.ledger.close()
    if site.test_ledger is not None:
        site.test_ledger.close()
    if site.outbound is not None:
        site.outbound.close()


@contextmanager
def _turn(root: Path, end: float) -> Iterator[None]:
    """Hold the lock of the site's directory, waiting for it until `end`, in seconds since the epoch.

    Raises UsageError after that, when nobody waits for the answer any more.
    """
    with ExitStack() as held:
        waited = False
        while True:
            try:
                held.enter_context(only_client(root))
                break
            except UsageError:
                if time.time() > end:
                    raise
            if not waited:
                log.warning("another process answers for the site in %s; waiting for it", root)
            waited = True
            time.sleep(_LOOK_AGAIN)
        yield
