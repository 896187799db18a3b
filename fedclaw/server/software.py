"""Which code, and which versions of what it builds on, made a run or a bundle.

Names no host, user or path. The digest of the sources tells whether two installations hold the same code, however they
came by it; a git revision is told where the package lies in a checkout, and says nothing of what was changed since.
"""

import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fedclaw.catalogue import STRATEGIES, WORKLOADS, plugin_points
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.limits import Digest

PACKAGE = "fedclaw"
_REVISION = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?\Z")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOOLS = re.compile(r"extra\s*==\s*['\"]dev['\"]")
_SMALL = 1 << 16
"""Bytes of a file of git's that are read."""


class Software(Frozen):
    """What a process ran on."""

    fedclaw: str | None
    """Its version; None: it is not installed as a distribution."""
    source_sha256: Digest
    """SHA-256 over the package's Python files, by name and content (`source_digest`)."""
    revision: str | None
    """The commit of the git checkout that the package lies in; None: it lies in none."""
    python: str
    platform: str
    """Operating system and kind of processor."""
    packages: dict[str, str]
    """The versions of installed dependencies, and of distributions that add strategies or workloads."""


@cache
def software() -> Software:
    """That of this process."""
    package = Path(__file__).resolve().parent.parent
    return Software(
        fedclaw=_version(PACKAGE),
        source_sha256=source_digest(package),
        revision=checkout_revision(package.parent),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: version for name in _dependencies() if (version := _version(name)) is not None},
    )


def source_digest(package: Path) -> str:
    """SHA-256 over each Python file under `package`: its relative name, its size and its content, in order of names."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def checkout_revision(root: Path) -> str | None:
    """The commit that the git checkout `root` is at; None if it is none, or says it in a way that is not known here.

    Read from git's files: git itself would run what a checkout's configuration names.
    """
    try:
        place = root / ".git"
        if place.is_file():  # a worktree
            place = root / _first_line(place).removeprefix("gitdir: ")
        head = _first_line(place / "HEAD")
        if not head.startswith("ref: "):
            return head if _REVISION.match(head) else None
        return _reference(place, head.removeprefix("ref: "))
    except (OSError, UnicodeDecodeError, ValueError):
        return None


def _reference(place: Path, name: str) -> str | None:
    """The commit of the reference `name`; of a worktree's, the references are in the directory that all share."""
    shared = place / _first_line(place / "commondir") if (place / "commondir").is_file() else place
    for directory in (place, shared):
        if (directory / name).is_file():
            commit = _first_line(directory / name)
            return commit if _REVISION.match(commit) else None
    for line in (shared / "packed-refs").read_text(encoding="utf-8").splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name:
            return commit if _REVISION.match(commit) else None
    return None


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_SMALL).decode("utf-8").partition("\n")[0].strip()


def _dependencies() -> list[str]:
    """Names of distributions, normalised, in order."""
    return sorted(
        {re.sub(r"[-_.]+", "-", name).lower() for name in (*_required(), *plugin_distributions())} - {PACKAGE}
    )


def _required() -> Iterator[str]:
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        if (match := _REQUIREMENT.match(line)) and not _TOOLS.search(line):
            yield match[0]


def plugin_distributions() -> tuple[str, ...]:
    """Names of the distributions that add strategies or workloads."""
    groups = (STRATEGIES, WORKLOADS)
    points = (point for group in groups for point in plugin_points(group).values())
    return tuple(sorted({point.dist.name for point in points if point.dist is not None}))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
