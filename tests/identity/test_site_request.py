"""Requests: a hostile one gets nowhere, and a name passes to a new key only with the old key's consent."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedclaw.errors import ProvisionError
from fedclaw.identity import pki
from fedclaw.identity.names import site_uri
from fedclaw.identity.site_home import encode_request, read_request

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def crafted(
    common_name: str,
    uri: str | None = None,
    key: Key | None = None,
    more: Sequence[x509.NameAttribute[str]] = (),
) -> x509.CertificateSigningRequest:
    """A request as somebody else's software might make it."""
    names = [x509.NameAttribute(NameOID.COMMON_NAME, common_name), *more]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    if uri is not None:
        alternative = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = builder.add_extension(alternative, critical=False)
    return builder.sign(key or pki.new_key(), hashes.SHA384())


def refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ProvisionError, match=message):
        read_request(path, "heart")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.csr"


def test_round_trip(path: Path) -> None:
    key = pki.new_key()
    path.write_bytes(encode_request(key, "heart", "hospital-a"))
    request = read_request(path, "heart")
    assert request.site == "hospital-a"
    assert request.key == key.public_key()
    assert request.fingerprint == pki.fingerprint(key.public_key())
    assert b"PRIVATE" not in path.read_bytes()


def test_a_broken_signature_is_refused(path: Path) -> None:
    der = bytearray(crafted("hospital-a", site_uri("heart", "hospital-a")).public_bytes(Encoding.DER))
    der[-5] ^= 1
    broken = x509.load_der_x509_csr(bytes(der))
    refused(path, pki.pem_of(broken), "not signed by the key that it is for")


def test_a_changed_name_is_refused(path: Path) -> None:
    der = crafted("hospital-a", site_uri("heart", "hospital-a")).public_bytes(Encoding.DER)
    changed = x509.load_der_x509_csr(der.replace(b"hospital-a", b"hospital-b"))
    refused(path, pki.pem_of(changed), "not signed by the key that it is for")


@pytest.mark.parametrize("name", ["../../etc/cron", "..", "/etc/passwd", "a/b", "a\\b", ".hidden", "A", "a\nb", "a\0b"])
def test_names_that_are_paths_are_refused(path: Path, name: str) -> None:
    uri = "fedclaw://heart/site/x"
    refused(path, pki.pem_of(crafted(name, uri)), r"is refused: .* cannot be used")


def test_only_a_single_common_name(path: Path) -> None:
    uri = site_uri("heart", "hospital-a")
    extra = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "x")]
    refused(path, pki.pem_of(crafted("hospital-a", uri, more=extra)), "not a single common name")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (None, "no subject alternative name"),
        ("fedclaw://lung/site/hospital-a", "not for the federation 'heart'"),
        ("fedclaw://heart/site/hospital-b", "not for the federation 'heart'"),
        ("fedclaw://heart/release", "not for the federation 'heart'"),
    ],
)
def test_the_uri_must_fit(path: Path, uri: str | None, message: str) -> None:
    refused(path, pki.pem_of(crafted("hospital-a", uri)), message)


def test_weak_keys_are_refused(path: Path) -> None:
    for key in (ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)):
        refused(path, pki.pem_of(crafted("hospital-a", site_uri("heart", "hospital-a"), key)), "not ECDSA P-384")


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"]
)
def test_garbage_is_refused(path: Path, content: bytes) -> None:
    refused(path, content, "not a certificate request")


def test_long_files_are_refused(path: Path) -> None:
    refused(path, bytes(70_000), "longer than")


def test_consent(path: Path) -> None:
    old, new, other = pki.new_key(), pki.new_key(), pki.new_key()
    path.write_bytes(encode_request(new, "heart", "hospital-a", old_key=old))
    request = read_request(path, "heart")
    assert request.key == new.public_key()
    assert request.has_consent_of(old.public_key())
    assert not request.has_consent_of(other.public_key())
    assert b"PRIVATE" not in path.read_bytes()


def test_consent_to_one_request_is_not_consent_to_another(path: Path) -> None:
    old = pki.new_key()
    consented = encode_request(pki.new_key(), "heart", "hospital-a", old_key=old)
    consent = consented[consented.index(b"-----BEGIN FEDCLAW") :]
    path.write_bytes(encode_request(pki.new_key(), "heart", "hospital-a") + consent)
    assert not read_request(path, "heart").has_consent_of(old.public_key())


@pytest.mark.parametrize("damage", [b"", b"AAAA"])
def test_damaged_consent_is_none(path: Path, damage: bytes) -> None:
    block = (
        b"-----BEGIN FEDCLAW KEY ROTATION CONSENT-----\n" + damage + b"\n-----END FEDCLAW KEY ROTATION CONSENT-----\n"
    )
    path.write_bytes(encode_request(pki.new_key(), "heart", "hospital-a") + block)
    assert not read_request(path, "heart").has_consent_of(pki.new_key().public_key())
