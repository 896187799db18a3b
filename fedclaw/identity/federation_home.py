"""The coordinator's federation directory: what the server and the export read of it, and the records of its sites.

A record, sites/NAME.json, is what the coordinator remembers of an approved site, with every certificate it ever got.
"""

import datetime as dt
import logging
import threading
from pathlib import Path
from typing import Annotated, Final, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator, Field, ValidationError

from fedclaw.errors import ProvisionError, SealError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.identity import pki
from fedclaw.identity.descriptor import DESCRIPTOR_FILE, Descriptor, load_descriptor
from fedclaw.identity.names import check_name
from fedclaw.identity.seal import Opener, SealSuite, decode_key, encode_key, public_of
from fedclaw.protocol.frozen import Frozen, explain


class IssuedCertificate(Frozen):
    """One certificate that a site was given."""

    serial: str
    """Hexadecimal, as openssl shows it."""
    key_fingerprint: str
    issued: dt.datetime
    expires: dt.datetime


class SiteRecord(Frozen):
    """A site and its certificates, the newest last. Revoking a site revokes all of them."""

    version: int = 1
    name: Annotated[str, AfterValidator(check_name)]
    revoked: bool = False
    """Set by revoke, cleared when the name is approved for a new key."""
    certificates: tuple[IssuedCertificate, ...]

    @property
    def current(self) -> IssuedCertificate:
        """The newest certificate."""
        return self.certificates[-1]


def record_path(sites: Path, name: str) -> Path:
    """Where the record of the site `name` is."""
    return sites / f"{check_name(name)}.json"


def load_record(sites: Path, name: str) -> SiteRecord | None:
    """The record of a site, None if there never was one. Raises ProvisionError if it is damaged."""
    path = record_path(sites, name)
    if not path.exists():
        return None
    try:
        record = SiteRecord.model_validate_json(pki.read_file(path, "the record of a site"))
    except ValidationError as error:
        raise ProvisionError(f"{path} is damaged: {explain(error)}; restore it from a backup") from None
    if record.name != name or not record.certificates:
        raise ProvisionError(f"{path} is damaged: it is not the record of {name!r}; restore it from a backup")
    return record


def load_records(sites: Path) -> tuple[SiteRecord, ...]:
    """All records, by name. Raises ProvisionError."""
    names = sorted(path.stem for path in sites.glob("*.json"))
    return tuple(record for name in names if (record := load_record(sites, name)) is not None)


def save_record(sites: Path, record: SiteRecord) -> None:
    """Write a record, whole or not at all."""
    write_atomic(record_path(sites, record.name), record.model_dump_json(indent=2).encode() + b"\n")


logger = logging.getLogger(__name__)

CA_CERTIFICATE: Final = "ca.crt"
CA_KEY: Final = "ca.key"
SERVER_CERTIFICATE: Final = "server.crt"
SERVER_KEY: Final = "server.key"
SEAL_KEY: Final = "seal.key"
RELEASE_CERTIFICATE: Final = "release.crt"
RELEASE_KEY: Final = "release.key"
RELEASE_KEY_PLACE: Final = "release.pkcs11"
"""In the place of release.key: the PKCS#11 URI of a key that stays in a token."""
REVOKED: Final = "revoked.crl"
SITES: Final = "sites"

# ca.key is not among them: a running server does not need it, and it may be kept elsewhere.
_NEEDED = (
    (CA_CERTIFICATE, "the CA's certificate"),
    (SERVER_CERTIFICATE, "the server's certificate"),
    (SERVER_KEY, "the server's key"),
    (SEAL_KEY, "the key that updates are sealed to"),
    (RELEASE_CERTIFICATE, "the certificate of the key that signs bundles"),
    (REVOKED, "the list of revoked sites"),
)


class _SealKeyFile(Frozen):
    suite: SealSuite
    private_key: str = Field(repr=False)


class ReleaseKey(Protocol):
    """The key that signs bundles, in a file or in a token."""

    def public_key(self) -> pki.PublicKey:
        """Its public half."""

    def sign(self, data: bytes, signature_algorithm: ec.ECDSA) -> bytes:
        """A signature over `data`, DER."""


def load_release_key(root: Path) -> ReleaseKey:
    """The release key of the federation in `root`. Raises ProvisionError, or EncryptionError if a token fails."""
    path, in_token = root / RELEASE_KEY, root / RELEASE_KEY_PLACE
    what = "the key that signs bundles"
    if not in_token.exists():
        return pki.load_key(path, what)
    if path.exists():
        raise ProvisionError(
            f"{root} holds both {RELEASE_KEY} and {RELEASE_KEY_PLACE}: {what} is one; remove the one that is not in "
            f"use, then run: python -m fedclaw.provision renew federation={root}"
        )
    from fedclaw.identity.token_keys import SigningKey, TokenUri

    text = pki.read_file(in_token, f"where {what} is").decode(errors="replace").strip()
    return SigningKey.open(TokenUri.parse(text, root))


class ReleaseSigner:
    """Signs bundles with the federation's release key."""

    def __init__(self, key: ReleaseKey, certificate_pem: bytes, ca_pem: bytes) -> None:
        self._key = key
        self.certificate_pem = certificate_pem
        self.ca_pem = ca_pem

    def sign(self, content: bytes) -> bytes:
        """ECDSA over `content` with the hash of the key's curve, DER (for P-384, `openssl dgst -sha384 -verify`)."""
        return self._key.sign(content, ec.ECDSA(pki.hash_of(self._key.public_key())))


class FederationHome:
    """A federation directory that has been opened and checked; keys are read when they are asked for."""

    def __init__(self, root: Path, descriptor: Descriptor) -> None:
        self.root = root
        self.descriptor = descriptor
        self.ca = descriptor.ca
        self._revocations = _Revocations(root / REVOKED, self.ca)

    @classmethod
    def open(cls, path: Path) -> "FederationHome":
        """Check the directory's files and descriptor. Raises ProvisionError naming what is missing or wrong."""
        if not path.is_dir():
            raise ProvisionError(
                f"{path} is not a federation directory; make one with: "
                f"python -m fedclaw.provision init federation={path} name=NAME address=HOST:PORT"
            )
        descriptor = load_descriptor(path / DESCRIPTOR_FILE)
        for file, what in _NEEDED:
            if not (path / file).is_file():
                raise ProvisionError(f"{path / file} is missing: {what}; restore it from a backup")
        if not any((path / file).is_file() for file in (RELEASE_KEY, RELEASE_KEY_PLACE)):
            raise ProvisionError(
                f"{path / RELEASE_KEY} is missing: the key that signs bundles; restore it from a backup"
            )
        home = cls(path, descriptor)
        if pki.load_certificate(path / CA_CERTIFICATE, "the CA's certificate") != home.ca:
            raise ProvisionError(f"{path / CA_CERTIFICATE} is not the CA that {path / DESCRIPTOR_FILE} names")
        home._revocations.load()
        return home

    @property
    def name(self) -> str:
        """The federation's name."""
        return self.descriptor.name

    def __repr__(self) -> str:
        return f"FederationHome({str(self.root)!r})"

    def tls(self) -> pki.TlsIdentity:
        """The server's end of a connection. Raises ProvisionError, with the command to run when it has expired."""
        certificate = self._certificate(SERVER_CERTIFICATE, pki.Purpose.SERVER)
        key = pki.load_key(self.root / SERVER_KEY, "the server key")
        self._check_belongs(SERVER_CERTIFICATE, certificate, SERVER_KEY, key)
        return pki.TlsIdentity(pki.pem_of(certificate), pki.key_pem(key), pki.pem_of(self.ca))

    def signer(self) -> ReleaseSigner:
        """The key that signs bundles. Raises ProvisionError, or EncryptionError if it is in a token that fails."""
        certificate = self._certificate(RELEASE_CERTIFICATE, pki.Purpose.RELEASE)
        key = load_release_key(self.root)
        self._check_belongs(RELEASE_CERTIFICATE, certificate, RELEASE_KEY, key)
        return ReleaseSigner(key, pki.pem_of(certificate), pki.pem_of(self.ca))

    def opener(self) -> Opener:
        """Opens sealed updates. Raises ProvisionError if the key is not the one in the descriptor."""
        path = self.root / SEAL_KEY
        content = pki.read_private(path, "the key that updates are sealed to")
        try:
            stored = _SealKeyFile.model_validate_json(content)
            private = decode_key(stored.private_key)
            public = public_of(stored.suite, private)
        except (ValidationError, SealError):
            # No detail: it could quote the key.
            raise ProvisionError(f"{path} is damaged; restore it from a backup") from None
        if (stored.suite, encode_key(public)) != (self.descriptor.seal_suite, self.descriptor.seal_public_key):
            raise ProvisionError(f"{path} is not the key that sites seal to by {self.root / DESCRIPTOR_FILE}")
        return Opener(stored.suite, private)

    def is_revoked(self, serial: int) -> bool:
        """Whether the certificate with that serial number is revoked, by revoked.crl as it is now.

        Raises ProvisionError if the list is missing, damaged or not signed by the CA: never "nobody is revoked".
        """
        return self._revocations.contains(serial)

    def _certificate(self, file: str, purpose: pki.Purpose) -> x509.Certificate:
        certificate = pki.load_certificate(self.root / file, f"the {purpose.name.lower()} certificate")
        pki.check_leaf(certificate, self.ca, purpose, str(self.root / file), self._renew_advice)
        return certificate

    def _check_belongs(self, file: str, certificate: x509.Certificate, key_file: str, key: ReleaseKey) -> None:
        if not pki.belongs(certificate, key):
            raise ProvisionError(
                f"{self.root / file} is not for the key in {self.root / key_file}; {self._renew_advice}"
            )

    @property
    def _renew_advice(self) -> str:
        return f"run: python -m fedclaw.provision renew federation={self.root}"


def save_seal_key(path: Path, suite: SealSuite, private_key: bytes) -> None:
    """Write the private seal key so that only its owner can read it."""
    stored = _SealKeyFile(suite=suite, private_key=encode_key(private_key))
    write_atomic(path, stored.model_dump_json().encode() + b"\n", PRIVATE_MODE)


class _Revocations:
    """The serial numbers in a CRL file, read again whenever the file has changed."""

    def __init__(self, path: Path, ca: x509.Certificate) -> None:
        self._path = path
        self._ca = ca
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._serials: frozenset[int] = frozenset()

    def contains(self, serial: int) -> bool:
        self.load()
        return serial in self._serials

    def load(self) -> None:
        with self._lock:
            stamp = self._stat()
            if stamp == self._stamp:
                return
            self._stamp = None
            crl = pki.parse_crl(pki.read_file(self._path, "the list of revoked sites"), self._ca, str(self._path))
            self._serials = frozenset(item.serial_number for item in crl)
            self._stamp = stamp
            logger.debug("read %s: %d certificates are revoked", self._path, len(self._serials))

    def _stat(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError:
            raise ProvisionError(
                f"{self._path} is missing: the list of revoked sites; restore it from a backup"
            ) from None
        return status.st_mtime_ns, status.st_size, status.st_ino
