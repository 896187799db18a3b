"""A new version for nodes that run: upload a bundle to each, then let one of them begin its release.

A node takes nothing on faith: it verifies what it got against the CA that its own configuration names. Bundles are
uploaded to all nodes before any of them routes to the new version, so that none is asked for what it has not got.
"""

import http.client
import json
import os
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import Field, field_validator

from fedclaw import startup
from fedclaw.cli import expanded, require_paths
from fedclaw.errors import FedClawError, UsageError
from fedclaw.protocol.frozen import Frozen
from fedclaw.serve.bundle_archive import MEDIA_TYPE, pack, require_bundle
from fedclaw.serve.names import ModelName, VersionName
from fedclaw.serve.settings import is_loopback

_SHOWN = 500
_EVERY = 1.0
_REMIND_EVERY = 60.0
_TIMEOUT = 120.0
"""Longer than workers have to load a version."""


class PublishSettings(Frozen):
    """conf/serve_publish.yaml, checked."""

    bundle: Path
    model: ModelName
    version: VersionName | None
    node: tuple[str, ...] = Field(min_length=1)
    """Addresses of admin ports, https://HOST:PORT; of all nodes that share a database."""
    token: str
    """file:PATH or env:NAME that holds a token with admin:publish."""
    node_ca: Path | None
    """Whose certificates the nodes have, if not those of a public CA."""
    mode: Literal["canary", "shadow", "at_once"] | None
    """null: as the node's configuration says."""
    wait: bool
    """Until the release has come to its end, or waits for a person."""
    patience: float = Field(gt=0)
    """Seconds to wait at most."""

    @field_validator("node", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given


class AdminClient:
    """Speaks to one node's admin port."""

    def __init__(self, node: str, token: str, ca: Path | None) -> None:
        try:
            found = urlsplit(node)
            host, port = found.hostname, found.port
        except ValueError:
            raise UsageError(f"node={node}: give the address of an admin port, as https://node.hospital:9443") from None
        if found.scheme not in {"https", "http"} or host is None or port is None or found.path not in {"", "/"}:
            raise UsageError(f"node={node}: give the address of an admin port, as https://node.hospital:9443")
        if found.scheme == "http" and not is_loopback(host):
            raise UsageError(f"node={node}: a token is sent in the clear to this machine's own nodes alone; use https")
        self.node, self._token, self._host, self._port = node, token, host, port
        self._tls = _tls(ca) if found.scheme == "https" else None

    def ask(self, method: str, path: str, body: Any = None, media_type: str = "application/json") -> Any:
        """One request; the answer, parsed. Raises FedClawError with what the node says."""
        connection = self._connection()
        headers = {"authorization": f"Bearer {self._token}", "content-type": media_type}
        content = json.dumps(body).encode() if media_type == "application/json" and body is not None else body
        try:
            connection.request(method, path, content, headers, encode_chunked=media_type == MEDIA_TYPE)
            response = connection.getresponse()
            found = response.read(1 << 24)
        except ssl.SSLError as error:
            raise FedClawError(f"{self.node}: no secure connection: {error.reason or 'TLS failed'}") from error
        except (OSError, http.client.HTTPException) as error:
            raise FedClawError(f"{self.node} does not answer: {getattr(error, 'strerror', None) or error}") from error
        finally:
            connection.close()
        return self._parsed(response.status, found)

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT)
        return http.client.HTTPSConnection(self._host, self._port, timeout=_TIMEOUT, context=self._tls)

    def _parsed(self, status: int, content: bytes) -> Any:
        try:
            found = json.loads(content)
        except ValueError as error:
            raise FedClawError(f"{self.node} answered {status}, and nothing that a node says") from error
        if status >= http.client.BAD_REQUEST:
            said = str(found.get("error", "")) if isinstance(found, dict) else ""
            raise FedClawError(f"{self.node} refused it ({status}): {said[:_SHOWN]}")
        return found


def read_token(source: str) -> str:
    """A token from file:PATH or env:NAME. Raises UsageError; the token is in no error."""
    scheme, _, rest = source.partition(":")
    if scheme == "file" and rest:
        path = expanded(Path(rest))
        try:
            token = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"token={source} cannot be read: give a file that holds a token") from error
    elif scheme == "env" and rest:
        token = os.environ.get(rest, "").strip()
    else:
        raise UsageError("give token=file:PATH or token=env:NAME: a token in an argument is seen by everybody here")
    if not token or any(letter.isspace() or not letter.isprintable() for letter in token):
        raise UsageError(f"token={source} holds no token")
    return token


def publish(settings: PublishSettings, tell: Callable[[str], None]) -> dict[str, Any]:
    """Upload, begin the release, and wait for its end if that is wanted; the model as the node then has it.

    Raises UsageError, FedClawError if a node refuses or the release is rolled back.
    """
    require_paths(bundle=settings.bundle, node_ca=settings.node_ca)
    token = read_token(settings.token)
    require_bundle(settings.bundle)
    clients = [AdminClient(node, token, settings.node_ca) for node in settings.node]
    path = f"/admin/models/{quote(settings.model, safe='')}"
    named = f"?version={quote(settings.version, safe='')}" if settings.version else ""
    versions = set[str]()
    for client in clients:
        answer = client.ask("POST", f"{path}/versions{named}", pack(expanded(settings.bundle)), MEDIA_TYPE)
        versions.add(str(answer["version"]))
        tell(f"{client.node} has version {answer['version']}, digest {answer['digest'][:12]}")
    if len(versions) != 1:
        raise FedClawError(f"the nodes gave it different names ({', '.join(sorted(versions))}): give version=")
    version = versions.pop()
    begun = clients[0].ask("POST", f"{path}/release", {"version": version, "mode": settings.mode})
    startup.next_step(f"the release of {version} goes on at the node, and `roll_back` on its admin port ends it")
    tell(f"release of {version}: {begun['says']}")
    return _wait(clients[0], path, version, settings.patience, tell) if settings.wait else begun


def _wait(client: AdminClient, path: str, version: str, patience: float, tell: Any) -> dict[str, Any]:
    end, said, awaited = time.monotonic() + patience, "", ""
    remind = time.monotonic() + _REMIND_EVERY
    while time.monotonic() < end:
        found: dict[str, Any] = client.ask("GET", f"{path}/release")
        if found["says"] != said:
            said = found["says"]
            tell(said)
        awaited = _awaited(found)
        if awaited and time.monotonic() >= remind:
            remind = time.monotonic() + _REMIND_EVERY
            tell(awaited)
        if found["state"] == "rolled_back":
            raise FedClawError(f"version {version} was rolled back: {said}")
        if found["state"] == "answers" and found["stable"] != version:
            raise FedClawError(f"version {version} does not answer: somebody else's decision was another. {said}")
        if found["state"] in {"answers", "waits_for_approval", "shadow"}:
            return found
        time.sleep(_EVERY)
    state = "; ".join(filter(None, (said, awaited, "it goes on")))
    raise FedClawError(f"the release of {version} was not at its end after {patience:g} s: {state}")


def _awaited(found: Mapping[str, Any]) -> str:
    waits = found.get("waits_for")
    return f"it waits for {waits['says']}" if isinstance(waits, dict) and "says" in waits else ""


def _tls(ca: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(expanded(ca)))
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"node_ca={ca} is no certificate") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
