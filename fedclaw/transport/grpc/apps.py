"""Plain Flower apps on this runtime: a ServerApp on a grid, a ClientApp as a site. Neither knows of FedClaw."""

import importlib
import logging
from collections.abc import Mapping
from typing import TypeVar

from flwr.app import Context, Error, Message, RecordDict, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedclaw.errors import UsageError
from fedclaw.protocol.plan import RefusalCode

log = logging.getLogger(__name__)

Config = Mapping[str, UserConfigValue]
A = TypeVar("A")


def load_app(reference: str, kind: type[A]) -> A:
    """The object that "module:attribute" names, which the operator typed; never called with a name from the wire.

    Raises UsageError in one line when there is no such thing, or it is not a `kind`.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"app={reference!r} is not of the form module:attribute")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        text = " ".join(str(error).split())
        raise UsageError(f"app={reference}: cannot import {module_name}: {type(error).__name__}: {text}") from error
    app = getattr(module, attribute, None)
    if not isinstance(app, kind):
        found = "does not exist" if app is None else f"is a {type(app).__name__}"
        raise UsageError(f"app={reference}: {attribute} {found}, expected a {kind.__name__}")
    return app


def run_server_app(server_app: ServerApp, grid: Grid, run_config: Config) -> None:
    """Run a ServerApp to its end. Whatever it raises passes through."""
    context = Context(
        run_id=grid.run.run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    server_app(grid, context)


class ClientAppHandler:
    """A ClientApp as a site: a `SiteHandler`. Its context's state lasts as long as the process, per run."""

    def __init__(self, client_app: ClientApp, node_id: int, node_config: Config, run_config: Config) -> None:
        self._app = client_app
        self._node_id = node_id
        self._node_config = dict(node_config)
        self._run_config = dict(run_config)
        self._contexts: dict[int, Context] = {}

    def answer(self, message: Message) -> Message:
        """The app's reply. An exception stays in this site's log; the server learns only that there was one."""
        context = self._context(message.metadata.run_id)
        try:
            reply = self._app(message, context)
        except Exception:
            log.exception("the client app failed on a %s message", message.metadata.message_type)
            error = Error(RefusalCode.FAILED, "the client app raised an exception; see the site's log")
            return Message(error, reply_to=message)
        return reply

    def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
        """A plain app keeps no record of what leaves beyond the log."""
        kind = message.metadata.message_type
        outcome = "error" if reply.has_error() else "reply"
        log.info("%s to a %s message leaves: %d bytes, sha256 %s", outcome, kind, size, digest[:16])

    def _context(self, run_id: int) -> Context:
        if run_id not in self._contexts:
            self._contexts[run_id] = Context(
                run_id=run_id,
                node_id=self._node_id,
                node_config=dict(self._node_config),
                state=RecordDict(),
                run_config=dict(self._run_config),
            )
        return self._contexts[run_id]
