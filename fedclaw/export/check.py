"""Verification of a bundle: each file is the one that the federation signed, and there are no others.

Needs neither torch nor ONNX. Each file is read once, from a handle that follows no symbolic link. A caller gets the
very bytes that were checked, so a file cannot be exchanged between check and use. `load_trust` makes a `Trust` of what
a user names on the command line: a certificate, a descriptor, a revocation list.
"""

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from pydantic import ValidationError

from fedclaw.errors import BundleError, ProvisionError, UsageError
from fedclaw.export import signature
from fedclaw.export.layout import (
    CA_CERTIFICATE,
    DIGESTS,
    MANIFEST,
    RELEASE_CERTIFICATE,
    REQUIRED,
    SIGNATURE,
    UNSIGNED,
    Manifest,
)
from fedclaw.export.signature import parse_certificate, parse_revocations
from fedclaw.protocol.frozen import Frozen, explain

LINE = re.compile(r"^([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]{0,99})$")
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
    somebody else.
    """
    trust = trust or Trust()
    names = _list(path)
    digests = _read_small(path, DIGESTS, names)
    listed = _parse_digests(digests)
    _require_complete(names, listed)
    wanted = {MANIFEST, RELEASE_CERTIFICATE, CA_CERTIFICATE, *keep}
    checked = {name: _read_checked(path, name, digest, name in wanted) for name, digest in listed.items()}
    contents = {name: content for name, content in checked.items() if content is not None}
    release, authority, signer = _check_certificates(contents, trust)
    signature.check_signature(release, _read_small(path, SIGNATURE, names), digests)
    manifest = _parse_manifest(contents[MANIFEST])
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
    names = set()
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise BundleError(f"{entry.name} is a symbolic link; a bundle holds plain files only")
            if not entry.is_file(follow_symlinks=False):
                raise BundleError(f"{entry.name} is not a plain file; a bundle holds plain files only")
            names.add(entry.name)
    return frozenset(names)


def _parse_digests(content: bytes) -> dict[str, str]:
    try:
        lines = content.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise BundleError(f"{DIGESTS} is damaged: it is not ASCII text") from error
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = LINE.match(line)
        if match is None:
            raise BundleError(f"{DIGESTS} is damaged: line {number} is not a digest and a file name")
        digest, name = match.groups()
        if name in digests or name in UNSIGNED:
            raise BundleError(f"{DIGESTS} is damaged: line {number} lists {name}, which must not be there")
        digests[name] = digest
    return digests


def _require_complete(names: frozenset[str], listed: Mapping[str, str]) -> None:
    for name in sorted((REQUIRED | UNSIGNED) - names):
        raise BundleError(f"{name} is missing from the bundle")
    for name in sorted(set(listed) - names):
        raise BundleError(f"{name} is in {DIGESTS} and not in the bundle: it was removed, or {DIGESTS} was changed")
    for name in sorted(names - UNSIGNED - set(listed)):
        raise BundleError(f"{name} is not in {DIGESTS}: it was added after signing, or {DIGESTS} was changed")


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


def _parse_manifest(content: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise BundleError(f"{MANIFEST} is signed but not understood by this version: {explain(error)}") from error


def _read_small(path: Path, name: str, names: frozenset[str]) -> bytes:
    if name not in names:
        raise BundleError(f"{name} is missing from the bundle")
    with os.fdopen(_open(path, name), "rb") as file:
        content = file.read(SMALL + 1)
    if len(content) > SMALL:
        raise BundleError(f"{name} is damaged: larger than {SMALL} bytes")
    return content


def _read_checked(path: Path, name: str, digest: str, keep: bool) -> bytes | None:
    hasher = hashlib.sha256()
    kept: list[bytes] = []
    with os.fdopen(_open(path, name), "rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
            if keep:
                kept.append(chunk)
    if hasher.hexdigest() != digest:
        raise BundleError(
            f"{name} (or its line in {DIGESTS}) was changed: its SHA-256 is {hasher.hexdigest()}, listed is {digest}"
        )
    return b"".join(kept) if keep else None


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


def load_trust(
    ca: Path | None, federation: Path | None, crl: Path | None, expired: Literal["accept", "refuse"] = "accept"
) -> Trust:
    """Read the CA to trust from `ca` (PEM) or from the descriptor `federation` (the file, or its directory).

    Raises UsageError when both are given, or a file cannot be read or is nothing of the kind.
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
    return Trust(authority, None if crl is None else _read(crl, "crl", parse_revocations), expired)


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
