"""A site's request for a certificate: a PKCS#10 request (RFC 2986), and for a new key the old key's consent.

The file is plain PEM, readable by `openssl req`. A request that rotates the key carries a second block: the
signature of the old key over the new request. So a name passes to another key only with the consent of the key that
has it, or after the coordinator revoked it.
"""

import base64
import textwrap
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedclaw.errors import ProvisionError
from fedclaw.identity import pki
from fedclaw.identity.key_files import read_file
from fedclaw.identity.names import check_name, site_uri

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
    content = read_file(path, "a site's request", limit=_MAX_BYTES)
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
