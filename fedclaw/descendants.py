"""The processes that this one started, directly or not, as Linux's /proc tells them (elsewhere: multiprocessing's)."""

import os
import signal
import sys
import time
from pathlib import Path

_LOOK_AGAIN = 0.02


def descendants() -> list[int]:
    """Process ids below this one, parents first; zombies are left out."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        if (parent := _living_parent(directory)) is not None:
            children.setdefault(parent, []).append(int(directory.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        own = children.get(waiting.pop(0), [])
        found += own
        waiting += own
    return found or _of_multiprocessing()


def end_all(patience: float) -> None:
    """Ask every one to end (SIGTERM), and kill those that are there after `patience` seconds."""
    if not (found := descendants()):
        return
    if patience > 0:
        _send(found, signal.SIGTERM)
        end = time.monotonic() + patience
        while (found := descendants()) and time.monotonic() < end:
            time.sleep(_LOOK_AGAIN)
    _send(found, signal.SIGKILL)


def _send(processes: list[int], number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except OSError:
            continue


def _living_parent(directory: Path) -> int | None:
    try:
        # Behind the name in brackets, which may hold anything: state, parent, ...
        state, parent = (directory / "stat").read_bytes().rpartition(b")")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return None if state == b"Z" else int(parent)


def _of_multiprocessing() -> list[int]:
    module = sys.modules.get("multiprocessing")
    if module is None:
        return []
    return [child.pid for child in module.active_children() if child.pid is not None]
