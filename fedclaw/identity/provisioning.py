"""Making a federation and letting sites into it: what `python -m fedclaw.provision` runs.

    coordinator                                     site
    initialise -> federation.json  ------------->   request_site -> keys/site.csr
    approve    <--------------------------------    (the private key never leaves keys/)
               -> sites/NAME.crt   ------------->   accept

Every function either finishes or leaves what was there; a command that was interrupted can be run again.
"""

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509

from fedclaw.errors import ProvisionError, UsageError
from fedclaw.files import PRIVATE_MODE, sync_directory, write_atomic
from fedclaw.identity import federation_home as home_files
from fedclaw.identity import pki, seal
from fedclaw.identity.descriptor import DESCRIPTOR_FILE, Descriptor, encode_descriptor, load_descriptor
from fedclaw.identity.federation_home import (
    FederationHome,
    IssuedCertificate,
    SiteRecord,
    load_record,
    load_records,
    save_record,
    save_seal_key,
)
from fedclaw.identity.names import canonical_address, canonical_host, check_host, check_name, split_address
from fedclaw.identity.site_home import (
    NEXT_KEY,
    SITE_CERTIFICATE,
    SITE_KEY,
    SITE_REQUEST,
    SiteRequest,
    check_site_certificate,
    encode_request,
    read_request,
    renew_advice,
)
from fedclaw.identity.token_keys import SigningKey, TokenUri

logger = logging.getLogger(__name__)

_LOCK = ".lock"


def initialise(
    root: Path,
    name: str,
    address: str,
    seal_suite: seal.SealSuite = "x25519",
    days: int = pki.LEAF_DAYS,
    addresses: Sequence[str] = (),
    release_key: str | None = None,
) -> FederationHome:
    """Make a federation directory: CA, server and release certificates, seal key, descriptor, empty CRL.

    The directory appears whole or not at all, and is readable by its owner only. `addresses` are further names and IP
    addresses under which sites reach the server: its certificate is for them too. `release_key` is the PKCS#11 URI of
    the key that signs bundles, which is made in the token if it is not there; None: it is a file. Raises UsageError for
    a wrong name, address or URI, ProvisionError if `root` exists and holds anything, EncryptionError if a token fails.
    """
    _checked(check_name, name)
    address, others = _checked(canonical_address, address), [_checked(check_host, other) for other in addresses]
    if root.is_symlink() or (root.exists() and (not root.is_dir() or any(root.iterdir()))):
        raise ProvisionError(f"{root} exists already; a federation is never overwritten, choose another directory")
    in_token = None if release_key is None else _token_key(root, release_key)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
        try:
            _fill(draft, name, address, others, seal_suite, days, in_token)
            draft.rename(root)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        sync_directory(root.parent)
    except OSError as error:
        raise ProvisionError(f"{root} cannot be made: {error.strerror}") from error
    logger.debug("made the federation %s in %s", name, root)
    return FederationHome.open(root)


def request_site(site_root: Path, descriptor_path: Path, name: str, ca_fingerprint: str | None = None) -> Path:
    """Make the site's key and its request; returns the request file, which is what goes to the coordinator.

    With `ca_fingerprint`, as the coordinator read it out, a descriptor of any other CA is refused. Run again, it
    keeps the key that is there. Raises UsageError for a wrong name, ProvisionError if the site has a
    certificate already or belongs to another federation.
    """
    _checked(check_name, name)
    descriptor = load_descriptor(descriptor_path)
    found = pki.fingerprint(pki.p384_key(descriptor.ca, str(descriptor_path)))
    if ca_fingerprint is not None and _digits(ca_fingerprint) != _digits(found):
        raise ProvisionError(
            f"{descriptor_path} is signed by the CA {found}, not by the one whose fingerprint was given; do not use it"
        )
    if (site_root / SITE_CERTIFICATE).exists():
        raise ProvisionError(
            f"{site_root} has a certificate already; to renew it {renew_advice(site_root)}. "
            f"To join anew after a revocation, move {site_root / 'keys'} away first"
        )
    _adopt_descriptor(site_root, descriptor_path, descriptor)
    key_path = site_root / SITE_KEY
    key_path.parent.mkdir(parents=True, exist_ok=True)
    key_path.parent.chmod(0o700)
    if not key_path.exists():
        pki.save_key(key_path, pki.new_key())
    key = pki.load_key(key_path, "the site's key")
    write_atomic(site_root / SITE_REQUEST, encode_request(key, descriptor.name, name))
    return site_root / SITE_REQUEST


def approve(
    federation_root: Path, request_path: Path, days: int = pki.LEAF_DAYS, fingerprint: str | None = None
) -> Path:
    """Issue the certificate that a request asks for; returns the file to hand back to the site.

    With `fingerprint`, as the site read it out, any other key is refused. Raises ProvisionError if the request is not
    genuine, or its name belongs to another key that did not consent or was revoked. A revoked site comes back with
    a new key only, and only when its `fingerprint` is given.
    """
    with _coordinator(federation_root) as (home, ca_key):
        request = read_request(request_path, home.name)
        if fingerprint is not None and _digits(fingerprint) != _digits(request.fingerprint):
            raise ProvisionError(
                f"the request {request_path} is for the key {request.fingerprint}, not for the fingerprint that was "
                "given; do not approve it, ask the site how it reached you"
            )
        sites = home.root / home_files.SITES
        record = load_record(sites, request.site)
        if record is not None and record.revoked:
            _check_readmission(record, request, deliberate=fingerprint is not None)
        elif record is not None:
            _check_name_is_free(home.root, record, request)
        certificate = pki.issue_site(home.ca, ca_key, request.key, home.name, request.site, days)
        # The record first: a certificate that is not in it could not be revoked by name.
        save_record(sites, _with_certificate(record, request, certificate))
        path = site_certificate_path(home.root, request.site)
        write_atomic(path, pki.pem_of(certificate))
        logger.debug("approved %s until %s", request.site, f"{certificate.not_valid_after_utc:%Y-%m-%d}")
        return path


def accept(site_root: Path, approval: Path) -> Path:
    """Install the certificate that the coordinator sent; returns where it is now.

    Raises ProvisionError unless it is for this site's own key, for the name it asked for, and from its federation.
    """
    descriptor = load_descriptor(site_root / DESCRIPTOR_FILE)
    certificate = pki.load_certificate(approval, "the certificate to install")
    name = check_site_certificate(certificate, descriptor, str(approval), renew_advice(site_root))
    requested = read_request(site_root / SITE_REQUEST, descriptor.name).site
    if name != requested:
        raise ProvisionError(f"{approval} is for the site {name!r}; this one asked to be {requested!r}")
    next_key, key_path = site_root / NEXT_KEY, site_root / SITE_KEY
    rotated = next_key.exists() and pki.belongs(certificate, pki.load_key(next_key, "the site's new key"))
    if not rotated and not pki.belongs(certificate, pki.load_key(key_path, "the site's key")):
        raise ProvisionError(f"{approval} is not for this site's key; was it made from an older request?")
    write_atomic(site_root / SITE_CERTIFICATE, pki.pem_of(certificate))
    if rotated:
        # Interrupted here, the certificate does not fit site.key: running install again completes it.
        next_key.replace(key_path)
        sync_directory(key_path.parent)
    logger.debug("installed the certificate of %s", name)
    return site_root / SITE_CERTIFICATE


def renew_site(site_root: Path, rotate: bool = False) -> Path:
    """Make a request for a new certificate, for the same key or (`rotate`) a new one; returns the request file.

    The site goes on with what it has until the new certificate is installed. Raises ProvisionError.
    """
    descriptor = load_descriptor(site_root / DESCRIPTOR_FILE)
    path = site_root / SITE_CERTIFICATE
    certificate = pki.load_certificate(path, "the site's certificate; a new site runs request, not renew")
    name = check_site_certificate(certificate, descriptor, str(path), "", expired_ok=True)
    key = pki.load_key(site_root / SITE_KEY, "the site's key")
    next_key = site_root / NEXT_KEY
    if not rotate:
        next_key.unlink(missing_ok=True)
        content = encode_request(key, descriptor.name, name)
    else:
        if not next_key.exists():
            pki.save_key(next_key, pki.new_key())
        content = encode_request(pki.load_key(next_key, "the site's new key"), descriptor.name, name, old_key=key)
    write_atomic(site_root / SITE_REQUEST, content)
    return site_root / SITE_REQUEST


def renew_federation(
    root: Path, days: int = pki.LEAF_DAYS, addresses: Sequence[str] | None = None, release_key: str | None = None
) -> FederationHome:
    """New server and release certificates for the keys that are there. A running server takes them when it restarts.

    `addresses` are the further names and IP addresses that the server's is for; None: those that it is for now.
    `release_key` is the PKCS#11 URI of a key in a token that signs bundles from now on, in the place of the present
    one, whose file is removed; the key is made if it is not there. Raises UsageError for a wrong one, ProvisionError,
    EncryptionError if the token fails.
    """
    given = None if addresses is None else [_checked(check_host, other) for other in addresses]
    with _coordinator(root) as (home, ca_key):
        host = canonical_host(split_address(home.descriptor.address)[0])
        others = _present_names(root) if given is None else given
        server = pki.load_key(root / home_files.SERVER_KEY, "the server's key").public_key()
        in_token = None if release_key is None else _token_key(root, release_key)
        release = (in_token or home_files.load_release_key(root)).public_key()
        server_certificate = pki.issue_server(home.ca, ca_key, server, host, days, others)
        release_certificate = pki.issue_release(home.ca, ca_key, release, home.name, days)
        write_atomic(root / home_files.SERVER_CERTIFICATE, pki.pem_of(server_certificate))
        if in_token is not None:
            # Killed in between, there are two keys, or a certificate for the other one: an error says what to do.
            _save_token_key(root, in_token)
            (root / home_files.RELEASE_KEY).unlink(missing_ok=True)
        write_atomic(root / home_files.RELEASE_CERTIFICATE, pki.pem_of(release_certificate))
        logger.debug("renewed the server's and the release certificate of %s", home.name)
        return home


def revoke(federation_root: Path, name: str) -> int:
    """Revoke every certificate that the site `name` was ever given; returns how many were newly revoked.

    A running server notices by itself. Raises UsageError for a name that was never approved, ProvisionError.
    """
    _checked(check_name, name)
    with _coordinator(federation_root) as (home, ca_key):
        sites = home.root / home_files.SITES
        record = load_record(sites, name)
        if record is None:
            known = ", ".join(item.name for item in load_records(sites)) or "none"
            raise UsageError(f"no site called {name!r} was ever approved; approved: {known}")
        path = home.root / home_files.REVOKED
        crl = pki.parse_crl(pki.read_file(path, "the list of revoked sites"), home.ca, str(path))
        known_serials = {item.serial_number for item in crl}
        fresh = [serial for item in record.certificates if (serial := int(item.serial, 16)) not in known_serials]
        if fresh:
            entries = [*crl, *map(pki.revoked_entry, fresh)]
            number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            write_atomic(path, pki.pem_of(pki.new_crl(home.ca, ca_key, entries, number + 1)))
        save_record(sites, record.model_copy(update={"revoked": True}))
        logger.debug("revoked %s: %d certificates", name, len(fresh))
        return len(fresh)


def site_certificate_path(federation_root: Path, name: str) -> Path:
    """Where approve leaves the certificate of the site `name`."""
    return federation_root / home_files.SITES / f"{check_name(name)}.crt"


def _token_key(root: Path, uri: str) -> SigningKey:
    """The release key in a token, made there if there is none of that name."""
    key, made = SigningKey.open_or_create(TokenUri.parse(uri, root))
    logger.debug("%s the release key in the token", "made" if made else "found")
    return key


def _save_token_key(root: Path, key: SigningKey) -> None:
    write_atomic(root / home_files.RELEASE_KEY_PLACE, key.uri.text.encode() + b"\n", PRIVATE_MODE)


def _fill(
    root: Path,
    name: str,
    address: str,
    others: Sequence[str],
    seal_suite: seal.SealSuite,
    days: int,
    in_token: SigningKey | None,
) -> None:
    ca_key, server_key = pki.new_key(), pki.new_key()
    release_key = pki.new_key() if in_token is None else in_token
    ca = pki.new_ca(name, ca_key)
    seal_keys = seal.generate(seal_suite)
    host, _ = split_address(address)
    descriptor = Descriptor(
        name=name,
        address=address,
        ca_certificate=pki.pem_of(ca).decode(),
        seal_suite=seal_suite,
        seal_public_key=seal.encode_key(seal_keys.public),
    )
    for file, key in ((home_files.CA_KEY, ca_key), (home_files.SERVER_KEY, server_key)):
        pki.save_key(root / file, key)
    if isinstance(release_key, SigningKey):
        _save_token_key(root, release_key)
    else:
        pki.save_key(root / home_files.RELEASE_KEY, release_key)
    save_seal_key(root / home_files.SEAL_KEY, seal_suite, seal_keys.private)
    public = {
        home_files.CA_CERTIFICATE: pki.pem_of(ca),
        home_files.SERVER_CERTIFICATE: pki.pem_of(
            pki.issue_server(ca, ca_key, server_key.public_key(), host, days, others)
        ),
        home_files.RELEASE_CERTIFICATE: pki.pem_of(pki.issue_release(ca, ca_key, release_key.public_key(), name, days)),
        home_files.REVOKED: pki.pem_of(pki.new_crl(ca, ca_key, (), 1)),
        DESCRIPTOR_FILE: encode_descriptor(descriptor, ca_key),
    }
    for file, content in public.items():
        write_atomic(root / file, content)
    (root / home_files.SITES).mkdir()


@contextmanager
def _coordinator(root: Path) -> Iterator[tuple[FederationHome, pki.PrivateKey]]:
    """The federation with its CA key, held by one command at a time."""
    home = FederationHome.open(root)
    with (root / _LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ca_key = pki.load_key(root / home_files.CA_KEY, "the CA's key")
        if not pki.belongs(home.ca, ca_key):
            raise ProvisionError(f"{root / home_files.CA_KEY} is not the key of {root / home_files.CA_CERTIFICATE}")
        yield home, ca_key


def _check_readmission(record: SiteRecord, request: SiteRequest, *, deliberate: bool) -> None:
    former = {item.key_fingerprint for item in record.certificates}
    if request.fingerprint in former or request.consent is not None:
        raise ProvisionError(
            f"the site {record.name!r} was revoked; it cannot renew. To come back it needs a new key: "
            "it moves its keys directory away and runs request"
        )
    if not deliberate:
        raise ProvisionError(
            f"the site {record.name!r} was revoked; to let it back in, have it read the fingerprint of its new key "
            "to you and give it as fingerprint=..."
        )


def _check_name_is_free(root: Path, record: SiteRecord, request: SiteRequest) -> None:
    if request.fingerprint == record.current.key_fingerprint:
        return
    path = site_certificate_path(root, record.name)
    current = pki.load_certificate(path, "the site's certificate") if path.exists() else None
    old_key = pki.p384_key(current, str(path)) if current is not None else None
    is_current = old_key is not None and pki.fingerprint(old_key) == record.current.key_fingerprint
    if not (is_current and old_key is not None and request.has_consent_of(old_key)):
        raise ProvisionError(
            f"the name {record.name!r} belongs to another key ({record.current.key_fingerprint}), which did not agree "
            "to this request. If that key is lost, revoke the site, then approve this request with its fingerprint"
        )


def _with_certificate(record: SiteRecord | None, request: SiteRequest, certificate: x509.Certificate) -> SiteRecord:
    issued = IssuedCertificate(
        serial=f"{certificate.serial_number:x}",
        key_fingerprint=request.fingerprint,
        issued=pki.now(),
        expires=certificate.not_valid_after_utc,
    )
    return SiteRecord(name=request.site, certificates=(*(record.certificates if record else ()), issued))


def _adopt_descriptor(site_root: Path, source: Path, descriptor: Descriptor) -> None:
    """Keep a copy at the site; a site never changes its federation's CA by accident."""
    target = site_root / DESCRIPTOR_FILE
    if target.exists() and load_descriptor(target).ca != descriptor.ca:
        raise ProvisionError(
            f"{source} is of another federation (or another CA) than {target}; a site has one federation"
        )
    write_atomic(target, pki.read_file(source, "the federation descriptor"))


def _present_names(root: Path) -> list[str]:
    path = root / home_files.SERVER_CERTIFICATE
    try:
        return pki.host_names(pki.load_certificate(path, "the server's certificate"))
    except ValueError as error:
        raise ProvisionError(f"{path}: {error}; give addresses=[...]") from None


def _digits(fingerprint: str) -> str:
    return "".join(character for character in fingerprint.lower() if character.isalnum())


def _checked(check: Callable[[str], str], value: str) -> str:
    try:
        return check(value)
    except ValueError as error:
        raise UsageError(str(error)) from None
