"""Whose signature is believed: real certificates from a federation on disk, as provisioned."""

import datetime as dt

import pytest

from fedclaw.errors import ProvisionError, SecureAggregationError
from fedclaw.identity import pki
from fedclaw.identity.provisioning import accept, approve, initialise, request_site
from fedclaw.identity.site_home import SiteKeys
from fedclaw.privacy.secure_aggregation import CertificateVerifier, ServerSession, SiteSession, local_identities
from fedclaw.privacy.secure_aggregation.keys import KEYS_PURPOSE, SURVIVORS_PURPOSE
from tests.privacy.secure_aggregation.rehearsal import identities, parameters

MESSAGE = b"the survivors are a, b and c"


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> SiteKeys:
    root = tmp_path_factory.mktemp("federation")
    home = initialise(root / "federation", "heart", "127.0.0.1:9443")
    site = root / "hospital-a"
    accept(site, approve(home.root, request_site(site, home.root / "federation.json", "hospital-a")))
    return SiteKeys.open(site)


def check(verifier: CertificateVerifier, member: SiteKeys, site: str = "hospital-a", **more: object) -> None:
    plain: dict[str, object] = {
        "certificate": pki.pem_of(member.certificate),
        "purpose": KEYS_PURPOSE,
        "message": MESSAGE,
        "signature": member.sign(KEYS_PURPOSE, MESSAGE),
    }
    verifier.check(site, **(plain | more))  # type: ignore[arg-type]


def test_a_member_is_believed(member: SiteKeys) -> None:
    verifier = CertificateVerifier(member.descriptor)
    check(verifier, member)
    check(verifier, member)


def test_a_signature_is_for_one_purpose_and_message(member: SiteKeys) -> None:
    verifier = CertificateVerifier(member.descriptor)
    for change in ({"purpose": SURVIVORS_PURPOSE}, {"message": MESSAGE + b"."}, {"signature": b"junk"}):
        with pytest.raises(SecureAggregationError, match="signature of hospital-a"):
            check(verifier, member, **change)
    with pytest.raises(ProvisionError):
        pki.check_signature(
            member.certificate, KEYS_PURPOSE, MESSAGE, member.sign(SURVIVORS_PURPOSE, MESSAGE), "hospital-a"
        )


def test_a_certificate_is_for_one_site(member: SiteKeys) -> None:
    verifier = CertificateVerifier(member.descriptor)
    for _ in range(2):
        with pytest.raises(SecureAggregationError, match="sent for hospital-b belongs to hospital-a"):
            check(verifier, member, "hospital-b")


def test_another_ca_of_the_same_name(member: SiteKeys) -> None:
    _, verifier = local_identities("heart", [])
    with pytest.raises(SecureAggregationError, match="was not issued by this federation's CA"):
        check(verifier, member)


def test_a_certificate_that_is_not_a_sites(member: SiteKeys) -> None:
    verifier = CertificateVerifier(member.descriptor)
    with pytest.raises(SecureAggregationError, match="does not say what it may be used for"):
        check(verifier, member, certificate=member.descriptor.ca_certificate.encode())
    with pytest.raises(SecureAggregationError, match="is not a PEM certificate"):
        check(verifier, member, certificate=b"junk")


def test_an_expired_certificate(member: SiteKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = CertificateVerifier(member.descriptor)
    check(verifier, member)
    later = pki.now() + dt.timedelta(days=pki.LEAF_DAYS + 1)
    monkeypatch.setattr(pki, "now", lambda: later)
    with pytest.raises(SecureAggregationError, match=r"sent for hospital-a expired on .*hospital-a has to renew it"):
        check(verifier, member)


def test_a_revoked_certificate(member: SiteKeys) -> None:
    verifier = CertificateVerifier(member.descriptor, revoked=[member.certificate.serial_number])
    with pytest.raises(SecureAggregationError, match="sent for hospital-a is revoked"):
        check(verifier, member)


def test_keys_signed_by_a_site_from_disk(member: SiteKeys) -> None:
    given = parameters(3, sites=("hospital-a", "site-b", "site-c"))
    verifier = CertificateVerifier(member.descriptor)
    server = ServerSession(given, verifier)
    server.add_advertisement(SiteSession(given, "hospital-a", member, verifier).advertise())
    stranger = identities()[0]["site-b"]
    with pytest.raises(SecureAggregationError, match="was not issued by this federation's CA"):
        server.add_advertisement(SiteSession(given, "site-b", stranger, verifier).advertise())
