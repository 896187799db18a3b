"""The OpenSSF's own tool on our bundles, and our verifier on its signatures."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL.crypto import X509StoreContextError

from fedclaw.errors import BundleError
from fedclaw.export import layout
from fedclaw.export.check import Trust, verify_bundle
from fedclaw.export.model_signature import sign_digests
from fedclaw.files import sha256_file
from fedclaw.identity import pki
from fedclaw.identity.federation_home import FederationHome, ReleaseSigner
from fedclaw.identity.provisioning import initialise

PAST = Path(__file__).parents[1] / "past"
EVERY_FILE = [*sorted(layout.REQUIRED), layout.PIPELINE, layout.DIGESTS]


@pytest.fixture(scope="module")
def tool():
    """The package model_signing, with the parts that this file calls."""
    import model_signing.hashing
    import model_signing.signing
    import model_signing.verifying

    return model_signing


@pytest.fixture
def accepts(tool, home):
    """Whether the tool accepts a bundle, as its command line does it."""

    def accepts(bundle, authority=home.root / "ca.crt"):
        verifier = tool.verifying.Config().use_certificate_verifier(certificate_chain=[authority])
        hashing = tool.hashing.Config().set_ignored_paths(paths=[bundle / layout.SIGNATURE])
        try:
            verifier.set_hashing_config(hashing).verify(bundle, bundle / layout.SIGNATURE)
        except (ValueError, InvalidSignature, X509StoreContextError):
            return False
        return True

    return accepts


def sign(bundle, signer):
    """`model.sig` anew, by any signer."""
    names = [path.name for path in bundle.iterdir() if path.name != layout.SIGNATURE]
    digests = {name: sha256_file(bundle / name) for name in names}
    (bundle / layout.SIGNATURE).write_bytes(sign_digests(digests, "bundle", signer))


def both_refuse(accepts, bundle):
    with pytest.raises(BundleError):
        verify_bundle(bundle)
    return not accepts(bundle)


def test_the_tool_accepts_a_bundle_and_refuses_it_after_any_change(bundle, accepts, tmp_path):
    """Each file in turn: a byte of it changed, it removed, renamed, exchanged for another one, or a link."""
    assert accepts(bundle)
    other = {name: EVERY_FILE[place - 1] for place, name in enumerate(EVERY_FILE)}
    for name in EVERY_FILE:
        path, kept = bundle / name, tmp_path / "kept"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert both_refuse(accepts, bundle), f"a byte of {name} was changed"
        path.rename(kept)
        assert both_refuse(accepts, bundle), f"{name} was removed"
        kept.write_bytes(content)
        path.symlink_to(kept)
        assert both_refuse(accepts, bundle), f"{name} is a link"
        path.unlink()
        shutil.copyfile(kept, bundle / f"x{name}")
        assert both_refuse(accepts, bundle), f"{name} was renamed"
        (bundle / f"x{name}").unlink()
        kept.rename(path)
        twin = bundle / other[name]
        exchanged = twin.read_bytes()
        path.write_bytes(exchanged), twin.write_bytes(content)
        assert both_refuse(accepts, bundle), f"{name} and {other[name]} were exchanged"
        path.write_bytes(content), twin.write_bytes(exchanged)
    (bundle / "added.txt").write_text("hello")
    assert both_refuse(accepts, bundle), "a file was added"
    (bundle / "added.txt").unlink()
    assert accepts(bundle)
    verify_bundle(bundle)


def test_the_tool_refuses_a_changed_signature_and_a_strangers_ca(bundle, accepts, stranger):
    assert not accepts(bundle, stranger.root / "ca.crt")
    path = bundle / layout.SIGNATURE
    content = path.read_bytes()
    sig = content.index(b'"sig":"') + 20
    for place in (content.index(b'"payload":"') + 40, sig):
        letter = b"A" if content[place : place + 1] != b"A" else b"B"
        path.write_bytes(content[:place] + letter + content[place + 1 :])
        assert both_refuse(accepts, bundle)


def test_what_the_tool_signs_with_the_release_key_is_a_bundle(tool, bundle, home, accepts):
    path = bundle / layout.SIGNATURE
    path.unlink()
    hashing = tool.hashing.Config().set_ignored_paths(paths=[path])
    tool.signing.Config().use_certificate_signer(
        private_key=home.root / "release.key",
        signing_certificate=home.root / "release.crt",
        certificate_chain=[home.root / "ca.crt"],
    ).set_hashing_config(hashing).sign(bundle, path)
    assert b'".gitignore"' in base64.b64decode(json.loads(path.read_bytes())["dsseEnvelope"]["payload"])
    assert verify_bundle(bundle, Trust(authority=home.signer().ca_pem)).pinned
    assert accepts(bundle)
    (bundle / ".gitignore").write_text("*")  # The tool leaves it out by itself, so its content proves nothing.
    assert accepts(bundle)
    with pytest.raises(BundleError, match=r"\.gitignore' is not in model\.sig: it was added after signing"):
        verify_bundle(bundle)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP521R1()])
def test_release_keys_on_the_other_curves(bundle, home, accepts, curve):
    key = ec.generate_private_key(curve)
    ca_key = load_pem_private_key((home.root / "ca.key").read_bytes(), None)
    certificate = pki.issue_release(home.ca, ca_key, key.public_key(), home.name, 1)
    (bundle / layout.RELEASE_CERTIFICATE).write_bytes(pki.pem_of(certificate))
    relist(bundle)
    sign(bundle, ReleaseSigner(key, pki.pem_of(certificate), home.signer().ca_pem))
    assert accepts(bundle)
    verify_bundle(bundle, Trust(authority=home.signer().ca_pem))


def relist(bundle):
    """SHA256SUMS anew."""
    names = sorted({path.name for path in bundle.iterdir()} - layout.UNSIGNED)
    (bundle / layout.DIGESTS).write_text("".join(f"{sha256_file(bundle / name)}  {name}\n" for name in names))


def test_a_sites_certificate_is_enough_for_the_tool_and_never_for_us(bundle, home, accepts):
    """VERIFY.md says so: the tool asks only whether a key of that CA may sign anything at all."""
    key = pki.new_key()
    ca_key = load_pem_private_key((home.root / "ca.key").read_bytes(), None)
    certificate = pki.pem_of(pki.issue_site(home.ca, ca_key, key.public_key(), home.name, "ward", 1))
    signer = ReleaseSigner(key, certificate, home.signer().ca_pem)
    sign(bundle, signer)
    assert accepts(bundle)
    with pytest.raises(BundleError, match=r"model\.sig is signed by another certificate than release\.crt"):
        verify_bundle(bundle)
    (bundle / layout.RELEASE_CERTIFICATE).write_bytes(certificate)
    relist(bundle)
    sign(bundle, signer)
    with pytest.raises(BundleError, match=r"release\.crt is not a code-signing certificate"):
        verify_bundle(bundle)


@pytest.mark.parametrize("commit", ["437d1ac", "8eca11f"])
def test_release_certificates_made_earlier_sign_bundles_of_today(bundle, accepts, tmp_path, commit):
    root = shutil.copytree(PAST / commit / "federation", tmp_path / "federation")
    for path in root.glob("*.key"):
        path.chmod(0o600)
    signer = FederationHome.open(root).signer()
    (bundle / layout.RELEASE_CERTIFICATE).write_bytes(signer.certificate_pem)
    (bundle / layout.CA_CERTIFICATE).write_bytes(signer.ca_pem)
    relist(bundle)
    sign(bundle, signer)
    assert accepts(bundle, root / "ca.crt")


def test_a_release_key_in_a_token_signs_a_bundle(bundle, accepts, token, tmp_path):
    federation = initialise(tmp_path / "federation", "test-federation", "127.0.0.1:9443", release_key=token.uri("oms"))
    signer = federation.signer()
    (bundle / layout.RELEASE_CERTIFICATE).write_bytes(signer.certificate_pem)
    (bundle / layout.CA_CERTIFICATE).write_bytes(signer.ca_pem)
    relist(bundle)
    sign(bundle, signer)
    assert accepts(bundle, federation.root / "ca.crt")
    assert verify_bundle(bundle, Trust(authority=signer.ca_pem)).pinned


NO_NETWORK = """
import socket, sys
def refuse(*arguments, **options):
    raise SystemExit("the tool wanted the network")
socket.socket.connect = socket.getaddrinfo = refuse
from model_signing._cli import main
main()
"""


@pytest.mark.slow
def test_the_published_command_needs_no_network(bundle, home):
    text = (bundle / layout.HOW_TO_VERIFY).read_text()
    (line,) = [line.split() for line in text.splitlines() if line.startswith("    model_signing verify")]
    arguments = [str(home.root / "ca.crt") if word.startswith("/path") else word for word in line[1:]]

    def run():
        command = [sys.executable, "-c", NO_NETWORK, *arguments]
        return subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)

    accepted = run()
    assert (accepted.returncode, accepted.stdout) == (0, "Verification succeeded\n"), accepted.stderr
    with (bundle / layout.PRIVACY).open("a") as file:
        file.write(" ")
    refused = run()
    assert refused.returncode == 1
    assert "Hash mismatch for 'privacy.json'" in refused.stderr
