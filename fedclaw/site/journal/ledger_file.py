"""The privacy ledger as a file: made private, watched for foreign hands, and read without writing to it."""

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from fedclaw.errors import LedgerError
from fedclaw.files import PRIVATE_MODE
from fedclaw.site.journal.history import Entry, Index

log = logging.getLogger(__name__)

BUSY_SECONDS = 60.0
"""How long a process waits for its turn at the file."""

_KNOWN: dict[tuple[int, ...], tuple[int, ...]] = {}
# By device and inode: what one ledger of this process writes is no foreign hand to another.


def read_ledger(path: Path) -> tuple[tuple[Entry, ...], Index]:
    """All entries of the ledger at `path` and what they say, verified, without writing to it.

    Holds SQLite's shared lock for one read, so a client may be running. Only a write that a crash has cut off is
    undone first, by SQLite, which needs the right to write. Raises LedgerError if there is no ledger, or naming the
    first bad entry.
    """
    where = f"privacy ledger {path}"
    if not path.is_file():
        raise LedgerError(f"{where} does not exist: the site's client makes it when it first starts")
    try:
        with closing(connect_to_read(path)) as connection:
            return follow_all(connection)
    except LedgerError as error:
        raise LedgerError(blocking(where, error)) from error
    except sqlite3.Error as error:
        raise LedgerError(f"{where}: {error}") from error


def blocking(where: str, error: LedgerError) -> str:
    """The error's text, once with `where` before it and what to do behind it."""
    text = str(error)
    if text.startswith(where):
        return text
    return f"{where}: {text}; do not train on until it is explained or a backup is restored"


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A new connection, which sees the file as it is now; read-only unless a cut-off write has to be undone."""
    try:
        return _connect(path, "ro")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
    return _connect(path, "rw")


def follow_all(connection: sqlite3.Connection) -> tuple[tuple[Entry, ...], Index]:
    """Read and check every entry. Raises LedgerError naming the first bad one."""
    # One statement, so that both are of the same moment.
    rows = connection.execute(
        "SELECT sequence, body, hash, (SELECT seq FROM sqlite_sequence WHERE name = 'entries') "
        "FROM entries ORDER BY sequence"
    ).fetchall()
    index = Index()
    entries = tuple(index.follow(*row[:3]) for row in rows)
    if not rows or rows[-1][3] != index.sequence:
        raise LedgerError(f"entries after {index.sequence} were removed from its end")
    return entries, index


def make_private(path: Path) -> None:
    """Create `path` with mode 0600, or take everybody else's rights away. SQLite's journal inherits the mode.

    Raises LedgerError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, PRIVATE_MODE))
        if path.stat().st_mode & 0o077:
            log.warning("privacy ledger %s was open to others; its mode is now 0600", path)
            path.chmod(PRIVATE_MODE)
    except OSError as error:
        raise LedgerError(f"privacy ledger {path} cannot be written: {error.strerror}") from error


class FileWatch:
    """Tells whether somebody else has touched a file. SQLite alone goes on with one that was renamed or removed."""

    def __init__(self, path: Path) -> None:
        """Begin with the file that is at `path` now. Raises LedgerError if there is none."""
        self._path = path
        self._file = self._status()[:2]
        self.known = self.look()

    @property
    def known(self) -> tuple[int, ...]:
        """What `look` returned when the file was last read or written by this process, through whichever watch."""
        return _KNOWN[self._file]

    @known.setter
    def known(self, seen: tuple[int, ...]) -> None:
        _KNOWN[self._file] = seen

    def look(self) -> tuple[int, ...]:
        """The file's size and times. Raises LedgerError if it is gone, or another file has its name."""
        device, inode, *touched = self._status()
        if (device, inode) != self._file:
            raise LedgerError("another file was put in its place while it was in use")
        return tuple(touched)

    def _status(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise LedgerError(f"the file cannot be found any more: {error.strerror}") from error
        # The change time cannot be set by hand, as the modification time can.
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None
    )
    try:
        # Undoes a cut-off write, if there is one, or says that it may not.
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection
