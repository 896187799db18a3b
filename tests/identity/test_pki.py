"""The certificates, as OpenSSL and a real TLS handshake see them."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedclaw.errors import ProvisionError
from fedclaw.identity import pki
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.provisioning import initialise, revoke
from fedclaw.identity.site_home import SiteKeys


def openssl(*arguments: object) -> tuple[int, str]:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def verify(home: FederationHome, certificate: Path, purpose: str, *more: object) -> tuple[int, str]:
    return openssl("verify", "-x509_strict", "-purpose", purpose, "-CAfile", home.root / "ca.crt", *more, certificate)


def test_openssl_accepts_each_leaf_for_its_purpose_only(home: FederationHome, site: Path) -> None:
    leaves = {
        "sslserver": home.root / "server.crt",
        "sslclient": site / "keys" / "site.crt",
        "codesign": home.root / "release.crt",
    }
    purposes = [purpose for purpose in leaves if purpose in openssl("verify", "-help")[1]] or ["sslserver", "sslclient"]
    for purpose, leaf in leaves.items():
        for asked in {"sslserver", "sslclient", *purposes} - {"codesign"}:
            code, output = verify(home, leaf, asked)
            assert (code == 0) == (asked == purpose), output
    release = x509.load_pem_x509_certificate((home.root / "release.crt").read_bytes())
    usage = release.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert list(usage.value) == [pki.Purpose.RELEASE.value]
    assert usage.critical


def test_openssl_sees_the_revocation(home: FederationHome, site: Path) -> None:
    check = ("-crl_check", "-CRLfile", home.root / "revoked.crl")
    assert verify(home, site / "keys" / "site.crt", "sslclient", *check)[0] == 0
    revoke(home.root, "hospital-a")
    code, output = verify(home, site / "keys" / "site.crt", "sslclient", *check)
    assert code != 0
    assert "revoked" in output


def test_openssl_reads_the_request(site: Path) -> None:
    code, output = openssl("req", "-verify", "-noout", "-text", "-in", site / "keys" / "site.csr")
    assert code == 0, output
    assert "secp384r1" in output
    assert "fedclaw://heart/site/hospital-a" in output


def test_openssl_checks_the_release_signature(home: FederationHome, tmp_path: Path) -> None:
    signer = home.signer()
    (tmp_path / "manifest").write_bytes(b"digests")
    (tmp_path / "signature").write_bytes(signer.sign(b"digests"))
    (tmp_path / "release.crt").write_bytes(signer.certificate_pem)
    code, public = openssl("x509", "-in", tmp_path / "release.crt", "-pubkey", "-noout")
    assert code == 0
    (tmp_path / "release.pub").write_text(public)
    check = ("dgst", "-sha384", "-verify", tmp_path / "release.pub", "-signature", tmp_path / "signature")
    assert openssl(*check, tmp_path / "manifest")[0] == 0
    (tmp_path / "manifest").write_bytes(b"other")
    assert openssl(*check, tmp_path / "manifest")[0] != 0


def test_everything_is_p384_with_sha384_and_dated(home: FederationHome, site: Path) -> None:
    for path in [*home.root.glob("*.crt"), site / "keys" / "site.crt"]:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        assert pki.p384_key(certificate, str(path)).curve.name == "secp384r1"
        assert certificate.signature_hash_algorithm is not None
        assert certificate.signature_hash_algorithm.name == "sha384"
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        assert life.days == (pki.CA_DAYS if path.name == "ca.crt" else 90)


@pytest.mark.parametrize(
    ("address", "dns", "addresses"),
    [
        ("127.0.0.1:1", ["localhost"], ["127.0.0.1", "::1"]),
        ("localhost:1", ["localhost"], ["127.0.0.1", "::1"]),
        ("fl.example.org:1", ["fl.example.org"], []),
        ("10.0.0.1:1", [], ["10.0.0.1"]),
        ("[fd00::1]:1", [], ["fd00::1"]),
    ],
)
def test_server_names(tmp_path: Path, address: str, dns: list[str], addresses: list[str]) -> None:
    home = initialise(tmp_path / "f", "heart", address)
    certificate = x509.load_pem_x509_certificate(home.tls().certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == dns
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == addresses


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> tuple[str, str]:
    """The TLS version and the name in the client's certificate, as the server saw them."""
    seen: list[tuple[str, str]] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def serve() -> None:
            connection, _ = listener.accept()
            connection.settimeout(20)
            try:
                with server.wrap_socket(connection, server_side=True) as tls:
                    certificate = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
                    seen.append((tls.version() or "", pki.common_name(certificate)))
                    tls.sendall(b"ok")
            except OSError:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=20) as raw,
                client.wrap_socket(raw, server_hostname=name) as tls,
            ):
                if tls.recv(2) != b"ok":
                    raise ssl.SSLError("refused")
        finally:
            thread.join()
    return seen[0]


def contexts(home: FederationHome, site: Path, ca: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(home.root / "server.crt", home.root / "server.key")
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(home.root / "ca.crt")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_cert_chain(site / "keys" / "site.crt", site / "keys" / "site.key")
    client.load_verify_locations(ca)
    return server, client


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_mutual_tls(home: FederationHome, site: Path, name: str) -> None:
    assert shake_hands(*contexts(home, site, home.root / "ca.crt"), name) == ("TLSv1.3", "hospital-a")


def test_no_tls_to_another_name(home: FederationHome, site: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"doesn't match|not valid for|mismatch"):
        shake_hands(*contexts(home, site, home.root / "ca.crt"), "fl.example.org")


def test_no_tls_with_another_ca(home: FederationHome, site: Path, tmp_path: Path) -> None:
    other = initialise(tmp_path / "other", "heart", "127.0.0.1:9443")
    with pytest.raises(ssl.SSLError):
        shake_hands(*contexts(home, site, other.root / "ca.crt"), "localhost")
    server_of_other, _ = contexts(other, site, other.root / "ca.crt")
    _, client_of_home = contexts(home, site, other.root / "ca.crt")
    with pytest.raises(OSError, match=r"alert|refused|reset|EOF"):
        shake_hands(server_of_other, client_of_home, "localhost")


def test_a_longer_life_than_the_ca_is_refused(home: FederationHome) -> None:
    ca_key = pki.load_key(home.root / "ca.key", "")
    with pytest.raises(ProvisionError, match="longer than the CA lives"):
        pki.issue_site(home.ca, ca_key, pki.new_key().public_key(), "heart", "a", pki.CA_DAYS + 1)


def test_other_kinds_of_key_are_refused() -> None:
    for key in (ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)):
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with pytest.raises(ProvisionError, match="x is not an ECDSA P-384 key"):
            pki.parse_key(pem, "x")
    with pytest.raises(ProvisionError, match="unencrypted PEM"):
        pki.parse_key(b"junk", "x")


def test_check_leaf_wants_the_purpose(home: FederationHome, site: Path) -> None:
    server = x509.load_pem_x509_certificate(home.tls().certificate)
    with pytest.raises(ProvisionError, match="x is not a site certificate"):
        pki.check_leaf(server, home.ca, pki.Purpose.SITE, "x", "")
    pki.check_leaf(SiteKeys.open(site).certificate, home.ca, pki.Purpose.SITE, "x", "")
    with pytest.raises(ProvisionError, match=r"does not say|not a site"):
        pki.check_leaf(home.ca, home.ca, pki.Purpose.SITE, "x", "")


def test_dates(home: FederationHome, days_pass: Callable[[float], None]) -> None:
    server = x509.load_pem_x509_certificate(home.tls().certificate)
    assert 89.9 < pki.days_left(server) <= 90
    days_pass(91)
    with pytest.raises(ProvisionError, match=r"x expired on .*; run renew"):
        pki.check_dates(server, "x", "run renew")


def test_a_clock_that_is_late_is_named(home: FederationHome, days_pass: Callable[[float], None]) -> None:
    server = x509.load_pem_x509_certificate(home.tls().certificate)
    days_pass(-1)
    with pytest.raises(ProvisionError, match="check this machine's clock"):
        pki.check_dates(server, "x", "")


def test_fingerprint_is_of_the_public_key(home: FederationHome) -> None:
    text = pki.fingerprint(pki.p384_key(home.ca, ""))
    code, public = openssl("x509", "-in", home.root / "ca.crt", "-pubkey", "-noout")
    assert code == 0
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-outform", "DER"], input=public.encode(), capture_output=True, check=True
    ).stdout
    digest = subprocess.run(["openssl", "sha256", "-r"], input=der, capture_output=True, check=True).stdout
    assert text.replace("-", "") == digest.decode().split()[0]


def test_identity_hides_its_key(home: FederationHome) -> None:
    identity = home.tls()
    assert b"PRIVATE KEY" in identity.key
    assert "PRIVATE" not in repr(identity)
