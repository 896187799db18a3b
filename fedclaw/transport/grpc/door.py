"""Connections that have not become a site's stream: how many are held, and whose go first.

gRPC counts an unfinished handshake like a site, and hangs up on whoever comes when its number is full: some hundred
peers that open a connection and say nothing would keep every site out. So gRPC may hold many more than there are sites,
and here those that have not said who they are are held to a number: of the address that has most of them, the oldest
are closed. A site needs a moment for its handshake, and is not among the oldest of the busiest address.
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

STRANGERS = 4096
"""Connections above what is held that may come between two looks."""
INTERVAL = 0.5
"""Seconds between two looks."""
_RESERVE = 512
"""Files that are left for everything else."""
_OPEN_FILES = Path("/dev/fd")
_TOLD_EVERY = 60.0

Endpoint = tuple[str, int]


def room(held: int) -> int:
    """Connections that gRPC may hold so that `held` strangers are no siege; asks for as many open files."""
    wanted = held + STRANGERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + _RESERVE:
        most = wanted + _RESERVE if hard == resource.RLIM_INFINITY else min(hard, wanted + _RESERVE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return wanted if soft == resource.RLIM_INFINITY else max(held, min(wanted, soft - _RESERVE))


def endpoint_of(peer: str) -> Endpoint | None:
    """Address and port in what gRPC calls a peer ("ipv4:127.0.0.1:5000"); None for a peer without."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    try:
        return _plain(host.strip("[]")), int(port)
    except ValueError:
        return None


@dataclass(frozen=True)
class _Stranger:
    descriptor: int
    inode: int
    address: str


class Door:
    """Who stands at the port `port`."""

    def __init__(self, port: int, held: int, told: Callable[[str], None]) -> None:
        """`held` strangers may stand there; `told` hears, now and then, that some were sent away."""
        self._port = port
        self._held = held
        self._told = told
        self._seen: dict[int, float] = {}
        self._said = -_TOLD_EVERY

    def look(self, known: Collection[Endpoint]) -> None:
        """Close the oldest of the strangers above the number that is held; `known` are the peers with a stream."""
        try:
            descriptors = [int(name) for name in os.listdir(_OPEN_FILES)]  # noqa: PTH208 - the numbers, not the files
        except (OSError, ValueError):
            return
        if len(descriptors) <= self._held:
            self._seen.clear()
            return
        strangers = [found for descriptor in descriptors if (found := self._stranger(descriptor, known)) is not None]
        now = time.monotonic()
        self._seen = {stranger.inode: self._seen.get(stranger.inode, now) for stranger in strangers}
        if len(strangers) > self._held:
            self._send_away(strangers, len(strangers) - self._held, now)

    def _send_away(self, strangers: list[_Stranger], count: int, now: float) -> None:
        crowds = Counter(stranger.address for stranger in strangers)
        address, most = crowds.most_common(1)[0]
        if now - self._said >= _TOLD_EVERY:
            self._said = now
            self._told(
                f"{len(strangers)} connections have not said who they are, {most} of them from {address}; {self._held} "
                "are held, and the oldest of the rest are closed"
            )
        strangers.sort(key=lambda stranger: self._seen[stranger.inode])
        for _ in range(count):
            crowd = crowds.most_common(1)[0][0]
            oldest = next(stranger for stranger in strangers if stranger.address == crowd)
            strangers.remove(oldest)
            crowds[crowd] -= 1
            self._close(oldest)

    def _stranger(self, descriptor: int, known: Collection[Endpoint]) -> _Stranger | None:
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
        return None if (address, port) in known else _Stranger(descriptor, status.st_ino, address)

    def _close(self, stranger: _Stranger) -> None:
        with suppress(OSError), socket.socket(fileno=os.dup(stranger.descriptor)) as copy:
            # The number may belong to another file by now; the copy is looked at, and only the copy is used.
            if os.fstat(copy.fileno()).st_ino == stranger.inode:
                copy.shutdown(socket.SHUT_RDWR)


def _plain(host: str) -> str:
    """An address as both sides write it: IPv4 within IPv6 as IPv4. Raises ValueError."""
    found = ipaddress.ip_address(host.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)
