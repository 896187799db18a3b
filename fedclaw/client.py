"""The site client: connects out to its federation's server and answers by its own policy.

    python -m fedclaw.client site=PATH                          serve, until stopped (Ctrl-C or SIGTERM)
    python -m fedclaw.client site=PATH check                    load everything, explain the policy, connect to nobody
    python -m fedclaw.client site=PATH check epsilon=4 rounds=20 batch_size=32
                                                                and say what such a run would cost
    python -m fedclaw.client site=PATH app=package.module:app   run a plain Flower ClientApp that the operator installed

PATH holds site.yaml, the schema, the data, keys/ and federation.json (see python -m fedclaw.provision --help).
    server=HOST:PORT   connect there instead of to the address in federation.json; whatever leads there, the server
                       proves that it is the one that federation.json names

check writes nothing and works before the site is enrolled. It says what is left of each budget, how many cells of the
data are missing, and what is wrong. Any of epsilon, delta, rounds, epochs or steps, batch_size, strategy_name and
cohort asks about a run with the site's own noise: whether it would be let in, its cost, and what would be left.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.client", __doc__)

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from fedclaw import startup
from fedclaw.cli import compose_settings, make_console, run_main, split
from fedclaw.errors import UsageError
from fedclaw.identity.at_rest import PLAIN
from fedclaw.identity.names import check_address
from fedclaw.identity.site_home import SiteKeys
from fedclaw.protocol.frozen import Frozen
from fedclaw.site.preflight.question import Question
from fedclaw.site.settings import SiteSettings, load_site_settings, require_name
from fedclaw.transport.grpc.limits import Limits

if TYPE_CHECKING:
    from fedclaw.transport.base import SiteHandler

log = logging.getLogger("fedclaw.client")

_LIBRARIES = "torch, Opacus and Flower"


class ClientSettings(Frozen):
    """conf/client.yaml, checked."""

    site: Path
    server: Annotated[str, AfterValidator(check_address)] | None = None
    app: str | None = None
    node_config: dict[str, str | int | float | bool] = {}
    run_config: dict[str, str | int | float | bool] = {}
    limits: Limits = Limits()


class CheckSettings(ClientSettings, Question):
    """conf/check.yaml, checked: a client's settings, and a run that its operator wonders about."""


def main(arguments: Sequence[str]) -> None:
    """Run the client as the command line says."""
    line = split(arguments)
    if line.words not in {(), ("check",)}:
        raise UsageError(f"unknown command {' '.join(line.words)!r}; the only one is check")
    if line.words == ("check",):
        check(line.overrides)
    else:
        settings = compose_settings("client", line.overrides, ClientSettings)
        _require_directory(settings.site)
        serve(settings)


def check(overrides: Sequence[str]) -> None:
    """Load what serving would load, and say what the policy would allow. Raises what keeps the client from serving."""
    settings = compose_settings("check", overrides, CheckSettings)
    _require_directory(settings.site)
    site = load_site_settings(settings.site)
    with startup.loading(_LIBRARIES):
        from fedclaw.site.preflight.check import examine, what_if
    checked = examine(settings.site, site)
    console, findings = make_console(), checked.findings
    for fact in findings.facts:
        console.print(fact, markup=False)
    for sentence in findings.allowed:
        console.print(f"- {sentence}", markup=False)
    for warning in findings.warnings:
        console.print(f"! {warning}", style="yellow", markup=False)
    if Question.model_fields.keys() & {override.lstrip("+~").partition("=")[0] for override in overrides}:
        for sentence in what_if(checked, settings):
            console.print(f"? {sentence}", style="cyan", markup=False)
    if findings.failure is not None:
        raise findings.failure


def _require_directory(site: Path) -> None:
    if not site.is_dir():
        raise UsageError(f"the site directory {site} does not exist")


def serve(settings: ClientSettings) -> None:
    """Connect and answer until told to stop."""
    site = load_site_settings(settings.site) if settings.app is None else None
    keys = SiteKeys.open(settings.site)
    if site is not None:
        require_name(settings.site, site, keys.site_name)
    with startup.loading(_LIBRARIES):
        from fedclaw.site.directory import only_client, site_store, state_directory
        from fedclaw.transport.grpc.site_connection import SiteConnection
    startup.next_step("start it again with the same command; what is asked meanwhile waits at the server")
    with only_client(settings.site):
        handler = _handler(settings, site, keys)
        store = PLAIN if site is None else site_store(settings.site, site)
        connection = SiteConnection(
            keys, handler, state_directory(settings.site), settings.limits, address=settings.server, store=store
        )
        log.info("site %s serves federation %s", keys.site_name, keys.descriptor.name)
        connection.run(threading.Event())


def _handler(settings: ClientSettings, site: SiteSettings | None, keys: SiteKeys) -> "SiteHandler":
    if site is None:
        from flwr.clientapp import ClientApp

        from fedclaw.protocol.message_identity import number_of
        from fedclaw.transport.grpc.apps import ClientAppHandler, load_app

        app = load_app(settings.app or "", ClientApp)
        return ClientAppHandler(app, number_of(keys.site_name), settings.node_config, settings.run_config)
    from fedclaw.site.directory import open_service

    service = open_service(settings.site, site, keys.descriptor.name, keys=keys)
    log.info("%d training examples on %s", len(service.data.train), service.device)
    return service


if __name__ == "__main__":
    run_main("fedclaw.client", __doc__ or "", main)
