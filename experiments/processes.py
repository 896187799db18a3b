"""Starts FedClaw's commands as real processes and ends them, whatever happens."""

import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from rich.console import Console

from fedclaw.errors import FedClawError

STOP_SECONDS = 20.0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """Commands of one session; their output goes to files in `logs`. A context manager that stops what runs."""

    def __init__(self, logs: Path, console: Console) -> None:
        self._logs = logs
        self._console = console
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._files = ExitStack()

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._files.close()

    def run(self, command: str, *arguments: str, show: bool = False, check: bool = True) -> int:
        """Run `python -m fedclaw.COMMAND` to its end and return its exit code.

        With `show`, its output is the terminal's. With `check`, another exit code than 0 raises FedClawError, and so
        does a background process that has ended meanwhile.
        """
        self._console.print(f"$ python -m fedclaw.{command} {' '.join(arguments)}", style="dim", markup=False)
        path = self._logs / f"{command}.log"
        with path.open("ab") as log:
            output: IO[bytes] | None = None if show else log
            done = subprocess.run(_python(command, arguments), stdout=output, stderr=output, check=False)
        if check and done.returncode != 0:
            where = "" if show else f"\n{_tail(path)}"
            raise FedClawError(f"fedclaw.{command} ended with exit code {done.returncode}{where}")
        self.check()
        return done.returncode

    def start(self, name: str, command: str, *arguments: str) -> None:
        """Start `python -m fedclaw.COMMAND` in the background under `name`."""
        self._console.print(f"$ python -m fedclaw.{command} {' '.join(arguments)} &", style="dim", markup=False)
        log = self._files.enter_context((self._logs / f"{name}.log").open("ab"))
        self._running[name] = subprocess.Popen(_python(command, arguments), stdout=log, stderr=log)

    def check(self) -> None:
        """Raise FedClawError if a background process has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                tail = _tail(self._logs / f"{name}.log")
                raise FedClawError(f"{name} ended with exit code {process.returncode}\n{tail}")


def _python(command: str, arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", f"fedclaw.{command}", *arguments]


def _tail(path: Path, lines: int = 5) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
