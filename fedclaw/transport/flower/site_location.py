"""Where a node's site is, and its name. Imports nothing heavy: stock Flower starts a process for each answer."""

import logging
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedclaw.errors import FedClawError
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.flower import FLOWER_RECORD, SITE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteLocation:
    """The site of a node: its directory, and the federation that it takes part in."""

    root: Path
    federation: str


def say_name(location: SiteLocation, message: Message) -> Message:
    """The reply to `fedclaw.transport.flower.NAME_QUERY`: the name in site.yaml, or an error."""
    try:
        name = load_site_settings(location.root).name
    except FedClawError as error:
        log.error("%s", error)
        return failure(message)
    return Message(RecordDict({FLOWER_RECORD: ConfigRecord({SITE: name})}), reply_to=message)


def failure(message: Message) -> Message:
    """An error reply without a reason, which stays at the site."""
    reason = "the site failed at this task; its operator finds why in its log"
    return Message(Error(RefusalCode.FAILED, reason), reply_to=message)
