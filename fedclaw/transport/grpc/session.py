"""The server's side of one site's stream, and who the site is.

A peer's identity is taken from its TLS certificate, never from what it says of itself.
"""

import threading
import time
from dataclasses import dataclass
from typing import Any

from cryptography import x509

from fedclaw.errors import ProvisionError, TransportError
from fedclaw.identity import pki
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.site_home import check_site_certificate
from fedclaw.protocol.message_identity import number_of
from fedclaw.transport.grpc.connection_limiter import endpoint_of
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.sender import Sender


class NotAdmitted(TransportError):
    """This peer may not connect, or may not stay connected. `reason` is sent to it."""

    def __init__(self, reason: pb.Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Peer:
    """A site, identified by its certificate. `node_id` is Flower's number for it."""

    site: str
    serial: int
    certificate: x509.Certificate

    @property
    def node_id(self) -> int:
        """The site's number, the same in every run."""
        return number_of(self.site)


def peer_of(context: Any, home: FederationHome) -> Peer:
    """The peer of a gRPC call. Raises NotAdmitted if its certificate is not that of an admitted site."""
    chain = context.auth_context().get("x509_pem_cert")
    if not chain:
        raise NotAdmitted(pb.REASON_IDENTITY, "the connection has no client certificate")
    try:
        certificate = pki.parse_certificate(chain[0], "the client certificate")
        site = check_site_certificate(
            certificate, home.descriptor, "the client certificate", "renew it", expired_ok=True
        )
    except ProvisionError as error:
        raise NotAdmitted(pb.REASON_IDENTITY, str(error)) from error
    peer = Peer(site, certificate.serial_number, certificate)
    check_standing(peer, home)
    return peer


def check_standing(peer: Peer, home: FederationHome) -> None:
    """Raises NotAdmitted if the certificate has expired or is revoked, or if that cannot be checked."""
    try:
        revoked = home.is_revoked(peer.serial)
    except ProvisionError as error:
        raise NotAdmitted(pb.REASON_UNAVAILABLE, "the server cannot read its list of revoked sites") from error
    if revoked:
        raise NotAdmitted(pb.REASON_REVOKED, f"the certificate of site {peer.site!r} is revoked; ask the coordinator")
    if pki.days_left(peer.certificate) < 0:
        raise NotAdmitted(pb.REASON_EXPIRED, f"the certificate of site {peer.site!r} has expired; renew it")


class Session:
    """One stream of a site: its identity, the frames that go to it, and when it was last heard from."""

    def __init__(self, peer: Peer, context: Any) -> None:
        self.peer = peer
        self.endpoint = endpoint_of(context.peer())
        self.sender = Sender()
        self.opened = self.heard = time.monotonic()
        self.welcomed = False
        self.idle_offers = 0
        """Offers of replies that were not asked for, or are arriving on this stream already."""
        self.closed_at: float | None = None
        self._context = context
        self._lock = threading.Lock()
        context.add_callback(self.sender.close)

    def close(self, last: pb.Frame | None = None) -> None:
        """Send `last`, then end the stream."""
        with self._lock:
            if self.closed_at is None:
                self.closed_at = time.monotonic()
        self.sender.close(last)

    def abort(self) -> None:
        """End the stream now, even if the peer does not read."""
        self.sender.close()
        self._context.cancel()
