"""`python -m fedclaw.serve`: take in the bundles, start the processes, and stay until told to stop."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from fedclaw import startup
from fedclaw.cli import expanded, require_paths
from fedclaw.errors import UsageError
from fedclaw.export.layout import Manifest
from fedclaw.serve.admission import check_admission
from fedclaw.serve.bundle_archive import require_bundle
from fedclaw.serve.home import DATABASE, NodeHome, trust_of
from fedclaw.serve.model_removal import forget_configured
from fedclaw.serve.models.bundle_store import BundleStore
from fedclaw.serve.names import LONGEST_NAME, NAME
from fedclaw.serve.releases import CONFIGURATION, configure_breakers, release_configured
from fedclaw.serve.security.rate_limits import RateTable
from fedclaw.serve.settings import ModelSettings, NodeSettings, VersionSettings
from fedclaw.serve.state.database import Database
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.supervisor import GRACE, ReservedPorts, Supervisor
from fedclaw.serve.version_catalogue import ModelEntry, VersionCatalogue

log = logging.getLogger("fedclaw.serve")

SILENT = 5.0
"""Seconds without a word after which a worker, which tells of itself four times a second, is taken for gone."""


def serve(settings: NodeSettings, console: Console) -> None:
    """Serve until a signal comes. Raises FedClawError when the node cannot start."""
    _require_some_model(settings)
    check_files(settings)
    home = NodeHome.make(expanded(settings.state))
    settings = settings.model_copy(update={"state": home.root})
    startup.need(settings.drain_seconds + GRACE + 3.0)
    startup.next_step("give the same command again: what was served is served on")
    with home.claimed():
        _serve_in(home, settings, console)


def _serve_in(home: NodeHome, settings: NodeSettings, console: Console) -> None:
    from fedclaw.serve.control import run_control
    from fedclaw.serve.worker import run_worker

    reserved = ReservedPorts(settings)
    supervisor = Supervisor(settings, reserved.ports, run_worker, run_control)
    try:
        take_in(settings, home)
        RateTable.create(home.rates)
        supervisor.start()
        _tell(settings, reserved, console)
        supervisor.watch()
    finally:
        supervisor.stop()
        reserved.close()


def check_files(settings: NodeSettings) -> None:
    """Read everything that the processes of the node will, so that what is wrong is said once, before anything begins.

    Raises UsageError for what is not there or not said, ProvisionError for what is there and no good.
    """
    tls, tokens = settings.tls, settings.tokens
    bundles = [version.bundle for model in _models(settings).values() for version in model.listed]
    for bundle in bundles:
        require_paths(bundle=bundle)
    named = {"tls.certificate": tls.certificate, "tls.private_key": tls.private_key, "tls.client_ca": tls.client_ca}
    named |= {"tls.client_crl": tls.client_crl, "tokens.jwks_ca": tokens.jwks_ca}
    named |= {"tokens.jwks": Path(tokens.jwks) if tokens.jwks and "://" not in tokens.jwks else None}
    named |= {"tracing.certificate": settings.tracing.certificate}
    require_paths(ca=settings.ca, federation=settings.federation, crl=settings.crl, **named)
    if settings.ca is None and settings.federation is None:
        raise UsageError("say whose bundles are served: ca=FILE, the federation's ca.crt, or federation=PATH")
    trust_of(settings)
    check_admission(settings)
    if settings.database is not None:
        Database(settings.database).close()
    for bundle in bundles:
        require_bundle(bundle)


def take_in(settings: NodeSettings, home: NodeHome) -> None:
    """Verify and copy the bundles that the settings name, and let their newest versions answer.

    Raises FedClawError, and then nothing is served otherwise than before.
    """
    trust, bundles = trust_of(settings), BundleStore(home.bundles)
    taken: list[tuple[str, ModelSettings, Sequence[tuple[VersionSettings, str, Manifest]]]] = []
    for name, model in _models(settings).items():
        found: list[tuple[VersionSettings, str, Manifest]] = []
        for version in model.listed:
            digest = bundles.put(expanded(version.bundle), trust)
            found.append((version, digest, bundles.open(digest, trust).manifest))
        taken.append((name or _name_of_run(found[-1][2]), model, found))
    with StateStore.open(home.database(settings.database)) as store:
        claim_name(store, settings.name, home.identity())
        catalogue = VersionCatalogue(store)
        for name, model, versions in taken:
            known = catalogue.read(name)
            entry = ModelEntry(versions={}, precision=model.precision, pinned=model.pinned)
            for version, digest, manifest in versions:
                added = catalogue.add(name, version.name, digest, manifest.run, CONFIGURATION, entry)
            release_configured(store, name, added, settings.name, known is None or added not in known.versions)
        configure_breakers(store, settings.breaker)
        forget_configured(store, settings.name, {name for name, _, _ in taken})
        if not catalogue.models():
            raise UsageError("there is no model to serve: give bundle=PATH, or models={NAME: {bundle: PATH}}")


def claim_name(store: StateStore, name: str, identity: str) -> None:
    """Have the name for the node whose directory has this identity, among all that share the store.

    Another directory that has it gives it up once its workers are silent. Raises UsageError while they are not: audit
    logs and workers of two nodes would be taken for those of one.
    """
    document = f"nodes/{name}"
    before = store.read(document)
    if before is not None and before[1] == {"identity": identity}:
        return
    alive = any(beat.node == name and beat.age < SILENT for beat in store.workers())
    if alive or not store.swap(document, None if before is None else before[0], {"identity": identity}):
        raise UsageError(f"name={name}: another node of this name runs on this database; give each a name of its own")


def _models(settings: NodeSettings) -> Mapping[str, ModelSettings]:
    """By name; '' is the name of the bundle's run."""
    if settings.bundle is None:
        return settings.models
    return {settings.model or "": ModelSettings(bundle=settings.bundle)}


def _name_of_run(manifest: Manifest) -> str:
    """As the name of its model. Raises UsageError where it cannot be one."""
    if re.fullmatch(NAME, manifest.run) is None:
        raise UsageError(
            f"give the model a name, model=NAME: the bundle's run is called {manifest.run!r:.140}, and names of models "
            f"are letters, digits, '.', '_' and '-', at most {LONGEST_NAME}"
        )
    return manifest.run


def _require_some_model(settings: NodeSettings) -> None:
    known = (expanded(settings.state) / DATABASE).exists() or settings.database is not None
    if settings.bundle is None and not settings.models and not known:
        raise UsageError("there is no model to serve: give bundle=PATH, or models={NAME: {bundle: PATH}}")


def _tell(settings: NodeSettings, reserved: ReservedPorts, console: Console) -> None:
    scheme, ports = "http" if settings.tls.disabled else "https", reserved.ports
    lines = [f"ready     {scheme}://{settings.host}:{ports.http}   (docs at /docs)"]
    if ports.grpc is not None:
        lines.append(f"grpc      {settings.host}:{ports.grpc}")
    lines.append(f"admin     {scheme}://{settings.admin.host}:{ports.admin}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if settings.tls.disabled:
        log.warning("TLS is off: requests and answers are in the clear")
    if settings.tokens.disabled:
        log.warning("tokens are off: whoever reaches these ports can ask for everything")
    log.info("process %d holds the node together; stop it with Ctrl-C or SIGTERM", os.getpid())
