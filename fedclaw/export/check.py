"""Verification of a bundle: each file is the one that the federation signed, and there are no others.

Bundles of format 2 are signed in `model.sig` (`fedclaw.export.model_signature`), those of format 1 in `SHA256SUMS.sig`.
The manifest, which is signed, says the format, so that a bundle of one cannot be given out as one of the other.

Needs neither torch nor ONNX. Each file is read once, from a handle that follows no symbolic link. A caller gets the
very bytes that were checked, so a file cannot be exchanged between check and use. `load_trust` makes a `Trust` of what
a user names on the command line: a certificate, a descriptor, a revocation list, a key. A bundle that is encrypted at
rest is decrypted in memory: what is signed is what was encrypted.
"""

import os
import re
import stat
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Literal

from cryptography import x509
from pydantic import ValidationError

from fedclaw.errors import BundleError, ProvisionError, UsageError
from fedclaw.export import signature
from fedclaw.export.layout import (
    CA_CERTIFICATE,
    COMPRESSION,
    DIGESTS,
    FILE_NAME,
    MANIFEST,
    RELEASE_CERTIFICATE,
    REQUIRED,
    REQUIRED_IN_FORMAT_1,
    SIGNATURE,
    SIGNATURE_IN_FORMAT_1,
    SIGNATURES,
    FormatVersion,
    Manifest,
)
from fedclaw.export.model_signature import verify_digests
from fedclaw.export.signature import parse_certificate, parse_revocations
from fedclaw.export.staging import SCOPE
from fedclaw.identity.at_rest import FileStore
from fedclaw.identity.data_keys import Keyring, KeySetting, load_keyring
from fedclaw.protocol.frozen import Frozen, explain

LINE = re.compile(rf"([0-9a-f]{{64}})  ({FILE_NAME.strip('^$')})")
SMALL = 1 << 20
"""Largest size in bytes of a digest list, a signature or a certificate; a larger file is refused unread."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class Trust:
    """What the verifier trusts, obtained in another way than the bundle."""

    authority: bytes | None = None
    """The CA certificate (PEM) that must have signed. None: take the bundle's own, which proves no identity."""
    revocations: bytes | None = None
    """A revocation list (PEM) of that CA."""
    expired: Literal["accept", "refuse"] = "accept"
    """Whether to accept a bundle whose release certificate has expired since it was signed."""
    keys: Keyring | None = None
    """What opens a bundle that is encrypted at rest; one that is not is then refused. None: it is not encrypted."""


@dataclass(frozen=True)
class Verified:
    """A bundle that passed every check. `contents` has the requested files, byte for byte as they were checked."""

    path: Path
    manifest: Manifest
    signer: signature.VerifiedSigner
    pinned: bool
    expired: bool
    files: tuple[str, ...]
    contents: Mapping[str, bytes]


def verify_bundle(path: Path, trust: Trust | None = None, keep: Iterable[str] = ()) -> Verified:
    """Verify the bundle directory `path`; `contents` of the result has the files named in `keep`.

    Raises BundleError naming the file that was changed, is missing, does not belong there, is a link, or was signed by
    somebody else, and EncryptionError naming the file that does not open. The signature is checked before a file of any
    size is read.
    """
    trust = trust or Trust()
    names = _list(path)
    files = _Files(path, FileStore(trust.keys, SCOPE))
    version = _format_version(names)
    proof = (RELEASE_CERTIFICATE, CA_CERTIFICATE, DIGESTS, SIGNATURES[version])
    small = {name: _read_small(files, name, names) for name in proof}
    release, authority, signer = _check_certificates(small, trust)
    digests = _signed_digests(version, small, release, authority)
    _require_complete(version, names, digests)
    kept = {MANIFEST, RELEASE_CERTIFICATE, CA_CERTIFICATE, *keep}
    proofs = {name: content for name, content in small.items() if name in kept}
    contents = {**proofs, **_read_listed(files, digests, small, kept)}
    if version != 1:
        _require_agreement(small[DIGESTS], digests)
    manifest = _parse_manifest(contents[MANIFEST], version)
    if version != 1:
        _require_told(manifest, names)
    signature.check_federation(release, manifest.federation)
    now = datetime.now(UTC)
    signature.check_times(release, authority, manifest.created, now)
    expired = now > signer.expires
    if expired and trust.expired == "refuse":
        raise BundleError(f"{RELEASE_CERTIFICATE} has expired ({signer.expires:%Y-%m-%d}); sign the model again")
    return Verified(path, manifest, signer, trust.authority is not None, expired, tuple(sorted(names)), contents)


def _list(path: Path) -> frozenset[str]:
    if not path.is_dir():
        raise BundleError(f"{path} is not a bundle: there is no such directory")
    if not os.path.lexists(path / DIGESTS):
        raise BundleError(f"{path} is not a bundle: it has no {DIGESTS}")
    names: dict[str, str] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise BundleError(f"{_shown(entry.name)} is a symbolic link; a bundle holds plain files only")
            if not entry.is_file(follow_symlinks=False):
                raise BundleError(f"{_shown(entry.name)} is not a plain file; a bundle holds plain files only")
            twin = names.setdefault(entry.name.lower(), entry.name)
            if twin != entry.name:
                both = " and ".join(sorted(map(_shown, (twin, entry.name))))
                raise BundleError(f"{both} are one file where a file system does not tell large letters from small")
    return frozenset(names.values())


def _shown(name: str) -> str:
    """A name that a stranger gave to a file, so that it can stand in one line of an error."""
    return name if re.fullmatch(FILE_NAME, name) else ascii(name)


def _format_version(names: frozenset[str]) -> FormatVersion:
    """Which signature the bundle has. Never more than one: nobody chooses by which rules it is checked."""
    found = [version for version, name in SIGNATURES.items() if name in names]
    if len(found) > 1:
        raise BundleError(f"the bundle holds both {' and '.join(SIGNATURES.values())}: a bundle has one signature")
    if not found:
        raise BundleError(f"{SIGNATURE} is missing from the bundle: nobody signed it, or the signature was removed")
    return found[0]


def _signed_digests(
    version: FormatVersion, small: Mapping[str, bytes], release: x509.Certificate, authority: x509.Certificate
) -> dict[str, str]:
    """The SHA-256 of each file that `release` signed. Raises BundleError."""
    if version == 1:
        refusal = f"{SIGNATURE_IN_FORMAT_1} is not {RELEASE_CERTIFICATE}'s signature over this {DIGESTS}"
        signature.check_signature(release, small[SIGNATURE_IN_FORMAT_1], small[DIGESTS], refusal)
        return _parse_digests(small[DIGESTS])
    digests = verify_digests(small[SIGNATURE], release, authority)
    for name in SIGNATURES.values():
        if name in digests:
            raise BundleError(f"{SIGNATURE} is damaged: it lists {name}, which must not be there")
    return digests


def _parse_digests(content: bytes) -> dict[str, str]:
    try:
        *lines, rest = content.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise BundleError(f"{DIGESTS} is damaged: it is not ASCII text") from error
    digests: dict[str, str] = {}
    for number, line in enumerate([*lines, rest] if rest else lines, start=1):
        match = LINE.fullmatch(line)
        if match is None:
            raise BundleError(f"{DIGESTS} is damaged: line {number} is not a digest and a file name")
        digest, name = match.groups()
        if name in digests or name in (DIGESTS, *SIGNATURES.values()):
            raise BundleError(f"{DIGESTS} is damaged: line {number} lists {name}, which must not be there")
        digests[name] = digest
    return digests


def _require_complete(version: FormatVersion, names: frozenset[str], listed: Mapping[str, str]) -> None:
    origin = DIGESTS if version == 1 else SIGNATURE
    for name in sorted((REQUIRED_IN_FORMAT_1 if version == 1 else REQUIRED) - names):
        raise BundleError(f"{name} is missing from the bundle")
    for name in sorted(set(listed) - names):
        raise BundleError(f"{name} is in {origin} and not in the bundle: it was removed")
    unlisted = {DIGESTS, SIGNATURES[version]} if version == 1 else {SIGNATURES[version]}
    for name in sorted(names - unlisted - set(listed)):
        raise BundleError(f"{_shown(name)} is not in {origin}: it was added after signing")


def _require_told(manifest: Manifest, names: frozenset[str]) -> None:
    """Raise BundleError for a file that the manifest tells of and that is not there."""
    report = {COMPRESSION} if manifest.variant == "compressed" else set()
    for name in sorted((set(manifest.graphs) | report) - names):
        raise BundleError(f"{_shown(name)} is missing from the bundle: {MANIFEST} tells of it")


def _read_listed(
    files: "_Files", digests: Mapping[str, str], read: Mapping[str, bytes], keep: Container[str]
) -> dict[str, bytes]:
    """Check every file against its digest, those in `read` from memory; the content of those named in `keep`."""
    contents = {}
    for name, digest in digests.items():
        if name in read:
            found, content = sha256(read[name]).hexdigest(), read[name]
        else:
            found, content = _read_hashed(files, name, name in keep)
        _require_digest(name, found, digest)
        if name in keep:
            contents[name] = content
    return contents


def _require_agreement(content: bytes, digests: Mapping[str, str]) -> None:
    """SHA256SUMS is for people, who may believe it; so it must not say anything else than what is signed."""
    if _parse_digests(content) != {name: digest for name, digest in digests.items() if name != DIGESTS}:
        raise BundleError(f"{DIGESTS} and {SIGNATURE} are signed and list different files: export the model again")


def _require_digest(name: str, found: str, signed: str) -> None:
    if found != signed:
        raise BundleError(f"{name} in the bundle was changed: its SHA-256 is {found}, signed is {signed}")


def _check_certificates(
    contents: Mapping[str, bytes], trust: Trust
) -> tuple[x509.Certificate, x509.Certificate, signature.VerifiedSigner]:
    release = signature.parse_certificate(contents[RELEASE_CERTIFICATE], RELEASE_CERTIFICATE)
    authority = signature.parse_certificate(contents[CA_CERTIFICATE], CA_CERTIFICATE)
    if trust.authority is not None:
        expected = signature.parse_certificate(trust.authority, "the CA certificate given")
        if expected != authority:
            raise BundleError(
                f"{CA_CERTIFICATE} is not the CA that you trust: the bundle has {signature.fingerprint(authority)}, "
                f"expected is {signature.fingerprint(expected)}"
            )
    signer = signature.check_chain(release, authority)
    if trust.revocations is not None:
        signature.check_not_revoked(release, authority, trust.revocations, "the revocation list given")
    return release, authority, signer


def _parse_manifest(content: bytes, version: FormatVersion) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise BundleError(f"{MANIFEST} is signed but not understood by this version: {explain(error)}") from error
    if manifest.format_version != version:
        expected = SIGNATURES[manifest.format_version]
        raise BundleError(
            f"{MANIFEST} says format {manifest.format_version}, which is signed by {expected}; "
            f"the bundle has {SIGNATURES[version]}"
        )
    return manifest


def _read_small(files: "_Files", name: str, names: frozenset[str]) -> bytes:
    if name not in names:
        raise BundleError(f"{name} is missing from the bundle")
    with files.open(name) as file:
        content = file.read(SMALL + 1)
    if len(content) > SMALL:
        raise BundleError(f"{name} is damaged: larger than {SMALL} bytes")
    return content


def _read_hashed(files: "_Files", name: str, keep: bool) -> tuple[str, bytes]:
    """The SHA-256 of a file and, if asked for, its content."""
    hasher = sha256()
    kept: list[bytes] = []
    with files.open(name) as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
            if keep:
                kept.append(chunk)
    return hasher.hexdigest(), b"".join(kept)


@dataclass(frozen=True)
class _Files:
    """A bundle's files, as they are or encrypted."""

    path: Path
    store: FileStore

    def open(self, name: str) -> BinaryIO:
        """The content of a file. Raises BundleError, EncryptionError."""
        return self.store.opened(os.fdopen(_open(self.path, name), "rb"), name, str(self.path / name))


def _open(path: Path, name: str) -> int:
    try:
        descriptor = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"{name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{name} is not a plain file; a bundle holds plain files only")
    return descriptor


class TrustSettings(Frozen):
    """What the commands that open a bundle are told of whom to trust."""

    ca: Path | None
    federation: Path | None
    crl: Path | None
    expired: Literal["accept", "refuse"]
    key: KeySetting | None = None


def load_trust(
    ca: Path | None,
    federation: Path | None,
    crl: Path | None,
    expired: Literal["accept", "refuse"] = "accept",
    key: KeySetting | None = None,
) -> Trust:
    """Read the CA to trust from `ca` (PEM) or from the descriptor `federation` (the file, or its directory).

    `key` names what opens an encrypted bundle. Raises UsageError when both are given, or a file cannot be read or is
    nothing of the kind, EncryptionError when the key cannot be had.
    """
    if ca is not None and federation is not None:
        raise UsageError("give ca=… or federation=…, not both")
    authority = None
    if ca is not None:
        authority = _read(ca, "ca", parse_certificate)
    elif federation is not None:
        from fedclaw.identity.descriptor import DESCRIPTOR_FILE, load_descriptor

        path = federation / DESCRIPTOR_FILE if federation.is_dir() else federation
        try:
            authority = load_descriptor(path).ca_certificate.encode()
        except ProvisionError as error:
            raise UsageError(f"federation={federation}: {error}") from error
    revocations = None if crl is None else _read(crl, "crl", parse_revocations)
    return Trust(authority, revocations, expired, None if key is None else load_keyring(key))


def _read(path: Path, setting: str, parse: Callable[[bytes, str], object]) -> bytes:
    """The file's content, which `parse` can read."""
    try:
        content = path.read_bytes()
        parse(content, f"{setting}={path}")
    except OSError as error:
        raise UsageError(f"{setting}={path} cannot be read: {error.strerror}") from error
    except BundleError as error:
        raise UsageError(str(error)) from error
    return content
