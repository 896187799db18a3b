"""A site's directory that answers Flower's messages, in whatever process Flower happens to ask.

Everything that has to last is in the directory: the ledger, the outbound log, what strategies remember, and the
answers that were given. Any number of processes may answer for a site, one at a time (the directory's lock), and each
sees what the others have paid and said.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict

from fedclaw.errors import FedClawError, UsageError
from fedclaw.protocol.message_identity import envelope_of, expires_at, rebuild
from fedclaw.site.directory import only_client, open_service, state_directory
from fedclaw.site.service import SiteService
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.base import measure
from fedclaw.transport.flower import IDENTITY, NOTE
from fedclaw.transport.flower.answers import Answers, for_flower
from fedclaw.transport.flower.place import Place, failure

log = logging.getLogger(__name__)

_LOOK_AGAIN = 0.05
OPEN_SITES = 16
"""Sites whose data a process keeps in memory between two messages."""


_open: OrderedDict[Place, SiteService] = OrderedDict()


def answer_at(place: Place, message: Message) -> Message:
    """What the site at `place` answers; a failure is a refusal whose reason is in the site's log.

    Returns only what may leave: it is stored, settled in the ledger and in the outbound log.
    """
    try:
        with _turn(place.root, expires_at(message)):
            return _answer(place, message)
    except FedClawError as error:
        log.error("%s", error)
    except Exception:
        log.exception("the site failed to answer")
    _forget(place)
    return failure(message)


def _answer(place: Place, message: Message) -> Message:
    asked = _question(message)
    answers = Answers(state_directory(place.root) / "answers")
    site = _service(place)
    stored = answers.find(asked.metadata.message_id)
    reply = site.answer(asked) if stored is None else Message(stored, reply_to=asked)
    if stored is None and reply.has_content():
        answers.store(asked.metadata.message_id, reply.content)
    site.release(asked, reply, *measure(reply))
    if reply.has_error():
        return Message(reply.error, reply_to=message)
    return Message(for_flower(reply.content), reply_to=message)


def _question(message: Message) -> Message:
    """The question as FedClaw asked it: under its own identity, without the note that brought that here."""
    content = RecordDict({name: record for name, record in message.content.items() if name != NOTE})
    note = message.content.config_records.get(NOTE, ConfigRecord())
    identity = str(note.get(IDENTITY, "")) or message.metadata.message_id
    return rebuild(replace(envelope_of(message), message_id=identity), content)


def _service(place: Place) -> SiteService:
    """The opened site. Its ledger and its log follow by themselves what other processes write to theirs."""
    if place not in _open:
        _open[place] = open_service(place.root, load_site_settings(place.root), place.federation)
    _open.move_to_end(place)
    while len(_open) > OPEN_SITES:
        _close(_open.popitem(last=False)[1])
    return _open[place]


def _forget(place: Place) -> None:
    """Open the site anew for the next message."""
    if (site := _open.pop(place, None)) is not None:
        _close(site)


def _close(site: SiteService) -> None:
    site.ledger.close()
    if site.test_ledger is not None:
        site.test_ledger.close()
    if site.outbound is not None:
        site.outbound.close()


@contextmanager
def _turn(root: Path, end: float) -> Iterator[None]:
    """Hold the site's directory, waiting for who holds it until `end`, in seconds since the epoch.

    Raises UsageError after that: nobody waits for the answer any more.
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
