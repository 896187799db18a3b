"""What there is in a federation or site directory, for people: keys, certificates, until when, revoked or not.

Shows expired certificates too, so it reads the parts itself instead of opening a home for use.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509

from fedclaw.identity import federation_home as home_files
from fedclaw.identity import pki
from fedclaw.identity.descriptor import DESCRIPTOR_FILE, Descriptor, load_descriptor
from fedclaw.identity.federation_home import FederationHome, load_records
from fedclaw.identity.provisioning import site_certificate_path
from fedclaw.identity.site_home import SITE_CERTIFICATE, SITE_KEY, SITE_REQUEST, check_site_certificate, read_request

Role = Literal["CA", "server", "release", "site"]
State = Literal["valid", "expires soon", "expired", "revoked", "waiting"]


@dataclass(frozen=True)
class KeyStatus:
    """One key with its certificate. `days` until it expires; None while a request waits for its certificate."""

    role: Role
    name: str
    fingerprint: str
    days: float | None
    expires: str
    state: State
    remedy: str = ""
    """What to run, if something is to be done."""


@dataclass(frozen=True)
class Overview:
    """A federation as the coordinator or a site sees it."""

    descriptor: Descriptor
    ca_fingerprint: str
    entries: tuple[KeyStatus, ...]


def federation_overview(root: Path) -> Overview:
    """What the coordinator has. Raises ProvisionError if the directory is damaged."""
    home = FederationHome.open(root)
    renew = f"python -m fedclaw.provision renew federation={root}"
    entries = [_entry("CA", pki.ca_name(home.name), home.ca, False, "")]
    leaves: tuple[tuple[Role, str, pki.Purpose], ...] = (
        ("server", home_files.SERVER_CERTIFICATE, pki.Purpose.SERVER),
        ("release", home_files.RELEASE_CERTIFICATE, pki.Purpose.RELEASE),
    )
    for role, file, purpose in leaves:
        certificate = pki.load_certificate(root / file, f"the {role} certificate")
        pki.check_leaf(certificate, home.ca, purpose, str(root / file), renew, expired_ok=True)
        entries.append(_entry(role, pki.common_name(certificate), certificate, False, renew))
    for record in load_records(root / home_files.SITES):
        path = site_certificate_path(root, record.name)
        certificate = pki.load_certificate(path, f"the certificate of {record.name}")
        check_site_certificate(certificate, home.descriptor, str(path), "", expired_ok=True)
        revoked = home.is_revoked(certificate.serial_number)
        entries.append(_entry("site", record.name, certificate, revoked, "the site runs provision renew"))
    return Overview(home.descriptor, _ca_fingerprint(home.descriptor), tuple(entries))


def site_overview(root: Path) -> Overview:
    """What a site has; it cannot know whether it is revoked. Raises ProvisionError if the directory is damaged."""
    descriptor = load_descriptor(root / DESCRIPTOR_FILE)
    path = root / SITE_CERTIFICATE
    key = pki.load_key(root / SITE_KEY, "the site's key")
    if path.exists():
        certificate = pki.load_certificate(path, "the site's certificate")
        name = check_site_certificate(certificate, descriptor, str(path), "", expired_ok=True)
        entry = _entry("site", name, certificate, False, f"python -m fedclaw.provision renew site={root}")
        if not pki.belongs(certificate, key):
            entry = _waiting(name, key, f"python -m fedclaw.provision install site={root} certificate=FILE")
    else:
        request = read_request(root / SITE_REQUEST, descriptor.name)
        remedy = f"send {root / SITE_REQUEST} to the coordinator, install what comes back"
        entry = _waiting(request.site, key, remedy)
    return Overview(descriptor, _ca_fingerprint(descriptor), (entry,))


def _waiting(name: str, key: pki.PrivateKey, remedy: str) -> KeyStatus:
    return KeyStatus("site", name, pki.fingerprint(key.public_key()), None, "", "waiting", remedy)


def _entry(
    role: Role,
    name: str,
    certificate: x509.Certificate,
    revoked: bool,
    remedy: str,
) -> KeyStatus:
    days = pki.days_left(certificate)
    state: State = "valid"
    if revoked:
        state, remedy = "revoked", ""
    elif days <= 0:
        state = "expired"
    elif days <= pki.WARN_DAYS:
        state = "expires soon"
    else:
        remedy = ""
    fingerprint = pki.fingerprint(pki.p384_key(certificate, name))
    return KeyStatus(role, name, fingerprint, days, f"{certificate.not_valid_after_utc:%Y-%m-%d}", state, remedy)


def _ca_fingerprint(descriptor: Descriptor) -> str:
    return pki.fingerprint(pki.p384_key(descriptor.ca, "the CA"))
