"""The database behind a state store: one SQLite file, or PostgreSQL where two nodes share it.

Where it is said in one of four ways: `sqlite:///PATH`; `postgresql://USER@HOST/NAME`; `env:NAME`, an environment
variable that holds such a URL; `file:PATH`, a file that does. A URL with a password is only taken from the last two: a
command line is read by every user of the machine. No message, log line or exception holds a password.

SQLite: WAL, so that readers never wait for a writer; one writer at a time, which waits up to `PATIENCE`. The file has
mode 0600, as it holds the feedback key. It must lie on a local disk: SQLite's locks do not hold over NFS.
PostgreSQL: connections are checked when they are taken from the pool, so a server that came back is used again at once.
A server on another machine has to prove who it is (`sslmode=verify-full`) unless the URL says something else.
"""

import logging
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Table,
    create_engine,
    event,
    literal_column,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from fedclaw.errors import FedClawError, UsageError
from fedclaw.files import PRIVATE_MODE
from fedclaw.serve.refusals import ServeRefusal

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds for which a statement waits for its turn, or for an answer, before the database counts as away."""
RETRY_AFTER = 2.0
"""Seconds after which a client may ask again."""
_SECRET_MODE = 0o077
_LOCAL = {None, "", "localhost", "127.0.0.1", "::1"}
_CREATION = 0x66656463  # The advisory lock under which nodes that start together make the tables.


class StateUnavailable(ServeRefusal):
    """The state store does not answer. What was to be written may or may not be in it: it is not acknowledged."""

    def __init__(self, detail: str) -> None:
        super().__init__("unavailable", "the node's state store does not answer; try again", RETRY_AFTER)
        self.detail = detail
        """What the database said, for the log. Not for a client."""


class StateStoreError(FedClawError):
    """The state store is not what it should be, and trying again does not help."""


class Database:
    """Connections to one database. Safe for many threads; each process opens its own."""

    def __init__(self, where: str) -> None:
        """`where` as the module says. Nothing is connected yet. Raises UsageError for what is no such place."""
        url = _resolved(where)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._path: Path | None = None
        self._inode: tuple[int, int] | None = None
        if self.is_sqlite:
            self._path = _database_path(url)
            self._engine = _sqlite_engine(self._path)
        else:
            self._engine = _postgresql_engine(url)
        # A transaction would be two more round trips.
        self._reader = self._engine if self.is_sqlite else self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self.now: ColumnElement[float] = literal_column(
            "((julianday('now') - 2440587.5) * 86400.0)"
            if self.is_sqlite
            else "(extract(epoch from clock_timestamp())::double precision)"
        )
        """The database's clock, in Unix seconds: two nodes whose clocks differ agree on it."""

    @contextmanager
    def creating(self) -> Iterator[Connection]:
        """A transaction to make tables in: of processes that start together, one after the other."""
        if self._path is not None:
            self._inode = _private_file(self._path)
            with self._translated():
                _use_wal(self._engine)
        with self.writing() as connection:
            if not self.is_sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_CREATION})"))
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for a question; each question sees what is committed when it is asked. Raises
        StateUnavailable."""
        with self._translated(), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[Connection]:
        """A transaction, which is on disk when the block has ended, unless it need not be `durable`: then a power cut
        (no crash of a process) may undo it. Raises StateUnavailable: then it may or may not have happened."""
        self._still_there()
        options = {"fedclaw_write": True, "fedclaw_durable": durable}
        with (
            self._translated(),
            self._engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            if not (durable or self.is_sqlite):
                connection.execute(text("SET LOCAL synchronous_commit = off"))
            yield connection

    def lock(self, connection: Connection, table: Table) -> None:
        """Let nobody else write a table until the transaction ends. In SQLite that is so already."""
        if not self.is_sqlite:
            connection.execute(text(f"LOCK TABLE {table.name} IN SHARE ROW EXCLUSIVE MODE"))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _still_there(self) -> None:
        """What is written to a removed file would be acknowledged, and lost."""
        if self._path is not None and self._inode != _identity(self._path):
            raise StateUnavailable(f"state file {self._path} was removed or replaced: start the node again")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            reason = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
            raise StateUnavailable(f"{type(reason).__name__}: {str(reason).strip():.300}") from None


def _resolved(where: str) -> URL:
    scheme, _, rest = where.partition(":")
    if scheme == "env":
        if not (plain := os.environ.get(rest, "").strip()):
            raise UsageError(f"database: the environment variable {rest} is empty or not set; it should hold a URL")
    elif scheme == "file":
        plain = _secret_text(Path(rest))
    else:
        plain = where
    url = _parsed(plain)
    if plain is where and url.password is not None:
        raise UsageError(
            "database: a URL with a password belongs into an environment variable (env:NAME) or a file (file:PATH)"
        )
    return url


def _parsed(plain: str) -> URL:
    try:
        url = make_url(plain)
        known = url.drivername in {"sqlite", "postgresql", "postgresql+psycopg"}
    except (ArgumentError, ValueError):
        known = False
    if not known:
        raise UsageError("database: give sqlite:///PATH, postgresql://USER@HOST/NAME, env:VARIABLE or file:PATH")
    return url


def _secret_text(path: Path) -> str:
    try:
        if path.stat().st_mode & stat.S_IRWXO:
            raise UsageError(f"database: {path} can be read by everybody; make it `chmod 600`")
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"database: {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}"
        ) from None


def _database_path(url: URL) -> Path:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:") or url.query:
        raise UsageError("database: a node's processes share a file: sqlite:///PATH, with nothing after the path")
    return Path(url.database).absolute()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _private_file(path: Path) -> tuple[int, int] | None:
    """Make the file if there is none, before SQLite would, with our mode. SQLite gives its other files the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_MODE)
    except OSError as error:
        raise StateStoreError(f"state file {path} cannot be written: {error.strerror}") from None
    try:
        if os.fstat(descriptor).st_mode & _SECRET_MODE:
            raise StateStoreError(f"state file {path} holds keys and is open to other users; make it `chmod 600`")
    finally:
        os.close(descriptor)
    return _identity(path)


def _sqlite_engine(path: Path) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"timeout": PATIENCE}, hide_parameters=True
    )

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # We say BEGIN: the driver would only before the first write.

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("fedclaw_write"):
            # At once for writing: a reader that turns writer is refused, not made to wait, when another was faster.
            connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if options['fedclaw_durable'] else 'NORMAL'}")
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _use_wal(engine: Engine) -> None:
    """SQLite's own patience does not cover this change, so ours does. It lasts: later connections find it."""
    end = time.monotonic() + PATIENCE
    while True:
        connection = engine.raw_connection()
        try:
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode = WAL")
            if cursor.fetchone() == ("wal",):
                return
            failure: Exception = sqlite3.OperationalError("the file system does not allow SQLite's WAL")
        except sqlite3.OperationalError as error:
            failure = error
        except sqlite3.DatabaseError as error:
            raise StateStoreError(f"the state file is damaged or no SQLite database: {error}") from None
        finally:
            connection.close()
        if time.monotonic() > end:
            raise StateUnavailable(str(failure))
        time.sleep(0.02)


def _postgresql_engine(url: URL) -> Engine:
    options = {
        "connect_timeout": str(int(PATIENCE / 2)),
        "tcp_user_timeout": str(int(PATIENCE * 1000)),
        "keepalives_idle": "5",
        "keepalives_interval": "2",
        "keepalives_count": "3",
        "options": f"-c statement_timeout={int(PATIENCE * 1000)} -c timezone=UTC",
        "application_name": "fedclaw-serve",
    }
    asked = dict(url.query)
    if "sslmode" not in asked and not _is_local(url):
        options["sslmode"] = "verify-full"
    if "options" in asked:
        options["options"] = f"{options['options']} {asked.pop('options')}"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise UsageError("database: PostgreSQL needs psycopg: pip install 'fedclaw[postgresql]'") from None
    engine = create_engine(
        url.set(drivername="postgresql+psycopg", query={**options, **asked}),
        hide_parameters=True,
        pool_pre_ping=True,
        pool_size=4,
        max_overflow=4,
        pool_timeout=PATIENCE,
    )

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        # What we acknowledge is on disk, whatever this server's default is. A stricter default stays.
        with connection.cursor() as cursor:
            cursor.execute("SHOW synchronous_commit")
            if cursor.fetchone() == ("off",):
                cursor.execute("SET synchronous_commit = on")
        connection.commit()

    return engine


def _is_local(url: URL) -> bool:
    host = url.host or url.query.get("host")
    return host in _LOCAL or (isinstance(host, str) and host.startswith("/"))
