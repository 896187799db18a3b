"""Numbers that one process counts and another reads: a memory-mapped file for each worker.

prometheus_client's own multi-process mode costs 2 to 4 us for each number, some 10 us a request, and leaves a file
behind for each process that ever ran. Here a number is a cell of eight bytes in a mapped file: to add to one costs 0.1
us. The file belongs to a worker's place in the node and not to its process: a worker that is started again goes on with
the counts of the one before, so that no counter ever falls, and sets its gauges anew. Cells that were written are in
the page cache and survive a SIGKILL.

    head   MAGIC, how many bytes are used (8 bytes each), then cells that stand for nothing
    series length of its name, number of cells (4 bytes each); the name, padded to 8 bytes; its cells, float64

An entry is complete before `used` includes it, so a reader sees whole ones only. The owner holds a lock while it lives,
which the kernel takes back from a dead process: so a reader tells whose gauges still hold.
"""

import fcntl
import logging
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import orjson

from fedclaw.errors import FedClawError
from fedclaw.files import PRIVATE_MODE

log = logging.getLogger(__name__)

MAGIC = b"FCSERIE1"
MOST_CELLS = 64
"""Of one series."""
NOWHERE = 2
"""The first of as many cells that nobody reads: the place of series for which there is no room."""
HEAD = 8 * (NOWHERE + MOST_CELLS)
CAPACITY = 1 << 26
"""Bytes that a file may come to; what is not used takes no room."""
STEP = 1 << 16
_USED = struct.Struct("<Q")
_SIZES = struct.Struct("<II")

Place: TypeAlias = "tuple[memoryview[float], int]"
"""Cells, and the number of a series' first one among them."""


class SeriesError(FedClawError):
    """A file of series that is in use, or is none."""


@dataclass(frozen=True, slots=True)
class SeriesName:
    """Which number it is: the metric and the values of its labels, in the metric's order."""

    metric: str
    labels: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """As it lies in the file."""
        return orjson.dumps([self.metric, *self.labels])

    @classmethod
    def decode(cls, data: bytes) -> "SeriesName":
        """Raises SeriesError."""
        try:
            metric, *labels = orjson.loads(data)
            return cls(str(metric), tuple(map(str, labels)))
        except (ValueError, TypeError) as error:
            raise SeriesError("a series has no name") from error


def _locked(descriptor: int) -> bool:
    """Whether the lock was had within a second: who only asks whether it is held has it for a moment."""
    for _ in range(20):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False


class SeriesFile:
    """The numbers of one worker, for it alone to write. Series are made when they are first asked for.

    One thread at a time may make or forget series.
    """

    def __init__(self, directory: Path, worker: int, goes_on: Callable[[SeriesName], bool]) -> None:
        """Take the worker's place. `goes_on`: whether a series of the process before is kept.

        Raises SeriesError when another process has the place, or nothing can be written there.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(_lock_path(directory, worker), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_MODE)
        except OSError as error:
            raise SeriesError(f"metrics cannot be kept in {directory}: {error.strerror}") from error
        if not _locked(self._lock):
            os.close(self._lock)
            raise SeriesError(f"another process is worker {worker} of this node and counts in {directory}")
        self._path = _series_path(directory, worker)
        self._map(self._before(goes_on))

    def place(self, name: SeriesName, cells: int) -> Place:
        """Where a series of `cells` cells begins; 0 at first."""
        assert cells <= MOST_CELLS
        place = self._places.get(name)
        return self._add(name, (0.0,) * cells) if place is None else (self._cells, place)

    def keep(self, wanted: Callable[[SeriesName], bool]) -> bool:
        """Forget all other series. True: places that were had before are of no use any more."""
        values = read_series(self._path)
        kept = {name: found for name, found in values.items() if wanted(name)}
        if len(kept) == len(values):
            return False
        self._map(kept)
        return True

    def close(self) -> None:
        """Give the place up; the counts stay."""
        os.close(self._lock)
        os.close(self._descriptor)

    def _before(self, goes_on: Callable[[SeriesName], bool]) -> Mapping[SeriesName, tuple[float, ...]]:
        """What a process before counted. A file that a power cut damaged is no reason not to start."""
        if not self._path.exists():
            return {}
        try:
            return {name: values for name, values in read_series(self._path).items() if goes_on(name)}
        except SeriesError as error:
            log.warning("metrics begin at 0: %s", error)
            return {}

    def _map(self, series: Mapping[SeriesName, tuple[float, ...]]) -> None:
        """Make the file anew with these series in it, then put it in the place of the old one."""
        temporary = self._path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        before = getattr(self, "_descriptor", None)
        self._descriptor = os.open(temporary, flags, PRIVATE_MODE)
        os.ftruncate(self._descriptor, CAPACITY)
        self._mapped = mmap.mmap(self._descriptor, CAPACITY)
        self._cells = memoryview(self._mapped).cast("d")
        self._places: dict[SeriesName, int] = {}
        self._used, self._reserved = HEAD, 0
        if not self._room(HEAD):
            raise SeriesError(f"metrics cannot be kept in {self._path.parent}: no room on the disk")
        self._mapped[:8] = MAGIC
        self._mapped[8:16] = _USED.pack(HEAD)
        for name, values in series.items():
            self._add(name, values)
        temporary.replace(self._path)
        if before is not None:
            os.close(before)

    def _add(self, name: SeriesName, values: tuple[float, ...]) -> Place:
        encoded = name.encode()
        encoded += b" " * (-len(encoded) % 8)
        entry = _SIZES.pack(len(encoded), len(values)) + encoded + struct.pack(f"<{len(values)}d", *values)
        end = self._used + len(entry)
        if not self._room(end):
            return self._cells, NOWHERE
        self._mapped[self._used : end] = entry
        self._mapped[8:16] = _USED.pack(end)
        self._used = end
        self._places[name] = place = end // 8 - len(values)
        return self._cells, place

    def _room(self, end: int) -> bool:
        """Whether there is room on the disk up to there. To write to a page without is a SIGBUS."""
        while self._reserved < min(end, CAPACITY):
            try:
                os.posix_fallocate(self._descriptor, self._reserved, STEP)
            except OSError as error:
                log.warning("no room for more metrics: what is new is not counted: %s", error.strerror)
                return False
            self._reserved += STEP
        return end <= CAPACITY


def read_series(path: Path) -> dict[SeriesName, tuple[float, ...]]:
    """The numbers in a file, whose owner may be at work. Raises SeriesError for a file that is none."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            data = head + file.read(min(_USED.unpack_from(head, 8)[0], CAPACITY) if len(head) == HEAD else 0)
    except OSError as error:
        raise SeriesError(f"{path.name} cannot be read: {error.strerror}") from error
    if len(data) < HEAD or data[:8] != MAGIC:
        raise SeriesError(f"{path.name} is no file of series")
    return dict(_entries(data, min(_USED.unpack_from(data, 8)[0], len(data)), path.name))


def _entries(data: bytes, used: int, what: str) -> Iterator[tuple[SeriesName, tuple[float, ...]]]:
    at = HEAD
    while at < used:
        length, cells = _SIZES.unpack_from(data, at) if at + _SIZES.size <= used else (used, 0)
        start = at + _SIZES.size + length
        if start + 8 * cells > used:
            raise SeriesError(f"{what} is damaged")
        yield SeriesName.decode(data[at + _SIZES.size : start]), struct.unpack_from(f"<{cells}d", data, start)
        at = start + 8 * cells


def series_files(directory: Path) -> dict[int, Path]:
    """The file of each worker that ever was."""
    found = {int(path.stem.removeprefix("worker-")): path for path in directory.glob("worker-*.series")}
    return dict(sorted(found.items()))


def alive(directory: Path, worker: int) -> bool:
    """Whether a process has the worker's place now."""
    try:
        descriptor = os.open(_lock_path(directory, worker), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _series_path(directory: Path, worker: int) -> Path:
    return directory / f"worker-{worker}.series"


def _lock_path(directory: Path, worker: int) -> Path:
    return directory / f"worker-{worker}.lock"
