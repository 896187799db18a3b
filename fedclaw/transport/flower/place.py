"""Which site a node is, and how it says so. Imports nothing heavy: stock Flower starts a process for each answer."""

import logging
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedclaw.errors import FedClawError
from fedclaw.protocol.plan import RefusalCode
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.flower import NOTE, SITE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Which site a node is: its directory, and the federation that it takes part in."""

    root: Path
    federation: str


def say_name(place: Place, message: Message) -> Message:
    """The reply to `fedclaw.transport.flower.NAME`: the name in site.yaml, or that the site failed."""
    try:
        name = load_site_settings(place.root).name
    except FedClawError as error:
        log.error("%s", error)
        return failure(message)
    return Message(RecordDict({NOTE: ConfigRecord({SITE: name})}), reply_to=message)


def failure(message: Message) -> Message:
    """That the site failed; why stays at the site."""
    reason = "the site failed at this task; its operator finds why in its log"
    return Message(Error(RefusalCode.FAILED, reason), reply_to=message)
