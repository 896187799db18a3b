"""A whole node under TLS and tokens, its real processes and hostile clients."""

import hashlib
import hmac
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import jwt
import pytest
from tritonclient.grpc import service_pb2 as triton
from tritonclient.grpc import service_pb2_grpc as triton_service

from fedclaw.serve.security.development_tokens import SIGNING_KEY, sign_token, write_keys
from tests.serve.node_process import RunningNode, running_node
from tests.serve.security.http_node import answer
from tests.serve.security.issuer import b64, signed
from tests.serve.security.test_tls import Authority

pytestmark = pytest.mark.slow

ISSUER, AUDIENCE = "fedclaw", "node-1"
ROWS = b"age,smoker,ward\n61,yes,surgery\n"
LIMITS = (
    "limits.header_seconds=1",
    "limits.body_seconds=1",
    "limits.body_bytes=100000",
    "limits.connections=150",
    "limits.connections_per_address=100",
    "limits.requests_per_second=20",
    "limits.burst=100",
)


class Secured:
    """The node, its keys and a client of raw sockets."""

    def __init__(self, node: RunningNode, authority: Authority, keys: Path) -> None:
        self.node, self.authority, self.keys = node, authority, keys
        self.context = authority.trusting()

    def token(self, subject: str, *scopes: str, audience: str = AUDIENCE, issuer: str = ISSUER) -> str:
        return sign_token(self.keys, issuer, audience, subject, scopes or ("predict:heart",), 10)

    def claims(self, **more: Any) -> dict[str, Any]:
        now = int(time.time())
        usual = {"iss": ISSUER, "aud": AUDIENCE, "sub": "me", "iat": now, "exp": now + 600, "scope": "predict:*"}
        return {**usual, **more}

    def connect(self, url: str | None = None) -> ssl.SSLSocket:
        at = urlsplit(url or self.node.http)
        plain = socket.create_connection((at.hostname, at.port), timeout=30)
        return self.context.wrap_socket(plain, server_hostname=at.hostname)

    def raw(self, request: bytes, url: str | None = None) -> tuple[int, bytes]:
        with self.connect(url) as connection:
            with suppress(OSError):
                connection.sendall(request)
            got = b""
            with suppress(OSError):
                while chunk := connection.recv(65536):
                    got += chunk
        return (int(got.split(b" ", 2)[1]) if got else 0), got

    def predict(self, token: str | None, path: str = "/predict/heart", body: bytes = ROWS) -> tuple[int, bytes]:
        head = [f"POST {path} HTTP/1.1", "Host: node", "Content-Type: text/csv", f"Content-Length: {len(body)}"]
        head += ["Connection: close"] + ([] if token is None else [f"Authorization: Bearer {token}"])
        return self.raw("\r\n".join(head).encode() + b"\r\n\r\n" + body)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, table_bundle: Path, home: Any) -> Iterator[Secured]:
    root = tmp_path_factory.mktemp("secured")
    authority = Authority(root / "pki")
    key_set = write_keys(root / "keys")
    tls = (f"tls.certificate={authority.files.certificate}", f"tls.private_key={authority.files.key}")
    tokens = (f"tokens.jwks={key_set}", f"tokens.issuer={ISSUER}", f"tokens.audience={AUDIENCE}")
    bundle = (f"bundle={table_bundle}", "model=heart", f"ca={home.root / 'ca.crt'}")
    with running_node(root, *bundle, *tls, *tokens, *LIMITS, "workers=2") as node:
        yield Secured(node, authority, root / "keys")


def test_only_good_tokens_are_answered(secured: Secured) -> None:
    good = secured.token("good")
    assert secured.predict(good)[0] == 200
    key = jwt.algorithms.ECAlgorithm.from_jwk(json.loads((secured.keys / "keys.json").read_text())["keys"][0])
    kid = json.loads((secured.keys / "keys.json").read_text())["keys"][0]["kid"]
    signing = jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256).prepare_key(
        (secured.keys / SIGNING_KEY).read_bytes()
    )
    head = {"alg": "ES256", "typ": "at+jwt", "kid": kid}
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[union-attr]
    mac = f"{b64({**head, 'alg': 'HS256'})}.{b64(secured.claims())}"
    hostile = {
        "none": f"{b64({**head, 'alg': 'none'})}.{b64(secured.claims())}.",
        "hmac": f"{mac}.{b64(hmac.digest(public, mac.encode(), hashlib.sha256))}",
        "expired": signed(head, secured.claims(exp=int(time.time()) - 3600), signing),  # type: ignore[arg-type]
        "future": signed(head, secured.claims(nbf=int(time.time()) + 3600), signing),  # type: ignore[arg-type]
        "audience": secured.token("x", audience="node-2"),
        "issuer": secured.token("x", issuer="https://evil.example"),
        "changed": good[:-10] + "AAAAAAAAAA",
        "huge": good + "A" * 9000,
    }
    for name, text in hostile.items():
        status, got = secured.predict(text)
        assert status == 401, name
        assert b"www-authenticate: bearer realm=" in got.lower(), name
        assert b"Traceback" not in got
    assert b"expired" in secured.predict(hostile["expired"])[1]
    assert secured.predict(None)[0] == 401
    assert secured.predict(good)[0] == 200


def test_a_model_that_exists_and_one_that_does_not_look_the_same(secured: Secured) -> None:
    other = secured.token("other", "predict:lung", "admin:read")

    def seen(path: str) -> tuple[int, bytes]:
        status, got = secured.predict(other, path)
        return status, got.partition(b"\r\n\r\n")[2]

    for form in ("/predict/{}", "/v2/models/{}/infer", "/v2/models/{}/versions/1/infer"):
        there, missing = seen(form.format("heart")), seen(form.format("kidney"))
        assert there == missing
        assert there[0] in (403, 404)


def test_admin_actions_need_their_scopes(secured: Secured) -> None:
    at = urlsplit(secured.node.admin)

    def ask(line: str, *scopes: str) -> int:
        head = f"{line} HTTP/1.1\r\nHost: {at.hostname}\r\nConnection: close\r\nContent-Length: 0\r\n"
        token = f"Authorization: Bearer {secured.token('operator', *scopes)}\r\n" if scopes else ""
        return secured.raw(f"{head}{token}\r\n".encode(), secured.node.admin)[0]

    assert ask("GET /metrics") == 401
    assert ask("GET /metrics", "predict:*", "feedback:*", "admin:publish") == 403
    assert ask("GET /metrics", "admin:read") == 200
    assert ask("POST /admin/models/heart/versions", "admin:read", "admin:route") == 403
    assert ask("POST /admin/models/heart/promote", "admin:read", "admin:publish") == 403


def test_large_bodies_and_ambiguous_requests_are_refused(secured: Secured) -> None:
    token = secured.token("large").encode()
    head = b"POST /predict/heart HTTP/1.1\r\nHost: node\r\nContent-Type: text/csv\r\nAuthorization: Bearer " + token
    assert secured.raw(head + b"\r\nContent-Length: 100001\r\n\r\n")[0] == 413
    chunks = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    assert secured.raw(head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks * 20)[0] in (413, 0)
    both = (
        b"\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    status, got = secured.raw(head + both)
    assert (status, got.count(b"HTTP/1.1 ")) == (400, 1)
    assert secured.predict(token.decode())[0] == 200


def test_slow_connections_keep_nobody_out(secured: Secured) -> None:
    token, stop = secured.token("patient"), threading.Event()

    def dribble() -> None:
        at = urlsplit(secured.node.http)
        with ExitStack() as stack:
            connections = []
            for i in range(200):
                with suppress(OSError):
                    source = (f"127.0.3.{1 + i % 20}", 0)
                    plain = socket.create_connection((at.hostname, at.port), timeout=5, source_address=source)
                    connections.append(stack.enter_context(plain))
            while not stop.wait(0.05):
                for connection in connections:
                    with suppress(OSError):
                        connection.send(b"\x16")

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        for _ in range(20):
            assert secured.predict(token)[0] == 200
            time.sleep(0.1)
    finally:
        stop.set()
        thread.join(timeout=60)


def test_the_rate_holds_for_all_workers_together(secured: Secured) -> None:
    token = secured.token("hasty")
    statuses = [secured.predict(token)[0] for _ in range(10)]
    begun = time.monotonic()
    with secured.connect() as one, secured.connect() as two, secured.connect() as three, secured.connect() as four:
        for _ in range(60):
            for connection in (one, two, three, four):
                request = f"GET /v2 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
                connection.sendall(request.encode())
                statuses.append(answer(connection)[0])
    assert set(statuses) <= {200, 429}
    # Kept by each of the two workers for itself it would be twice the burst.
    assert statuses.count(200) <= 110 + 20 * (time.monotonic() - begun + 5)
    assert 429 in statuses
    assert secured.predict(secured.token("another"))[0] == 200


def test_grpc_lets_in_whom_http_lets_in(secured: Secured) -> None:
    root = (secured.authority.at / "ca.crt").read_bytes()
    with grpc.secure_channel(secured.node.grpc, grpc.ssl_channel_credentials(root)) as channel:
        stub = triton_service.GRPCInferenceServiceStub(channel)

        def ask(token: str | None) -> str:
            metadata = [] if token is None else [("authorization", f"Bearer {token}")]
            try:
                stub.ModelMetadata(triton.ModelMetadataRequest(name="heart"), timeout=30, metadata=metadata)
            except grpc.RpcError as error:
                return error.code().name
            return "OK"

        assert ask(secured.token("grpc")) == "OK"
        assert ask(None) == "UNAUTHENTICATED"
        assert ask(secured.token("grpc", audience="x")) == "UNAUTHENTICATED"
        assert ask(secured.token("grpc", "predict:lung")) in {"PERMISSION_DENIED", "NOT_FOUND"}
    for version, good in ((ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)):
        context = secured.authority.trusting()
        context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        host, _, port = secured.node.grpc.rpartition(":")
        try:
            with (
                socket.create_connection((host, int(port)), timeout=30) as plain,
                context.wrap_socket(plain, server_hostname=host) as connection,
            ):
                assert connection.version() == "TLSv1.3"
                answered = True
        except (ssl.SSLError, ConnectionError):
            answered = False
        assert answered == good


def test_new_keys_and_certificates_are_taken_while_it_runs(secured: Secured) -> None:
    old = secured.token("rotated")
    assert secured.predict(old)[0] == 200
    with secured.connect() as connection:
        before = connection.getpeercert(binary_form=True)
    fresh = secured.keys.parent / "fresh"
    write_keys(fresh)
    (fresh / "keys.json").rename(secured.keys / "keys.json")
    secured.authority.server()
    secured.keys = fresh

    def changed() -> bool | None:
        with secured.connect() as connection:
            if connection.getpeercert(binary_form=True) == before:
                return None
        return (secured.predict(old)[0] == 401 and secured.predict(secured.token("rotated"))[0] == 200) or None

    assert secured.node.wait_for(changed)
    # Both workers have them.
    assert [secured.predict(old)[0] for _ in range(6)] == [401] * 6
