import hashlib
import json
import os
import re
import shutil
import socket
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedclaw.errors import BundleError, UsageError
from fedclaw.export import layout, signature
from fedclaw.export.check import SMALL, Trust, load_trust, verify_bundle
from fedclaw.export.model_signature import sign_digests
from fedclaw.identity import pki
from fedclaw.identity.federation_home import ReleaseSigner

SIGNATURE = "the signature"
EVERY_FILE = [*sorted(layout.REQUIRED), layout.DIGESTS, SIGNATURE]


@pytest.fixture(params=sorted(layout.SIGNATURES))
def bundle(bundle, home, request):
    """A bundle of each format that a test may damage."""
    if request.param == 1:
        (bundle / layout.SIGNATURE).rename(bundle / layout.SIGNATURE_IN_FORMAT_1)
        path = bundle / layout.MANIFEST
        path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))
        sign(bundle, home.signer())
    return bundle


IN_FORMAT_1 = pytest.mark.parametrize("bundle", [1], indirect=True)
IN_FORMAT_2 = pytest.mark.parametrize("bundle", [2], indirect=True)


def signature_of(bundle):
    (name,) = [name for name in layout.SIGNATURES.values() if (bundle / name).exists()]
    return name


def named(bundle, name):
    """`name` as the bundle's format has it."""
    return signature_of(bundle) if name == SIGNATURE else name


def origin_of(bundle):
    """The file that says what belongs to the bundle."""
    return layout.SIGNATURE if signature_of(bundle) == layout.SIGNATURE else layout.DIGESTS


def sign(bundle, signer, also=()):
    """What the export does last: certificates, digests, signature. Files named in `also` are signed and not there."""
    (bundle / layout.RELEASE_CERTIFICATE).write_bytes(signer.certificate_pem)
    (bundle / layout.CA_CERTIFICATE).write_bytes(signer.ca_pem)
    form = signature_of(bundle)
    names = sorted(path.name for path in bundle.iterdir() if path.name not in (layout.DIGESTS, form))
    digests = [(hashlib.sha256((bundle / name).read_bytes()).hexdigest(), name) for name in names]
    digests += [("0" * 64, name) for name in also]
    content = "".join(f"{digest}  {name}\n" for digest, name in digests).encode()
    (bundle / layout.DIGESTS).write_bytes(content)
    if form == layout.SIGNATURE:
        signed = {name: digest for digest, name in digests} | {layout.DIGESTS: hashlib.sha256(content).hexdigest()}
        content = sign_digests(signed, "bundle", signer)
    (bundle / form).write_bytes(content if form == layout.SIGNATURE else signer.sign(content))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


NOW = datetime.now(UTC)
DAY = timedelta(days=1)
RELEASE_URI = "fedclaw://test-federation/release"


def issue(subject, key, issuer, issuer_key, extensions, start=NOW - DAY, end=NOW + DAY):
    """Any certificate, good or bad."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return pki.pem_of(builder.sign(issuer_key, hashes.SHA384()))


def make_signer(purpose=ExtendedKeyUsageOID.CODE_SIGNING, uri=RELEASE_URI, ca=True, leaf_ca=False, **dates):
    """A signer under a CA of its own that is a thousand days old; by default a good one."""
    ca_key, key = pki.new_key(), pki.new_key()
    root = [x509.BasicConstraints(ca=ca, path_length=None)]
    authority = issue("old CA", ca_key, "old CA", ca_key, root, NOW - 1000 * DAY, NOW + 1000 * DAY)
    extensions = [x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])]
    extensions += [x509.ExtendedKeyUsage([purpose])] if purpose else []
    extensions += [x509.BasicConstraints(ca=leaf_ca, path_length=None)]
    return ReleaseSigner(key, issue("old release", key, "old CA", ca_key, extensions, **dates), authority)


def date(bundle, moment):
    """Let the bundle say that it was signed at `moment`."""
    manifest = layout.Manifest.model_validate_json((bundle / layout.MANIFEST).read_bytes())
    changed = manifest.model_copy(update={"created": moment})
    (bundle / layout.MANIFEST).write_text(changed.model_dump_json())


def test_a_genuine_bundle_passes_with_and_without_a_pinned_ca(bundle, home):
    loose = verify_bundle(bundle)
    assert (loose.pinned, loose.expired) == (False, False)
    pinned = verify_bundle(bundle, Trust(authority=(home.root / "ca.crt").read_bytes()), keep=[layout.ONNX])
    assert pinned.pinned
    assert pinned.contents[layout.ONNX] == (bundle / layout.ONNX).read_bytes()
    assert pinned.signer.name == "test-federation release"
    assert pinned.signer.fingerprint.replace(":", "").lower() == home.ca.fingerprint(hashes.SHA256()).hex()
    assert pinned.signer.key_fingerprint == pki.fingerprint(home.ca.public_key())


@pytest.mark.parametrize("name", EVERY_FILE)
def test_any_changed_byte_is_found_and_the_file_named(bundle, name):
    name = named(bundle, name)
    path = bundle / name
    original, size = path.read_bytes(), path.stat().st_size
    for position in sorted({0, 1, size // 3, size // 2, size - 2, size - 1}):
        flip(path, position)
        with pytest.raises(BundleError) as caught:
            verify_bundle(bundle)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        path.write_bytes(original)
    verify_bundle(bundle)


@IN_FORMAT_1
@pytest.mark.parametrize("name", [layout.SIGNATURE_IN_FORMAT_1, layout.DIGESTS])
def test_every_single_byte_of_signature_and_digests_counts(bundle, name):
    """test_model_signature.py has each byte of model.sig."""
    path = bundle / name
    original = path.read_bytes()
    for position in range(len(original)):
        flip(path, position)
        with pytest.raises(BundleError, match=name):
            verify_bundle(bundle)
        path.write_bytes(original)


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("change", [lambda b: b + b"\n", lambda b: b[:-1], lambda _: b""])
def test_longer_shorter_and_empty_files_are_found(bundle, name, change):
    name = named(bundle, name)
    path = bundle / name
    path.write_bytes(change(path.read_bytes()))
    if name == layout.SIGNATURE and change(b"") == b"\n":
        verify_bundle(bundle)  # Space after JSON says nothing.
        return
    with pytest.raises(BundleError, match=name):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_removed_file_is_named(bundle, name):
    name = named(bundle, name)
    (bundle / name).unlink()
    expected = layout.SIGNATURE if name in layout.SIGNATURES.values() else name
    with pytest.raises(BundleError, match=expected):
        verify_bundle(bundle)


def test_an_added_file_is_named(bundle):
    (bundle / "readme.txt").write_text("hello")
    with pytest.raises(BundleError, match=rf"readme\.txt is not in {origin_of(bundle)}"):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["re\nad\x1b[2J", "\udc80", "\N{CYRILLIC SMALL LETTER A}", ".gitignore"])
def test_a_name_that_nobody_would_give_is_shown_in_one_plain_line(bundle, name):
    """Also what the OpenSSF's tool leaves out of a signature by itself."""
    (bundle / name).write_text("hello")
    with pytest.raises(BundleError, match="was added after signing") as caught:
        verify_bundle(bundle)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


def test_two_files_that_are_one_elsewhere_are_refused(bundle, home):
    shutil.copyfile(bundle / layout.ONNX, bundle / "Model.onnx")
    sign(bundle, home.signer())
    with pytest.raises(BundleError, match=r"Model\.onnx and model\.onnx are one file"):
        verify_bundle(bundle)


def test_a_bundle_has_one_signature(bundle, home):
    """Whoever checks a bundle never chooses which of two to believe."""
    (other,) = set(layout.SIGNATURES.values()) - {signature_of(bundle)}
    shutil.copyfile(bundle / signature_of(bundle), bundle / other)
    with pytest.raises(BundleError, match=r"holds both SHA256SUMS\.sig and model\.sig"):
        verify_bundle(bundle)


def test_a_bundle_of_one_format_is_never_one_of_the_other(bundle, home):
    """Even if the release key itself signed it in the other form."""
    (other,) = set(layout.SIGNATURES.values()) - {signature_of(bundle)}
    (bundle / signature_of(bundle)).rename(bundle / other)
    with pytest.raises(BundleError, match=re.escape(other)):
        verify_bundle(bundle)
    sign(bundle, home.signer())
    with pytest.raises(BundleError, match=rf"bundle\.json says format \d, .* the bundle has {other}"):
        verify_bundle(bundle)


@IN_FORMAT_2
def test_a_signed_list_for_people_that_says_something_else_is_refused(bundle, home):
    content = (bundle / layout.DIGESTS).read_bytes()
    (bundle / layout.DIGESTS).write_bytes(b"".join(content.splitlines(keepends=True)[1:]))
    names = [path.name for path in bundle.iterdir() if path.name != layout.SIGNATURE]
    digests = {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in names}
    (bundle / layout.SIGNATURE).write_bytes(sign_digests(digests, "bundle", home.signer()))
    with pytest.raises(BundleError, match=r"SHA256SUMS and model\.sig are signed and list different files"):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_link_is_refused_even_to_the_same_bytes(bundle, tmp_path, name):
    name = named(bundle, name)
    shutil.move(bundle / name, tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=f"{name} is a symbolic link"):
        verify_bundle(bundle)


def test_directories_pipes_and_sockets_are_refused(bundle):
    (bundle / "folder").mkdir()
    with pytest.raises(BundleError, match="folder is not a plain file"):
        verify_bundle(bundle)
    (bundle / "folder").rmdir()
    os.mkfifo(bundle / "pipe")
    with pytest.raises(BundleError, match="pipe is not a plain file"):
        verify_bundle(bundle)
    (bundle / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(bundle / "s"))
        with pytest.raises(BundleError, match="s is not a plain file"):
            verify_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "..", ".hidden", "a/b", "a\\b", "C:b", "nul\0", *layout.SIGNATURES.values()]
)
def test_a_signed_list_that_names_what_it_must_not_is_refused(bundle, home, name):
    sign(bundle, home.signer(), also=[name])
    with pytest.raises(BundleError, match=f"{origin_of(bundle)} is damaged"):
        verify_bundle(bundle)


@IN_FORMAT_1
def test_a_signed_list_that_names_a_file_twice_is_refused(bundle, home):
    sign(bundle, home.signer(), also=[layout.ONNX])
    with pytest.raises(BundleError, match="SHA256SUMS is damaged"):
        verify_bundle(bundle)


def test_a_signed_bundle_without_a_required_file_is_incomplete(bundle, home):
    (bundle / layout.PRIVACY).unlink()
    sign(bundle, home.signer())
    with pytest.raises(BundleError, match=r"privacy\.json is missing"):
        verify_bundle(bundle)


def test_a_signed_manifest_of_another_version_is_not_guessed_at(bundle, home):
    path = bundle / layout.MANIFEST
    path.write_text(path.read_text().replace('"format_version": ', '"format_version": 3'))
    sign(bundle, home.signer())
    with pytest.raises(BundleError, match="not understood by this version: format_version"):
        verify_bundle(bundle)


@pytest.mark.parametrize("which", ["inputs", "outputs"])
def test_a_signed_manifest_without_a_tensor_is_not_understood(which, bundle, home):
    path = bundle / layout.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), which: []}))
    sign(bundle, home.signer())
    with pytest.raises(BundleError, match=f"not understood by this version: {which}"):
        verify_bundle(bundle)


def test_a_huge_list_is_not_read(bundle):
    with (bundle / layout.DIGESTS).open("ab") as file:
        file.truncate(100 * SMALL)
    with pytest.raises(BundleError, match="SHA256SUMS is damaged: larger"):
        verify_bundle(bundle)


def test_the_signature_of_another_bundle_does_not_fit(bundle, image_bundle, home):
    if signature_of(bundle) == layout.SIGNATURE:
        shutil.copyfile(image_bundle / layout.SIGNATURE, bundle / layout.SIGNATURE)
        expected = r" is not in model\.sig"
    else:
        (bundle / layout.SIGNATURE_IN_FORMAT_1).write_bytes(
            home.signer().sign((image_bundle / layout.DIGESTS).read_bytes())
        )
        expected = r"SHA256SUMS\.sig is not release\.crt's signature over this SHA256SUMS"
    with pytest.raises(BundleError, match=expected):
        verify_bundle(bundle)


def test_nothing_large_is_read_before_the_signature_holds(bundle, home, stranger, monkeypatch):
    monkeypatch.setattr("fedclaw.export.check._read_hashed", lambda *_: pytest.fail("it was read"))
    sign(bundle, stranger.signer())
    with pytest.raises(BundleError, match=r"ca\.crt is not the CA that you trust"):
        verify_bundle(bundle, Trust(authority=(home.root / "ca.crt").read_bytes()))
    path = bundle / signature_of(bundle)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=path.name):
        verify_bundle(bundle)


def test_a_stranger_who_signs_everything_anew_fails_against_a_pinned_ca_only(bundle, home, stranger):
    sign(bundle, stranger.signer())
    assert not verify_bundle(bundle).pinned
    with pytest.raises(BundleError, match=r"ca\.crt is not the CA that you trust"):
        verify_bundle(bundle, Trust(authority=(home.root / "ca.crt").read_bytes()))


def test_a_strangers_certificate_under_the_genuine_ca_fails(bundle, home, stranger):
    mixed = stranger.signer()
    mixed.ca_pem = home.signer().ca_pem
    sign(bundle, mixed)
    with pytest.raises(BundleError, match=r"release\.crt was not issued by the expected CA"):
        verify_bundle(bundle)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.parametrize("which", [layout.RELEASE_CERTIFICATE, layout.CA_CERTIFICATE])
def test_a_certificate_damaged_anywhere_is_a_bundle_error(home, which):
    """Of a certificate alone, without the digests; DER lets one bit change that nobody reads (unused bits)."""
    signer = home.signer()
    pems = {layout.RELEASE_CERTIFICATE: signer.certificate_pem, layout.CA_CERTIFICATE: signer.ca_pem}
    der = x509.load_pem_x509_certificate(pems[which]).public_bytes(Encoding.DER)
    refusals = []
    for position in range(len(der)):
        damaged = bytearray(der)
        damaged[position] ^= 1
        pems[which] = ssl.DER_cert_to_PEM_cert(bytes(damaged)).encode()
        try:
            signature.check_chain(*(signature.parse_certificate(pem, name) for name, pem in pems.items()))
        except BundleError as error:
            refusals.append(str(error))
    assert len(refusals) >= len(der) - 1
    assert all(which in refusal for refusal in refusals)


def test_the_servers_key_must_not_sign_bundles(bundle, home):
    key = load_pem_private_key((home.root / "server.key").read_bytes(), None)
    certificate = (home.root / "server.crt").read_bytes()
    sign(bundle, ReleaseSigner(key, certificate, home.signer().ca_pem))
    with pytest.raises(BundleError, match=r"release\.crt is not a code-signing certificate"):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({}, None),
        ({"purpose": None}, "not a code-signing certificate"),
        ({"purpose": ExtendedKeyUsageOID.CLIENT_AUTH}, "not a code-signing certificate"),
        ({"leaf_ca": True}, "not a code-signing certificate"),
        ({"uri": "fedclaw://other/release"}, "not the release certificate of the federation 'test-federation'"),
        ({"ca": False}, r"ca\.crt is not a CA certificate"),
    ],
)
def test_a_certificate_of_the_wrong_kind_must_not_sign(bundle, fault, message):
    sign(bundle, make_signer(**fault))
    if message is None:
        verify_bundle(bundle)
        return
    with pytest.raises(BundleError, match=message):
        verify_bundle(bundle)


def test_a_leaf_is_no_ca(bundle, home):
    signer = home.signer()
    signer.ca_pem = signer.certificate_pem
    sign(bundle, signer)
    with pytest.raises(BundleError, match=r"ca\.crt is not a self-signed CA"):
        verify_bundle(bundle)


class TestTimes:
    EXPIRED = {"start": NOW - 10 * DAY, "end": NOW - 5 * DAY}

    def test_expired_since_is_accepted_and_said(self, bundle):
        date(bundle, NOW - 6 * DAY)
        sign(bundle, make_signer(**self.EXPIRED))
        assert verify_bundle(bundle).expired

    def test_expired_since_is_refused_on_request(self, bundle):
        date(bundle, NOW - 6 * DAY)
        sign(bundle, make_signer(**self.EXPIRED))
        with pytest.raises(BundleError, match=r"release\.crt has expired"):
            verify_bundle(bundle, Trust(expired="refuse"))

    @pytest.mark.parametrize("days_ago", [4, 11])
    def test_signed_outside_the_certificates_life(self, bundle, days_ago):
        date(bundle, NOW - days_ago * DAY)
        sign(bundle, make_signer(**self.EXPIRED))
        with pytest.raises(BundleError, match=r"release\.crt was not valid when the bundle was signed"):
            verify_bundle(bundle)

    def test_signed_in_the_future(self, bundle, home):
        date(bundle, NOW + DAY)
        sign(bundle, home.signer())
        with pytest.raises(BundleError, match="in the future"):
            verify_bundle(bundle)

    def test_signed_at_no_known_time(self, bundle, home):
        date(bundle, NOW.replace(tzinfo=None))
        sign(bundle, home.signer())
        with pytest.raises(BundleError, match="time zone"):
            verify_bundle(bundle)


def test_a_revoked_release_certificate_is_refused(bundle, home, stranger):
    ca_key = load_pem_private_key((home.root / "ca.key").read_bytes(), None)
    serial = x509.load_pem_x509_certificate(home.signer().certificate_pem).serial_number
    empty = pki.new_crl(home.ca, ca_key, [], 1)
    full = pki.new_crl(home.ca, ca_key, [pki.revoked_entry(serial)], 2)
    verify_bundle(bundle, Trust(revocations=pki.pem_of(empty)))
    with pytest.raises(BundleError, match=r"release\.crt was revoked"):
        verify_bundle(bundle, Trust(revocations=pki.pem_of(full)))
    with pytest.raises(BundleError, match="was not signed by the expected CA"):
        verify_bundle(bundle, Trust(revocations=(stranger.root / "revoked.crl").read_bytes()))
    with pytest.raises(BundleError, match="not a PEM certificate revocation list"):
        verify_bundle(bundle, Trust(revocations=b"nothing"))


@pytest.mark.parametrize(
    ("setting", "content", "words"),
    [
        ("ca", b"hello", r"ca=.*notes is not a PEM certificate"),
        ("ca", b"", r"ca=.*notes is not a PEM certificate"),
        ("crl", b"hello", r"crl=.*notes is not a PEM certificate revocation list"),
        ("federation", b"{}", r"federation=.*notes is not a federation descriptor"),
    ],
)
def test_a_file_of_another_kind(tmp_path, setting, content, words):
    (tmp_path / "notes").write_bytes(content)
    asked = {"ca": None, "federation": None, "crl": None, setting: tmp_path / "notes"}
    with pytest.raises(UsageError, match=words):
        load_trust(**asked)


def test_two_certificates_name_no_authority(tmp_path, home):
    pem = (home.root / "ca.crt").read_bytes()
    (tmp_path / "two").write_bytes(pem + pem)
    with pytest.raises(UsageError, match="holds 2 certificates, it should hold one"):
        load_trust(tmp_path / "two", None, None)
    (tmp_path / "one").write_bytes(pem)
    assert load_trust(tmp_path / "one", None, None).authority == pem


def test_a_descriptor_that_was_changed(tmp_path, home):
    text = (home.root / "federation.json").read_text()
    assert "127.0.0.1:9443" in text
    (tmp_path / "federation.json").write_text(text.replace("127.0.0.1:9443", "127.0.0.2:9443"))
    with pytest.raises(UsageError, match=r"federation=.*was changed after the coordinator signed it"):
        load_trust(None, tmp_path, None)


@IN_FORMAT_2
@pytest.mark.parametrize(
    ("was", "told", "missing"),
    [
        ('"variant": "final"', '"variant": "compressed"', "compression.json"),
        ('"model.pt2": "prepared inputs"', '"model.pt2": "prepared inputs", "m.onnx": "prepared inputs"', "m.onnx"),
    ],
)
def test_a_file_that_the_manifest_tells_of_and_nobody_signed_is_missing(bundle, home, was, told, missing):
    path = bundle / layout.MANIFEST
    path.write_text(path.read_text().replace(was, told))
    sign(bundle, home.signer())
    with pytest.raises(BundleError, match=f"^{missing} is missing from the bundle: bundle.json tells of it$"):
        verify_bundle(bundle)
