"""Files that are either whole or not there, and keys that only their owner can read."""

import errno
import glob
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PRIVATE_MODE = 0o600
PUBLIC_MODE = 0o644
_RANDOM = "[a-z0-9_]" * 8
"""What `tempfile` adds to a name, as a glob."""


def write_atomic(path: Path, content: bytes, mode: int = PUBLIC_MODE) -> None:
    """Write `content` under a temporary name, flush it to disk, then rename it to `path`.

    The file has `mode` before it holds a byte, so a key is never readable by others, not even for a moment.
    """
    with replacing(path, mode) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, mode: int = PUBLIC_MODE) -> Iterator[BinaryIO]:
    """A file, to write and read, that takes the place of `path` as the block ends, flushed to disk.

    If the block fails, `path` is as it was. For what is too large to be had in memory once more.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        # The name that was asked for, not the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(descriptor, "w+b") as file:
            os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed inside `replacing` left of `path`. Nobody may be writing it now."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_RANDOM}"):
        left.unlink(missing_ok=True)


def write_all(descriptor: int, data: bytes, offset: int | None = None) -> None:
    """Write every byte of `data`, at `offset` (None: where the file stands).

    Raises OSError: `os.write` alone says how much it wrote, and writes less when the disk is full.
    """
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
        if written <= 0:
            raise OSError(errno.EIO, "nothing more could be written")
        view = view[written:]
        offset = None if offset is None else offset + written


def append_all(descriptor: int, data: bytes, *, durable: bool = True) -> None:
    """Add `data` at the end of an open file (O_APPEND), all of it, on disk on return if it is to be `durable`.

    Raises OSError, and the file is then as it was: what a full disk took of a line would otherwise be the beginning of
    the next one. Only one writer at a time may be at work.
    """
    size = os.fstat(descriptor).st_size
    try:
        write_all(descriptor, data)
        if durable:
            os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        raise


def sync_data(descriptor: int) -> None:
    """Make what was written to an open file durable, with no more of its metadata than it takes to read it."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
