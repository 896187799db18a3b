"""TLS of a node in real handshakes: versions, replaced files, clients' certificates, bound tokens, gRPC."""

import http.client
import json
import multiprocessing
import socket
import ssl
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedclaw.errors import ProvisionError
from fedclaw.identity import pki
from fedclaw.identity.provisioning import accept, approve, initialise, renew_federation, request_site, revoke
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.security.http_protocol import ConnectionLimits
from fedclaw.serve.security.key_sets import KeyFile, KeyKeeper
from fedclaw.serve.security.tls import GrpcClients, ServerTls, TlsFiles, thumbprint
from fedclaw.serve.security.tokens import Authenticator, TokenRules
from tests.serve.security.http_node import Seen, node
from tests.serve.security.issuer import AUDIENCE, ISSUER, bearer, ec_key, jwk, key_set, token


class Authority:
    """A CA with its files in a directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.at = directory
        self.key = pki.new_key()
        self.certificate = pki.new_ca("heart", self.key)
        (directory / "ca.crt").write_bytes(pki.pem_of(self.certificate))
        self.files = TlsFiles(directory / "server.crt", directory / "server.key")
        self.server()
        self.client("alice")
        self.crl()

    @property
    def mutual(self) -> TlsFiles:
        return replace(self.files, client_ca=self.at / "ca.crt", revoked=self.at / "revoked.crl")

    def server(self) -> None:
        key = pki.new_key()
        leaf = pki.issue_server(self.certificate, self.key, key.public_key(), "127.0.0.1", 30)
        pki.save_key(self.files.key, key)
        self.files.certificate.write_bytes(pki.pem_of(leaf))

    def rsa_server(self) -> None:
        key = rsa.generate_private_key(65537, 2048)
        leaf = pki.issue_server(self.certificate, self.key, key.public_key(), "127.0.0.1", 30)  # type: ignore[arg-type]
        self.files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.files.certificate.write_bytes(pki.pem_of(leaf))

    def client(self, name: str) -> x509.Certificate:
        key = pki.new_key()
        leaf = pki.issue_site(self.certificate, self.key, key.public_key(), "heart", name, 30)
        (self.at / f"{name}.pem").write_bytes(pki.key_pem(key) + pki.pem_of(leaf))
        return leaf

    def crl(self, *revoked: x509.Certificate) -> None:
        entries = [pki.revoked_entry(leaf.serial_number) for leaf in revoked]
        content = pki.pem_of(pki.new_crl(self.certificate, self.key, entries, 1))
        (self.at / "new.crl").write_bytes(content)
        (self.at / "new.crl").rename(self.at / "revoked.crl")

    def trusting(self, client: str | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.at / "ca.crt")
        if client is not None:
            context.load_cert_chain(self.at / f"{client}.pem")
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


def ask(seen: Seen, context: ssl.SSLContext) -> dict[str, Any]:
    client = http.client.HTTPSConnection("127.0.0.1", seen.port, timeout=30, context=context)
    try:
        client.request("GET", "/v2")
        answer: dict[str, Any] = json.loads(client.getresponse().read())
        return answer
    finally:
        client.close()


def served(seen: Seen, context: ssl.SSLContext) -> bytes | None:
    """The certificate that a new connection gets."""
    with (
        socket.create_connection(("127.0.0.1", seen.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        return tls.getpeercert(binary_form=True)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_only_tls_1_3_and_no_plain_http(authority: Authority, loop: str) -> None:
    with node(ConnectionLimits(), loop, ServerTls(authority.files)) as seen:
        assert ask(seen, authority.trusting()) == {"path": "/v2", "certificate": None}
        old = authority.trusting()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError):
            ask(seen, old)
        assert b"HTTP" not in seen.ask(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")[1]
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(seen, ssl.create_default_context())


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_new_connections_get_the_new_certificate_and_old_ones_go_on(authority: Authority, loop: str) -> None:
    tls = ServerTls(authority.files)
    with node(ConnectionLimits(), loop, tls) as seen:
        before = served(seen, authority.trusting())
        client = http.client.HTTPSConnection("127.0.0.1", seen.port, timeout=30, context=authority.trusting())
        client.request("GET", "/v2")
        assert client.getresponse().read()
        assert not tls.reload()
        authority.server()
        assert tls.reload()
        after = served(seen, authority.trusting())
        assert after != before
        assert after == ssl.PEM_cert_to_DER_cert(authority.files.certificate.read_text())
        client.request("GET", "/v2")
        assert client.getresponse().read()
        client.close()


def test_files_that_do_not_fit_leave_what_is_served(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    tls = ServerTls(authority.files)
    with node(ConnectionLimits(), tls=tls) as seen:
        before = served(seen, authority.trusting())
        old_key, old_certificate = authority.files.key.read_bytes(), authority.files.certificate.read_bytes()
        authority.server()
        new_key, new_certificate = authority.files.key.read_bytes(), authority.files.certificate.read_bytes()
        for key, certificate in ((old_key, new_certificate), (b"", new_certificate), (new_key, b""), (b"x", b"y")):
            authority.files.key.write_bytes(key)
            authority.files.certificate.write_bytes(certificate)
            assert not tls.reload()
            assert not tls.reload()
            assert served(seen, authority.trusting()) == before
        assert len([record for record in caplog.records if "not taken" in record.message]) == 4
        authority.files.key.write_bytes(new_key)
        authority.files.key.chmod(0o640)
        authority.files.certificate.write_bytes(new_certificate)
        assert not tls.reload()
        authority.files.key.chmod(0o600)
        assert tls.reload()
        assert served(seen, authority.trusting()) == ssl.PEM_cert_to_DER_cert(new_certificate.decode())
        assert old_certificate != new_certificate


def test_the_thread_sees_new_files(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedclaw.serve.security.tls.LOOK_EVERY", 0.02)
    tls = ServerTls(authority.files)
    first = tls._current
    tls.start()
    try:
        authority.server()
        end = time.monotonic() + 30
        while tls._current is first:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        tls.close()
    assert not tls._thread.is_alive()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_clients_show_a_certificate_that_is_not_revoked(authority: Authority, tmp_path: Path, loop: str) -> None:
    tls = ServerTls(authority.mutual)
    other = Authority(tmp_path / "other")
    with node(ConnectionLimits(), loop, tls) as seen:
        bob = authority.client("bob")
        known = thumbprint(bob.public_bytes(Encoding.DER))
        assert ask(seen, authority.trusting("bob"))["certificate"] == known
        assert ask(seen, authority.trusting("alice"))["certificate"] not in (known, None)
        strange = authority.trusting()
        strange.load_cert_chain(other.at / "alice.pem")
        wrong_kind = authority.trusting()
        wrong_kind.load_cert_chain(authority.files.certificate, authority.files.key)
        for context in (authority.trusting(), strange, wrong_kind):
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
                ask(seen, context)
        authority.crl(bob)
        assert tls.reload()
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            ask(seen, authority.trusting("bob"))
        assert ask(seen, authority.trusting("alice"))["certificate"]


def test_no_handshake_with_a_client_certificate_is_cut_short(authority: Authority) -> None:
    """A resumed session would carry a certificate over that has been revoked since."""

    def resumed(context: ssl.SSLContext) -> bool | None:
        session = None
        for _ in range(2):
            with (
                socket.create_connection(("127.0.0.1", seen.port), timeout=30) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as tls,
            ):
                tls.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
                assert tls.recv(4096)
                session, reused = tls.session, tls.session_reused
        return reused

    with node(ConnectionLimits(), tls=ServerTls(authority.mutual)) as seen:
        assert resumed(authority.trusting("alice")) is False
    with node(ConnectionLimits(), tls=ServerTls(authority.files)) as seen:
        assert resumed(authority.trusting()) is True


def test_a_token_is_bound_to_the_certificate_of_the_connection(authority: Authority, tmp_path: Path) -> None:
    """RFC 8705: a stolen token is of no use with another certificate."""
    (tmp_path / "keys.json").write_bytes(key_set(jwk(ec_key())))
    keeper = KeyKeeper(KeyFile(tmp_path / "keys.json"), ("ES256",))
    keeper.refresh()
    authenticator = Authenticator(TokenRules(ISSUER, AUDIENCE), keeper)
    der = x509.load_pem_x509_certificate((authority.at / "alice.pem").read_bytes()).public_bytes(Encoding.DER)
    bound = token(cnf={"x5t#S256": urlsafe_b64encode(sha256(der).digest()).decode().rstrip("=")})
    authority.client("mallory")
    with node(ConnectionLimits(), tls=ServerTls(authority.mutual)) as seen:
        own = ask(seen, authority.trusting("alice"))["certificate"]
        stolen = ask(seen, authority.trusting("mallory"))["certificate"]
    assert authenticator.authenticate(bearer(bound), own).name == "scanner-7"
    for certificate in (stolen, None):
        with pytest.raises(ServeRefusal, match="another client certificate"):
            authenticator.authenticate(bearer(bound), certificate)


def test_certificates_of_a_federation_serve_and_its_sites_are_clients(tmp_path: Path) -> None:
    home = initialise(tmp_path / "federation", "heart", "127.0.0.1:9443")
    root = tmp_path / "hospital-a"
    accept(root, approve(home.root, request_site(root, home.root / "federation.json", "hospital-a")))
    at = home.root
    tls = ServerTls(TlsFiles(at / "server.crt", at / "server.key", at / "ca.crt", at / "revoked.crl"))
    context = ssl.create_default_context(cafile=at / "ca.crt")
    context.load_cert_chain(root / "keys" / "site.crt", root / "keys" / "site.key")
    with node(ConnectionLimits(), tls=tls) as seen:
        assert ask(seen, context)["certificate"]
        renew_federation(at)
        assert tls.reload()
        assert ask(seen, context)["certificate"]
        revoke(at, "hospital-a")
        assert tls.reload()
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            ask(seen, context)


def expired(authority: Authority) -> None:
    key = pki.new_key()
    leaf = pki.issue_server(authority.certificate, authority.key, key.public_key(), "127.0.0.1", 0)
    pki.save_key(authority.files.key, key)
    authority.files.certificate.write_bytes(pki.pem_of(leaf))


def encrypted(authority: Authority) -> None:
    key = pki.parse_key(authority.files.key.read_bytes(), "key")
    secret = BestAvailableEncryption(b"secret")
    authority.files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda it: it.files.key.chmod(0o644), r"server\.key.*chmod 600"),
        (lambda it: it.files.key.unlink(), r"server\.key is missing"),
        (lambda it: it.files.certificate.unlink(), r"server\.crt is missing"),
        (lambda it: it.files.certificate.write_text("x"), r"server\.crt is not a certificate"),
        (lambda it: pki.save_key(it.files.key, pki.new_key()), r"server\.key does not fit"),
        (expired, r"server\.crt has expired"),
        (encrypted, r"server\.key .*unencrypted"),
        (lambda it: (it.at / "ca.crt").write_text("x"), r"ca\.crt holds no certificate"),
        (lambda it: (it.at / "ca.crt").write_text(""), r"ca\.crt holds no certificate"),
        (lambda it: (it.at / "ca.crt").unlink(), r"ca\.crt is missing"),
        (lambda it: (it.at / "revoked.crl").write_text("x"), r"revoked\.crl holds no revocation list"),
        (lambda it: (it.at / "revoked.crl").unlink(), r"revoked\.crl is missing"),
    ],
)
def test_files_that_are_wrong_are_named(authority: Authority, spoil: Callable[[Authority], None], says: str) -> None:
    ServerTls(authority.mutual)
    spoil(authority)
    with pytest.raises(ProvisionError, match=says):
        ServerTls(authority.mutual)


def test_a_revocation_list_of_another_authority_is_none(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    files = replace(authority.mutual, revoked=other.at / "revoked.crl")
    with pytest.raises(ProvisionError, match="revoked"):
        ServerTls(files)


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)])
def test_keys_of_a_hospitals_own_authority(authority: Authority, key: Any) -> None:
    """Not only the P-384 of a federation."""
    leaf = pki.issue_server(authority.certificate, authority.key, key.public_key(), "127.0.0.1", 30)
    authority.files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    authority.files.certificate.write_bytes(pki.pem_of(leaf))
    with node(ConnectionLimits(), tls=ServerTls(authority.files)) as seen:
        assert ask(seen, authority.trusting())["path"] == "/v2"


def _grpc_node(files: TlsFiles, pipe: Any) -> None:
    """A gRPC server in a process of its own."""
    import grpc

    tls = ServerTls(files)
    tls.start()
    clients = GrpcClients(files)

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(self.answer)

        def answer(self, request: bytes, context: Any) -> bytes:
            try:
                return str(clients.certificate(context.auth_context())).encode()
            except ServeRefusal as refusal:
                return f"refused: {refusal}".encode()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_secure_port("127.0.0.1:0", tls.grpc_credentials())
    server.start()
    pipe.send(port)
    pipe.recv()
    server.stop(0)


@pytest.mark.slow
def test_grpc_speaks_tls_1_3_follows_the_files_and_refuses_revoked_clients(authority: Authority) -> None:
    import grpc

    # Neither kind of key is to bring TLS 1.2 back; an ECDSA one is taken later.
    authority.rsa_server()
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    process = context.Process(target=_grpc_node, args=(authority.mutual, far), daemon=True)
    process.start()
    try:
        assert pipe.poll(60)
        port = pipe.recv()

        def call(client: str | None) -> str:
            pem = b"" if client is None else (authority.at / f"{client}.pem").read_bytes()
            pair = (None, None) if client is None else (pem, pem)
            credentials = grpc.ssl_channel_credentials((authority.at / "ca.crt").read_bytes(), *pair)
            with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
                answer: bytes = channel.unary_unary("/x/y")(b"", timeout=20)
                return answer.decode()

        def offered(version: ssl.TLSVersion) -> bytes | None:
            tls = authority.trusting("alice")
            tls.maximum_version = version
            tls.set_alpn_protocols(["h2"])
            with (
                socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
                tls.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
            ):
                return connection.getpeercert(binary_form=True)

        alice = x509.load_pem_x509_certificate((authority.at / "alice.pem").read_bytes())
        assert call("alice") == thumbprint(alice.public_bytes(Encoding.DER))
        with pytest.raises(grpc.RpcError):
            call(None)
        before = offered(ssl.TLSVersion.TLSv1_3)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            offered(ssl.TLSVersion.TLSv1_2)
        authority.server()
        authority.crl(alice)
        end = time.monotonic() + 30
        while offered(ssl.TLSVersion.TLSv1_3) == before or "refused" not in call("alice"):
            assert time.monotonic() < end
            time.sleep(0.05)
        pipe.send(None)
        process.join(timeout=20)
    finally:
        process.kill()


def test_a_revocation_list_that_is_damaged_lets_nobody_in_over_grpc(authority: Authority) -> None:
    now = 0.0
    clients = GrpcClients(authority.mutual, clock=lambda: now)
    leaf = x509.load_pem_x509_certificate((authority.at / "alice.pem").read_bytes())
    peer = {"x509_pem_cert": [pki.pem_of(leaf)]}
    assert clients.certificate(peer) == thumbprint(leaf.public_bytes(Encoding.DER))
    assert clients.certificate({}) is None
    (authority.at / "revoked.crl").write_bytes(b"x")
    assert clients.certificate(peer)
    now = 1.0
    with pytest.raises(ServeRefusal):
        clients.certificate(peer)
    authority.crl()
    now = 2.0
    assert clients.certificate(peer)
    authority.crl(leaf)
    now = 3.0
    with pytest.raises(ServeRefusal):
        clients.certificate(peer)
