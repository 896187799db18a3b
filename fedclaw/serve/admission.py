"""Who is let in, made of the settings: token checks, rate limits, TLS."""

from pathlib import Path
from ssl import SSLContext
from typing import Any, Protocol

from fedclaw.cli import expanded
from fedclaw.errors import UsageError
from fedclaw.serve.home import NodeHome
from fedclaw.serve.requests import Principal
from fedclaw.serve.settings import NodeSettings


class Authentication(Protocol):
    """Tells who asks."""

    def start(self) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102

    async def admit(self, header: bytes | None, certificate: str | None = None) -> Principal: ...  # noqa: D102


class Admission(Protocol):
    """Lets a principal in, or tells it to come again later."""

    def admit(self, principal: str) -> None: ...  # noqa: D102


def admission_of(settings: NodeSettings, home: NodeHome) -> Admission:
    """The rate limits that hold for all workers of a node together."""
    from fedclaw.serve.security.rate_limits import Limits, Rate, RateLimiter, RateTable

    rate = Rate(settings.limits.requests_per_second, float(settings.limits.burst))
    return RateLimiter(RateTable.open(home.rates), Limits(requests=rate))


def authentication_of(settings: NodeSettings) -> Authentication:
    """By the settings' tokens. Raises UsageError."""
    from fedclaw.serve.security.key_sets import KeyFile, KeyKeeper, KeySource, KeyUrl
    from fedclaw.serve.security.tokens import Authenticator, NoAuthentication, TokenRules

    tokens = settings.tokens
    if tokens.disabled:
        return NoAuthentication(settings.host, settings.admin.host)
    if tokens.jwks is None or tokens.issuer is None or tokens.audience is None:
        raise UsageError("tokens need jwks, issuer and audience")
    rules = TokenRules(tokens.issuer, tokens.audience, tokens.algorithms)
    source: KeySource = (
        KeyUrl(tokens.jwks, tokens.jwks_ca)
        if tokens.jwks.startswith("https://")
        else KeyFile(expanded(Path(tokens.jwks)))
    )
    return Authenticator(rules, KeyKeeper(source, tokens.algorithms))


def tls_context(settings: NodeSettings) -> SSLContext | None:
    """For the HTTP ports; None: without TLS. Raises UsageError."""
    tls = settings.tls
    if tls.disabled or tls.certificate is None or tls.private_key is None:
        return None
    from fedclaw.serve.security.tls import server_context

    return server_context(tls.certificate, tls.private_key, tls.client_ca, tls.client_crl)


def grpc_credentials(settings: NodeSettings) -> Any:
    """For the gRPC port; None: without TLS. Raises UsageError."""
    tls = settings.tls
    if tls.disabled or tls.certificate is None or tls.private_key is None:
        return None
    from fedclaw.serve.security.tls import grpc_server_credentials

    return grpc_server_credentials(tls.certificate, tls.private_key, tls.client_ca, tls.client_crl)
