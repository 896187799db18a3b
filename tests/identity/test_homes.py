"""Opening a federation directory and a site directory: what is missing or wrong is named, with what to run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from fedclaw.errors import ProvisionError
from fedclaw.identity import pki
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.provisioning import initialise, request_site, revoke
from fedclaw.identity.seal import SUITES, Binding, SealSuite
from fedclaw.identity.site_home import SiteKeys

FILES = (
    "federation.json",
    "ca.crt",
    "server.crt",
    "server.key",
    "seal.key",
    "release.crt",
    "release.key",
    "revoked.crl",
)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(home: FederationHome, file: str) -> None:
    (home.root / file).unlink()
    with pytest.raises(ProvisionError, match=f"{file} is missing"):
        FederationHome.open(home.root)


def test_a_server_needs_no_ca_key(home: FederationHome) -> None:
    (home.root / "ca.key").unlink()
    FederationHome.open(home.root).tls()


def test_not_a_federation(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match=r"is not a federation directory; .*provision init"):
        FederationHome.open(tmp_path / "nothing")


@pytest.mark.parametrize("file", [file for file in FILES if file != "federation.json"])
def test_damage_is_found_before_use(home: FederationHome, file: str) -> None:
    (home.root / file).write_bytes(b"-----BEGIN JUNK-----\n")
    with pytest.raises(ProvisionError, match=file):
        use_everything(home.root)


@pytest.mark.parametrize("file", [file for file in FILES if file not in {"federation.json", "ca.crt"}])
def test_files_of_another_federation_are_refused(home: FederationHome, tmp_path: Path, file: str) -> None:
    other = initialise(tmp_path / "other", "heart", "127.0.0.1:9443")
    shutil.copy(other.root / file, home.root / file)
    with pytest.raises(ProvisionError, match=file.replace("key", "(key|crt)")):
        use_everything(home.root)


def test_another_ca_certificate_is_refused(home: FederationHome, tmp_path: Path) -> None:
    other = initialise(tmp_path / "other", "heart", "127.0.0.1:9443")
    shutil.copy(other.root / "ca.crt", home.root / "ca.crt")
    with pytest.raises(ProvisionError, match="is not the CA that"):
        FederationHome.open(home.root)


def use_everything(root: Path) -> None:
    home = FederationHome.open(root)
    home.tls()
    home.signer()
    home.opener()


@pytest.mark.parametrize("file", ["server.key", "seal.key", "release.key"])
def test_keys_that_others_can_read_are_refused(home: FederationHome, file: str) -> None:
    (home.root / file).chmod(0o640)
    with pytest.raises(ProvisionError, match=rf"{file}.*mode 0640.*chmod 600"):
        use_everything(home.root)


def test_expired_server_certificate_names_the_command(home: FederationHome, days_pass: Callable[[float], None]) -> None:
    days_pass(91)
    opened = FederationHome.open(home.root)
    for use in (opened.tls, opened.signer):
        with pytest.raises(ProvisionError, match=r"expired on .* run: python -m fedclaw.provision renew federation="):
            use()


def test_server_and_release_certificates_cannot_be_swapped(home: FederationHome) -> None:
    for suffix in ("crt", "key"):
        shutil.copy(home.root / f"release.{suffix}", home.root / f"server.{suffix}")
    with pytest.raises(ProvisionError, match="not a server certificate"):
        home.tls()


@pytest.mark.parametrize("suite", SUITES)
def test_site_seals_federation_opens(tmp_path: Path, suite: SealSuite, home: FederationHome, site: Path) -> None:
    if suite != home.descriptor.seal_suite:
        home = initialise(tmp_path / "quantum", "heart", "127.0.0.1:9443", suite)
    sealer = home.descriptor.sealer() if suite != "x25519" else SiteKeys.open(site).sealer()
    binding = Binding("heart", 1, "1", "m", "hospital-a")
    sealed = sealer.seal([b"update"], binding)
    stream = home.opener().open(sealed.header, binding, sealed.plain_size)
    for segment in sealed.segments:
        stream.feed(segment)
    assert bytes(stream.finish()) == b"update"


class TestRevocation:
    def test_follows_the_file(self, home: FederationHome, site: Path) -> None:
        serial = SiteKeys.open(site).certificate.serial_number
        assert not home.is_revoked(serial)
        revoke(home.root, "hospital-a")
        assert home.is_revoked(serial)
        assert not home.is_revoked(serial + 1)

    def test_missing_list_is_an_error(self, home: FederationHome) -> None:
        home.is_revoked(1)
        (home.root / "revoked.crl").unlink()
        with pytest.raises(ProvisionError, match=r"revoked\.crl is missing"):
            home.is_revoked(1)

    @pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"])
    def test_damaged_list_is_an_error_each_time(self, home: FederationHome, content: bytes) -> None:
        good = (home.root / "revoked.crl").read_bytes()
        (home.root / "revoked.crl").write_bytes(content)
        for _ in range(2):
            with pytest.raises(ProvisionError, match="damaged or not signed"):
                home.is_revoked(1)
        (home.root / "revoked.crl").write_bytes(good)
        assert not home.is_revoked(1)

    def test_tampered_list_is_an_error(self, home: FederationHome, site: Path) -> None:
        """Somebody takes a name off the list, and signs it with a CA of their own that has the same name."""
        revoke(home.root, "hospital-a")
        key = pki.new_key()
        forged = pki.new_crl(pki.new_ca("heart", key), key, (), 9)
        (home.root / "revoked.crl").write_bytes(pki.pem_of(forged))
        with pytest.raises(ProvisionError, match="not signed by this federation's CA"):
            home.is_revoked(SiteKeys.open(site).certificate.serial_number)
        with pytest.raises(ProvisionError, match="not signed by this federation's CA"):
            revoke(home.root, "hospital-a")

    def test_flipped_byte_is_an_error(self, home: FederationHome, site: Path) -> None:
        revoke(home.root, "hospital-a")
        crl = x509.load_pem_x509_crl((home.root / "revoked.crl").read_bytes())
        der = bytearray(crl.public_bytes(pki.Encoding.DER))
        position = der.index(SiteKeys.open(site).certificate.serial_number.to_bytes(20, "big").lstrip(b"\0"))
        der[position + 3] ^= 1
        forged = x509.load_der_x509_crl(bytes(der))
        (home.root / "revoked.crl").write_bytes(pki.pem_of(forged))
        with pytest.raises(ProvisionError, match="damaged or not signed"):
            FederationHome.open(home.root)


class TestSite:
    def test_opens(self, site: Path) -> None:
        keys = SiteKeys.open(site)
        assert keys.site_name == "hospital-a"
        assert keys.descriptor.name == "heart"
        assert keys.tls().certificate == (site / "keys" / "site.crt").read_bytes()
        assert keys.tls().ca == keys.descriptor.ca_certificate.encode()
        assert "PRIVATE" not in repr(keys) + repr(keys.tls())

    @pytest.mark.parametrize("file", ["federation.json", "keys/site.crt", "keys/site.key"])
    def test_missing_files_are_named(self, site: Path, file: str) -> None:
        (site / file).unlink()
        with pytest.raises(ProvisionError, match=f"{file} is missing"):
            SiteKeys.open(site)

    def test_a_site_that_has_not_joined_is_told_how(self, home: FederationHome, tmp_path: Path) -> None:
        root = tmp_path / "b"
        root.mkdir()
        with pytest.raises(ProvisionError, match=r"run: python -m fedclaw\.provision request site="):
            SiteKeys.open(root)
        request_site(root, home.root / "federation.json", "b")
        with pytest.raises(ProvisionError, match=r"site\.csr to the coordinator, then run: .* install site="):
            SiteKeys.open(root)

    def test_not_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ProvisionError, match="not a site directory"):
            SiteKeys.open(tmp_path / "x")

    def test_expired_names_the_command(self, site: Path, days_pass: Callable[[float], None]) -> None:
        days_pass(91)
        with pytest.raises(ProvisionError, match=r"expired on .*run: python -m fedclaw\.provision renew site="):
            SiteKeys.open(site)

    def test_readable_key(self, site: Path) -> None:
        (site / "keys" / "site.key").chmod(0o644)
        with pytest.raises(ProvisionError, match="chmod 600"):
            SiteKeys.open(site)

    def test_another_key(self, site: Path) -> None:
        (site / "keys" / "site.key").write_bytes(pki.key_pem(pki.new_key()))
        with pytest.raises(ProvisionError, match=r"is not for the key in"):
            SiteKeys.open(site)

    def test_descriptor_of_another_ca(self, site: Path, tmp_path: Path) -> None:
        other = initialise(tmp_path / "other", "heart", "127.0.0.1:9443")
        shutil.copy(other.root / "federation.json", site / "federation.json")
        with pytest.raises(ProvisionError, match="was not issued by this federation's CA"):
            SiteKeys.open(site)

    def test_server_certificate_is_no_site_certificate(self, home: FederationHome, site: Path) -> None:
        shutil.copy(home.root / "server.crt", site / "keys" / "site.crt")
        with pytest.raises(ProvisionError, match="not a site certificate"):
            SiteKeys.open(site)

    def test_certificate_must_be_for_the_named_federation(self, home: FederationHome, site: Path) -> None:
        key = pki.load_key(site / "keys" / "site.key", "")
        ca_key = pki.load_key(home.root / "ca.key", "")
        wrong = pki.issue_site(home.ca, ca_key, key.public_key(), "lung", "hospital-a", 9)
        (site / "keys" / "site.crt").write_bytes(pki.pem_of(wrong))
        with pytest.raises(ProvisionError, match="not for a site of the federation 'heart'"):
            SiteKeys.open(site)
