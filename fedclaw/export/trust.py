"""From what a user names on the command line (a certificate, a descriptor, a revocation list) to `Trust`."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fedclaw.errors import BundleError, ProvisionError, UsageError
from fedclaw.export.check import Trust
from fedclaw.export.signature import parse_certificate, parse_revocations
from fedclaw.protocol.frozen import Frozen


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
