"""Serve signed bundles: one node that answers requests, on-premises.

    python -m fedclaw.serve bundle=PATH ca=ca.crt …          serve, until stopped (Ctrl-C or SIGTERM)
    python -m fedclaw.serve publish bundle=PATH model=NAME   a new version for nodes that run
    python -m fedclaw.serve keys directory=PATH              a signing key and its key set, without an identity provider
    python -m fedclaw.serve token keys=PATH subject=NAME scopes=[predict:heart]
                                                             a token, signed with that key
    python -m fedclaw.serve audit state=PATH                 check the audit log
    python -m fedclaw.serve haproxy nodes=[HOST:PORT,…]      a configuration for HAProxy in front

    bundle      a bundle directory; several models, or versions: models={heart: {versions: [{bundle: A}, {bundle: B}]}}
    ca          certificate of the CA whose bundles are served (or federation=…, its descriptor)
    state       directory of the node: its own copies of bundles, routing, feedback, audit log
    port        HTTP: Open Inference Protocol v2, /predict, /feedback; grpc_port: the protocol over gRPC; admin.port
    tls         tls.certificate= and tls.private_key=; tls.client_ca= for mutual TLS
    tokens      tokens.jwks= (file or https URL), tokens.issuer=, tokens.audience=
    workers     processes that answer
    database    env:NAME or file:PATH with postgresql://…, for two nodes that share routing and feedback

A bundle is verified, and the very bytes that were verified are what is loaded. To try it on this machine alone:

    python -m fedclaw.serve bundle=BUNDLE ca=ca.crt tls.disabled=true tokens.disabled=true

See docs/serving.md.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.serve", __doc__)

from collections.abc import Callable, Sequence
from pathlib import Path

from fedclaw.cli import compose_settings, expanded, make_console, require_paths, run_main, split
from fedclaw.errors import UsageError
from fedclaw.files import PRIVATE_MODE, write_atomic


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says. Raises FedClawError."""
    line = split(arguments)
    if not line.words:
        _serve(line.overrides)
        return
    word, *rest = line.words
    if word not in _WORDS and Path(word).exists():
        raise UsageError(f"{word!r} is no command; to serve a bundle give bundle={word}")
    if rest or word not in _WORDS:
        raise UsageError(f"unknown command {' '.join(line.words)!r}; there are: {', '.join(_WORDS)}, or none to serve")
    _WORDS[word](line.overrides)


def _serve(overrides: Sequence[str]) -> None:
    from fedclaw.serve.command import serve
    from fedclaw.serve.settings import NodeSettings

    serve(compose_settings("serve", overrides, NodeSettings), make_console())


def _publish(overrides: Sequence[str]) -> None:
    from fedclaw.serve.publish import PublishSettings, publish

    settings = compose_settings("serve_publish", overrides, PublishSettings)
    console = make_console()
    publish(settings, lambda said: console.print(said, markup=False))


def _audit(overrides: Sequence[str]) -> None:
    from fedclaw.serve.state.audit_command import AuditCommand, check_audit_log

    check_audit_log(compose_settings("serve_audit", overrides, AuditCommand), make_console())


def _haproxy(overrides: Sequence[str]) -> None:
    from fedclaw.serve.proxies.haproxy import HaproxySettings, haproxy

    settings = compose_settings("serve_haproxy", overrides, HaproxySettings)
    console = make_console()
    haproxy(settings, lambda said: console.print(said, markup=False))


def _keys(overrides: Sequence[str]) -> None:
    from fedclaw.serve.security.development_tokens import AUDIENCE, ISSUER, KeysCommand, write_keys

    settings = compose_settings("serve_keys", overrides, KeysCommand)
    made = write_keys(expanded(settings.directory))
    line = f"tokens.jwks={made} tokens.issuer={ISSUER} tokens.audience={AUDIENCE}"
    make_console().print(line, markup=False, soft_wrap=True)


def _token(overrides: Sequence[str]) -> None:
    from fedclaw.serve.security.development_tokens import TokenCommand, sign_token

    asked = compose_settings("serve_token", overrides, TokenCommand)
    require_paths(keys=asked.keys)
    token = sign_token(expanded(asked.keys), asked.issuer, asked.audience, asked.subject, asked.scopes, asked.minutes)
    if asked.output is None:
        print(token)  # noqa: T201
    else:
        write_atomic(expanded(asked.output), token.encode(), PRIVATE_MODE)


_WORDS: dict[str, Callable[[Sequence[str]], None]] = {
    "publish": _publish,
    "keys": _keys,
    "token": _token,
    "audit": _audit,
    "haproxy": _haproxy,
}

if __name__ == "__main__":
    run_main("fedclaw.serve", __doc__ or "", main)
