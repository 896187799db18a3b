"""A CA with the certificates of a proxy and of the nodes behind it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NODE_NAME = "node.example.org"


@dataclass(frozen=True)
class Certificates:
    """PEM files; of `proxy` and `node` with their keys."""

    ca: Path
    proxy: Path
    node: Path


def make_certificates(directory: Path) -> Certificates:
    """A new CA, a proxy at 127.0.0.1, and nodes of one name."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("proxies' CA", key.public_key(), None, key)
    found = Certificates(directory / "ca.crt", directory / "proxy.pem", directory / "node.pem")
    found.ca.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    for path, name in ((found.proxy, x509.IPAddress(ip_address("127.0.0.1"))), (found.node, x509.DNSName(NODE_NAME))):
        own = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(path.stem, own.public_key(), authority, key, name)
        path.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + own.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        path.chmod(0o600)
    return found


def _certificate(
    name: str,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Certificate | None,
    signer: ec.EllipticCurvePrivateKey,
    *alternatives: x509.GeneralName,
) -> x509.Certificate:
    subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(signer, hashes.SHA256())
