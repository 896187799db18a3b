"""Who is let in, and what notes it, made of the settings: token checks, rate limits, TLS, the audit log."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fedclaw.cli import expanded
from fedclaw.errors import UsageError
from fedclaw.serve.home import NodeHome
from fedclaw.serve.requests import Principal
from fedclaw.serve.security.http_protocol import ConnectionLimits, GuardedHttp, guarded
from fedclaw.serve.security.key_sets import KeyFile, KeyKeeper, KeySource, KeyUrl, parse_key_set
from fedclaw.serve.security.rate_limits import FailureLimiter, Rate, RateLimiter, RateLimits, RateTable
from fedclaw.serve.security.tls import GrpcClients, ServerTls, TlsFiles
from fedclaw.serve.security.tokens import Authenticator, NoAuthentication, TokenRules
from fedclaw.serve.settings import AdminSettings, LimitSettings, NodeSettings
from fedclaw.serve.state.audit_log import AuditLog

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
FAILURES = Rate(10.0, 100.0)
"""Tokens that are not accepted, from one address."""
STRANGERS = 10.0, 100.0
"""Audit lines a second, and at once, for requests of which nobody knows who asks: a flood must not fill the disk."""


class Authentication(Protocol):
    """Tells who asks."""

    def start(self) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102

    async def admit(  # noqa: D102
        self, header: bytes | None, certificate: str | None = None, address: str | None = None
    ) -> Principal: ...


class Admission(Protocol):
    """Lets a principal in, or tells it to come again later."""

    def admit(self, principal: str) -> None: ...  # noqa: D102

    def admit_rows(self, principal: str, rows: int) -> None: ...  # noqa: D102


def admission_of(settings: NodeSettings, home: NodeHome) -> Admission:
    """The rate limits that hold for all workers of a node together."""
    limits = RateLimits(_rate(settings.limits), _row_rate(settings.limits))
    return RateLimiter(RateTable.open(home.rates), limits)


def admin_rate(settings: NodeSettings) -> Rate:
    """Of one principal's requests at the admin port."""
    return _rate(settings.admin)


def _rate(limits: LimitSettings | AdminSettings) -> Rate:
    """Raises UsageError."""
    return Rate(limits.requests_per_second, float(limits.burst))


def _row_rate(limits: LimitSettings) -> Rate | None:
    """Raises UsageError."""
    return None if limits.rows_per_second is None else Rate(limits.rows_per_second, float(limits.rows_burst))


def authentication_of(
    settings: NodeSettings, home: NodeHome, observe: Callable[[bool], None] | None = None
) -> Authentication:
    """By the settings' tokens; `observe` is told of each token whether it was known. Raises UsageError."""
    tokens = settings.tokens
    if tokens.disabled:
        return NoAuthentication(settings.host, settings.admin.host)
    if tokens.jwks is None or tokens.issuer is None or tokens.audience is None:
        raise UsageError("tokens need jwks, issuer and audience")
    rules = TokenRules(tokens.issuer, tokens.audience, tokens.algorithms)
    source = _key_source(tokens.jwks, tokens.jwks_ca)
    failures = FailureLimiter(RateTable.open(home.rates), FAILURES, frozenset(settings.limits.proxies))
    return Authenticator(rules, KeyKeeper(source, tokens.algorithms), failures, observe=observe)


def audit_log_of(settings: NodeSettings, home: NodeHome, process: str) -> AuditLog:
    """The chain of one of the node's processes. Raises AuditLogError."""
    audit = settings.audit
    return AuditLog(
        home.audit,
        f"{settings.name}.{process}",
        inputs="no" if audit.inputs == "none" else audit.inputs,
        sync_seconds=audit.sync_seconds,
        when_full=audit.when_full,
    )


def check_admission(settings: NodeSettings) -> None:
    """Read certificates, keys and the key set once, but for one that a URL gives. Raises UsageError, ProvisionError."""
    _tls_as_it_is(settings)
    for name, limits in (("limits", settings.limits), ("admin", settings.admin)):
        try:
            _rate(limits)
        except UsageError as error:
            raise UsageError(f"{name}.requests_per_second and {name}.burst: {error}") from None
    try:
        _row_rate(settings.limits)
    except UsageError as error:
        raise UsageError(f"limits.rows_per_second and limits.rows_burst: {error}") from None
    tokens = settings.tokens
    source = None if tokens.jwks is None else _key_source(tokens.jwks, tokens.jwks_ca)
    if isinstance(source, KeyFile):
        try:
            parse_key_set(source.fetch().document, tokens.algorithms)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"tokens.jwks={tokens.jwks} is no key set: {reason}") from error


def _key_source(place: str, ca: Path | None) -> KeySource:
    """A URL or a file. Raises UsageError for a URL that is none."""
    if "://" in place:
        return KeyUrl(place, None if ca is None else expanded(ca))
    return KeyFile(expanded(Path(place)))


def tls_of(settings: NodeSettings) -> ServerTls | None:
    """By the settings' files, followed when they are replaced; None: without TLS. Raises ProvisionError."""
    found = _tls_as_it_is(settings)
    if found is not None:
        found.start()
    return found


def _tls_as_it_is(settings: NodeSettings) -> ServerTls | None:
    tls = settings.tls
    if tls.disabled or tls.certificate is None or tls.private_key is None:
        return None
    named = (tls.client_ca, tls.client_crl)
    others = [None if path is None else expanded(path) for path in named]
    return ServerTls(TlsFiles(expanded(tls.certificate), expanded(tls.private_key), *others))


def grpc_clients(tls: ServerTls | None) -> GrpcClients | None:
    """Who looks at the certificates of gRPC's clients; None: they have none. Raises ProvisionError."""
    return None if tls is None or tls.files.client_ca is None else GrpcClients(tls.files)


def http_protocol(settings: NodeSettings, body_bytes: int | None = None) -> type[GuardedHttp]:
    """The protocol class of uvicorn, which ends slow and ambiguous requests. `body_bytes`: None is by the settings."""
    limits = settings.limits
    # Without tokens a page in a browser on this machine must not get at the node under a name of its own.
    own = {*LOOPBACK, settings.host, settings.admin.host} if settings.tokens.disabled else set[str]()
    return guarded(
        ConnectionLimits(
            header_seconds=limits.header_seconds,
            body_bytes=body_bytes or limits.body_bytes,
            body_grace=limits.body_seconds,
            connections=limits.connections,
            connections_per_address=limits.connections_per_address,
            proxies=frozenset(limits.proxies),
            hosts=frozenset(own),
        )
    )
