"""Python processes that begin with their libraries imported: `python -m MODULE` without the seconds that torch takes.

A server process imports what commands import from other packages, and nothing of ours, and forks for each process that
is asked for. In the fork `python -m MODULE`, `python -c CODE` or `python FILE` goes on as Python itself would have
begun it, with its own arguments, directory, environment, path and files: a process like any other, which listens,
writes, takes signals and is killed. What a start itself does is looked at where it is the point, with `fresh=True` or
with processes of the tests' own.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

_PRELOADED = (
    *("numpy", "torch", "torch.utils.data", "torch.func", "opacus", "opacus.accountants", "dp_accounting.pld"),
    *("flwr.app", "flwr.serverapp", "flwr.clientapp", "grpc", "hydra", "omegaconf", "pydantic", "yaml", "rich.console"),
    *("rich.logging", "rich.progress", "rich.table", "scipy.stats", "scipy.optimize", "cryptography.x509", "sqlite3"),
    *("cryptography.hazmat.primitives.hpke", "sklearn.datasets", "sklearn.metrics", "mlflow", "mlflow.tracking"),
    *("sqlalchemy", "alembic", "pandas", "logging.config", "multiprocessing.pool", "concurrent.futures"),
)


class Warm:
    """A process as `subprocess.Popen` has it, forked from a server that has its libraries."""

    def __init__(self, words: Sequence[str | Path], *, files: Sequence[int], env: Mapping[str, str], cwd: Path | None):
        """`words` follow `python`; `files` become its standard input, output and error."""
        self.args = [sys.executable, *map(str, words)]
        self.returncode: int | None = None
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(_server.address())
        request = {"words": self.args[1:], "env": dict(env), "cwd": str(cwd or Path.cwd())}
        body = json.dumps(request).encode()
        socket.send_fds(self._line, [len(body).to_bytes(4, "big")], list(files))
        self._line.sendall(body)
        self.pid = int.from_bytes(self._read(4), "big")

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._line, selectors.EVENT_READ)
                if not ready.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = int.from_bytes(self._read(4), "big", signed=True)
            self._line.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            if not (part := self._line.recv(count - len(found))):
                raise RuntimeError("the server of warm processes has ended")
            found += part
        return found


def start(
    words: Sequence[str | Path],
    *,
    stdout: IO[bytes],
    stderr: IO[bytes],
    env: Mapping[str, str],
    cwd: Path | None = None,
) -> "Warm | subprocess.Popen[bytes]":
    """`python WORDS` in the background, which reads nothing. Elsewhere than on Linux it starts from nothing."""
    with Path(os.devnull).open("rb") as nothing:
        if sys.platform != "linux":
            command = [sys.executable, *map(str, words)]
            return subprocess.Popen(command, stdin=nothing, stdout=stdout, stderr=stderr, env=env, cwd=cwd)
        return Warm(words, files=[one.fileno() for one in (nothing, stdout, stderr)], env=env, cwd=cwd)


def run(
    words: Sequence[str | Path], *, env: Mapping[str, str], cwd: Path | None = None, timeout: float
) -> "subprocess.CompletedProcess[str]":
    """`python WORDS` to its end, with what it wrote; raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = start(words, stdout=output, stderr=errors, env=env, cwd=cwd)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        texts = [(one.seek(0), one.read().decode())[1] for one in (output, errors)]
    return subprocess.CompletedProcess(process.args, code, *texts)


class _Server:
    """The process that forks, started when it is first needed; it ends with this one, whose pipe it holds."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def address(self) -> str:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                # Each fork is told a PYTHONPATH of its own, and Ray writes all of sys.path into this process's.
                env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
                self._process = subprocess.Popen(
                    [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
                )
                assert self._process.stdout is not None
                if not self._process.stdout.readline():
                    raise RuntimeError("the server of warm processes did not start; what it said is on stderr")
            return f"\0fedclaw-warm-{self._process.pid}"


_server = _Server()


def _serve() -> dict[str, Any]:
    """Fork for each request, and return it in the fork. Ends with the process that asks."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0fedclaw-warm-{os.getpid()}")
    listener.listen()
    ended, wake = socket.socketpair()
    for end in (ended, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(1, b"ready\n")
    waiting: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as ready:
        for source in (listener, ended, sys.stdin):
            ready.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is sys.stdin:
                    os._exit(0)
                if key.fileobj is ended:
                    ended.recv(4096)
                    _tell(waiting)
                if key.fileobj is listener:
                    line, _ = listener.accept()
                    head, files, *_ = socket.recv_fds(line, 4, 3)
                    request = json.loads(_all_of(line, int.from_bytes(head, "big")))
                    if (process := os.fork()) == 0:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        signal.signal(signal.SIGINT, signal.default_int_handler)
                        for one in (listener, ended, wake, line, *waiting.values()):
                            one.close()
                        return request | {"files": files}
                    for descriptor in files:
                        os.close(descriptor)
                    waiting[process] = line
                    line.sendall(process.to_bytes(4, "big"))


def _all_of(line: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += line.recv(count - len(found))
    return found


def _tell(waiting: dict[int, socket.socket]) -> None:
    """Say how those ended that have."""
    for process in list(waiting):
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            with waiting.pop(process) as line, contextlib.suppress(OSError):
                line.sendall(code.to_bytes(4, "big", signed=True))


def _become(request: dict[str, Any]) -> None:
    """Make of this fork what `python WORDS` is when it has just begun."""
    for number, descriptor in enumerate(request["files"]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.modules["numpy"].random.seed()  # random and secrets see to that themselves
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    words = request["words"]
    kind = words[0] if words[0] in ("-m", "-c") else ""
    sys.orig_argv = [sys.executable, *words]
    sys.argv = [kind, *words[2:]] if kind else words
    first = {"-m": str(Path.cwd()), "-c": ""}.get(kind, str(Path(words[0]).absolute().parent))
    sys.path[:] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    sys.stdin = os.fdopen(0, "r")
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.modules["__main__"] = types.ModuleType("__main__")


def _run(words: Sequence[str]) -> None:
    namespace = sys.modules["__main__"].__dict__
    if words[0] == "-m":
        runpy._run_module_as_main(words[1])
    elif words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), namespace)
    else:
        namespace["__file__"] = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), namespace)


def _end(words: Sequence[str]) -> NoReturn:
    """Run, and end as Python does, but for half a second in which it takes all that was imported apart again."""
    code: object = 0
    try:
        _run(words)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(int(code or 0))


if __name__ == "__main__":
    sys.path.pop(0)
    runpy.run_path(str(Path(__file__).parent.parent / "fedclaw" / "environment.py"))
    import importlib

    for _name in _PRELOADED:
        importlib.import_module(_name)
    gc.collect()
    gc.freeze()
    _request = _serve()
    _become(_request)
    _end(_request["words"])
