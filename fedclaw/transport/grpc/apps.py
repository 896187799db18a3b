"""Runs plain Flower apps, which know nothing of FedClaw: a ServerApp on a grid, a ClientApp as a site."""

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, Error, Message, RecordDict, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedclaw.errors import UsageError
from fedclaw.protocol.refusal import RefusalCode

log = logging.getLogger(__name__)

Config = Mapping[str, UserConfigValue]
A = TypeVar("A")


def load_app(reference: str, kind: type[A]) -> A:
    """The object named by "module:attribute". Only for names that the operator typed, never for names from the wire.

    The module's first part is looked for in the current directory and then among all that is installed. What else the
    app imports from the current directory is found there if nothing installed has its name.
    Raises UsageError if it does not exist or is not a `kind`.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"app={reference!r} is not of the form module:attribute")
    try:
        _import_here(module_name.partition(".")[0])
        module = importlib.import_module(module_name)
    except Exception as error:
        text = " ".join(str(error).split())
        raise UsageError(f"app={reference}: cannot import {module_name}: {type(error).__name__}: {text}") from error
    app = getattr(module, attribute, None)
    if not isinstance(app, kind):
        found = "does not exist" if app is None else f"is a {type(app).__name__}"
        raise UsageError(f"app={reference}: {attribute} {found}, expected a {kind.__name__}")
    return app


def _import_here(package: str) -> None:
    """Import the package or module of that name from the current directory, if it is there."""
    here = str(Path.cwd())
    if here not in map(os.path.realpath, sys.path):
        sys.path.append(here)
    spec = PathFinder.find_spec(package, [here])
    if package in sys.modules or spec is None or spec.loader is None:
        return
    sys.modules[package] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[package]
        raise


def run_server_app(server_app: ServerApp, grid: Grid, run_config: Config) -> None:
    """Run a ServerApp to its end. Its exceptions pass through."""
    context = Context(
        run_id=grid.run.run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    server_app(grid, context)


class ClientAppHandler:
    """A `SiteHandler` that answers with a ClientApp. Each run has a context, which lasts as long as the process."""

    def __init__(self, client_app: ClientApp, node_id: int, node_config: Config, run_config: Config) -> None:
        self._app = client_app
        self._node_id = node_id
        self._node_config = dict(node_config)
        self._run_config = dict(run_config)
        self._contexts: dict[int, Context] = {}

    def answer(self, message: Message) -> Message:
        """The app's reply. An exception is logged at the site; the server only learns that there was one."""
        context = self._context(message.metadata.run_id)
        try:
            reply = self._app(message, context)
        except Exception:
            log.exception("the client app failed on a %s message", message.metadata.message_type)
            error = Error(RefusalCode.FAILED, "the client app raised an exception; see the site's log")
            return Message(error, reply_to=message)
        return reply

    def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
        """Log what leaves; a plain app keeps no other record."""
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
