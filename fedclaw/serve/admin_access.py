"""Who gets through the admin port, how often, and what of it stands in the audit log.

The control process has a chain of its own in the node's audit log, NODE.control. Before anything is changed, a line of
kind `change` says who asked for what; where it cannot be written, nothing is changed (`audit.when_full`). A line of
kind `admin` says what came of it, and of each other request who read what, or was refused. The metrics, which are read
every few seconds, have no line.

Who asks too often is refused before its token's scopes are looked at, or anything else: so nobody with a token keeps
the control process from its decisions. Tokens that are not accepted are counted by address, together with those of the
data ports.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from fedclaw.serve.admission import STRANGERS, Authentication
from fedclaw.serve.monitoring.metrics import NodeMetrics
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Principal
from fedclaw.serve.security.rate_limits import Allowance, Rate, RateLimiter, RateLimits, RateTable
from fedclaw.serve.security.scopes import require
from fedclaw.serve.state.audit_log import AuditLog, AuditUnavailable

log = logging.getLogger("fedclaw.serve")

METRICS, READ = "metrics", "read"
MOST_CHANGES = 4
"""Changes that are under way at once, uploads too: fewer than the process has threads, so that reads go on."""


@dataclass(slots=True)
class AdminCall:
    """One request at the admin port, as the audit log tells of it."""

    scope: str
    """read, publish or route."""
    action: str
    """What is asked for, in the node's words."""
    peer: str
    model: str = ""
    versions: Sequence[str] = ()
    """That the request names, or that came of it."""
    principal: str = ""
    """Empty: nobody knows."""


class AdminAccess:
    """Lets requests in, and notes them."""

    def __init__(self, authentication: Authentication, audit: AuditLog, metrics: NodeMetrics, rate: Rate) -> None:
        """`rate` is of the requests of one principal."""
        self.audit = audit
        self._authentication, self._metrics = authentication, metrics
        self._limiter = RateLimiter(RateTable.private(), RateLimits(requests=rate))
        self._strangers = Allowance(*STRANGERS)
        self._changing = 0

    async def admit(self, call: AdminCall, authorization: bytes | None, certificate: str | None) -> None:
        """Find out who asks. Raises ServeRefusal."""
        principal = await self._authentication.admit(authorization, certificate, call.peer or None)
        call.principal = principal.name
        self._limiter.admit(principal.name)
        _require(principal, call.scope)

    def begin(self, call: AdminCall) -> None:
        """Note that a change is about to be made; `ended` has to follow. Raises ServeRefusal, and then it must not."""
        if self._changing >= MOST_CHANGES:
            raise ServeRefusal("overloaded", f"{MOST_CHANGES} changes are under way: try again", 5.0)
        self._write("change", call, None)
        self._changing += 1

    def ended(self) -> None:
        """A change is not under way any more."""
        self._changing -= 1

    def answered(self, call: AdminCall, status: int, refusal: ServeRefusal | None = None) -> None:
        """Note what came of a request."""
        if refusal is None and call.action == METRICS:
            return
        if refusal is not None and refusal.code == "too_many_requests":
            return
        if call.principal or self._strangers.take():
            try:
                self._write("admin", call, status, "" if refusal is None else refusal.code)
            except AuditUnavailable:
                # It is done, or nothing was: whoever asked is told which. The log has said that lines are missing.
                self._metrics.audit_missed()

    def _write(self, kind: str, call: AdminCall, status: int | None, code: str = "") -> None:
        written = self.audit.append_admin(
            kind=kind,
            principal=call.principal,
            peer=call.peer,
            action=call.action,
            model=call.model,
            version=" ".join(call.versions),
            status=status,
            code=code,
        )
        if not written:
            self._metrics.audit_missed()


def _require(principal: Principal, scope: str) -> None:
    """Raise ServeRefusal for whoever may not, and say so in the log."""
    try:
        require(principal, "admin", scope)
    except ServeRefusal:
        log.warning("%.200r was refused at the admin port: it has no admin:%s", principal.name, scope)
        raise
