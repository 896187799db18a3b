"""Whose keys these are: a site's certificate key signs them, and the federation's CA vouches for the certificate."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from cryptography import x509

from fedclaw.errors import ProvisionError, SecureAggregationError
from fedclaw.identity import pki
from fedclaw.identity.descriptor import Descriptor
from fedclaw.identity.seal import encode_key, generate
from fedclaw.identity.site_home import SiteKeys, check_site_certificate
from fedclaw.privacy.secure_aggregation.parameters import MAX_SITES, Parameters, framed

KEYS_PURPOSE = "secure aggregation keys"
"""A site's certificate key signs only its keys of a session. Those sign everything else in the session."""
SHARES_PURPOSE = "secure aggregation shares"
ACCUSATION_PURPOSE = "secure aggregation accusation"
SURVIVORS_PURPOSE = "secure aggregation survivors"

MAX_CERTIFICATE = 8192
MAX_SIGNATURE = 128


class Signer(Protocol):
    """A site's own identity, such as `SiteKeys`."""

    site_name: str
    certificate: x509.Certificate

    def sign(self, purpose: str, message: bytes) -> bytes:
        """A signature that the certificate's public key verifies."""


class Verifier(Protocol):
    """Decides whether a signature is the named site's."""

    def check(self, site: str, certificate: bytes, purpose: str, message: bytes, signature: bytes) -> None:
        """Raise SecureAggregationError if it is not. `certificate` is PEM."""


class CertificateVerifier:
    """Accepts the site certificates of one federation, by the CA in the descriptor that the site was set up with.

    A certificate must be issued by that CA for a site of that federation, carry the site's name, and be valid now.

    This trusts the holder of the CA's key to certify only sites that exist: invented ones would count as survivors.
    Sites cannot fetch a revocation list; they know only the serial numbers in `revoked`. The server turns revoked sites
    away when they connect, but a dishonest server could let one in.
    """

    def __init__(self, descriptor: Descriptor, revoked: Collection[int] = ()) -> None:
        self._descriptor = descriptor
        self._revoked = frozenset(revoked)
        self._issued: dict[bytes, x509.Certificate] = {}

    def check(self, site: str, certificate: bytes, purpose: str, message: bytes, signature: bytes) -> None:
        """Raise SecureAggregationError, naming the site, unless its certificate and its signature are valid."""
        try:
            parsed = self._certificate(site, certificate)
            pki.check_signature(parsed, purpose, message, signature, site)
        except ProvisionError as error:
            raise SecureAggregationError(str(error)) from None

    def _certificate(self, site: str, pem: bytes) -> x509.Certificate:
        """The certificate of `site`, verified. The issuer's signature is checked once, the dates every time."""
        origin, remedy = f"the certificate sent for {site}", f"{site} has to renew it"
        certificate = self._issued.get(pem)
        if certificate is None:
            certificate = pki.parse_certificate(pem, origin)
            check_site_certificate(certificate, self._descriptor, origin, remedy)
            if len(self._issued) >= MAX_SITES:
                self._issued.clear()
            self._issued[pem] = certificate
        pki.check_dates(certificate, origin, remedy)
        if (named := pki.common_name(certificate)) != site:
            raise SecureAggregationError(f"{origin} belongs to {named}")
        if certificate.serial_number in self._revoked:
            raise SecureAggregationError(f"{origin} is revoked")
        return certificate


def keys_message(
    parameters: Parameters, site: str, mask_public: bytes, share_public: bytes, sign_public: bytes
) -> bytes:
    """What a site signs to advertise its keys. The parameters' digest ties them to one session."""
    return _statement(parameters, site, mask_public, share_public, sign_public)


def shares_message(parameters: Parameters, dealer: str, holder: str, sealed: bytes, proof: bytes) -> bytes:
    """What a dealer signs for one holder: the sealed shares, and the proof that they are checked with."""
    return _statement(parameters, dealer, holder.encode(), sealed, proof)


def accusation_message(parameters: Parameters, accuser: str, dealer: str, shares: bytes) -> bytes:
    """What a holder signs to accuse `dealer`: `shares` is the `shares_message` that the dealer signed for it."""
    return _statement(parameters, accuser, dealer.encode(), shares)


def survivors_message(parameters: Parameters, site: str, survivors: Sequence[str]) -> bytes:
    """What a site signs to consent to the survivors, in whatever order they come."""
    return _statement(parameters, site, *(name.encode() for name in sorted(survivors)))


def _statement(parameters: Parameters, site: str, *parts: bytes) -> bytes:
    names = (parameters.federation, parameters.run, str(parameters.round), parameters.session, site)
    return framed(*(name.encode() for name in names), parameters.digest, *parts)


def local_identities(federation: str, sites: Sequence[str]) -> tuple[dict[str, SiteKeys], CertificateVerifier]:
    """Identities for a simulation: a CA and certificates that are valid for a day and never leave this process."""
    ca_key = pki.new_key()
    ca = pki.new_ca(federation, ca_key)
    descriptor = Descriptor(
        name=federation,
        address="127.0.0.1:1",
        ca_certificate=pki.pem_of(ca).decode(),
        seal_suite="x25519",
        seal_public_key=encode_key(generate("x25519").public),
    )
    identities = {}
    for site in sites:
        key = pki.new_key()
        certificate = pki.issue_site(ca, ca_key, key.public_key(), federation, site, days=1)
        identities[site] = SiteKeys(Path(site), descriptor, certificate, key)
    return identities, CertificateVerifier(descriptor)
