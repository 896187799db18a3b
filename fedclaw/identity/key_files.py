"""Reading keys and certificates from files, each with an error that says which file and what to do."""

import stat
from pathlib import Path

from cryptography import x509

from fedclaw.errors import ProvisionError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.identity import pki

_MAX_BYTES = 16 * 1024 * 1024


def read_file(path: Path, what: str, *, limit: int = _MAX_BYTES) -> bytes:
    """The content of `path`. Raises ProvisionError if it is missing, unreadable or longer than `limit` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise ProvisionError(f"{path} is missing: {what}") from None
    except OSError as error:
        raise ProvisionError(f"{path} ({what}) cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise ProvisionError(f"{path} ({what}) is longer than {limit} bytes; that is not what belongs there")
    return content


def read_private(path: Path, what: str) -> bytes:
    """The content of a file that only its owner may read. Raises ProvisionError if others may."""
    content = read_file(path, what)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ProvisionError(f"{path} ({what}) can be read by others (mode {mode:04o}); run: chmod 600 {path}")
    return content


def load_key(path: Path, what: str) -> pki.PrivateKey:
    """A P-384 key from a private file. Raises ProvisionError."""
    return pki.parse_key(read_private(path, what), str(path))


def load_certificate(path: Path, what: str) -> x509.Certificate:
    """A certificate from a file. Raises ProvisionError."""
    return pki.parse_certificate(read_file(path, what), str(path))


def save_key(path: Path, key: pki.PrivateKey) -> None:
    """Write a private key that only its owner can read."""
    write_atomic(path, pki.key_pem(key), PRIVATE_MODE)


def belongs(certificate: x509.Certificate, key: pki.PrivateKey) -> bool:
    """Whether `certificate` is for `key`."""
    return certificate.public_key() == key.public_key()
