"""A FedClaw site as a Flower ClientApp, for Flower's own runtimes.

A SuperNode runs `app`. The site's directory and the federation's name come from the node's configuration, which its
operator writes (`--node-config 'site="PATH" federation="NAME"'`). The site refuses, pays and logs as always. But
Flower's transport has no seal: the SuperLink can read what leaves.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedclaw.cli import make_console, start_logging
from fedclaw.errors import UsageError
from fedclaw.transport.flower import NAME_QUERY
from fedclaw.transport.flower.site_location import SiteLocation, say_name

log = logging.getLogger(__name__)


def client_app(location_of: Callable[[Context], SiteLocation]) -> ClientApp:
    """A ClientApp that answers as the site that `location_of` returns for the node.

    The app can be sent to another process if `location_of` can: each process opens the site's files itself.
    """
    made = ClientApp()

    def respond(message: Message, context: Context) -> Message:
        location = location_of(context)
        if message.metadata.message_type == NAME_QUERY:
            return say_name(location, message)
        # Imports torch, which takes seconds, so not to answer with a name.
        from fedclaw.transport.flower.site import answer_at

        return answer_at(location, message)

    made.train()(respond)
    made.evaluate()(respond)
    made.query("name")(respond)
    return made


def configured_location(context: Context) -> SiteLocation:
    """The location that the node's configuration names. Raises UsageError."""
    if not logging.getLogger("fedclaw").handlers:
        start_logging(make_console(stderr=True))
    try:
        return SiteLocation(Path(str(context.node_config["site"])), str(context.node_config["federation"]))
    except KeyError as error:
        message = f"the node's configuration lacks {error}; give site=PATH and federation=NAME"
        log.error("%s", message)
        raise UsageError(message) from error


app = client_app(configured_location)
