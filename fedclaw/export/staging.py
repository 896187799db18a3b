"""Where a bundle is assembled before it is published: beside its target, or in memory, if it is to be encrypted.

What is encrypted is never on a disk in the clear. Exporters write files, and libraries under them temporary ones; so
for an encrypted bundle all of them go to a directory of a file system that is held in memory (tmpfs), readable by its
owner alone. Swap space is the operator's: it has to be encrypted too, or switched off.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedclaw.errors import BundleError
from fedclaw.files import PUBLIC_MODE
from fedclaw.identity.at_rest import FileStore
from fedclaw.identity.data_keys import Keyring

DIRECTORY_MODE = 0o755
MEMORY_VARIABLE = "FEDCLAW_MEMORY_DIRECTORY"
SCOPE = "bundle"
"""Of the files of a bundle. Which bundle they are of, its signature says."""
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_CANDIDATES = ("/dev/shm", "/run/shm")  # noqa: S108, whether it is held in memory is looked at


@contextmanager
def assembling(target: Path, keys: Keyring | None) -> Iterator[Path]:
    """An empty directory to assemble the bundle `target` in; it is gone as the block ends.

    Raises BundleError if it has to be in memory, and there is no such file system.
    """
    if keys is None:
        with beside(target) as directory:
            yield directory
        return
    with in_memory() as directory:
        yield directory


@contextmanager
def in_memory() -> Iterator[Path]:
    """An empty directory in memory, gone as the block ends; temporary files go beside it.

    Raises BundleError if there is no such file system.
    """
    directory = Path(tempfile.mkdtemp(dir=_memory(), prefix="fedclaw-bundle."))
    before, tempfile.tempdir = tempfile.tempdir, str(directory.parent)
    try:
        yield directory
    finally:
        tempfile.tempdir = before
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """An empty directory that can be renamed to `target`; what is left of it is gone as the block ends."""
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        directory.chmod(DIRECTORY_MODE)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def encrypt_bundle(source: Path, target: Path, keys: Keyring) -> None:
    """Write each file of the signed bundle `source` into the directory `target`, encrypted."""
    store = FileStore(keys, SCOPE)
    for path in sorted(source.iterdir()):
        with path.open("rb") as content, store.replacing(target / path.name, PUBLIC_MODE) as file:
            shutil.copyfileobj(content, file)


def _memory() -> Path:
    """A directory that is held in memory. Raises BundleError."""
    named = os.environ.get(MEMORY_VARIABLE)
    for candidate in map(Path, (named,) if named else _CANDIDATES):
        if candidate.is_dir() and os.access(candidate, os.W_OK) and _file_system(candidate) in _IN_MEMORY:
            return candidate
    raise BundleError(
        f"an encrypted model is worked on in memory, and {named or ' and '.join(_CANDIDATES)} is no directory of a "
        f"tmpfs that can be written to; mount one and name it by {MEMORY_VARIABLE}"
    )


def _file_system(path: Path) -> str:
    """The type of the file system that `path` is on, as Linux tells it."""
    found, kind = Path("/"), ""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, where, name, *_ = line.split(" ")
        mounted = Path(where.encode().decode("unicode_escape"))
        if path.resolve().is_relative_to(mounted) and len(mounted.parts) >= len(found.parts):
            found, kind = mounted, name
    return kind
