"""From what a user names on the command line (a certificate, a descriptor, a revocation list) to `Trust`."""

from pathlib import Path
from typing import Literal

from fedclaw.errors import UsageError
from fedclaw.export.check import Trust

DESCRIPTOR = "federation.json"


def load_trust(
    ca: Path | None, federation: Path | None, crl: Path | None, expired: Literal["accept", "refuse"] = "accept"
) -> Trust:
    """Read the CA to trust from `ca` (PEM) or from the descriptor `federation` (the file, or its directory).

    Raises UsageError when both are given or a file cannot be read, ProvisionError for a damaged descriptor.
    """
    if ca is not None and federation is not None:
        raise UsageError("give ca=… or federation=…, not both")
    authority = None
    if ca is not None:
        authority = _read(ca, "ca")
    elif federation is not None:
        from fedclaw.identity.descriptor import load_descriptor

        path = federation / DESCRIPTOR if federation.is_dir() else federation
        authority = load_descriptor(path).ca_certificate.encode()
    return Trust(authority, None if crl is None else _read(crl, "crl"), expired)


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{setting}={path} cannot be read: {error.strerror}") from error
