"""A site's keys directory: the descriptor, the site's own key and certificate, and its request for a certificate.

A request is PKCS#10 (RFC 2986), with the old key's consent if the key is a new one. The file is plain PEM, readable by
`openssl req`. A request that rotates the key carries a second block: the signature of the old key over the new request.
So a name passes to another key only with the consent of the key that has it, or after the coordinator revoked it.
"""

import base64
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedclaw.errors import ProvisionError
from fedclaw.identity import pki
from fedclaw.identity.descriptor import DESCRIPTOR_FILE, Descriptor, load_descriptor
from fedclaw.identity.names import check_name, site_uri
from fedclaw.identity.seal import Sealer

_MAX_BYTES = 64 * 1024
_CONSENT_BEGIN = "-----BEGIN FEDCLAW KEY ROTATION CONSENT-----"
_CONSENT_END = "-----END FEDCLAW KEY ROTATION CONSENT-----"
_CONSENT_LABEL = b"fedclaw key rotation v1\x00"


@dataclass(frozen=True)
class SiteRequest:
    """A request that has been checked: well formed, for this federation, and signed by the key it is for."""

    site: str
    key: pki.PublicKey
    encoded: bytes
    """The request in DER."""
    consent: bytes | None
    """The old key's signature, not yet checked."""

    @property
    def fingerprint(self) -> str:
        """Of the requesting key; the coordinator and the site compare it over another channel."""
        return pki.fingerprint(self.key)

    def has_consent_of(self, old: pki.PublicKey) -> bool:
        """Whether the holder of `old` agreed that the name passes to this request's key."""
        if self.consent is None:
            return False
        try:
            old.verify(self.consent, _CONSENT_LABEL + self.encoded, pki.ECDSA)
        except InvalidSignature:
            return False
        return True


def encode_request(key: pki.PrivateKey, federation: str, site: str, old_key: pki.PrivateKey | None = None) -> bytes:
    """A request file for `site`'s `key`, with the consent of `old_key` if there is one."""
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)]))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(site_uri(federation, site))]), critical=False
        )
        .sign(key, hashes.SHA384())
    )
    content = pki.pem_of(request)
    if old_key is not None:
        signature = old_key.sign(_CONSENT_LABEL + request.public_bytes(Encoding.DER), pki.ECDSA)
        body = "\n".join(textwrap.wrap(base64.b64encode(signature).decode(), 64))
        content += f"{_CONSENT_BEGIN}\n{body}\n{_CONSENT_END}\n".encode()
    return content


def read_request(path: Path, federation: str) -> SiteRequest:
    """Read and check a request. Raises ProvisionError: damaged, badly signed, a bad name, another federation."""
    content = pki.read_file(path, "a site's request", limit=_MAX_BYTES)
    try:
        request = x509.load_pem_x509_csr(content)
        genuine = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ProvisionError(f"{path} is not a certificate request in PEM form") from None
    key = pki.p384_key(request, f"the request {path}")
    if not genuine:
        raise ProvisionError(f"{path} is not signed by the key that it is for; ask the site to make it again")
    try:
        site = check_name(pki.common_name(request))
        names = pki.alternative_names(request)
    except ValueError as error:
        raise ProvisionError(f"the request {path} is refused: {error}") from None
    if names != [x509.UniformResourceIdentifier(site_uri(federation, site))]:
        raise ProvisionError(f"the request {path} is not for the federation {federation!r}")
    return SiteRequest(site, key, request.public_bytes(Encoding.DER), _consent(content))


def _consent(content: bytes) -> bytes | None:
    _, begin, rest = content.partition(_CONSENT_BEGIN.encode())
    body, end, _ = rest.partition(_CONSENT_END.encode())
    if not begin or not end:
        return None
    try:
        return base64.b64decode(b"".join(body.split()), validate=True)
    except ValueError:
        return None


KEYS: Final = "keys"
SITE_KEY: Final = f"{KEYS}/site.key"
NEXT_KEY: Final = f"{KEYS}/next.key"
"""The new key of a renewal, until its certificate is installed."""
SITE_CERTIFICATE: Final = f"{KEYS}/site.crt"
SITE_REQUEST: Final = f"{KEYS}/site.csr"


class SiteKeys:
    """A site's identity in its federation, opened and checked."""

    def __init__(self, root: Path, descriptor: Descriptor, certificate: x509.Certificate, key: pki.PrivateKey) -> None:
        self.root = root
        self.descriptor = descriptor
        self.certificate = certificate
        self.site_name = pki.common_name(certificate)
        self._key = key

    @classmethod
    def open(cls, path: Path) -> "SiteKeys":
        """Read and check a site directory. Raises ProvisionError saying what is missing and what to run."""
        if not path.is_dir():
            raise ProvisionError(f"{path} is not a site directory; see python -m fedclaw.provision --help")
        if not (path / DESCRIPTOR_FILE).exists():
            raise ProvisionError(
                f"{path / DESCRIPTOR_FILE} is missing: get it from the coordinator, then run: "
                f"python -m fedclaw.provision request site={path} name=NAME descriptor=FILE"
            )
        descriptor = load_descriptor(path / DESCRIPTOR_FILE)
        if not (path / SITE_CERTIFICATE).is_file():
            raise ProvisionError(
                f"{path / SITE_CERTIFICATE} is missing: send {path / SITE_REQUEST} to the coordinator, then run: "
                f"python -m fedclaw.provision install site={path} certificate=FILE"
            )
        certificate = pki.load_certificate(path / SITE_CERTIFICATE, "the site's certificate")
        check_site_certificate(certificate, descriptor, str(path / SITE_CERTIFICATE), renew_advice(path))
        key = pki.load_key(path / SITE_KEY, "the site's key")
        if not pki.belongs(certificate, key):
            raise ProvisionError(
                f"{path / SITE_CERTIFICATE} is not for the key in {path / SITE_KEY}; install the certificate again, "
                f"or {renew_advice(path)}"
            )
        return cls(path, descriptor, certificate, key)

    def __repr__(self) -> str:
        return f"SiteKeys({self.site_name!r})"

    def tls(self) -> pki.TlsIdentity:
        """The site's end of a connection."""
        certificate = pki.pem_of(self.certificate)
        return pki.TlsIdentity(certificate, pki.key_pem(self._key), pki.pem_of(self.descriptor.ca))

    def sign(self, purpose: str, message: bytes) -> bytes:
        """The site's signature over `message` for `purpose`; `pki.check_signature` checks it."""
        return self._key.sign(pki.signed_content(purpose, message), pki.ECDSA)

    def sealer(self) -> Sealer:
        """Seals to the aggregator of the site's federation."""
        return self.descriptor.sealer()


def renew_advice(root: Path) -> str:
    """What to do about a certificate that is not good any more."""
    return (
        f"run: python -m fedclaw.provision renew site={root}, send {root / SITE_REQUEST} to the coordinator "
        "and install the certificate that comes back"
    )


def check_site_certificate(
    certificate: x509.Certificate, descriptor: Descriptor, origin: str, remedy: str, *, expired_ok: bool = False
) -> str:
    """The name of the site that `certificate` is for. Raises ProvisionError unless `descriptor`'s CA issued it."""
    pki.check_leaf(certificate, descriptor.ca, pki.Purpose.SITE, origin, remedy, expired_ok=expired_ok)
    try:
        name = check_name(pki.common_name(certificate))
        names = pki.alternative_names(certificate)
    except ValueError as error:
        raise ProvisionError(f"{origin} is not a site certificate: {error}") from None
    if names != [x509.UniformResourceIdentifier(site_uri(descriptor.name, name))]:
        raise ProvisionError(f"{origin} is not for a site of the federation {descriptor.name!r}")
    return name
