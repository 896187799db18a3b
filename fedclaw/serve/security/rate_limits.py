"""How often a principal may ask a node, whichever worker answers, and how often an address may fail to say who it is.

The generic cell rate algorithm (ITU-T I.371, appendix I): of each bucket one number is kept, the time at which it will
be full again. A bucket that is full needs no memory, so the table holds only who asked within the last moments.

The table is a small file that all workers of a node map into memory. A bucket is taken into it under a lock. It is
counted in without one, since a lock would cost 4 to 5 us a request and this costs 1: a worker counts within 0.1 us or
so after it has looked that nobody else did. If another does in just that time, one of two requests is not counted: at
a rate of r requests per second over n workers about (n - 1) * r * 1e-7 of them, 0.03% for 4 workers at 1,000 a second.
If the system suspends a worker in just that time, what the others counted until it goes on is lost: at most a burst,
and what the rate allows in that time.
"""

import fcntl
import ipaddress
import mmap
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from fedclaw.errors import UsageError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.serve.refusals import ServeRefusal

SETS = 1 << 15
WAYS = 4
"""A set is one cache line: the names of four buckets, then their times. 131,072 principals may be active at once."""
_SET = 2 * WAYS
_HEADER = 8
"""Words of 8 bytes before the first set: what the file is, and a key that keeps collisions from being made."""
_MAGIC = b"fedclaw\x01"
_BYTES = 8 * (_HEADER + SETS * _SET)
_FARTHEST = 10 * 86_400.0
"""Seconds; a time farther ahead is of a clock before the last boot."""
MAX_RETRY_AFTER = 60.0
_PATIENCE = 50
"""Attempts to get the lock, 0.1 ms apart."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many per second on average, and `burst` at once after a pause."""

    per_second: float
    burst: float

    def __post_init__(self) -> None:
        if not 0 < self.per_second <= 1e9 or not 1 <= self.burst <= self.per_second * 86_400:
            raise UsageError("a rate limit needs a rate above 0 per second, and a burst of 1 up to a day's worth")


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Of one principal; None: no limit."""

    requests: Rate | None = None
    rows: Rate | None = None


class RateTable:
    """The buckets of a node, shared by all processes that open the same file."""

    def __init__(self, memory: mmap.mmap, file: BinaryIO | None = None) -> None:
        """`file` is what other processes lock too; None: there are none."""
        self._bytes, self._file = memory, file
        self._names = memoryview(memory).cast("Q")
        self._times = memoryview(memory).cast("d")
        self._key = bytes(memory[8:40])
        self._place = lru_cache(maxsize=8192)(self._find_place)

    @classmethod
    def create(cls, path: Path) -> None:
        """Write an empty table, for a node that starts. Processes that have an older one open keep that."""
        write_atomic(path, _empty(), PRIVATE_MODE)

    @classmethod
    def open(cls, path: Path) -> "RateTable":
        """The table in a file of `create`. Raises UsageError."""
        try:
            file = path.open("r+b")
            if os.fstat(file.fileno()).st_size != _BYTES or file.read(8) != _MAGIC:
                file.close()
                raise UsageError(f"{path} is not a table of rate limits")
            return cls(mmap.mmap(file.fileno(), _BYTES), file)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None

    @classmethod
    def private(cls) -> "RateTable":
        """A table of this process alone."""
        memory = mmap.mmap(-1, _BYTES)
        memory[: 8 * _HEADER] = _empty()[: 8 * _HEADER]
        return cls(memory)

    def take(self, kind: str, name: str, rate: Rate, amount: float, now: float) -> float:
        """Take `amount` from the bucket of `name`: 0, or the seconds after which there is enough; then none is taken.

        An amount above the burst is given to a full bucket, which then stays in debt accordingly long.
        """
        base, tag = self._place(kind, name)
        place = base if self._names[base] == tag else self._slot(base, tag, now)
        times, needed, burst = self._times, amount / rate.per_second, rate.burst / rate.per_second
        while True:
            before = times[place + WAYS]
            full_at = (before if now < before < now + _FARTHEST else now) + needed
            wait = full_at - now - (burst if burst > needed else needed)
            # Sums of intervals are not exact.
            if wait > 1e-12 * now:
                return wait
            if full_at > now + _FARTHEST:
                full_at = now + _FARTHEST - 1
            # Otherwise another worker counted meanwhile.
            if times[place + WAYS] == before or before != before:
                times[place + WAYS] = full_at
                return 0.0

    def wait(self, kind: str, name: str, rate: Rate, now: float) -> float:
        """The seconds after which one can be taken; takes none."""
        base, tag = self._place(kind, name)
        for place in range(base, base + WAYS):
            if self._names[place] == tag:
                return max(0.0, self._full_at(place, now) - now - (rate.burst - 1) / rate.per_second)
        return 0.0

    def _slot(self, base: int, tag: int, now: float) -> int:
        """The bucket's own slot, or else that of the bucket that is full or will be soonest: full ones need none."""
        places = range(base, base + WAYS)
        found = self._find(places, tag)
        if found is not None:
            return found
        with self._locked():
            found = self._find(places, tag)
            if found is None:
                found = min(places, key=lambda slot: self._full_at(slot, now))
                self._times[found + WAYS] = 0.0
                self._names[found] = tag
            return found

    def _find(self, places: Iterable[int], tag: int) -> int | None:
        return next((place for place in places if self._names[place] == tag), None)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the processes, for a microsecond. One that was suspended meanwhile is not waited for."""
        if self._file is None:
            yield
            return
        for _ in range(_PATIENCE):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(1e-4)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _full_at(self, place: int, now: float) -> float:
        full_at = self._times[place + WAYS]
        return full_at if now < full_at < now + _FARTHEST else 0.0

    def _find_place(self, kind: str, name: str) -> tuple[int, int]:
        digest = blake2b(f"{kind}:{name}".encode("utf-8", "replace"), digest_size=16, key=self._key).digest()
        chosen, tag = struct.unpack("=QQ", digest)
        return _HEADER + chosen % SETS * _SET, tag


def _empty() -> bytes:
    return (_MAGIC + secrets.token_bytes(32)).ljust(_BYTES, b"\0")


class RateLimiter:
    """Admits requests and rows of principals at their rates."""

    def __init__(
        self,
        table: RateTable,
        limits: RateLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The clock is the same in all processes of a node."""
        self._table, self._limits, self._clock = table, limits, clock

    def admit(self, principal: str) -> None:
        """Count one request. Raises ServeRefusal `too_many_requests`."""
        rate = self._limits.requests
        if rate is not None and (wait := self._table.take("requests", principal, rate, 1.0, self._clock())):
            raise _too_many("Too many requests", wait)

    def admit_rows(self, principal: str, rows: int) -> None:
        """Count the rows of a request, once it is known how many they are. Raises ServeRefusal `too_many_requests`."""
        rate = self._limits.rows
        if rate is not None and (wait := self._table.take("rows", principal, rate, float(rows), self._clock())):
            raise _too_many("Too many rows", wait)


class Allowance:
    """So much a second, and so much at once after a pause, of one process."""

    def __init__(self, per_second: float, most: float) -> None:
        self._per_second, self._most, self._left, self._at = per_second, most, most, time.monotonic()

    def take(self) -> bool:
        """Whether there is one left; then it is taken."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class FailureLimiter:
    """Slows down an address that sends tokens which are not accepted.

    It stands before the check of a signature, the costly part, and not before tokens that are known to be good: those
    are answered whoever else sends from the same address.
    """

    def __init__(
        self,
        table: RateTable,
        rate: Rate,
        proxies: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`proxies` are addresses that stand for many clients: they are not limited, but limit their clients."""
        self._table, self._rate, self._proxies, self._clock = table, rate, proxies, clock

    def check(self, address: str) -> None:
        """Raises ServeRefusal `too_many_requests` if the address failed too often lately."""
        if address in self._proxies:
            return
        if wait := self._table.wait("failures", network_of(address), self._rate, self._clock()):
            raise _too_many("Too many tokens that were not accepted", wait)

    def failed(self, address: str) -> None:
        """Count one token that was not accepted."""
        if address not in self._proxies:
            self._table.take("failures", network_of(address), self._rate, 1.0, self._clock())


@lru_cache(maxsize=8192)
def network_of(address: str) -> str:
    """What stands for a client among addresses: an IPv4 address, or the /64 that one subscriber has of IPv6."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))


def _too_many(message: str, wait: float) -> ServeRefusal:
    return ServeRefusal("too_many_requests", message, retry_after=min(wait, MAX_RETRY_AFTER))
