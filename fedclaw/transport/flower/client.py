"""A FedClaw site as a Flower ClientApp, for Flower's own runtimes.

`app` is what a SuperNode is given: the site's directory and the federation's name come from the node's
configuration, which its operator writes (`--node-config 'site="PATH" federation="NAME"'`). The site refuses, pays
and logs as it always does. What Flower's transport does not have is the seal: what leaves can be read by the SuperLink.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedclaw.cli import start_logging
from fedclaw.console import make_console
from fedclaw.errors import UsageError
from fedclaw.transport.flower import NAME
from fedclaw.transport.flower.place import Place, say_name

log = logging.getLogger(__name__)


def client_app(place_of: Callable[[Context], Place]) -> ClientApp:
    """A ClientApp that answers with the site that `place_of` finds for the node.

    The app can be sent to another process if `place_of` can: what is opened belongs to the process that answers.
    """
    made = ClientApp()

    def respond(message: Message, context: Context) -> Message:
        place = place_of(context)
        if message.metadata.message_type == NAME:
            return say_name(place, message)
        # Brings torch with it, which takes seconds: not for a name.
        from fedclaw.transport.flower.site import answer_at

        return answer_at(place, message)

    made.train()(respond)
    made.evaluate()(respond)
    made.query("name")(respond)
    return made


def configured_place(context: Context) -> Place:
    """The place that the node's configuration names. Raises UsageError."""
    if not logging.getLogger("fedclaw").handlers:
        start_logging(make_console(stderr=True))
    try:
        return Place(Path(str(context.node_config["site"])), str(context.node_config["federation"]))
    except KeyError as error:
        message = f"the node's configuration lacks {error}; give site=PATH and federation=NAME"
        log.error("%s", message)
        raise UsageError(message) from error


app = client_app(configured_place)
