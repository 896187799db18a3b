"""Certificates of a stranger: anybody can make a CA, and let it sign whatever he likes."""

import datetime as dt
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedclaw.errors import BundleError
from fedclaw.export import signature
from fedclaw.identity import pki

CA_KEY, KEY = pki.new_key(), pki.new_key()
CA = pki.new_ca("heart", CA_KEY)
RELEASE = pki.issue_release(CA, CA_KEY, KEY.public_key(), "heart", 30)
ECDSA_WITH_SHA384 = bytes.fromhex("300a06082a8648ce3d040303")


def der(tag, content):
    """One value in DER."""
    size = len(content)
    length = bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def signed_anew(content):
    """What is signed of a certificate, signed by the CA whatever it is, as PEM."""
    signed = CA_KEY.sign(content, ec.ECDSA(hashes.SHA384()))
    return ssl.DER_cert_to_PEM_cert(der(0x30, content + ECDSA_WITH_SHA384 + der(3, b"\0" + signed))).encode()


def check(release_pem, ca_pem):
    """All that is asked of the two certificates of a bundle."""
    release = signature.parse_certificate(release_pem, "release.crt")
    authority = signature.parse_certificate(ca_pem, "ca.crt")
    signer = signature.check_chain(release, authority)
    signature.check_federation(release, "heart")
    signature.check_times(release, authority, pki.now(), dt.datetime.now(dt.UTC))
    signature.check_signature(release, KEY.sign(b"x", ec.ECDSA(hashes.SHA384())), b"x", "release.crt: refused")
    return signer


def test_a_certificate_put_together_here_is_a_good_one():
    pem = signed_anew(RELEASE.tbs_certificate_bytes)
    assert check(pem, pki.pem_of(CA)).name == "heart release"


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning", "ignore:.*:UserWarning")
@given(
    of_ca=st.booleans(),
    changes=st.lists(st.tuples(st.integers(4, 10**6), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_whatever_a_ca_signs_the_answer_is_one_line(of_ca, changes):
    content = bytearray((CA if of_ca else RELEASE).tbs_certificate_bytes)
    for place, value in changes:
        content[4 + place % (len(content) - 4)] = value
    pem = signed_anew(bytes(content))
    try:
        said = check(*((pki.pem_of(RELEASE), pem) if of_ca else (pem, pki.pem_of(CA)))).name
    except BundleError as error:
        said = str(error)
    assert said.isprintable()


def with_extension(value, name="heart release"):
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(CA.subject)
        .public_key(KEY.public_key())
        .serial_number(7)
        .not_valid_before(pki.now())
        .not_valid_after(pki.now() + dt.timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=True)
    )
    return pki.pem_of(builder.add_extension(value, critical=False).sign(CA_KEY, hashes.SHA384()))


def test_extensions_that_nobody_can_read_are_a_bundle_error():
    broken = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\x30\x05junk")
    with pytest.raises(BundleError, match=r"release\.crt is damaged: its extensions cannot be read"):
        check(with_extension(broken), pki.pem_of(CA))


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"])
def test_a_bundle_signed_before_or_after_all_time(text):
    with pytest.raises(BundleError, match="a time at the end of the calendar"):
        signature.check_times(RELEASE, CA, dt.datetime.fromisoformat(text), dt.datetime.now(dt.UTC))


def test_a_certificate_of_the_year_1():
    content = RELEASE.tbs_certificate_bytes
    start = content.index(b"\x17\x0d")
    changed = bytearray(content[:start] + b"\x18\x0f00010101000000Z" + content[start + 15 :])
    changed[start - 1] += 2
    changed[2:4] = (int.from_bytes(changed[2:4], "big") + 2).to_bytes(2, "big")
    with pytest.raises(BundleError, match="a time at the end of the calendar"):
        check(signed_anew(bytes(changed)), pki.pem_of(CA))


def test_a_name_cannot_speak_to_the_terminal():
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("fedclaw://heart/release")])
    assert check(with_extension(names, "\x1b[2Jheart\n"), pki.pem_of(CA)).name == "?[2Jheart?"
