"""Who signed a bundle: the release certificate, the CA above it, and what its key signed.

Expiry: models are used for longer than the 90 days of a release certificate. So a bundle stays valid after the
certificate has expired, if certificate and CA were valid when it was signed. The time of signing is `created` in
bundle.json. The signature covers it, but it is the signer's own word and no trusted time stamp: a thief of an expired
key can backdate a bundle. Who cannot accept that requires a certificate that is valid now (`expired=refuse`).
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedclaw.errors import BundleError, ProvisionError
from fedclaw.export.layout import CA_CERTIFICATE, MANIFEST, RELEASE_CERTIFICATE
from fedclaw.identity import pki

CLOCK_SKEW = timedelta(minutes=5)
UNUSABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What cryptography raises for a damaged certificate."""


@dataclass(frozen=True)
class VerifiedSigner:
    """Who signed, according to the certificates."""

    name: str
    fingerprint: str
    """SHA-256 of the CA's certificate, as OpenSSL prints it."""
    key_fingerprint: str
    """SHA-256 of the CA's public key, as `python -m fedclaw.provision show` prints it."""
    expires: datetime


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate's DER, as `openssl x509 -fingerprint -sha256` prints it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def parse_certificate(pem: bytes, origin: str) -> x509.Certificate:
    """The one certificate in `pem`. Raises BundleError naming `origin`."""
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except UNUSABLE as error:
        raise BundleError(f"{origin} is not a PEM certificate") from error
    if len(certificates) != 1:
        raise BundleError(f"{origin} holds {len(certificates)} certificates, it should hold one")
    return certificates[0]


def parse_revocations(pem: bytes, origin: str) -> x509.CertificateRevocationList:
    """The revocation list in `pem`. Raises BundleError naming `origin`."""
    try:
        return x509.load_pem_x509_crl(pem)
    except UNUSABLE as error:
        raise BundleError(f"{origin} is not a PEM certificate revocation list") from error


def check_chain(release: x509.Certificate, authority: x509.Certificate) -> VerifiedSigner:
    """Check that `release` is a code-signing certificate issued by `authority`. Raises BundleError."""
    try:
        authority.verify_directly_issued_by(authority)
        is_ca = authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except UNUSABLE as error:
        raise BundleError(f"{CA_CERTIFICATE} is not a self-signed CA certificate") from error
    if not is_ca:
        raise BundleError(f"{CA_CERTIFICATE} is not a CA certificate")
    try:
        release.verify_directly_issued_by(authority)
    except UNUSABLE as error:
        raise BundleError(f"{RELEASE_CERTIFICATE} was not issued by the expected CA ({_name(authority)})") from error
    if not _may_sign_code(release):
        raise BundleError(f"{RELEASE_CERTIFICATE} is not a code-signing certificate: it must not sign bundles")
    key = authority.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BundleError(f"{CA_CERTIFICATE} does not hold an ECDSA key")
    return VerifiedSigner(_name(release), fingerprint(authority), pki.fingerprint(key), release.not_valid_after_utc)


def check_federation(release: x509.Certificate, federation: str) -> None:
    """Check that `release` is the release certificate of `federation`. Raises BundleError."""
    found = _extensions(release)
    names = found.get(x509.SubjectAlternativeName)
    kind = x509.UniformResourceIdentifier
    uris = names.get_values_for_type(kind) if isinstance(names, x509.SubjectAlternativeName) else []
    if f"fedclaw://{federation}/release" not in uris:
        raise BundleError(f"{RELEASE_CERTIFICATE} is not the release certificate of the federation {federation!r}")


def check_signature(release: x509.Certificate, signature: bytes, message: bytes, refusal: str) -> None:
    """Check the ECDSA `signature` (DER) by `release` over `message`, hashed as its curve asks for.

    Raises BundleError, with the words `refusal` when the signature does not fit.
    """
    key = _signing_key(release)
    try:
        key.verify(signature, message, ec.ECDSA(pki.hash_of(key)))
    except (InvalidSignature, ValueError) as error:
        raise BundleError(refusal) from error


def hash_name(release: x509.Certificate) -> str:
    """The hash of what `release` signs, as OpenSSL names it. Raises BundleError."""
    return pki.hash_of(_signing_key(release)).name


def _signing_key(release: x509.Certificate) -> ec.EllipticCurvePublicKey:
    try:
        key = release.public_key()
    except UNUSABLE as error:
        raise BundleError(f"{RELEASE_CERTIFICATE} holds no key that can be used") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BundleError(f"{RELEASE_CERTIFICATE} does not hold an ECDSA key")
    try:
        pki.hash_of(key)
    except ProvisionError as error:
        raise BundleError(f"{RELEASE_CERTIFICATE}: {error}") from error
    return key


def check_times(release: x509.Certificate, authority: x509.Certificate, signed: datetime, now: datetime) -> None:
    """Check that the certificates were valid when the bundle says that it was signed. Raises BundleError."""
    if signed.tzinfo is None:
        raise BundleError(f"{MANIFEST}: `created` has no time zone")
    try:
        _check_times(release, authority, signed.astimezone(UTC), now)
    except OverflowError as error:
        raise BundleError(f"{MANIFEST} or a certificate holds a time at the end of the calendar") from error


def _check_times(release: x509.Certificate, authority: x509.Certificate, signed: datetime, now: datetime) -> None:
    if signed > now + CLOCK_SKEW:
        raise BundleError(f"{MANIFEST} says that it was signed at {_stamp(signed)}, which is in the future")
    for name, certificate in ((RELEASE_CERTIFICATE, release), (CA_CERTIFICATE, authority)):
        start, end = certificate.not_valid_before_utc - CLOCK_SKEW, certificate.not_valid_after_utc
        if not start <= signed <= end:
            raise BundleError(
                f"{name} was not valid when the bundle was signed ({_stamp(signed)}): "
                f"it runs from {_stamp(certificate.not_valid_before_utc)} to {_stamp(end)}"
            )


def check_not_revoked(release: x509.Certificate, authority: x509.Certificate, crl_pem: bytes, origin: str) -> None:
    """Check `release` against a revocation list of `authority`. Raises BundleError.

    A revoked certificate is refused whatever the time of signing: whoever has a leaked key can choose the date.
    """
    revocations = parse_revocations(crl_pem, origin)
    key = authority.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not revocations.is_signature_valid(key):
        raise BundleError(f"{origin} was not signed by the expected CA ({_name(authority)})")
    entry = revocations.get_revoked_certificate_by_serial_number(release.serial_number)
    if entry is not None:
        raise BundleError(f"{RELEASE_CERTIFICATE} was revoked at {_stamp(entry.revocation_date_utc)}")


def _extensions(release: x509.Certificate) -> dict[type, x509.ExtensionType]:
    """By type. Anybody can make a CA, and let it sign a certificate that is not one to the last byte."""
    try:
        return {type(extension.value): extension.value for extension in release.extensions}
    except UNUSABLE as error:
        raise BundleError(f"{RELEASE_CERTIFICATE} is damaged: its extensions cannot be read") from error


def _may_sign_code(release: x509.Certificate) -> bool:
    found = _extensions(release)
    usage = found.get(x509.ExtendedKeyUsage)
    constraints = found.get(x509.BasicConstraints)
    is_ca = isinstance(constraints, x509.BasicConstraints) and constraints.ca
    return isinstance(usage, x509.ExtendedKeyUsage) and ExtendedKeyUsageOID.CODE_SIGNING in usage and not is_ca


def _name(certificate: x509.Certificate) -> str:
    try:
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return printable(str(common[0].value) if common else certificate.subject.rfc4514_string())
    except UNUSABLE:
        return "a name that cannot be read"


def printable(text: str) -> str:
    """A stranger's text on one line, without what moves a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _stamp(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
