"""The bundles that a node serves: one copy of each version, named by its digest, that only the service can write.

    STORE/                  0700
        .lock               held while the store is changed
        .incoming.XXXXXXXX  a copy that is being made or verified; swept at the start and at the next change
        DIGEST/             a verified copy: 64 hex digits, the SHA-256 of its SHA256SUMS

`put` verifies the copy, not what it was copied from, so a bundle that changes meanwhile cannot slip in. `open` verifies
again and hands out the very bytes that it verified: a file that is changed in the store is never served. An encrypted
bundle lies here as it came, encrypted, and is only decrypted in memory.
"""

import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedclaw.errors import BundleError, EncryptionError, UsageError
from fedclaw.export.check import Trust, Verified, verify_bundle
from fedclaw.export.layout import DIGESTS, FILE_NAME
from fedclaw.files import PRIVATE_MODE, sync_directory, write_all

SHORT = 12
"""Hex digits of a version's short name."""
MOST_FILES = 1000
MOST_BYTES = 16 << 30
_CHUNK = 1 << 20
_DIRECTORY_MODE = 0o700
_INCOMING = ".incoming."
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BundleStore:
    """Bundles by digest. Several processes may read; whoever changes the store holds its lock."""

    def __init__(self, directory: Path, most_bytes: int = MOST_BYTES) -> None:
        """Create the directory where it is missing. Raises UsageError for one that others can read or write."""
        self._directory = directory
        self._most_bytes = most_bytes
        try:
            directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
            found = directory.lstat()
        except OSError as error:
            raise UsageError(f"the bundle store {directory} cannot be made: {error.strerror}") from error
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(f"the bundle store {directory} is not a directory, or a link to one: name it directly")
        if found.st_uid != os.geteuid():
            raise UsageError(f"the bundle store {directory} belongs to another user; the service must own it")
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise UsageError(f"the bundle store {directory} is open to other users: chmod 700 {directory}")

    def put(self, source: Path, trust: Trust) -> str:
        """Copy the bundle at `source` into the store and verify the copy; its digest.

        A bundle that is here already stays as it is, unless its copy no longer verifies: then it is replaced. Raises
        BundleError or EncryptionError for a bundle that does not verify, and the store is as it was.
        """
        with self._changing():
            incoming = Path(tempfile.mkdtemp(dir=self._directory, prefix=_INCOMING))
            try:
                _copy(source, incoming, self._most_bytes)
                digest = _digest_of(verify_bundle(incoming, trust, keep=(DIGESTS,)))
                if not self._holds(digest, trust):
                    self._discard(digest)
                    incoming.rename(self._directory / digest)
                    sync_directory(self._directory)
            except BundleError as error:
                raise BundleError(str(error).replace(str(incoming), str(source))) from error
            except EncryptionError as error:
                raise EncryptionError(str(error).replace(str(incoming), str(source))) from error
            except OSError as error:
                raise BundleError(f"{source} cannot be copied into the store: {error.strerror}") from error
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
        return digest

    def open(self, digest: str, trust: Trust, keep: Iterable[str] = ()) -> Verified:
        """Verify the stored bundle `digest` once more; `contents` has the very bytes of the files in `keep`.

        Raises BundleError for a bundle that is not here, was changed, or is another than its name says, and
        EncryptionError for one that the keys of `trust` do not open.
        """
        if not _DIGEST.fullmatch(digest) or not (self._directory / digest).is_dir():
            raise BundleError(f"the store has no bundle {digest[:SHORT]!r}")
        verified = verify_bundle(self._directory / digest, trust, keep=(DIGESTS, *keep))
        if (found := _digest_of(verified)) != digest:
            raise BundleError(f"the bundle {digest[:SHORT]} in the store is {found[:SHORT]}: it was exchanged")
        return verified

    def size(self, digest: str, names: Iterable[str]) -> int:
        """Bytes on disk of those of the named files that a bundle has. Raises BundleError for one that is not here."""
        if not _DIGEST.fullmatch(digest) or not (self._directory / digest).is_dir():
            raise BundleError(f"the store has no bundle {digest[:SHORT]!r}")
        found = [self._directory / digest / name for name in names]
        return sum(path.lstat().st_size for path in found if os.path.lexists(path))

    def digests(self) -> tuple[str, ...]:
        """The bundles in the store, in alphabetical order. Whether they verify shows when they are opened."""
        return tuple(sorted(path.name for path in self._directory.iterdir() if _DIGEST.fullmatch(path.name)))

    def remove(self, digest: str) -> None:
        """Remove a bundle; one that is not here is no error. What was opened before stays usable."""
        with self._changing():
            self._discard(digest)

    def sweep(self) -> None:
        """Remove what a process that was killed in the middle of a change left."""
        with self._changing():
            pass

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; what lies in the way of nobody then is a leftover."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._directory / ".lock", flags, PRIVATE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for left in self._directory.glob(f"{_INCOMING}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            os.close(descriptor)

    def _holds(self, digest: str, trust: Trust) -> bool:
        with suppress(BundleError, EncryptionError):
            self.open(digest, trust)
            return True
        return False

    def _discard(self, digest: str) -> None:
        """Take a bundle out of sight at once, then remove it."""
        if not _DIGEST.fullmatch(digest) or not os.path.lexists(self._directory / digest):
            return
        grave = Path(tempfile.mkdtemp(dir=self._directory, prefix=_INCOMING))
        (self._directory / digest).rename(grave / digest)
        sync_directory(self._directory)
        shutil.rmtree(grave, ignore_errors=True)


def short_name(digest: str) -> str:
    """What a version is called unless the operator gave it a name: the first 12 hex digits of its digest."""
    return digest[:SHORT]


def _digest_of(verified: Verified) -> str:
    return hashlib.sha256(verified.contents[DIGESTS]).hexdigest()


def _copy(source: Path, target: Path, most_bytes: int) -> None:
    """Copy the plain files of a directory, following no link inside of it. Raises BundleError."""
    try:
        directory = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"{source} is not a bundle: there is no such directory") from error
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries]
        if len(names) > MOST_FILES:
            raise BundleError(f"{source} is not a bundle: it has {len(names)} entries, and {MOST_FILES} is the most")
        left = most_bytes
        for name in sorted(names):
            if not re.fullmatch(FILE_NAME, name):
                raise BundleError(f"{name!a} is not the name of a file in a bundle")
            left -= _copy_file(directory, name, target / name, left)
    finally:
        os.close(directory)
    sync_directory(target)


def _copy_file(directory: int, name: str, target: Path, most_bytes: int) -> int:
    """Copy one file of an open directory; its size. Raises BundleError for what is not a plain file of that size."""
    try:
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        raise BundleError(f"{name} cannot be read, or is a link: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(source).st_mode):
            raise BundleError(f"{name} is not a plain file; a bundle holds plain files only")
        opened = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_MODE)
        try:
            return _copy_bytes(source, opened, most_bytes)
        finally:
            os.close(opened)
    finally:
        os.close(source)


def _copy_bytes(source: int, target: int, most_bytes: int) -> int:
    """Copy a file to its end, durable on return; its size. Raises BundleError if it is larger than `most_bytes`."""
    size = 0
    while chunk := os.read(source, _CHUNK):
        size += len(chunk)
        if size > most_bytes:
            raise BundleError("the bundle is larger than the store takes")
        write_all(target, chunk)
    os.fsync(target)
    return size
