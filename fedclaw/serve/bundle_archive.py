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
from fedclaw.errors import FedClawError, UsageError
from fedclaw.export.layout import DIGESTS, FILE_NAME
from fedclaw.files import PRIVATE_MODE
from fedclaw.serve.refusals import ServeRefusal

MEDIA_TYPE = "application/x-tar"
MOST_FILES = 64
_CHUNK = 1 << 20


def require_bundle(path: Path) -> None:
    """Raise UsageError for a directory that is there and, by its files, no bundle."""
    if not (expanded(path) / DIGESTS).is_file():
        raise UsageError(f"bundle={path} is no bundle: it has no {DIGESTS}; give the directory of an export")


def pack(bundle: Path) -> Iterator[bytes]:
    """The archive, piece by piece, no file whole in memory. Raises OSError, FedClawError for a file that shrinks."""
    for path in sorted(bundle.iterdir()):
        if path.name.startswith(".") or path.is_symlink() or not path.is_file():
            continue
        entry = tarfile.TarInfo(path.name)
        with path.open("rb") as file:
            entry.size = left = os.fstat(file.fileno()).st_size
            yield entry.tobuf(tarfile.GNU_FORMAT)
            while left and (piece := file.read(min(left, _CHUNK))):
                left -= len(piece)
                yield piece
        if left:
            raise FedClawError(f"{path} became shorter while it was sent: publish again")
        yield bytes(-entry.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


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
