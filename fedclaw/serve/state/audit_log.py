"""The audit log of a node: one line for each answer, written before its first byte leaves.

One hash chain (`fedclaw.protocol.chain`) for each worker, and one for the admin port (`fedclaw.serve.admin_access`), in
files CHAIN.000001.jsonl, CHAIN.000002.jsonl, ...; a line is {"entry": {...}, "hash": ...} with the SHA-256 of the hash
before it and the entry's bytes as they stand there. The chain goes on over files and over restarts. Each file, and each
process, starts with an entry of kind `begin`.

A line is one write, done before `append` returns: no SIGKILL of the process loses it. A power cut can lose what the
last `sync_seconds` brought; 0 syncs each line. What such an end left of a line, or of some, stays where it is: the next
process begins a new file, which says how many bytes that was, with their SHA-256, and goes on from the last whole line.

`fedclaw.serve.state.audit_verification` finds what was changed. The end of a chain can be cut off, or all of it written
anew, without a trace in the files: so its head is anchored in the state store now and then.

The log is not encrypted: `fedclaw.identity.stream` closes a file with its last segment, and what can be appended to is
never closed. Inputs asked for in full belong on an encrypted file system.
"""

import base64
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import orjson
from pydantic import JsonValue

from fedclaw.errors import FedClawError
from fedclaw.files import PRIVATE_MODE, sync_data, sync_directory
from fedclaw.protocol.chain import GENESIS, canonical
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.state.store import StateStore

log = logging.getLogger(__name__)

SEGMENT_BYTES = 64 << 20
"""A file that has reached this size is followed by the next."""
CHAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,149}")
_SEGMENT = re.compile(rf"({CHAIN_NAME.pattern})\.(\d{{6,}})\.jsonl")
_BEFORE, _BETWEEN, _AFTER = b'{"entry":', b',"hash":"', b'"}\n'
_HASH = 64
_LONGEST = 200
_BLOCK = 1 << 16
_MOST_TWINS = 100

Torn = Mapping[str, bytes]
"""By the names of files, what stands behind their last whole lines."""
Inputs = Literal["no", "digest", "full"]
WhenFull = Literal["refuse", "go_on"]


class AuditLogError(FedClawError):
    """The audit log cannot be opened."""


class AuditUnavailable(ServeRefusal):
    """The line of an answer could not be written, so the answer must not leave."""

    def __init__(self) -> None:
        super().__init__("unavailable", "the node cannot keep its audit log", retry_after=5.0)


@dataclass(frozen=True, slots=True)
class AuditFile:
    """One file of a chain."""

    chain: str
    number: int
    path: Path


@dataclass(frozen=True, slots=True)
class AuditLine:
    """One line, split but not checked."""

    entry: bytes
    """The JSON text of the entry, as it stands there."""
    hash: str
    content: dict[str, Any]

    def follows(self, previous: str) -> bool:
        """Whether its hash is what follows the hash `previous`."""
        return hashlib.sha256(bytes.fromhex(previous) + self.entry).hexdigest() == self.hash

    @property
    def sequence(self) -> int:
        """Its number in the chain, from 1."""
        return int(self.content["sequence"])


@dataclass(frozen=True, slots=True)
class AuditFileEnd:
    """How a file ends: its last whole line, and what stands behind it."""

    last: AuditLine | None
    torn: bytes
    end: int
    """Size of the file up to the end of that line."""


class AuditLog:
    """The chain that one process writes. Safe for its threads."""

    def __init__(
        self,
        directory: Path,
        chain: str,
        *,
        inputs: Inputs = "no",
        sync_seconds: float = 1.0,
        when_full: WhenFull = "refuse",
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Go on with a chain, or begin it. `chain` names its writer, as `NODE.worker-0`.

        While another process still writes that chain, as one that drains does, `chain-2` is taken, and so on.
        `inputs` says what of a request's body goes into the log; `when_full` what becomes of answers whose line cannot
        be written. Raises AuditLogError if nothing can be written at all.
        """
        if not CHAIN_NAME.fullmatch(chain):
            raise AuditLogError(f"audit log: {chain!r:.80} is no name for a chain: letters, digits, '_', '.' and '-'")
        self.missed = 0
        """Answers that left without a line since the last line (`go_on`)."""
        self._inputs, self._when_full, self._segment_bytes = inputs, when_full, segment_bytes
        self._each = sync_seconds == 0
        self._directory = directory
        self._file, self._size, self._dirty, self._torn = -1, 0, False, False
        self._failing = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.chain, self._claim = _claimed(directory, chain)
            torn = self._find_head()
        except OSError as error:
            raise AuditLogError(f"audit log {directory} cannot be opened: {error.strerror}") from None
        try:
            self._begin(torn)
        except OSError as error:
            if when_full == "refuse":
                self.close()
                raise AuditLogError(f"audit log {directory} cannot be written: {error.strerror}") from None
            self._torn = True
        if not self._each:
            threading.Thread(target=self._sync_now_and_then, args=(sync_seconds,), daemon=True).start()

    def append(
        self,
        *,
        principal: str,
        peer: str,
        model: str,
        version: str,
        request: str,
        rows: int,
        status: int,
        code: str = "",
        received: int = 0,
        body: bytes | None = None,
    ) -> bool:
        """Note an answer that is about to leave. False: it leaves without a line, as was asked for (`go_on`).

        `principal` is empty for who is unknown, `version` where none answered, `code` where nothing was refused;
        `received` is the size of the body in bytes. `body` is looked at only where inputs are asked for. Raises
        AuditUnavailable if the line cannot be written and must be: then nothing may leave.
        """
        entry: dict[str, Any] = {
            "sequence": 0,
            "kind": "answer",
            "time": datetime.now(UTC),
            "principal": principal[:_LONGEST],
            "peer": peer[:_LONGEST],
            "model": model[:_LONGEST],
            "version": version[:_LONGEST],
            "request": request[:_LONGEST],
            "rows": rows,
            "status": status,
            "code": code,
            "received": received,
        }
        if body is not None and self._inputs != "no":
            entry |= _inputs_of(body, self._inputs)
        return self._append(entry)

    def append_admin(
        self,
        *,
        kind: str,
        principal: str,
        peer: str,
        action: str,
        model: str,
        version: str,
        status: int | None,
        code: str = "",
    ) -> bool:
        """Note what an operator asked for: as `change` before it is done, as `admin` with the answer's `status`.

        Returns and raises what `append` does.
        """
        entry: dict[str, Any] = {
            "sequence": 0,
            "kind": kind,
            "time": datetime.now(UTC),
            "principal": principal[:_LONGEST],
            "peer": peer[:_LONGEST],
            "action": action[:_LONGEST],
            "model": model[:_LONGEST],
            "version": version[:_LONGEST],
        }
        return self._append(entry if status is None else {**entry, "status": status, "code": code})

    def _append(self, entry: dict[str, Any]) -> bool:
        with self._lock:
            try:
                if self._torn or self._size >= self._segment_bytes:
                    self._follow_up()
                if self.missed:
                    self._write({"sequence": 0, "kind": "missed", "time": datetime.now(UTC), "answers": self.missed})
                    self.missed = 0
                self._write(entry)
            except OSError as error:
                self._failed(error)
                return False
            self._failing = False
            return True

    def head(self) -> tuple[int, str]:
        """Number and hash of the newest line."""
        with self._lock:
            return self._sequence, self._head.hex()

    def anchor(self, store: StateStore) -> bool:
        """Tell the state store the chain's head: what comes before can no longer be changed or cut off unseen.

        False: another head was anchored there, or one that the chain does not reach; lines are gone. Raises
        StateUnavailable.
        """
        sequence, head = self.head()
        return store.anchor(self.chain, sequence, head)

    def close(self) -> None:
        """Bring all to the disk, and leave the chain to the next process."""
        self._stopped.set()
        with self._lock:
            if self._file >= 0:
                with suppress(OSError):
                    self._sync()
                os.close(self._file)
            if self._claim >= 0:
                os.close(self._claim)
            self._file, self._claim, self._torn = -1, -1, True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find_head(self) -> Torn:
        """Where the chain ended. Returns what stands behind its last whole line."""
        self._number, self._sequence, self._head = 0, 0, bytes.fromhex(GENESIS)
        segments = segments_of(self._directory).get(self.chain, [])
        self._number = segments[-1].number if segments else 0
        torn: dict[str, bytes] = {}
        for segment in reversed(segments):
            end = tail_of(segment.path)
            if end.torn:
                log.warning("audit log %s: its last %d bytes are no whole line", segment.path.name, len(end.torn))
                torn[segment.path.name] = end.torn
            if end.last is not None:
                self._sequence, self._head = end.last.sequence, bytes.fromhex(end.last.hash)
                break
        return torn

    def _begin(self, torn: Torn) -> None:
        """Go on in the last file, unless there is none or it ended in the middle of a line."""
        path = segment_path(self._directory, self.chain, self._number)
        if torn or not path.exists() or path.stat().st_size >= self._segment_bytes:
            self._next_segment(torn)
        else:
            self._open(path, os.O_RDWR)
            self._write(self._beginning({}))

    def _follow_up(self) -> None:
        """Begin the next file. One that is only large is written on where that fails."""
        if self._stopped.is_set():
            raise OSError(errno.EBADF, "the audit log is closed")
        if self._file < 0:
            self._next_segment(self._find_head())
        elif self._torn:
            size = max(0, os.fstat(self._file).st_size - self._size)
            name = segment_path(self._directory, self.chain, self._number).name
            self._next_segment({name: os.pread(self._file, size, self._size)} if size else {})
        else:
            with suppress(OSError):
                self._next_segment({})

    def _next_segment(self, torn: Torn) -> None:
        """Begin the next file, which says what `torn` stands at the end of this one. Raises OSError, and nothing is
        changed."""
        old = (self._file, self._size, self._torn, self._sequence, self._head)
        path = segment_path(self._directory, self.chain, self._number + 1)
        try:
            self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self._write(self._beginning(torn))
        except OSError:
            if self._file != old[0]:
                with suppress(OSError):
                    os.close(self._file)
                    path.unlink()
            self._file, self._size, self._torn, self._sequence, self._head = old
            # A name that is taken, which it should not be, is passed over.
            self._number += path.exists()
            raise
        self._number, self._torn = self._number + 1, False
        if old[0] >= 0:
            with suppress(OSError):
                sync_data(old[0])
            os.close(old[0])

    def _beginning(self, torn: Torn) -> dict[str, Any]:
        entry: dict[str, Any] = {"sequence": 0, "kind": "begin", "time": datetime.now(UTC), "process": os.getpid()}
        entry["follows"] = self._head.hex()
        if torn:
            entry["torn"] = described(torn)
        return entry

    def _open(self, path: Path, how: int) -> None:
        self._file = os.open(path, how | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_MODE)
        self._size = os.fstat(self._file).st_size
        sync_directory(self._directory)

    def _write(self, entry: dict[str, Any]) -> None:
        """One line, all of it or none. Raises OSError."""
        entry["sequence"] = self._sequence + 1
        try:
            text = orjson.dumps(entry)
        except TypeError:  # A text that is no Unicode: half a surrogate pair.
            text = canonical({**entry, "time": entry["time"].isoformat()}).encode()
        head = hashlib.sha256(self._head + text).digest()
        line = _BEFORE + text + _BETWEEN + head.hex().encode() + _AFTER
        written = os.write(self._file, line)
        if written != len(line):
            self._cut_back()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._sequence += 1
        self._head = head
        self._size += written
        self._dirty = True
        if self._each:
            self._sync()

    def _cut_back(self) -> None:
        """Take back a part of a line. Where that fails, the next line begins a new file."""
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            self._torn = True

    def _failed(self, error: OSError) -> None:
        goes_on = self._when_full == "go_on" and not self._stopped.is_set()
        if not self._failing:
            what = "answers leave without a line, as was asked for" if goes_on else "nothing is answered"
            log.error("audit log %s: %s; %s", self.chain, error.strerror, what)
        self._failing = True
        if not goes_on:
            raise AuditUnavailable from None
        self.missed += 1

    def _sync(self) -> None:
        if self._dirty:
            sync_data(self._file)
            self._dirty = False

    def _sync_now_and_then(self, seconds: float) -> None:
        while not self._stopped.wait(seconds):
            with self._lock:
                if self._file < 0 or not self._dirty:
                    continue
                file, self._dirty = os.dup(self._file), False
            try:
                # Not under the lock: a slow disk does not hold up answers.
                sync_data(file)
                if os.fstat(file).st_nlink == 0:
                    self._was_removed()
            except OSError as error:
                log.error("audit log %s cannot be brought to the disk: %s", self.chain, error)
                self._dirty = True
            finally:
                os.close(file)

    def _was_removed(self) -> None:
        log.error("audit log %s: its file was removed while it was written", self.chain)
        with self._lock:
            self._torn = True


def described(torn: Torn) -> dict[str, dict[str, JsonValue]]:
    """What the next file says of the ends of those before it."""
    return {
        name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()} for name, text in sorted(torn.items())
    }


def segment_path(directory: Path, chain: str, number: int) -> Path:
    """The file of a chain's segment `number`, from 1."""
    return directory / f"{chain}.{number:06d}.jsonl"


def segments_of(directory: Path) -> dict[str, list[AuditFile]]:
    """The files of each chain in a directory, in order."""
    chains: dict[str, list[AuditFile]] = {}
    for path in directory.iterdir():
        if (found := _SEGMENT.fullmatch(path.name)) is not None:
            chains.setdefault(found[1], []).append(AuditFile(found[1], int(found[2]), path))
    return {chain: sorted(chains[chain], key=lambda segment: segment.number) for chain in sorted(chains)}


def split(line: bytes) -> AuditLine | None:
    """A line with its end; None if it is not written as this log writes."""
    cut = len(line) - len(_AFTER) - _HASH - len(_BETWEEN)
    if not (line.startswith(_BEFORE) and line.endswith(_AFTER) and line[cut : cut + len(_BETWEEN)] == _BETWEEN):
        return None
    entry, found = line[len(_BEFORE) : cut], line[-len(_AFTER) - _HASH : -len(_AFTER)].decode("ascii", "replace")
    try:
        content = orjson.loads(entry) if b"\\ud" not in entry else json.loads(entry)
        bytes.fromhex(found)
        int(content["sequence"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return AuditLine(entry, found, content) if isinstance(content, dict) else None


def tail_of(path: Path) -> AuditFileEnd:
    """The last whole line of a file, and what stands behind it. Reads no more than that."""
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        rest = b""
        while True:
            for cut, end in _line_ends(rest, start == 0):
                if (line := split(rest[cut:end])) is not None:
                    return AuditFileEnd(line, rest[end:], start + end)
            if start == 0:
                return AuditFileEnd(None, rest, 0)
            size = min(start, max(_BLOCK, len(rest)))
            start = file.seek(start - size)
            rest = file.read(size) + rest


def _line_ends(text: bytes, whole: bool) -> Iterator[tuple[int, int]]:
    """Where lines begin and end, the last one first; the first one only if the text begins with its beginning."""
    end = text.rfind(b"\n") + 1
    while end > 0:
        begin = text.rfind(b"\n", 0, end - 1) + 1
        if begin == 0 and not whole:
            return
        yield begin, end
        end = begin


def _claimed(directory: Path, chain: str) -> tuple[str, int]:
    """A chain that no other process writes, and the lock that keeps it so."""
    for twin in range(1, _MOST_TWINS + 1):
        name = chain if twin == 1 else f"{chain}-{twin}"
        claim = os.open(directory / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_MODE)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(claim)
        else:
            return name, claim
    raise AuditLogError(f"audit log {directory}: {_MOST_TWINS} processes write {chain} already")


def _inputs_of(body: bytes, how: str) -> Mapping[str, str]:
    if how == "digest":
        return {"body_sha256": hashlib.sha256(body).hexdigest()}
    try:
        return {"body": body.decode("utf-8")}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(body).decode()}
