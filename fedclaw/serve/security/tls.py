"""TLS of a node: 1.3 only, for HTTP and gRPC, with the clients' certificates checked where the operator wants it.

The files may be replaced while the node runs: new connections get what is there, as soon as certificate and key fit
each other. A client's certificate is checked in each handshake; with mutual TLS there is no resumption, which would
skip that check and so a revocation.
"""

import logging
import ssl
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedclaw.errors import ProvisionError
from fedclaw.identity.pki import WARN_DAYS, days_left, read_file, read_private
from fedclaw.serve.refusals import ServeRefusal

if TYPE_CHECKING:
    import grpc

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0
"""Seconds between two looks at the files."""


def thumbprint(certificate: bytes | None) -> str | None:
    """What binds a token to a certificate in DER form: `x5t#S256` (RFC 8705, section 3.1). None of None."""
    if not certificate:
        return None
    return urlsafe_b64encode(sha256(certificate).digest()).rstrip(b"=").decode("ascii")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. `key` is for its owner only, and not encrypted."""

    certificate: Path
    """The server's, followed by those between it and the authority that clients trust."""
    key: Path
    client_ca: Path | None = None
    """The authorities of clients' certificates; None: clients need none."""
    revoked: Path | None = None
    """Revocation lists of `client_ca`. A list that is out of date lets nobody in."""


class ServerTls:
    """The TLS context of a server's HTTP port, and credentials for its gRPC port."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises ProvisionError, which says which file is wrong and how."""
        self.files = files
        self._seen = _stamps(files)
        self._failed: object = None
        self._current = _context(files)
        self.context = _context(files)
        """For a listening socket. Each handshake is passed on to the context of the files as they are now."""
        self.context.sni_callback = self._choose
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedclaw-tls", daemon=True)

    def start(self) -> None:
        """Look at the files each second, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def reload(self) -> bool:
        """Take the files if they are others than before and fit each other. Whether they were taken.

        What is served stays served otherwise, and the log says once why.
        """
        stamps = _stamps(self.files)
        if stamps == self._seen:
            return False
        try:
            current = _context(self.files)
        except ProvisionError as error:
            if stamps != self._failed:
                log.error("TLS files are not taken, the ones before stay: %s", error)
            self._failed = stamps
            return False
        self._current, self._seen = current, stamps
        log.info("TLS files taken: %s", self.files.certificate)
        return True

    def grpc_credentials(self) -> "grpc.ServerCredentials":
        """Credentials for a gRPC port that follow the files. TLS 1.3 alone, by `fedclaw.environment`."""
        import grpc

        first = self._grpc_configuration()
        taken = self._seen

        def fetch() -> "grpc.ServerCertificateConfiguration | None":
            nonlocal taken
            now = self._seen
            if now == taken:
                return None
            configuration = self._grpc_configuration()
            taken = now
            return configuration

        needed = self.files.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(first, fetch, require_client_authentication=needed)

    def _grpc_configuration(self) -> "grpc.ServerCertificateConfiguration":
        import grpc

        files = self.files
        pair = (read_private(files.key, "the server's key"), read_file(files.certificate, "its certificate"))
        authorities = None if files.client_ca is None else read_file(files.client_ca, "the clients' authorities")
        return grpc.ssl_server_certificate_configuration([pair], authorities)

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _run(self) -> None:
        while not self._closed.wait(LOOK_EVERY):
            try:
                self.reload()
            except Exception:
                log.exception("the TLS files could not be looked at")


class Revocations:
    """The revocation lists of a file, read again when it changes."""

    def __init__(self, path: Path, authority: Path) -> None:
        """Raises ProvisionError."""
        self._path, self._authority = path, authority
        self._stamp = _stamp(path)
        self._lists = self._read()

    def refresh(self) -> None:
        """Read the file if it is another. Raises ProvisionError."""
        if (stamp := _stamp(self._path)) != self._stamp:
            self._lists = self._read()
            self._stamp = stamp

    def good(self, leaf: x509.Certificate) -> bool:
        """Whether a list of the leaf's issuer that is up to date does not name it."""
        now = datetime.now(UTC)
        lists = [one for one in self._lists if one.issuer == leaf.issuer]
        current = [one for one in lists if one.next_update_utc is None or now < one.next_update_utc]
        serial = leaf.serial_number
        return bool(current) and not any(one.get_revoked_certificate_by_serial_number(serial) for one in current)

    def _read(self) -> list[x509.CertificateRevocationList]:
        authorities = x509.load_pem_x509_certificates(read_file(self._authority, "the clients' authorities"))
        keys = {authority.subject: authority.public_key() for authority in authorities}
        end = b"-----END X509 CRL-----"
        parts = read_file(self._path, "the revocation list").split(end)[:-1]
        try:
            lists = [x509.load_pem_x509_crl(part.lstrip() + end) for part in parts]
            genuine = all(one.is_signature_valid(keys[one.issuer]) for one in lists)  # type: ignore[arg-type]
        except (ValueError, TypeError, KeyError):
            genuine = False
        if not parts or not genuine:
            raise ProvisionError(f"{self._path} holds no revocation list that an authority in {self._authority} signed")
        return lists


class GrpcClients:
    """Clients' certificates on a gRPC port. gRPC verifies them but reads no revocation lists, so each call is checked
    here; what is known of a certificate is kept for a second."""

    def __init__(self, files: TlsFiles, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ProvisionError."""
        self._revocations = None
        if files.revoked is not None and files.client_ca is not None:
            self._revocations = Revocations(files.revoked, files.client_ca)
        self._clock = clock
        self._known: dict[bytes, str | None] = {}
        self._until = 0.0

    def certificate(self, peer: Mapping[str, Iterable[bytes]]) -> str | None:
        """The thumbprint of the client's certificate, by a call's `auth_context()`; None: it has none.

        Raises ServeRefusal if the certificate is revoked, or if that cannot be told.
        """
        pem = next(iter(peer.get("x509_pem_cert", ())), None)
        if pem is None:
            return None
        if self._clock() >= self._until:
            self._known.clear()
            self._until = self._clock() + LOOK_EVERY
        if pem not in self._known:
            self._known[pem] = self._look_up(pem)
        known = self._known[pem]
        if known is None:
            raise ServeRefusal("unauthenticated", "The client's certificate is not accepted")
        return known

    def _look_up(self, pem: bytes) -> str | None:
        leaf = x509.load_pem_x509_certificate(pem)
        if self._revocations is not None:
            try:
                self._revocations.refresh()
            except ProvisionError as error:
                log.error("nobody is let in over gRPC: %s", error)
                return None
            if not self._revocations.good(leaf):
                return None
        return thumbprint(leaf.public_bytes(Encoding.DER))


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    leaf = _leaf(files.certificate)
    read_private(files.key, "the server's private key")
    misfit = "does not fit the certificate, or is no unencrypted key in PEM form"
    _loading(files.key, misfit, lambda: context.load_cert_chain(files.certificate, files.key, password=_no_password))
    if files.client_ca is not None:
        _ask_clients(context, files.client_ca, files.revoked)
    if (left := days_left(leaf)) < WARN_DAYS:
        log.warning("%s expires in %.1f days", files.certificate, left)
    return context


def _leaf(path: Path) -> x509.Certificate:
    content = read_file(path, "the server's certificate")
    try:
        leaf = x509.load_pem_x509_certificate(content)
    except ValueError:
        raise ProvisionError(f"{path} is not a certificate in PEM form") from None
    if days_left(leaf) <= 0:
        raise ProvisionError(f"{path} has expired")
    return leaf


def _ask_clients(context: ssl.SSLContext, authority: Path, revoked: Path | None) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    read_file(authority, "the clients' authorities")
    _loading(authority, "holds no certificate in PEM form", lambda: context.load_verify_locations(authority))
    if not context.get_ca_certs():
        raise ProvisionError(f"{authority} holds no certificate of an authority")
    if revoked is not None:
        Revocations(revoked, authority)
        _loading(revoked, "is not a revocation list", lambda: context.load_verify_locations(revoked))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _loading(path: Path, problem: str, load: Callable[[], None]) -> None:
    try:
        load()
    except (OSError, ValueError):
        raise ProvisionError(f"{path} {problem}") from None


def _no_password() -> str:
    """So that OpenSSL does not ask at a terminal."""
    return ""


def _stamps(files: TlsFiles) -> tuple[object, ...]:
    paths = files.certificate, files.key, files.client_ca, files.revoked
    return tuple(None if path is None else _stamp(path) for path in paths)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
