"""`python -m fedclaw.serve audit`: the newest lines of a node's audit log, and whether it is whole."""

import logging
from pathlib import Path

from pydantic import Field
from rich.console import Console

from fedclaw.cli import expanded, require_paths
from fedclaw.errors import UsageError
from fedclaw.protocol.frozen import Frozen
from fedclaw.serve.home import DATABASE, NodeHome
from fedclaw.serve.names import ModelName
from fedclaw.serve.state.audit_log import AuditLogError, segments_of
from fedclaw.serve.state.audit_verification import Anchors, of_node, show_audit_log
from fedclaw.serve.state.store import StateStore, StateUnavailable

log = logging.getLogger("fedclaw.serve")


class AuditCommand(Frozen):
    """conf/serve_audit.yaml, checked."""

    state: Path
    name: ModelName
    database: str | None
    last: int = Field(ge=0)
    principal: str | None
    model: str | None
    archived: bool


def check_audit_log(asked: AuditCommand, console: Console) -> None:
    """Show what was asked for. Raises AuditLogError if a chain was tampered with, or there is no log."""
    require_paths(state=asked.state)
    home = NodeHome(expanded(asked.state))
    _require_name(home, asked.name)
    code = show_audit_log(
        home.audit,
        console,
        anchors=_anchors(asked, home),
        last=asked.last,
        principal=asked.principal,
        model=asked.model,
        archived=asked.archived,
    )
    if code:
        raise AuditLogError(f"audit log {home.audit}: it is not whole; what was found stands above")


def _require_name(home: NodeHome, name: str) -> None:
    """Anchors are found by the node's name: another name would find none, and say nothing of an end that is gone."""
    try:
        owners = {chain.rpartition(".")[0] for chain in segments_of(home.audit)}
    except OSError:
        return  # There is no log, as whoever reads it says.
    if owners and name not in owners:
        raise UsageError(f"name={name}: the audit log {home.audit} is of {', '.join(sorted(owners))}")


def _anchors(asked: AuditCommand, home: NodeHome) -> Anchors | None:
    """None: the state store cannot be asked. The files are looked at all the same."""
    if asked.database is None and not (home.root / DATABASE).exists():
        return None
    try:
        with StateStore.open(home.database(asked.database)) as store:
            return of_node(store, asked.name)
    except StateUnavailable as error:
        log.warning("the state store does not answer, so an end that was cut off is not seen: %s", error.detail)
        return None
