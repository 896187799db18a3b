"""A node's directory, and whom the node believes."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedclaw.cli import naming
from fedclaw.errors import UsageError
from fedclaw.export.check import Trust, load_trust
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.serve.settings import NodeSettings

DIRECTORY_MODE = 0o700
CLAIM, INCOMING, IDENTITY = ".running", ".incoming.", "identity"
BUNDLES, DATABASE, METRICS, RATES, AUDIT = "bundles", "state.db", "metrics", "rates", "audit"


@dataclass(frozen=True)
class NodeHome:
    """A node's directory, for its own user alone."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> "NodeHome":
        """The directory, made if it is missing. Raises UsageError for one that others can enter."""
        try:
            root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            mode = root.stat().st_mode
        except OSError as error:
            raise UsageError(f"state={root}: {error.strerror}") from error
        if mode & 0o077:
            raise UsageError(f"state={root} is open to others: it holds keys and logs; chmod 700 {root}")
        return cls(root)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Have the directory for this node alone. Raises UsageError where another one runs in it."""
        held = os.open(self.root / CLAIM, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_MODE)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise UsageError(
                f"state={self.root}: a node runs in it already; give this one a directory of its own, or publish to "
                "the other"
            ) from error
        finally:
            os.close(held)

    def identity(self) -> str:
        """What tells this directory from any other, made when it is first asked for."""
        path = self.root / IDENTITY
        if not path.exists():
            write_atomic(path, os.urandom(16).hex().encode(), PRIVATE_MODE)
        return path.read_text(encoding="ascii")

    def sweep(self) -> None:
        """Remove uploads that a process which was killed left."""
        for left in self.root.glob(f"{INCOMING}*"):
            shutil.rmtree(left, ignore_errors=True)

    @property
    def bundles(self) -> Path:
        """The node's copies."""
        return self.root / BUNDLES

    @property
    def metrics(self) -> Path:
        """What workers count."""
        return self.root / METRICS

    @property
    def rates(self) -> Path:
        """Of all workers' requests together."""
        return self.root / RATES

    @property
    def audit(self) -> Path:
        """Who asked what."""
        return self.root / AUDIT

    def database(self, setting: str | None) -> str:
        """Where the state store is."""
        return setting if setting is not None else f"sqlite:///{self.root.resolve() / DATABASE}"


def trust_of(settings: NodeSettings) -> Trust:
    """Whom the node believes. Raises UsageError."""
    with naming(federation=settings.federation):
        return load_trust(settings.ca, settings.federation, settings.crl, settings.expired, settings.key)
