"""A federation whose release key is in a PKCS#11 token, and in no file."""

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from fedclaw import provision
from fedclaw.errors import EncryptionError, ProvisionError, UsageError
from fedclaw.identity import pki
from fedclaw.identity.federation_home import RELEASE_KEY, RELEASE_KEY_PLACE, FederationHome
from fedclaw.identity.provisioning import initialise, renew_federation
from tests.tokens import PIN, Token


def verify(home: FederationHome, content: bytes, signature: bytes) -> None:
    certificate = x509.load_pem_x509_certificate(home.signer().certificate_pem)
    pki.p384_key(certificate, "release.crt").verify(signature, content, pki.ECDSA)


def test_a_federation_without_a_release_key_file(
    token: Token, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "clinic"
    given = [f"federation={root}", "name=clinic", "address=127.0.0.1:9443", f"release_key={token.uri('release-init')}"]
    provision.main(["init", *given])
    assert not (root / RELEASE_KEY).exists()
    assert (root / RELEASE_KEY_PLACE).stat().st_mode & 0o777 == 0o600
    home = FederationHome.open(root)
    signature = home.signer().sign(b"bundle")
    verify(home, b"bundle", signature)
    home.tls()
    before = home.signer().certificate_pem
    provision.main(["renew", f"federation={root}"])
    assert FederationHome.open(root).signer().certificate_pem != before
    verify(FederationHome.open(root), b"bundle", signature)
    provision.main(["show", f"federation={root}"])
    assert PIN not in capsys.readouterr().out + (root / RELEASE_KEY_PLACE).read_text()


def test_openssl_checks_what_the_token_signed(token: Token, tmp_path: Path) -> None:
    home = initialise(tmp_path / "clinic", "clinic", "127.0.0.1:9443", release_key=token.uri("release-openssl"))
    (tmp_path / "content").write_bytes(b"bundle")
    (tmp_path / "signature").write_bytes(home.signer().sign(b"bundle"))
    key = subprocess.run(
        ["openssl", "x509", "-in", str(home.root / "release.crt"), "-pubkey", "-noout"],
        check=True,
        capture_output=True,
    ).stdout
    (tmp_path / "key.pem").write_bytes(key)
    given = ["-verify", str(tmp_path / "key.pem"), "-signature", str(tmp_path / "signature"), str(tmp_path / "content")]
    assert (
        b"Verified OK" in subprocess.run(["openssl", "dgst", "-sha384", *given], check=True, capture_output=True).stdout
    )


def test_a_key_moves_into_the_token(token: Token, tmp_path: Path) -> None:
    home = initialise(tmp_path / "clinic", "clinic", "127.0.0.1:9443")
    before = home.signer()
    uri = token.uri("release-moved")
    provision.main(["renew", f"federation={home.root}", f"release_key={uri}"])
    assert not (home.root / RELEASE_KEY).exists()
    after = FederationHome.open(home.root).signer()
    assert after.certificate_pem != before.certificate_pem
    verify(FederationHome.open(home.root), b"x", after.sign(b"x"))
    with pytest.raises(UsageError, match="is the federation's"):
        provision.main(["renew", f"site={tmp_path}", f"release_key={uri}"])


def test_a_move_that_was_stopped_says_what_to_do(token: Token, tmp_path: Path) -> None:
    home = initialise(tmp_path / "clinic", "clinic", "127.0.0.1:9443")
    kept = (home.root / RELEASE_KEY).read_bytes()
    renew_federation(home.root, release_key=token.uri("release-stopped"))
    pki.save_key(home.root / RELEASE_KEY, pki.parse_key(kept, "kept"))
    for refused in (FederationHome.open(home.root).signer, lambda: renew_federation(home.root)):
        with pytest.raises(ProvisionError, match=r"holds both release\.key and release\.pkcs11.*provision renew"):
            refused()
    (home.root / RELEASE_KEY_PLACE).unlink()
    with pytest.raises(ProvisionError, match=r"is not for the key.*provision renew"):
        FederationHome.open(home.root).signer()
    renew_federation(home.root)
    verify(FederationHome.open(home.root), b"x", FederationHome.open(home.root).signer().sign(b"x"))


def test_without_its_token_a_federation_opens_and_does_not_sign(token: Token, tmp_path: Path) -> None:
    home = initialise(tmp_path / "clinic", "clinic", "127.0.0.1:9443", release_key=token.uri("release-gone"))
    (home.root / RELEASE_KEY_PLACE).write_text(token.uri("release-none"))
    opened = FederationHome.open(home.root)
    opened.tls()
    with pytest.raises(EncryptionError, match="holds no such key"):
        opened.signer()
    (home.root / RELEASE_KEY_PLACE).write_text(token.uri("release-other"))
    initialise(tmp_path / "other", "other", "127.0.0.1:9443", release_key=token.uri("release-other"))
    with pytest.raises(ProvisionError, match="is not for the key"):
        opened.signer()
    (home.root / RELEASE_KEY_PLACE).unlink()
    with pytest.raises(ProvisionError, match=r"release\.key is missing"):
        FederationHome.open(home.root)


@pytest.mark.parametrize("uri", ["pkcs11:token=a", "release.key", "pkcs11:token=a;object=b?pin-value=4711"])
def test_a_wrong_uri_leaves_no_federation_behind(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        initialise(tmp_path / "clinic", "clinic", "127.0.0.1:9443", release_key=uri)
    assert not list(tmp_path.iterdir())
    assert shutil.which("openssl")
