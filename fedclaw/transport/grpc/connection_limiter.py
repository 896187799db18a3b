"""Limits the connections whose peers have not identified themselves, so that they cannot keep sites out.

gRPC counts an unfinished handshake like a site, and refuses whoever comes once its maximum is reached: some hundred
peers that open a connection and stay silent would keep every site out. So gRPC's maximum is far above the number of
sites, and the unidentified connections are limited here: beyond the limit, the oldest of the address that has most of
them are closed. A site takes a moment for its handshake, so its connection is not among the oldest.
"""

import ipaddress
import logging
import os
import resource
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

log = logging.getLogger(__name__)

HEADROOM = 4096
"""Connections above the limit that may come between two checks."""
INTERVAL = 0.5
"""Seconds between two checks."""
_RESERVE = 512
"""File descriptors left for everything else."""
_OPEN_FILES = Path("/dev/fd")
_REPORT_EVERY = 60.0

Endpoint = tuple[str, int]


def room(limit: int) -> int:
    """gRPC's maximum of connections for a limit of `limit`; asks the system for as many open files."""
    wanted = limit + HEADROOM
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + _RESERVE:
        most = wanted + _RESERVE if hard == resource.RLIM_INFINITY else min(hard, wanted + _RESERVE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return wanted if soft == resource.RLIM_INFINITY else max(limit, min(wanted, soft - _RESERVE))


def endpoint_of(peer: str) -> Endpoint | None:
    """Address and port of a peer as gRPC names it ("ipv4:127.0.0.1:5000"); None for a peer without."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    try:
        return _plain(host.strip("[]")), int(port)
    except ValueError:
        return None


@dataclass(frozen=True)
class _Unidentified:
    descriptor: int
    inode: int
    address: str


class ConnectionLimiter:
    """Limits the unidentified connections to `port`."""

    def __init__(self, port: int, limit: int, report: Callable[[str], None]) -> None:
        """`limit` of them are kept; `report` is called, once a minute at most, when some are closed."""
        self._port = port
        self._limit = limit
        self._report = report
        self._first_seen: dict[int, float] = {}
        self._reported_at = -_REPORT_EVERY

    def enforce(self, known: Collection[Endpoint]) -> None:
        """Close the oldest unidentified connections above the limit; `known` are the peers that have a stream."""
        try:
            descriptors = [int(name) for name in os.listdir(_OPEN_FILES)]  # noqa: PTH208 - the numbers, not the files
        except (OSError, ValueError):
            return
        if len(descriptors) <= self._limit:
            self._first_seen.clear()
            return
        found = [one for descriptor in descriptors if (one := self._unidentified(descriptor, known)) is not None]
        now = time.monotonic()
        self._first_seen = {connection.inode: self._first_seen.get(connection.inode, now) for connection in found}
        if len(found) > self._limit:
            self._close_oldest(found, len(found) - self._limit, now)

    def _close_oldest(self, found: list[_Unidentified], count: int, now: float) -> None:
        by_address = Counter(connection.address for connection in found)
        address, most = by_address.most_common(1)[0]
        if now - self._reported_at >= _REPORT_EVERY:
            self._reported_at = now
            self._report(
                f"{len(found)} connections have not said who they are, {most} of them from {address}; {self._limit} "
                "are held, and the oldest of the rest are closed"
            )
        found.sort(key=lambda connection: self._first_seen[connection.inode])
        for _ in range(count):
            busiest = by_address.most_common(1)[0][0]
            oldest = next(connection for connection in found if connection.address == busiest)
            found.remove(oldest)
            by_address[busiest] -= 1
            self._close(oldest)

    def _unidentified(self, descriptor: int, known: Collection[Endpoint]) -> _Unidentified | None:
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISSOCK(status.st_mode):
                return None
            with socket.socket(fileno=os.dup(descriptor)) as copy:
                if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.getsockname()[1] != self._port:
                    return None
                host, port = copy.getpeername()[:2]
        except OSError:
            # It was closed meanwhile, or it is the socket that listens.
            return None
        address = _plain(host)
        return None if (address, port) in known else _Unidentified(descriptor, status.st_ino, address)

    def _close(self, connection: _Unidentified) -> None:
        with suppress(OSError), socket.socket(fileno=os.dup(connection.descriptor)) as copy:
            # The number may belong to another file by now; the copy is looked at, and only the copy is used.
            if os.fstat(copy.fileno()).st_ino == connection.inode:
                copy.shutdown(socket.SHUT_RDWR)


def _plain(host: str) -> str:
    """An address in one spelling: IPv4 within IPv6 as IPv4. Raises ValueError."""
    found = ipaddress.ip_address(host.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)
