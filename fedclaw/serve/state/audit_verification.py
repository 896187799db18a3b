"""Whether a node's audit log is whole, and what stands in it.

Found in the files alone: a line that was changed, removed, put in or moved. Found with the anchors of the state store:
an end that was cut off, and a chain that was written anew. Anchors show it only to who could not change them as well:
with SQLite on the same disk, keep a copy elsewhere, or let PostgreSQL be another machine. Nobody can tell lines that
someone who may write the files added behind the last one from the log's own.
"""

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedclaw.protocol.chain import GENESIS
from fedclaw.serve.state.audit_log import AuditFile, AuditLine, AuditLogError, described, segments_of, split, tail_of
from fedclaw.serve.state.store import StateStore

Anchors = Mapping[str, Mapping[int, str]]
"""Hashes by chain and entry."""
_MOST_FAULTS = 20
_SHOWN = frozenset({"answer", "admin", "change"})
"""Kinds of entries that people look for."""


@dataclass(frozen=True)
class ChainReport:
    """What was found of one chain."""

    chain: str
    entries: int
    """Lines that were read."""
    head: tuple[int, str]
    """Number and hash of the last one; (0, …) where there is none."""
    anchored: int
    """How many anchors its lines have been held against."""
    faults: tuple[str, ...]
    """What was changed, removed, moved or cut off; of many the first."""
    notes: tuple[str, ...]
    """What a crash or an archive explains."""


@dataclass
class _Walk:
    """Where one has come in a chain."""

    chain: str
    anchors: Mapping[int, str]
    archived: bool
    hash: str = GENESIS
    sequence: int = 0
    entries: int = 0
    anchored: int = 0
    first: int | None = None
    torn: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def segment(self, segment: AuditFile) -> None:
        tail = tail_of(segment.path)
        with segment.path.open("rb") as file:
            read, number = 0, 0
            while read < tail.end:  # What a process at work has added since is not looked at.
                line, number = file.readline(), number + 1
                read += len(line)
                self._line(f"{segment.path.name}, line {number}", split(line))
        if tail.torn:
            self.torn[segment.path.name] = tail.torn

    def end(self) -> None:
        for name, torn in self.torn.items():
            self.notes.append(f"{name}: its last {len(torn)} bytes are no whole line: a write that was cut short")
        if cut := [sequence for sequence in self.anchors if sequence > self.sequence]:
            self.faults.append(
                f"lines {self.sequence + 1} to {max(cut)} were cut off its end: line {max(cut)} is anchored"
            )
        elif self.first is None and self.anchors:
            self.faults.append("all its lines are gone")

    def _line(self, where: str, line: AuditLine | None) -> None:
        self.entries += 1
        if line is None:
            self.faults.append(f"{where}: it is not as the log writes one")
            return
        if self.first is None:
            self._begins(where, line)
        self._links(where, line)
        if line.content.get("kind") == "begin":
            self._explained(where, line)
        self.sequence, self.hash = line.sequence, line.hash
        if (known := self.anchors.get(line.sequence)) is not None:
            self.anchored += 1
            if known != line.hash:
                self.faults.append(f"{where}: it is not the line that was anchored as number {line.sequence}")

    def _begins(self, where: str, line: AuditLine) -> None:
        self.first = line.sequence
        if line.sequence == 1:
            return
        told = self.notes if self.archived else self.faults
        told.append(f"{where}: lines 1 to {line.sequence - 1} are not here")
        follows = line.content.get("follows")
        if isinstance(follows, str) and re.fullmatch("[0-9a-f]{64}", follows):
            self.sequence, self.hash = line.sequence - 1, follows

    def _links(self, where: str, line: AuditLine) -> None:
        expected = self.sequence + 1
        if line.sequence > expected:
            self.faults.append(f"{where}: lines {expected} to {line.sequence - 1} before it are missing or were moved")
        elif line.sequence < expected:
            self.faults.append(f"{where}: number {line.sequence} stands where number {expected} belongs")
        elif not line.follows(self.hash):
            self.faults.append(f"{where}: it was changed, or put in the place of another")

    def _explained(self, where: str, line: AuditLine) -> None:
        """A new file after one that ended in the middle of a line says what that was."""
        told = line.content.get("torn")
        if not self.torn and told is None:
            return
        if told == described(self.torn):
            for name, torn in self.torn.items():
                self.notes.append(f"{name}: a crash left {len(torn)} bytes of a line at its end; {where} says so")
        else:
            self.faults.append(f"{where}: what it says of the ends of the files before it is not so")
        self.torn = {}


def verify(directory: Path, anchors: Anchors | None = None, *, archived: bool = False) -> list[ChainReport]:
    """What is found of each chain in a directory, and of each that has an anchor. Reads every line.

    `archived`: the oldest files may have been moved away. Raises AuditLogError if a file cannot be read.
    """
    known = anchors or {}
    try:
        chains = segments_of(directory)
        return [
            _verify_chain(chain, chains.get(chain, []), known.get(chain, {}), archived)
            for chain in sorted({*chains, *known})
        ]
    except OSError as error:
        raise AuditLogError(f"audit log {error.filename or directory} cannot be read: {error.strerror}") from None


def _verify_chain(chain: str, segments: list[AuditFile], anchors: Mapping[int, str], archived: bool) -> ChainReport:
    walk = _Walk(chain, anchors, archived)
    for segment in segments:
        walk.segment(segment)
    walk.end()
    more = len(walk.faults) - _MOST_FAULTS
    faults = (*walk.faults[:_MOST_FAULTS], *([f"and {more} more"] if more > 0 else []))
    head = (walk.sequence, walk.hash)
    return ChainReport(chain, walk.entries, head, walk.anchored, faults, tuple(walk.notes))


def entries(directory: Path) -> Iterator[dict[str, Any]]:
    """The entries of all chains, chain after chain, not verified; lines that cannot be read are left out."""
    for segments in segments_of(directory).values():
        for segment in segments:
            with segment.path.open("rb") as file:
                yield from (found.content for line in file if (found := split(line)) is not None)


def show_audit_log(
    directory: Path,
    console: Console,
    *,
    anchors: Anchors | None = None,
    last: int = 20,
    principal: str | None = None,
    model: str | None = None,
    archived: bool = False,
) -> int:
    """Show the newest answers and admin requests of a principal and a model (None: of all), then what is found of each
    chain.

    Returns the exit code: 1 if a chain was tampered with. Raises AuditLogError.
    """
    if not directory.is_dir():
        raise AuditLogError(f"audit log {directory}: there is no such directory")
    reports = verify(directory, anchors, archived=archived)
    if last > 0:
        console.print(_answers(_newest(directory, last, principal, model)))
    for report in reports:
        state = "tampered with" if report.faults else "whole"
        against = f", {report.anchored} anchors" if anchors is not None else ", not held against anchors"
        console.print(Text(f"{report.chain}: {report.entries} lines{against}: {state}"))
        for told in (*report.faults, *report.notes):
            console.print(Text(f"  {_printable(told)}"))
    if not reports:
        console.print(Text("no line has been written"))
    return int(any(report.faults for report in reports))


def of_node(store: StateStore, node: str) -> Anchors:
    """The anchors of one node's chains, NODE.WORKER."""
    return {chain: known for chain, known in store.anchors(f"{node}.").items() if "." not in chain[len(node) + 1 :]}


def _newest(directory: Path, last: int, principal: str | None, model: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for chain in segments_of(directory).values():
        answers: deque[dict[str, Any]] = deque(maxlen=last)
        for segment in chain:
            with segment.path.open("rb") as file:
                answers.extend(
                    line.content
                    for text in file
                    if (line := split(text)) is not None
                    and line.content.get("kind") in _SHOWN
                    and principal in (None, line.content.get("principal"))
                    and model in (None, line.content.get("model"))
                )
        found.extend(answers)
    return sorted(found, key=lambda entry: str(entry.get("time")))[-last:]


def _answers(newest: list[dict[str, Any]]) -> Table:
    columns = ("time", "principal", "peer", "action", "model", "version", "request", "rows", "status", "code")
    table = Table(*columns, box=None, pad_edge=False)
    for entry in newest:
        table.add_row(*(Text(_printable(str(entry.get(column, "")))) for column in columns))
    return table


def _printable(told: str) -> str:
    """A client chose some of it, and a terminal obeys control characters."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in told)
