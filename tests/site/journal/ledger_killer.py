"""Kill a process that uses a ledger at every place where it can be killed, and look at what it left.

Started by test_ledger_kill.py as a process of its own: it forks for each place, so that the libraries are loaded once.

    python ledger_killer.py DIRECTORY instruction|call

`instruction`: at the n-th instruction of SQLite's virtual machine, for every n. `call`: at the entry of the n-th system
call, for every n, by ptrace: between any two writes, locks, flushes and removals of the journal.
"""

import ctypes
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.site.journal.ledger import Budget, Ledger

ROUND = NoiseEvent(0.1, 2.0, 10)
UNLIMITED = Budget(None, 1e-5)
DONE = 0
TRACE_ME, NEXT_CALL, SET_OPTIONS = 0, 24, 0x4200
KILL_WITH_PARENT = 0x00100000
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
libc.ptrace.restype = ctypes.c_long


def reserve(ledger: Ledger, key: str) -> None:
    ledger.reserve(key, federation="f", run="r", round=1, mechanism=ROUND, budget=UNLIMITED)


def work(path: Path, say: Callable[[str], None]) -> None:
    """Begin a ledger and go through the life of two rounds, saying what has returned."""
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "a")
        say("reserved a")
        ledger.settle("a")
        say("settled a")
        reserve(ledger, "b")
        say("reserved b")


def look(path: Path, said: list[str]) -> None:
    """What every killed process must leave: an intact ledger that has all that was said and at most one entry more."""
    with Ledger.open(path, "data") as ledger:
        bodies = [entry.body for entry in ledger.entries()]
        keys = {body["sequence"]: body["key"] for body in bodies if body["kind"] == "reserve"}
        noted = [
            f"reserved {body['key']}" if body["kind"] == "reserve" else f"settled {keys[body['reserve']]}"
            for body in bodies[1:]
        ]
        assert noted[: len(said)] == said, f"said {said}, noted {noted}"
        assert len(noted) <= len(said) + 1, f"said {said}, noted {noted}"
        before = ledger.rounds("r")
        # It goes on: what is open is taken up again, what is settled is paid again, nothing is lost.
        for key in "ab":
            is_open = f"reserved {key}" in noted and f"settled {key}" not in noted
            reserve(ledger, key)
            before += not is_open
            assert ledger.rounds("r") == before, f"{key} after {noted}"
            ledger.settle(key)
        ledger.verify()
    assert not path.with_name(path.name + "-journal").exists()


def run_and_kill(path: Path, place: int, how: str) -> tuple[bool, list[str]]:
    """Let a child work and die at the `place`-th instruction or call. Whether it died there, and what it had said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            if how == "call":
                _stop_for_tracer()
            else:
                _count_instructions(place)
            work(path, lambda text: os.write(writing, f"{text}\n".encode()) and None)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(DONE)
    os.close(writing)
    killed = _trace(child, place) if how == "call" else _wait(child)
    with os.fdopen(reading) as pipe:
        return killed, pipe.read().splitlines()


def _count_instructions(place: int) -> None:
    """Die at the `place`-th instruction of all connections that this process opens from now on."""
    count, connect = 0, sqlite3.connect

    def one_more() -> int:
        nonlocal count
        count += 1
        if count == place:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def counted(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.set_progress_handler(one_more, 1)
        return connection

    sqlite3.connect = counted


def _stop_for_tracer() -> None:
    if libc.ptrace(TRACE_ME, 0, None, None):
        raise OSError(ctypes.get_errno(), "ptrace is not allowed here")
    os.kill(os.getpid(), signal.SIGSTOP)


def _trace(child: int, place: int) -> bool:
    """Let `child` stop at the entry and the return of each call, and kill it at its `place`-th entry."""
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        return _ended(status)
    libc.ptrace(SET_OPTIONS, child, None, KILL_WITH_PARENT)
    for _ in range(2 * place - 1):
        if libc.ptrace(NEXT_CALL, child, None, None):
            raise OSError(ctypes.get_errno(), "the child cannot be traced")
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            return _ended(status)
    os.kill(child, signal.SIGKILL)
    return _wait(child)


def _wait(child: int) -> bool:
    return _ended(os.waitpid(child, 0)[1])


def _ended(status: int) -> bool:
    code = os.waitstatus_to_exitcode(status)
    if code not in (DONE, -signal.SIGKILL):
        raise SystemExit(f"the child ended with {code}")
    return code != DONE


def main(directory: Path, how: str) -> None:
    place, killed, outcomes = 0, True, set()
    while killed:
        place += 1
        path = directory / str(place) / "ledger.sqlite"
        killed, said = run_and_kill(path, place, how)
        try:
            look(path, said)
        except Exception as error:
            raise SystemExit(f"killed at {how} {place}: {error}") from error
        outcomes.add(len(said))
    sys.stdout.write(f"{place - 1} {sorted(outcomes)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
