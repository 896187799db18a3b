"""A bundle on its way to a node: a tar archive of its files, flat, written and read as a stream.

What comes in is a stranger's until its signature was verified: only plain files come out, of names that a bundle may
have, into a directory that the caller made for nothing else.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from fedclaw.cli import expanded
from fedclaw.errors import UsageError
from fedclaw.export.layout import DIGESTS, FILE_NAME
from fedclaw.files import PRIVATE_MODE
from fedclaw.serve.refusals import ServeRefusal

MEDIA_TYPE = "application/x-tar"
MOST_FILES = 64
_CHUNK = 1 << 20


class _Pipe:
    """Takes what tarfile writes, to be taken out again piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, piece: bytes) -> int:
        self.pieces.append(bytes(piece))
        return len(piece)

    def take(self) -> bytes:
        taken, self.pieces = b"".join(self.pieces), []
        return taken


def require_bundle(path: Path) -> None:
    """Raise UsageError for a directory that is there and, by its files, no bundle."""
    if not (expanded(path) / DIGESTS).is_file():
        raise UsageError(f"bundle={path} is no bundle: it has no {DIGESTS}; give the directory of an export")


def pack(bundle: Path) -> Iterator[bytes]:
    """The archive, piece by piece, never whole in memory. Raises OSError."""
    pipe = _Pipe()
    with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.USTAR_FORMAT) as archive:  # type: ignore[call-overload]
        for path in sorted(bundle.iterdir()):
            if path.name.startswith(".") or path.is_symlink() or not path.is_file():
                continue
            entry = tarfile.TarInfo(path.name)
            with path.open("rb") as file:
                entry.size = os.fstat(file.fileno()).st_size
                archive.addfile(entry, file)
            yield pipe.take()
    yield pipe.take()


def unpack(archive: BinaryIO, directory: Path, most_bytes: int) -> None:
    """Write an archive's files into the empty `directory`.

    Raises ServeRefusal for anything in it that no bundle holds, and for more than `most_bytes`.
    """
    left, seen = most_bytes, set[str]()
    try:
        with tarfile.open(fileobj=archive, mode="r|") as opened:
            for entry in opened:
                left -= entry.size
                if not entry.isreg() or not re.fullmatch(FILE_NAME, entry.name) or entry.name.lower() in seen:
                    raise ServeRefusal("bad_request", "the archive holds something else than a bundle's plain files")
                if left < 0 or len(seen) >= MOST_FILES:
                    raise ServeRefusal("too_large", f"a bundle has at most {MOST_FILES} files, {most_bytes} bytes")
                seen.add(entry.name.lower())
                source = opened.extractfile(entry)
                assert source is not None
                _write(source, directory / entry.name)
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        raise ServeRefusal("bad_request", "the body is not a whole tar archive") from error


def _write(source: IO[bytes], path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        while piece := source.read(_CHUNK):
            file.write(piece)
