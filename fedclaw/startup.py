"""What a command does before all else: it takes signals, answers --help, and says that it has begun.

Each command's module calls `begin` in front of its other imports, and what is imported here is small. So whoever starts
a command sees a line at once, and can stop it at once, however long libraries take to load.

A signal ends the process where nothing is under way (`begin` up to `under_way`, and inside `loading`). After that it is
raised in the main thread as `Stopped`, so that files, sockets, and runs in MLflow are closed; a second signal, or ten
seconds, end the process whatever it is doing. Files are written whole or not at all, so no moment is a wrong one.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 10.0
"""Seconds that a command has to put things away after it was told to stop."""
_CHILDREN = 3.0
"""Of those, how long its own processes have to end by themselves."""
_HELP = frozenset({"-h", "--help"})
_NOTHING_BEGUN = "nothing had begun: give the same command again"
_AGAIN = "nothing is left half done: give the same command again"


class Stopped(KeyboardInterrupt):
    """A signal told the command to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number
        """The exit code: 130 for Ctrl-C, 143 for SIGTERM."""


@dataclass
class _Command:
    """The command that this process is, if it is one."""

    module: str = ""
    spoken: str = ""
    """As it was typed: python -m fedclaw.server, or fedclaw server."""
    at_once: bool = True
    advice: str = _AGAIN
    signal: int | None = None
    """The first one that came."""
    unbroken: bool = False
    """Whether the main thread is at something that is not to be broken off."""
    line_shown: bool = False
    loaded: str = ""
    """What was said to be loaded."""
    process: int = 0
    patience: float = PATIENCE


_command = _Command()


def begin(module: str, usage: str | None = None, *, plugins: bool = False, spoken: str | None = None) -> None:
    """Take signals from now on, answer --help with `usage`, and tell a person at a terminal that this has begun.

    With `plugins`, the help lists strategies and workloads that are installed. `spoken` is how the command was typed,
    if not `python -m module`. What the console script has begun already is not begun again.
    """
    if _command.module:
        return
    _command.module, _command.process = module, os.getpid()
    _command.spoken = spoken or f"python -m {module}"
    for number in SIGNALS:
        # nohup ignores hang-ups. Ctrl-C is taken even by what a shell script started in the background.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    os.register_at_fork(after_in_child=_leave_signals)
    if usage is not None and _HELP & set(sys.argv[1:]):
        give_help(usage, plugins=plugins)
    if sys.stderr is not None and sys.stderr.isatty():
        _write(f"\x1b[2m{module}: reading the settings\x1b[0m")
        _command.line_shown = True


def give_help(usage: str, *, plugins: bool = False) -> NoReturn:
    """Print `usage`, and with `plugins` what is installed, and end with 0."""
    text = usage.strip() + "\n"
    if plugins:
        from fedclaw.catalogue import plugin_lines

        text += "\n" + "\n".join(plugin_lines()) + "\n"
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has seen enough (| head).
        os._exit(0)
    sys.exit(0)


def see_help(module: str) -> str:
    """How to ask for a command's help, as the command was typed."""
    return f"{_command.spoken or f'python -m {module}'} --help"


def under_way() -> None:
    """From now on a signal is raised as `Stopped`, for there is something to close."""
    _command.at_once = False


def next_step(advice: str) -> None:
    """What to do after the command was stopped; the default is to give it again."""
    _command.advice = advice


def need(seconds: float) -> None:
    """The command needs so long to put things away after it was told to stop, if that is more than is usual."""
    _command.patience = max(PATIENCE, seconds)


def clear_line() -> None:
    """Take the first line away again; the next one says more."""
    if _command.line_shown:
        _command.line_shown = False
        _write("\r\x1b[K")


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say what is being imported, and end at once if a signal comes meanwhile; for imports that take seconds."""
    clear_line()
    if _command.module and what != _command.loaded:
        import logging

        _command.loaded = what
        logging.getLogger("fedclaw.startup").info("loading %s", what)
    before, _command.at_once = _command.at_once, True
    try:
        yield
    finally:
        _command.at_once = before


@contextmanager
def unbroken() -> Iterator[None]:
    """Let a signal wait for the end of what is done here, which breaks where it is broken off; ten seconds at most.

    Raises Stopped at its end if one came. In another thread than the main one, which takes no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or _command.unbroken:
        yield
        return
    before, _command.unbroken = _command.signal, True
    try:
        yield
    finally:
        _command.unbroken = False
        if _command.signal is not None and before is None:
            raise Stopped(_command.signal)


def is_stopping() -> bool:
    """Whether a signal has told this command to stop."""
    return _command.signal is not None


def stop_line(module: str) -> str:
    """What a command that was stopped says, in one line."""
    return f"{module}: stopped; {_command.advice}"


def leave(code: int) -> NoReturn:
    """End this process, and all that it started, without waiting for threads that are still at work."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    end_all(_CHILDREN)
    os._exit(code)


def stop_code(error: BaseException) -> int:
    """The exit code of a command that `error` stopped."""
    if isinstance(error, Stopped):
        return error.code
    return 128 + (_command.signal or signal.SIGINT)


def _on_signal(number: int, _: FrameType | None) -> None:
    if _command.signal is not None:
        _end(number)
    _command.signal = number
    if _command.at_once:
        _command.advice = _NOTHING_BEGUN
        _say()
        _end(number)
    threading.Thread(target=_wait, args=(number,), name="fedclaw-stop", daemon=True).start()
    if not _command.unbroken:
        raise Stopped(number)


def _wait(number: int) -> None:
    threading.Event().wait(_command.patience)
    _say()
    _end(number)


def _say() -> None:
    clear_line()
    _write(stop_line(_command.module) + "\n")


def _end(number: int) -> NoReturn:
    if sys.stderr is not None and sys.stderr.isatty():
        _write("\x1b[?25h")  # a progress bar hides the cursor
    end_all(0.0)
    os._exit(128 + number)


def _leave_signals() -> None:
    """In a process forked from this one: what it does about signals is its own matter."""
    if _command.process != os.getpid():
        for number in SIGNALS:
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, signal.SIG_DFL)


def _write(text: str) -> None:
    """To standard error past all buffers: a signal may come while those are in use."""
    try:
        os.write(2, text.encode())
    except OSError:
        return


_LOOK_AGAIN = 0.02


def descendants() -> list[int]:
    """Process ids of all that this one started, directly or not, parents first; zombies are left out.

    As Linux's /proc tells them; elsewhere, those of multiprocessing.
    """
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
