"""A federation's life: made, joined, renewed, revoked; and what must not happen on the way."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from fedclaw.errors import ProvisionError, UsageError
from fedclaw.identity import federation_home, pki, provisioning
from fedclaw.identity.descriptor import Descriptor
from fedclaw.identity.federation_home import FederationHome, load_record
from fedclaw.identity.overview import federation_overview, site_overview
from fedclaw.identity.provisioning import (
    accept,
    approve,
    initialise,
    renew_federation,
    renew_site,
    request_site,
    revoke,
)
from fedclaw.identity.site_home import SiteKeys, encode_request, read_request


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def joined(home: FederationHome, root: Path, name: str) -> Path:
    accept(root, approve(home.root, request_site(root, home.root / "federation.json", name)))
    return root


class TestInitialise:
    def test_modes(self, home: FederationHome) -> None:
        assert mode(home.root) == 0o700
        keys = {path.name for path in home.root.glob("*.key")}
        assert keys == {"ca.key", "server.key", "seal.key", "release.key"}
        assert {mode(home.root / key) for key in keys} == {0o600}

    def test_keys_are_private_before_they_hold_a_byte(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written: dict[str, int] = {}
        real = provisioning.write_atomic

        def watching(path: Path, content: bytes, file_mode: int = 0o644) -> None:
            written[path.name] = file_mode
            real(path, content, file_mode)

        for module in (provisioning, federation_home):
            monkeypatch.setattr(module, "write_atomic", watching)
        monkeypatch.setattr("fedclaw.identity.pki.write_atomic", watching)
        initialise(tmp_path / "f", "heart", "127.0.0.1:9443")
        assert {name for name, file_mode in written.items() if file_mode == 0o600} == {
            "ca.key",
            "server.key",
            "seal.key",
            "release.key",
        }

    def test_only_private_files_hold_private_keys(self, home: FederationHome, site: Path) -> None:
        seal_key = json.loads((home.root / "seal.key").read_text())["private_key"].encode()
        for root in (home.root, site):
            for name, content in everything(root).items():
                secret = b"PRIVATE KEY" in content or seal_key in content
                assert secret == name.endswith(".key"), name

    def test_never_overwrites(self, home: FederationHome) -> None:
        before = everything(home.root)
        with pytest.raises(ProvisionError, match="never overwritten"):
            initialise(home.root, "lung", "127.0.0.1:1")
        assert everything(home.root) == before

    @pytest.mark.parametrize("kind", ["file", "directory with a file", "dangling link"])
    def test_never_replaces_anything(self, tmp_path: Path, kind: str) -> None:
        target = tmp_path / "f"
        if kind == "file":
            target.write_text("mine")
        elif kind == "dangling link":
            target.symlink_to(tmp_path / "nowhere")
        else:
            target.mkdir()
            (target / "note").write_text("mine")
        with pytest.raises(ProvisionError, match="exists already"):
            initialise(target, "heart", "127.0.0.1:1")

    def test_takes_an_empty_directory(self, tmp_path: Path) -> None:
        (tmp_path / "f").mkdir()
        assert initialise(tmp_path / "f", "heart", "127.0.0.1:1").name == "heart"

    def test_interrupted_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> Descriptor:
            raise KeyboardInterrupt

        monkeypatch.setattr(provisioning, "encode_descriptor", interrupt)
        with pytest.raises(KeyboardInterrupt):
            initialise(tmp_path / "f", "heart", "127.0.0.1:1")
        assert list(tmp_path.iterdir()) == []

    def test_an_impossible_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ProvisionError, match="cannot be made"):
            initialise(tmp_path / "file" / "f", "heart", "127.0.0.1:1")

    @pytest.mark.parametrize(("name", "address"), [("../x", "127.0.0.1:1"), ("heart", "nowhere"), ("", "a:1")])
    def test_wrong_use(self, tmp_path: Path, name: str, address: str) -> None:
        with pytest.raises(UsageError):
            initialise(tmp_path / "f", name, address)
        assert list(tmp_path.iterdir()) == []


class TestJoining:
    def test_modes_at_the_site(self, site: Path) -> None:
        assert mode(site / "keys") == 0o700
        assert mode(site / "keys" / "site.key") == 0o600

    def test_nothing_but_the_certificate_comes_from_the_coordinator(self, home: FederationHome, site: Path) -> None:
        site_key = (site / "keys" / "site.key").read_bytes()
        assert all(site_key not in content for content in everything(home.root).values())
        assert (home.root / "sites" / "hospital-a.crt").read_bytes() == (site / "keys" / "site.crt").read_bytes()

    def test_requesting_again_keeps_the_key(self, home: FederationHome, tmp_path: Path) -> None:
        root = tmp_path / "b"
        request_site(root, home.root / "federation.json", "b")
        key = (root / "keys" / "site.key").read_bytes()
        path = request_site(root, home.root / "federation.json", "b2")
        assert (root / "keys" / "site.key").read_bytes() == key
        assert read_request(path, "heart").site == "b2"

    def test_a_member_does_not_request_again(self, home: FederationHome, site: Path) -> None:
        before = everything(site)
        with pytest.raises(ProvisionError, match="has a certificate already"):
            request_site(site, home.root / "federation.json", "hospital-a")
        assert everything(site) == before

    def test_descriptor_of_another_ca_is_refused(self, home: FederationHome, tmp_path: Path) -> None:
        request_site(tmp_path / "b", home.root / "federation.json", "b")
        other = initialise(tmp_path / "other", "heart", "127.0.0.1:9443")
        with pytest.raises(ProvisionError, match="another federation"):
            request_site(tmp_path / "b", other.root / "federation.json", "b")

    def test_ca_fingerprint(self, home: FederationHome, tmp_path: Path) -> None:
        right = pki.fingerprint(pki.p384_key(home.ca, ""))
        descriptor = home.root / "federation.json"
        with pytest.raises(ProvisionError, match="not by the one whose fingerprint was given"):
            request_site(tmp_path / "b", descriptor, "b", "0000-" + right[5:])
        assert not (tmp_path / "b").exists()
        request_site(tmp_path / "b", descriptor, "b", right.upper().replace("-", " "))

    def test_key_fingerprint(self, home: FederationHome, tmp_path: Path) -> None:
        path = request_site(tmp_path / "b", home.root / "federation.json", "b")
        right = read_request(path, "heart").fingerprint
        with pytest.raises(ProvisionError, match="do not approve it"):
            approve(home.root, path, fingerprint=right[:-1])
        assert list((home.root / "sites").iterdir()) == []
        approve(home.root, path, fingerprint=right)

    def test_request_for_another_federation_is_refused(self, home: FederationHome, tmp_path: Path) -> None:
        other = initialise(tmp_path / "other", "lung", "127.0.0.1:9443")
        path = request_site(tmp_path / "b", other.root / "federation.json", "b")
        with pytest.raises(ProvisionError, match="not for the federation 'heart'"):
            approve(home.root, path)

    def test_the_name_of_another_is_refused(self, home: FederationHome, site: Path, tmp_path: Path) -> None:
        before = everything(home.root)
        path = request_site(tmp_path / "impostor", home.root / "federation.json", "hospital-a")
        with pytest.raises(ProvisionError, match="belongs to another key"):
            approve(home.root, path)
        assert everything(home.root) == before

    def test_a_certificate_for_another_key_is_refused(self, home: FederationHome, tmp_path: Path) -> None:
        one = approve(home.root, request_site(tmp_path / "b", home.root / "federation.json", "b"))
        request_site(tmp_path / "c", home.root / "federation.json", "b")
        with pytest.raises(ProvisionError, match="is not for this site's key"):
            accept(tmp_path / "c", one)
        assert not (tmp_path / "c" / "keys" / "site.crt").exists()

    def test_a_certificate_for_another_name_is_refused(self, home: FederationHome, tmp_path: Path) -> None:
        first = request_site(tmp_path / "b", home.root / "federation.json", "b")
        certificate = approve(home.root, first)
        request_site(tmp_path / "b", home.root / "federation.json", "c")
        with pytest.raises(ProvisionError, match="is for the site 'b'; this one asked to be 'c'"):
            accept(tmp_path / "b", certificate)

    def test_a_certificate_of_another_ca_is_refused(self, home: FederationHome, tmp_path: Path) -> None:
        request = request_site(tmp_path / "b", home.root / "federation.json", "b")
        other = initialise(tmp_path / "other", "heart", "127.0.0.1:9443")
        with pytest.raises(ProvisionError, match="was not issued by this federation's CA"):
            accept(tmp_path / "b", approve(other.root, request))

    def test_the_federation_needs_its_ca_key(self, home: FederationHome, tmp_path: Path) -> None:
        request = request_site(tmp_path / "b", home.root / "federation.json", "b")
        other = initialise(tmp_path / "other", "heart", "127.0.0.1:9443")
        shutil.copy(other.root / "ca.key", home.root / "ca.key")
        with pytest.raises(ProvisionError, match="is not the key of"):
            approve(home.root, request)
        (home.root / "ca.key").unlink()
        with pytest.raises(ProvisionError, match=r"ca\.key is missing"):
            approve(home.root, request)


class TestRenewal:
    def test_same_key(self, home: FederationHome, site: Path, days_pass: Callable[[float], None]) -> None:
        before = SiteKeys.open(site)
        days_pass(91)
        with pytest.raises(ProvisionError, match="expired"):
            SiteKeys.open(site)
        accept(site, approve(home.root, renew_site(site)))
        after = SiteKeys.open(site)
        assert after.tls().key == before.tls().key
        assert after.certificate.serial_number != before.certificate.serial_number

    def test_rotated_key(self, home: FederationHome, site: Path) -> None:
        before = SiteKeys.open(site)
        request = renew_site(site, rotate=True)
        assert mode(site / "keys" / "next.key") == 0o600
        assert SiteKeys.open(site).tls() == before.tls()
        accept(site, approve(home.root, request))
        assert SiteKeys.open(site).tls().key != before.tls().key
        assert not (site / "keys" / "next.key").exists()
        accept(site, approve(home.root, renew_site(site, rotate=True)))

    def test_rotation_interrupted_at_the_site(
        self, home: FederationHome, site: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        certificate = approve(home.root, renew_site(site, rotate=True))

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stop_at(Path.replace, "next.key", interrupt))
            with pytest.raises(KeyboardInterrupt):
                accept(site, certificate)
        with pytest.raises(ProvisionError, match="install the certificate again"):
            SiteKeys.open(site)
        assert site_overview(site).entries[0].state == "waiting"
        accept(site, certificate)
        SiteKeys.open(site)

    def test_rotation_begun_then_not_wanted(self, home: FederationHome, site: Path) -> None:
        renew_site(site, rotate=True)
        accept(site, approve(home.root, renew_site(site)))
        assert not (site / "keys" / "next.key").exists()
        SiteKeys.open(site)

    def test_consent_of_an_older_key_is_not_enough(self, home: FederationHome, site: Path, tmp_path: Path) -> None:
        old = pki.parse_key((site / "keys" / "site.key").read_bytes(), "")
        accept(site, approve(home.root, renew_site(site, rotate=True)))
        stolen = tmp_path / "stolen.csr"
        stolen.write_bytes(encode_request(pki.new_key(), "heart", "hospital-a", old_key=old))
        with pytest.raises(ProvisionError, match="belongs to another key"):
            approve(home.root, stolen)

    def test_a_site_without_certificate_has_nothing_to_renew(self, home: FederationHome, tmp_path: Path) -> None:
        request_site(tmp_path / "b", home.root / "federation.json", "b")
        with pytest.raises(ProvisionError, match="a new site runs request"):
            renew_site(tmp_path / "b")

    def test_federation(self, home: FederationHome, days_pass: Callable[[float], None]) -> None:
        keys = {name: (home.root / name).read_bytes() for name in ("server.key", "release.key", "federation.json")}
        days_pass(91)
        with pytest.raises(ProvisionError, match="expired"):
            home.tls()
        renewed = renew_federation(home.root, days=30)
        assert 29 < pki.days_left(x509.load_pem_x509_certificate(renewed.tls().certificate)) <= 30
        renewed.signer()
        assert keys == {name: (home.root / name).read_bytes() for name in keys}


def stop_at(real: Callable[[Path, Path], Path], name: str, stop: Callable[..., None]) -> Callable[[Path, Path], Path]:
    def replace(self: Path, target: Path) -> Path:
        if self.name == name:
            stop()
        return real(self, target)

    return replace


class TestRevocation:
    def test_every_certificate_of_the_site_is_revoked(self, home: FederationHome, site: Path, tmp_path: Path) -> None:
        first = SiteKeys.open(site).certificate.serial_number
        accept(site, approve(home.root, renew_site(site, rotate=True)))
        second = SiteKeys.open(site).certificate.serial_number
        other = SiteKeys.open(joined(home, tmp_path / "b", "b")).certificate.serial_number
        assert revoke(home.root, "hospital-a") == 2
        assert [home.is_revoked(serial) for serial in (first, second, other)] == [True, True, False]

    def test_twice_is_once(self, home: FederationHome, site: Path) -> None:
        assert revoke(home.root, "hospital-a") == 1
        crl = (home.root / "revoked.crl").read_bytes()
        assert revoke(home.root, "hospital-a") == 0
        assert (home.root / "revoked.crl").read_bytes() == crl

    def test_adds_to_the_list(self, home: FederationHome, site: Path, tmp_path: Path) -> None:
        joined(home, tmp_path / "b", "b")
        revoke(home.root, "hospital-a")
        revoke(home.root, "b")
        crl = x509.load_pem_x509_crl((home.root / "revoked.crl").read_bytes())
        assert len(list(crl)) == 2
        assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 3

    def test_interrupted_after_the_list_is_finished_later(
        self, home: FederationHome, site: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(provisioning, "save_record", interrupt)
            with pytest.raises(KeyboardInterrupt):
                revoke(home.root, "hospital-a")
        assert home.is_revoked(SiteKeys.open(site).certificate.serial_number)
        revoke(home.root, "hospital-a")
        record = load_record(home.root / "sites", "hospital-a")
        assert record is not None
        assert record.revoked

    def test_a_certificate_that_was_never_handed_out_is_revoked_too(
        self, home: FederationHome, site: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Approve stops between the record and the file: the serial number is known all the same."""

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        request = renew_site(site)
        with monkeypatch.context() as patch:
            patch.setattr(provisioning, "write_atomic", interrupt)
            with pytest.raises(KeyboardInterrupt):
                approve(home.root, request)
        assert revoke(home.root, "hospital-a") == 2

    def test_unknown_site(self, home: FederationHome, site: Path) -> None:
        with pytest.raises(UsageError, match=r"no site called 'b' was ever approved; approved: hospital-a"):
            revoke(home.root, "b")
        with pytest.raises(UsageError, match="cannot be used"):
            revoke(home.root, "../b")

    def test_a_revoked_key_does_not_come_back(self, home: FederationHome, site: Path) -> None:
        revoke(home.root, "hospital-a")
        for rotate in (False, True):
            request = renew_site(site, rotate=rotate)
            right = read_request(request, "heart").fingerprint
            with pytest.raises(ProvisionError, match="was revoked; it cannot renew"):
                approve(home.root, request, fingerprint=right)

    def test_a_revoked_site_may_join_anew_with_a_new_key(self, home: FederationHome, site: Path) -> None:
        old = SiteKeys.open(site).certificate.serial_number
        revoke(home.root, "hospital-a")
        (site / "keys").rename(site / "keys.old")
        request = request_site(site, home.root / "federation.json", "hospital-a")
        with pytest.raises(ProvisionError, match="give it as fingerprint="):
            approve(home.root, request)
        accept(site, approve(home.root, request, fingerprint=read_request(request, "heart").fingerprint))
        assert home.is_revoked(old)
        assert not home.is_revoked(SiteKeys.open(site).certificate.serial_number)


class TestOverview:
    def test_states(self, home: FederationHome, site: Path, tmp_path: Path, days_pass: Callable[[float], None]) -> None:
        joined(home, tmp_path / "b", "b")
        revoke(home.root, "b")
        states = {entry.name: entry.state for entry in federation_overview(home.root).entries}
        assert states == {
            "heart federation CA": "valid",
            "127.0.0.1": "valid",
            "heart release": "valid",
            "hospital-a": "valid",
            "b": "revoked",
        }
        days_pass(80)
        assert {entry.state for entry in federation_overview(home.root).entries} == {"valid", "expires soon", "revoked"}
        assert site_overview(site).entries[0].state == "expires soon"
        assert "renew" in site_overview(site).entries[0].remedy
        days_pass(91)
        assert site_overview(site).entries[0].state == "expired"

    def test_waiting(self, home: FederationHome, tmp_path: Path) -> None:
        path = request_site(tmp_path / "b", home.root / "federation.json", "b")
        entry = site_overview(tmp_path / "b").entries[0]
        assert (entry.name, entry.state, entry.days) == ("b", "waiting", None)
        assert entry.fingerprint == read_request(path, "heart").fingerprint

    @pytest.mark.parametrize("content", ["", "{}", '{"name": "b", "certificates": []}'])
    def test_damaged_records(self, home: FederationHome, site: Path, content: str) -> None:
        (home.root / "sites" / "hospital-a.json").write_text(content)
        for use in (lambda: federation_overview(home.root), lambda: revoke(home.root, "hospital-a")):
            with pytest.raises(ProvisionError, match=r"hospital-a\.json is damaged"):
                use()
