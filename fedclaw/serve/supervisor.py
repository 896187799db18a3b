"""The process that holds a node together: it starts the others, starts them again when they end, and ends them.

It has no model and reads no request, so there is little in it that could fail. Workers open their own listening
sockets (SO_REUSEPORT): one that is killed takes its connections with it and nobody else's, and the kernel sends new
ones to those that are left. The supervisor keeps the ports for the node with sockets that are bound and never listen.
"""

import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from fedclaw import startup
from fedclaw.cli import describe_failure, make_console, start_logging
from fedclaw.errors import FedClawError, UsageError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.serve.settings import NodeSettings

log = logging.getLogger("fedclaw.serve")

PROCESSES = "processes.json"
"""In the node's directory: each process, how often it was started again, and whether it ends again and again."""
FIRST_DELAY, LONGEST_DELAY = 0.05, 10.0
"""Seconds before a process is started again; doubled each time that it ends soon after its start."""
SETTLED = 30.0
"""Seconds after which a process counts as well started."""
LOOP = 5
"""So many ends in a row, each soon after the start, are a crash loop."""
GRACE = 7.0
"""Seconds that processes have to finish what they answer."""
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
"""Weights of some ten MB in pages of 4 kB miss the processor's table of pages all the time. glibc (from 2.35) reads
this where a process begins, and asks for huge pages for large blocks; other libraries and kernels pass over it."""
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Ports:
    """Where a node listens: the numbers as they are, where the settings say 0."""

    http: int
    grpc: int | None
    admin: int


@dataclass(frozen=True)
class Launch:
    """What a process of the node is started with."""

    settings: NodeSettings
    ports: Ports
    number: int
    """Of the worker, from 1; 0: the control process."""
    again: bool = False
    """Whether it takes the place of one that ended: then it serves what it can."""

    @property
    def name(self) -> str:
        """As logs and metrics call it."""
        return f"worker-{self.number}" if self.number else "control"


Entry = Callable[[Launch, Event], None]
"""A process' main function; it sets the event as soon as it answers."""


class ReservedPorts:
    """Ports that this node has, whichever of its processes listens on them at the moment."""

    def __init__(self, settings: NodeSettings) -> None:
        self._held: list[socket.socket] = []
        self.ports = Ports(
            self._reserve("port", settings.host, settings.port),
            None if settings.grpc_port is None else self._reserve("grpc_port", settings.host, settings.grpc_port),
            self._reserve("admin.port", settings.admin.host, settings.admin.port),
        )

    def _reserve(self, setting: str, host: str, port: int) -> int:
        try:
            with listening(host, port, probe=True):
                pass
            held = bound(host, port)
        except OSError as error:
            raise UsageError(f"{setting}={port}: {host} cannot be listened on: {error.strerror or error}") from error
        self._held.append(held)
        return int(held.getsockname()[1])

    def close(self) -> None:
        """Let others have them."""
        for held in self._held:
            held.close()


def bound(host: str, port: int) -> socket.socket:
    """A socket on the address that others of this node may have too. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def listening(host: str, port: int, *, probe: bool = False) -> socket.socket:
    """A socket that listens there; to `probe` whether nobody else does, it shares with nobody. Raises OSError."""
    if not probe:
        made = bound(host, port)
        made.listen(2048)
        return made
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1)
    except OSError:
        made.close()
        raise
    return made


@contextmanager
def huge_pages() -> Iterator[None]:
    """Processes that begin meanwhile hold large blocks in huge pages; the operator's own word on it stays."""
    before = os.environ.get(TUNABLES)
    if HUGE_PAGES in (before or ""):
        yield
        return
    os.environ[TUNABLES] = ":".join(filter(None, (before, f"{HUGE_PAGES}=1")))
    try:
        yield
    finally:
        if before is None:
            del os.environ[TUNABLES]
        else:
            os.environ[TUNABLES] = before


def _run_child(entry: Entry, launch: Launch, ready: Event) -> None:
    """A process' whole life: what ends it is one line of the log."""
    start_logging(make_console(stderr=True))
    try:
        entry(launch, ready)
    except Exception as error:
        expected = isinstance(error, FedClawError)
        log.error("%s: %s", launch.name, describe_failure(error), exc_info=None if expected else error)
        sys.exit(1)


@dataclass
class _Child:
    """One process of the node, through all its lives."""

    entry: Entry
    launch: Launch
    process: BaseProcess | None = None
    ready: Event = field(default_factory=_SPAWN.Event)
    begun: float = 0.0
    due: float = 0.0
    """When it is to be started again."""
    restarts: int = 0
    in_a_row: int = 0

    def start(self) -> None:
        self.ready = _SPAWN.Event()
        launch = replace(self.launch, again=self.restarts > 0)
        arguments = (self.entry, launch, self.ready)
        self.process = _SPAWN.Process(target=_run_child, args=arguments, name=f"fedclaw-{self.launch.name}")
        # A child whose start is broken off would be nobody's; and Ctrl-C, which reaches it too, is not for it to heed.
        with startup.unbroken():
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
            try:
                with huge_pages() if self.launch.number else nullcontext():
                    self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.begun = time.monotonic()

    def ended(self, now: float) -> str:
        """Take note of its end, and decide when it is started again; how it ended, in words."""
        assert self.process is not None
        code = self.process.exitcode or 0
        self.process = None
        self.restarts += 1
        self.in_a_row = self.in_a_row + 1 if now - self.begun < SETTLED else 1
        self.due = now + min(FIRST_DELAY * 2 ** (self.in_a_row - 1), LONGEST_DELAY)
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    @property
    def loops(self) -> bool:
        return self.in_a_row >= LOOP

    def describe(self) -> dict[str, Any]:
        pid = None if self.process is None else self.process.pid
        return {"name": self.launch.name, "pid": pid, "restarts": self.restarts, "crash_loop": self.loops}


class Supervisor:
    """Runs the processes of one node until it is told to stop."""

    def __init__(self, settings: NodeSettings, ports: Ports, worker: Entry, control: Entry) -> None:
        self._settings = settings
        self._children = [_Child(control, Launch(settings, ports, 0))]
        self._children += [_Child(worker, Launch(settings, ports, number + 1)) for number in range(settings.workers)]

    def start(self, patience: float = 120.0) -> None:
        """Start all, and wait until each answers. Raises FedClawError when one ends instead, or is killed each time."""
        for child in self._children:
            child.start()
        self._write()
        end = time.monotonic() + patience
        for child in self._children:
            while not child.ready.wait(0.05):
                self._look_after(child)
                if time.monotonic() > end:
                    raise FedClawError(f"{child.launch.name} was not ready after {patience:g} s")

    def _look_after(self, child: _Child) -> None:
        """A process that does not answer yet: one that ends by itself would do so again, but one that is killed, as by
        the kernel where memory is short, is given another start. Raises FedClawError."""
        now = time.monotonic()
        if child.process is None:
            if now >= child.due:
                child.start()
                self._write()
        elif (code := child.process.exitcode) is not None:
            how = child.ended(now)
            if code >= 0:
                raise FedClawError(f"{child.launch.name} could not start: its own line above says why")
            if child.loops:
                raise FedClawError(f"{child.launch.name} could not start: it {how}, {child.in_a_row} times in a row")
            self._tell_end(child, how, now)
            self._write()

    def watch(self) -> None:
        """Start again what ends, for ever; a signal ends it, as `startup.Stopped`."""
        while True:
            alive = [child.process.sentinel for child in self._children if child.process is not None]
            wait(alive, timeout=self._pause())
            now = time.monotonic()
            for child in self._children:
                if child.process is None:
                    if now >= child.due:
                        child.start()
                        self._write()
                elif child.process.exitcode is not None:
                    self._tell_end(child, child.ended(now), now)
                    self._write()

    def stop(self) -> None:
        """Let requests that are being answered finish, then end all."""
        living = [child.process for child in self._children if child.process is not None and child.process.is_alive()]
        for process in living:
            process.terminate()
        end = time.monotonic() + GRACE + self._settings.drain_seconds
        for process in living:
            process.join(max(0.0, end - time.monotonic()))
        for process in living:
            if process.is_alive():
                log.warning("%s is ended: it was not done after %g s", process.name, GRACE)
                process.kill()
                process.join()
        (self._settings.state / PROCESSES).unlink(missing_ok=True)

    def _pause(self) -> float | None:
        due = [child.due for child in self._children if child.process is None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _tell_end(self, child: _Child, how: str, now: float) -> None:
        name, delay = child.launch.name, child.due - now
        if child.loops:
            log.error(
                "%s %s, for the %d. time in a row soon after its start: it does not get going. It is started again in "
                "%.1f s; its own lines above say why",
                name,
                how,
                child.in_a_row,
                delay,
            )
        else:
            log.warning("%s %s; it is started again in %.2f s", name, how, delay)

    def _write(self) -> None:
        content = json.dumps([child.describe() for child in self._children]).encode()
        write_atomic(self._settings.state / PROCESSES, content, PRIVATE_MODE)


def read_processes(state: Path) -> Sequence[dict[str, Any]]:
    """What the supervisor last wrote of its processes; nothing where it does not run."""
    try:
        found = json.loads((state / PROCESSES).read_bytes())
    except (OSError, ValueError):
        return ()
    return found if isinstance(found, list) else ()
