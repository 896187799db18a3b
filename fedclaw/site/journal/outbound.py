"""The outbound log: one line for each message that leaves a site, written before its first byte does.

JSON lines, hash-chained (`fedclaw.protocol.chain`): {"entry": {...}, "hash": ...}. A line is one write, flushed to disk
before `append` returns; the file has mode 0600. A process killed in mid-write leaves a last line without its end: it
was never acknowledged, so its message did not leave, and it is moved to FILE.torn when the log is next used. Any other
line that does not fit is damage, and named. Several processes may write; they take turns by a file lock.

A message that is sent again (same identity, same digest: a broken connection, a restart) gets an entry of its own
with `resent` true: the log holds what may have left, not only what arrived.
"""

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import Field, JsonValue, ValidationError

from fedclaw.errors import LedgerError
from fedclaw.files import PRIVATE_MODE, append_all, sync_directory
from fedclaw.protocol.chain import GENESIS, canonical, link
from fedclaw.protocol.frozen import Frozen, explain

log = logging.getLogger(__name__)

EVALUATE = "evaluate"
"""Flower's MessageType.EVALUATE, as it stands in a line: who reads the log has no need of Flower."""

_BLOCK = 1 << 20


class OutboundEntry(Frozen):
    """What left, when, and what it cost."""

    sequence: int = Field(ge=1)
    time: str
    """UTC, ISO 8601; for people, and for how often the site lets itself be asked (`fedclaw.site.privacy_budget`)."""
    federation: str
    run: str
    round: str
    """The message's group: the round, as the server named it."""
    kind: str
    """The message's type: train, evaluate, ..."""
    message_id: str
    bytes: int = Field(ge=0)
    """Size of what left, sealed."""
    digest: str
    """SHA-256 (hexadecimal) of what left, sealed; `tree:` before it: of the SHA-256 of each of its chunks, joined."""
    receipt: dict[str, JsonValue] | None
    """The privacy receipt inside, if the message carried one."""
    resent: bool
    """Whether the same message left, or was about to, before."""
    refused: bool = False
    """Whether it says that the site does not take part, or failed."""

    @property
    def is_free_evaluation(self) -> bool:
        """Whether it answers an evaluation at no cost: sent again counts once, what was charged is in the ledger."""
        return self.kind == EVALUATE and not (self.resent or self.refused or self.receipt is not None)


class OutboundLog:
    """The log at one path. Safe for use by several threads and processes."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or begin the log and check all of it. Raises LedgerError if it is damaged or cannot be written.

        With `read_only` nothing is written, not even a last line without its end set aside, and `append` fails.
        """
        self._path = path
        self._read_only = read_only
        self._lock = threading.RLock()
        self._known = GENESIS
        self._forget()
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if read_only else _open_to_write(path)
        except OSError as error:
            wanted = "read" if read_only else "written"
            raise LedgerError(f"outbound log {path} cannot be {wanted}: {error.strerror}") from error
        try:
            self.verify()
        except BaseException:
            self.close()
            raise

    def append(
        self,
        *,
        federation: str,
        run: str,
        round: str,
        kind: str,
        message_id: str,
        size: int,
        digest: str,
        receipt: str | None,
        refused: bool = False,
    ) -> OutboundEntry:
        """Note that a message is about to leave; durable on return.

        `size` in bytes and `digest` are those of what leaves; `receipt` is the receipt's JSON text. Raises LedgerError
        if it cannot be noted: then nothing may leave.
        """
        with self._exclusive():
            self._catch_up()
            try:
                entry = OutboundEntry(
                    sequence=self._sequence + 1,
                    time=datetime.now(UTC).isoformat(timespec="seconds"),
                    federation=federation,
                    run=run,
                    round=round,
                    kind=kind,
                    message_id=message_id,
                    bytes=size,
                    digest=digest,
                    receipt=None if receipt is None else json.loads(receipt),
                    resent=(message_id, digest) in self._sent,
                    refused=refused,
                )
                line = self._line(entry)
            except ValidationError as error:
                raise LedgerError(
                    f"outbound log {self._path}: the message cannot be noted: {explain(error)}"
                ) from error
            except ValueError as error:
                raise LedgerError(f"outbound log {self._path}: the receipt is not JSON: {error}") from error
            self._write(line)
            self._follow(line.rstrip(b"\n"))
            self._known = self._head
            return entry

    def verify(self) -> None:
        """Read the whole file again and walk the chain. Raises LedgerError naming the first bad line."""
        with self._exclusive():
            self._forget()
            self._catch_up()

    def entries(self) -> tuple[OutboundEntry, ...]:
        """All entries, verified."""
        with self._exclusive():
            self._forget()
            self._catch_up()
            lines = os.pread(self._file, self._offset, 0).splitlines()
            return tuple(OutboundEntry.model_validate(json.loads(line)["entry"]) for line in lines)

    def evaluation_times(self, last: int) -> list[str]:
        """When evaluations were answered at no cost, the `last` ones in order, each no earlier than those before it."""
        with self._exclusive():
            self._catch_up()
            return self._evaluations[-last:]

    def head(self) -> str:
        """The hash of the newest entry."""
        with self._exclusive():
            self._catch_up()
            return self._head

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget(self) -> None:
        self._sequence, self._offset, self._head = 0, 0, GENESIS
        self._heads = {GENESIS}
        self._sent: set[tuple[str, str]] = set()
        self._evaluations: list[str] = []

    def _catch_up(self) -> None:
        """Follow what other processes have written since; a line without its end is set aside."""
        size = os.fstat(self._file).st_size
        if size < self._offset:
            raise LedgerError(f"outbound log {self._path}: lines after {self._sequence} are gone; the file was cut")
        rest = b""
        while self._offset + len(rest) < size:
            block = os.pread(self._file, _BLOCK, self._offset + len(rest))
            if not block:
                break
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._follow(line)
        if rest and not self._read_only:
            self._set_aside(rest)
        if self._known not in self._heads:
            raise LedgerError(f"outbound log {self._path}: lines that this process has written or seen are gone")
        self._known = self._head

    def _follow(self, line: bytes) -> None:
        number = self._sequence + 1
        try:
            plain: Any = json.loads(line)
            text = canonical(plain["entry"])
            entry = OutboundEntry.model_validate(plain["entry"])
            if canonical(plain).encode() != line or entry.sequence != number:
                raise ValueError("it is not as FedClaw writes it")
        except (ValueError, KeyError, TypeError) as error:
            reason = explain(error) if isinstance(error, ValidationError) else str(error)
            raise LedgerError(f"outbound log {self._path}: line {number} cannot be read: {reason}") from error
        if link(self._head, text) != plain["hash"]:
            raise LedgerError(
                f"outbound log {self._path}: line {number} was changed, or one before it removed: its hash does not "
                "follow from what precedes it"
            )
        self._sequence, self._head, self._offset = number, plain["hash"], self._offset + len(line) + 1
        self._heads.add(self._head)
        self._sent.add((entry.message_id, entry.digest))
        if entry.is_free_evaluation:
            self._evaluations.append(max([entry.time, *self._evaluations[-1:]]))

    def _line(self, entry: OutboundEntry) -> bytes:
        plain = entry.model_dump()
        return canonical({"entry": plain, "hash": link(self._head, canonical(plain))}).encode() + b"\n"

    def _write(self, line: bytes) -> None:
        try:
            append_all(self._file, line)
        except OSError as error:
            raise LedgerError(f"outbound log {self._path} cannot be written: {error}") from error

    def _set_aside(self, rest: bytes) -> None:
        torn = self._path.with_name(self._path.name + ".torn")
        try:
            with os.fdopen(os.open(torn, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_MODE), "ab") as file:
                file.write(rest + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.ftruncate(self._file, self._offset)
            os.fsync(self._file)
        except OSError as error:
            raise LedgerError(f"outbound log {self._path} cannot be repaired: {error}") from error
        log.warning(
            "outbound log %s: line %d was cut off in mid-write; its message did not leave, its %d bytes are now in %s",
            self._path,
            self._sequence + 1,
            len(rest),
            torn.name,
        )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            if self._file < 0:
                raise LedgerError(f"outbound log {self._path} is closed")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)


def _open_to_write(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, PRIVATE_MODE)
    os.fchmod(file, PRIVATE_MODE)
    sync_directory(path.parent)
    return file
