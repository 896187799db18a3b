"""An identity provider for tests: real keys, tokens written by hand where a library would refuse, and a key server."""

import base64
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedclaw.identity import pki

ISSUER = "https://idp.hospital.example"
AUDIENCE = "fedclaw-node"
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@cache
def ec_key(name: str = "a") -> ec.EllipticCurvePrivateKey:
    """One key for each name, the same in a whole run."""
    return ec.generate_private_key(ec.SECP256R1())


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def b64(data: bytes | str | dict[str, Any]) -> str:
    if isinstance(data, dict):
        data = json.dumps(data)
    return base64.urlsafe_b64encode(data.encode() if isinstance(data, str) else data).decode().rstrip("=")


def jwk(key: Key, kid: str | None = "a", **more: object) -> dict[str, Any]:
    """The public half, as a key set lists it."""
    kind = jwt.algorithms.ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else jwt.algorithms.RSAAlgorithm
    public = kind.to_jwk(key.public_key(), as_dict=True)
    public.pop("key_ops", None)
    return {**public, **({} if kid is None else {"kid": kid}), **more}


def key_set(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def claims(**more: object) -> dict[str, Any]:
    """Claims that are all right; None takes one away."""
    now = time.time()
    usual = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "scanner-7",
        "iat": int(now),
        "exp": int(now) + 600,
        "scope": "predict:heart feedback:heart",
    }
    return {name: value for name, value in {**usual, **more}.items() if value is not None}


def signed(jose: dict[str, Any] | str, body: dict[str, Any] | str, key: Key | None = None) -> str:
    """A token of exactly these texts, signed with ES256 or RS256 by `key`."""
    text = f"{b64(jose)}.{b64(body)}"
    key = key or ec_key()
    algorithm = "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256"
    handler = jwt.PyJWS().get_algorithm_by_name(algorithm)
    return f"{text}.{b64(handler.sign(text.encode(), key))}"


def token(key: Key | None = None, kid: str | None = "a", jose: dict[str, Any] | None = None, **more: object) -> str:
    """A token that is all right but for what is said."""
    key = key or ec_key()
    algorithm = "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256"
    header = {"alg": algorithm, "typ": "at+jwt", "kid": kid, **(jose or {})}
    return signed({name: value for name, value in header.items() if value is not None}, claims(**more), key)


def bearer(text: str) -> bytes:
    return f"Bearer {text}".encode()


@dataclass
class KeyServer:
    """What the server answers, which a test changes, and what it was asked."""

    url: str
    ca: Path
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    """Seconds between two of 20 pieces of the body."""
    asked: int = 0
    sent: int = 0


@contextmanager
def key_server(directory: Path, body: bytes, host: str = "127.0.0.1") -> Iterator[KeyServer]:
    """A real https server on loopback, with a certificate for `host` from a CA of its own."""
    ca_key, key = pki.new_key(), pki.new_key()
    ca = pki.new_ca("idp", ca_key)
    leaf = pki.issue_server(ca, ca_key, key.public_key(), host, 1)
    directory.mkdir(exist_ok=True)
    (directory / "ca.crt").write_bytes(pki.pem_of(ca))
    (directory / "both.pem").write_bytes(pki.key_pem(key) + pki.pem_of(leaf))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked += 1
            self.send_response(state.status)
            for name, value in {"content-length": str(len(state.body)), **state.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            piece = max(1, len(state.body) // 20)
            try:
                for start in range(0, len(state.body), piece):
                    self.wfile.write(state.body[start : start + piece])
                    self.wfile.flush()
                    state.sent += piece
                    time.sleep(state.pause)
            except OSError:
                return

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that refuses the certificate is no error here."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "both.pem")
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    state = KeyServer(f"https://127.0.0.1:{server.server_address[1]}/keys", directory / "ca.crt", body)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
