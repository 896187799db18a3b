"""The federation's X.509: one CA, leaves for the server, the sites and the release signature, and a CRL.

ECDSA on P-384 with SHA-384 throughout; the CA signs leaves directly (path length 0). A leaf says by its extended key
usage what it is for, and nothing accepts it for anything else: serverAuth, clientAuth or codeSigning. RFC 5280.

Keys and certificates are read from files with errors that say which file and what to do.
"""

import datetime as dt
import ipaddress
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedclaw.errors import ProvisionError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.identity.names import is_loopback, site_uri

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey

CA_DAYS = 3652
LEAF_DAYS = 90
WARN_DAYS = 14
"""Days before expiry from which on a certificate is worth a warning."""

ECDSA = ec.ECDSA(hashes.SHA384())
_HASHES: dict[type[ec.EllipticCurve], hashes.HashAlgorithm] = {
    ec.SECP256R1: hashes.SHA256(),
    ec.SECP384R1: hashes.SHA384(),
    ec.SECP521R1: hashes.SHA512(),
}
# Clocks of different organisations differ; a certificate is good from a little before it was made.
_CLOCK_SKEW = dt.timedelta(minutes=10)


class Purpose(Enum):
    """What a leaf is for."""

    SERVER = ExtendedKeyUsageOID.SERVER_AUTH
    SITE = ExtendedKeyUsageOID.CLIENT_AUTH
    RELEASE = ExtendedKeyUsageOID.CODE_SIGNING


@dataclass(frozen=True)
class TlsIdentity:
    """What one end of a mutually authenticated connection needs, as PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    ca: bytes


def new_key() -> PrivateKey:
    """A fresh P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def key_pem(key: PrivateKey) -> bytes:
    """The private key as unencrypted PKCS#8; for files of mode 0600 only."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def parse_key(pem: bytes, origin: str) -> PrivateKey:
    """Read a private key. Raises ProvisionError without quoting any of it."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ProvisionError(f"{origin} is not a private key in unencrypted PEM form") from None
    if not isinstance(key, PrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ProvisionError(f"{origin} is not an ECDSA P-384 key")
    return key


def pem_of(item: x509.Certificate | x509.CertificateSigningRequest | x509.CertificateRevocationList) -> bytes:
    """PEM of anything public."""
    return item.public_bytes(Encoding.PEM)


def parse_certificate(pem: bytes, origin: str) -> x509.Certificate:
    """Read one certificate with a P-384 key. Raises ProvisionError naming `origin`."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        p384_key(certificate, origin)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ProvisionError(f"{origin} is not a PEM certificate: {error}") from None
    return certificate


def p384_key(holder: x509.Certificate | x509.CertificateSigningRequest, origin: str) -> PublicKey:
    """The public key of `holder`. Raises ProvisionError if it is anything but P-384."""
    key = holder.public_key()
    if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ProvisionError(f"{origin} has a key that is not ECDSA P-384")
    return key


def fingerprint(key: PublicKey) -> str:
    """SHA-256 of the public key (SubjectPublicKeyInfo) in groups of four digits, short enough to read aloud."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    text = digest.finalize().hex()
    return "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def common_name(holder: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The one common name of the subject. Raises ValueError if the subject has anything else in it."""
    attributes = list(holder.subject)
    if len(attributes) != 1 or attributes[0].oid != NameOID.COMMON_NAME:
        raise ValueError("its subject is not a single common name")
    value = attributes[0].value
    if not isinstance(value, str):
        raise ValueError("its common name is not text")
    return value


def new_ca(federation: str, key: PrivateKey) -> x509.Certificate:
    """A self-signed CA certificate for `federation`."""
    name = _subject(ca_name(federation))
    builder = _builder(name, name, key.public_key(), now() + dt.timedelta(days=CA_DAYS))
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def ca_name(federation: str) -> str:
    """The common name of a federation's CA."""
    return f"{federation} federation CA"


def issue_server(
    ca: x509.Certificate, ca_key: PrivateKey, key: PublicKey, host: str, days: int, others: Sequence[str] = ()
) -> x509.Certificate:
    """A certificate for the server at `host` (a DNS name or IP address; loopback gets all its usual names).

    `others` are further names and addresses under which sites reach it.
    """
    hosts = [host, *others]
    if any(map(is_loopback, hosts)):
        hosts += ["localhost", "127.0.0.1", "::1"]
    return _issue(ca, ca_key, key, host, Purpose.SERVER, [_general_name(item) for item in dict.fromkeys(hosts)], days)


def issue_site(
    ca: x509.Certificate, ca_key: PrivateKey, key: PublicKey, federation: str, site: str, days: int
) -> x509.Certificate:
    """A certificate for a site, bound to the federation by its URI."""
    names = [x509.UniformResourceIdentifier(site_uri(federation, site))]
    return _issue(ca, ca_key, key, site, Purpose.SITE, names, days)


def issue_release(
    ca: x509.Certificate, ca_key: PrivateKey, key: PublicKey, federation: str, days: int
) -> x509.Certificate:
    """A certificate for the key that signs bundles."""
    names = [x509.UniformResourceIdentifier(f"fedclaw://{federation}/release")]
    return _issue(ca, ca_key, key, f"{federation} release", Purpose.RELEASE, names, days)


def new_crl(
    ca: x509.Certificate, ca_key: PrivateKey, revoked: Iterable[x509.RevokedCertificate], number: int
) -> x509.CertificateRevocationList:
    """A CRL. It is good as long as the CA: it lies beside the server, and a stale one must not stop a federation."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(now())
        .next_update(ca.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority(ca), critical=False)
    )
    for item in revoked:
        builder = builder.add_revoked_certificate(item)
    return builder.sign(ca_key, hashes.SHA384())


def revoked_entry(serial: int) -> x509.RevokedCertificate:
    """An entry for a CRL, as of now."""
    return x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now()).build()


def parse_crl(pem: bytes, ca: x509.Certificate, origin: str) -> x509.CertificateRevocationList:
    """Read a CRL and check that `ca` signed it. Raises ProvisionError."""
    try:
        crl = x509.load_pem_x509_crl(pem)
        genuine = crl.issuer == ca.subject and crl.is_signature_valid(p384_key(ca, "the CA"))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        genuine = False
    if not genuine:
        raise ProvisionError(f"{origin} is damaged or not signed by this federation's CA; restore it from a backup")
    return crl


def check_ca(ca: x509.Certificate, federation: str, origin: str) -> None:
    """Raises ProvisionError unless `ca` is a valid, self-signed CA of `federation`."""
    try:
        ca.verify_directly_issued_by(ca)
        constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
        named = common_name(ca) == ca_name(federation)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        raise ProvisionError(f"{origin} is not a self-signed CA certificate") from None
    if not constraints.ca or not named:
        raise ProvisionError(f"{origin} is not the CA certificate of the federation {federation!r}")
    check_dates(ca, origin, "the federation has to be made anew with provision init")


def check_leaf(
    leaf: x509.Certificate,
    ca: x509.Certificate,
    purpose: Purpose,
    origin: str,
    remedy: str,
    *,
    expired_ok: bool = False,
) -> None:
    """Raises ProvisionError unless `ca` issued `leaf` for `purpose` and it is valid now (`remedy`: what to run)."""
    try:
        leaf.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        raise ProvisionError(f"{origin} was not issued by this federation's CA ({ca_label(ca)})") from None
    try:
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        is_ca = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.ExtensionNotFound):
        raise ProvisionError(f"{origin} does not say what it may be used for") from None
    if is_ca or list(usage) != [purpose.value]:
        raise ProvisionError(f"{origin} is not a {purpose.name.lower()} certificate")
    if not expired_ok:
        check_dates(leaf, origin, remedy)


def check_dates(certificate: x509.Certificate, origin: str, remedy: str) -> None:
    """Raises ProvisionError if `certificate` is not valid now."""
    if now() > certificate.not_valid_after_utc:
        raise ProvisionError(f"{origin} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; {remedy}")
    if now() < certificate.not_valid_before_utc:
        start = certificate.not_valid_before_utc
        raise ProvisionError(f"{origin} is not valid before {start:%Y-%m-%d %H:%M} UTC; check this machine's clock")


def hash_of(key: PrivateKey | PublicKey) -> hashes.HashAlgorithm:
    """The hash that goes with the key's curve in ECDSA. Raises ProvisionError if it is not P-256, P-384 or P-521."""
    algorithm = _HASHES.get(type(key.curve))
    if algorithm is None:
        raise ProvisionError(f"a key on the curve {key.curve.name} cannot sign; P-256, P-384 and P-521 can")
    return algorithm


def signed_content(purpose: str, message: bytes) -> bytes:
    """What a signature for `purpose` is over: never a text that TLS or another part of FedClaw would sign."""
    label = f"fedclaw signature v1: {purpose}".encode()
    return len(label).to_bytes(4, "big") + label + message


def check_signature(certificate: x509.Certificate, purpose: str, message: bytes, signature: bytes, who: str) -> None:
    """Raises ProvisionError unless the key of `certificate` signed `message` for `purpose` (`who`: for the error)."""
    try:
        p384_key(certificate, who).verify(signature, signed_content(purpose, message), ECDSA)
    except InvalidSignature:
        raise ProvisionError(f"a signature of {who} ({purpose}) does not fit its certificate and message") from None


def days_left(certificate: x509.Certificate) -> float:
    """Days until `certificate` expires; negative when it has."""
    return (certificate.not_valid_after_utc - now()) / dt.timedelta(days=1)


def ca_label(ca: x509.Certificate) -> str:
    """Name and fingerprint of a CA, for people to compare."""
    return f"{common_name(ca)}, {fingerprint(p384_key(ca, 'the CA'))}"


def alternative_names(holder: x509.Certificate | x509.CertificateSigningRequest) -> list[x509.GeneralName]:
    """All subject alternative names. Raises ValueError if the extension is missing or malformed."""
    try:
        return list(holder.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        raise ValueError("it has no subject alternative name") from None


def host_names(server: x509.Certificate) -> list[str]:
    """The names and addresses that a server's certificate is for. Raises ValueError if it says none."""
    names = alternative_names(server)
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def now() -> dt.datetime:
    """The present, in UTC and whole seconds (what X.509 can say)."""
    return dt.datetime.now(dt.UTC).replace(microsecond=0)


def _issue(
    ca: x509.Certificate,
    ca_key: PrivateKey,
    key: PublicKey,
    name: str,
    purpose: Purpose,
    names: Sequence[x509.GeneralName],
    days: int,
) -> x509.Certificate:
    expires = now() + dt.timedelta(days=days)
    if expires > ca.not_valid_after_utc:
        raise ProvisionError(
            f"{days} days are longer than the CA lives (until {ca.not_valid_after_utc:%Y-%m-%d}); give fewer days"
        )
    builder = _builder(_subject(name), ca.subject, key, expires)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose.value]), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(_authority(ca), critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: PublicKey, expires: dt.datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - _CLOCK_SKEW)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _authority(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


_MAX_BYTES = 16 * 1024 * 1024


def read_file(path: Path, what: str, *, limit: int = _MAX_BYTES) -> bytes:
    """The content of `path`. Raises ProvisionError if it is missing, unreadable or longer than `limit` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise ProvisionError(f"{path} is missing: {what}") from None
    except OSError as error:
        raise ProvisionError(f"{path} ({what}) cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise ProvisionError(f"{path} ({what}) is longer than {limit} bytes; that is not what belongs there")
    return content


def read_private(path: Path, what: str) -> bytes:
    """The content of a file that only its owner may read. Raises ProvisionError if others may."""
    content = read_file(path, what)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ProvisionError(f"{path} ({what}) can be read by others (mode {mode:04o}); run: chmod 600 {path}")
    return content


def load_key(path: Path, what: str) -> PrivateKey:
    """A P-384 key from a private file. Raises ProvisionError."""
    return parse_key(read_private(path, what), str(path))


def load_certificate(path: Path, what: str) -> x509.Certificate:
    """A certificate from a file. Raises ProvisionError."""
    return parse_certificate(read_file(path, what), str(path))


def save_key(path: Path, key: PrivateKey) -> None:
    """Write a private key that only its owner can read."""
    write_atomic(path, key_pem(key), PRIVATE_MODE)


class HasPublicKey(Protocol):
    """A private key, wherever it is."""

    def public_key(self) -> PublicKey:
        """Its public half."""


def belongs(certificate: x509.Certificate, key: HasPublicKey) -> bool:
    """Whether `certificate` is for `key`."""
    return certificate.public_key() == key.public_key()
