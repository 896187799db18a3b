"""Servers as processes: our own node, MLServer and MLflow; and what they cost, by Linux's own account.

Each is started as a person would, answers on 127.0.0.1, and is ended with all that it started. Everything is behind
`Server`: where to ask, which processes it is made of, and their processor time.
"""

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from experiments.processes import free_port
from experiments.serving.bundles import Foundry
from experiments.serving.issuer import Issuer
from experiments.serving.load import pinned
from fedclaw.errors import FedClawError
from fedclaw.files import write_atomic

PATIENCE = 120.0
"""Seconds that a server has to become ready, on a machine that does other things too."""
STOPPING = 20.0
LOOK_AGAIN = 0.005
MLSERVER_MODEL = Path(__file__).with_name("mlserver_model.py")
_TICKS = os.sysconf("SC_CLK_TCK")


class ServerError(FedClawError):
    """A server that did not start, or ended."""


class Server:
    """A command that answers at `url`, and its processes. A context manager that starts it and ends it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        url: str,
        ready: str,
        log: Path,
        *,
        core: int | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        authority: Path | None = None,
    ) -> None:
        self.name, self.url = name, url
        self._trust = None if authority is None else ssl.create_default_context(cafile=str(authority))
        self.log = log
        self._ready = url + ready
        self._core = core
        self._command = pinned(core, command)
        self._environment = {**os.environ, **(environment or {})}
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is not ready then."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=self._directory,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Raises ServerError if that takes too long, or the process ends."""
        end = time.monotonic() + PATIENCE
        while not is_ready(self._ready, self._trust):
            if self._process is None or self._process.poll() is not None or time.monotonic() > end:
                raise ServerError(f"{self.name} is not ready; its last words:\n{self.last_words()}")
            time.sleep(LOOK_AGAIN)

    def keep_to_its_core(self) -> None:
        """Put every thread on the server's core again: ONNX Runtime, left to itself, gives each of its threads a core
        of its own, whatever the process was confined to."""
        if self._core is None:
            return
        for process in self.processes:
            for thread in Path(f"/proc/{process}/task").glob("[0-9]*"):
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), {self._core})

    def pause(self) -> None:
        """Have all of it stand still, as long as another server is measured."""
        for process in self.processes:
            _signal(process, signal.SIGSTOP)

    def resume(self) -> None:
        """Have it go on."""
        for process in self.processes:
            _signal(process, signal.SIGCONT)

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])

    @property
    def process_id(self) -> int:
        """Of the process that was started. Raises ServerError if none was."""
        if self._process is None:
            raise ServerError(f"{self.name} was not started")
        return self._process.pid

    @property
    def processes(self) -> list[int]:
        """All of its processes that live, the first one first."""
        return family(self.process_id)

    def processor_seconds(self) -> float:
        """That its living processes have used so far."""
        return sum(processor_seconds(process) for process in self.processes)

    def kill(self) -> None:
        """End all of it at once (SIGKILL), as a power cut does."""
        for process in self.processes:
            _signal(process, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """End it as an operator does, and what is left of it after a while by force."""
        if self._process is None:
            return
        self.resume()
        whole = self.processes
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOPPING)
        for process in whole:
            _signal(process, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def is_ready(url: str, trust: ssl.SSLContext | None = None) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5, context=trust) as answer:  # noqa: S310 - of this machine
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def family(process: int) -> list[int]:
    """The process and all that it started, directly or not, as far as they live."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        if (fields := _stat(int(directory.name))) is not None and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(directory.name))
    found = [process]
    for known in found:
        found += children.get(known, [])
    return found


def processor_seconds(process: int) -> float:
    """User and system time of one process; 0 if it is not there."""
    fields = _stat(process)
    return 0.0 if fields is None else (int(fields[11]) + int(fields[12])) / _TICKS


def _stat(process: int) -> list[str] | None:
    """/proc/PID/stat from the state on: what stands before it is a name that may hold anything."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _signal(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except OSError:
        return


@dataclass(frozen=True)
class NodePorts:
    """Where a node listens."""

    http: int
    grpc: int
    admin: int

    @classmethod
    def free(cls) -> "NodePorts":
        """Three that nobody listens on."""
        return cls(free_port(), free_port(), free_port())


class Node(Server):
    """`python -m fedclaw.serve` with tokens, limits, metrics and audit as they are by default.

    The rate limit is there and out of reach: what is measured is the check, not the refusal.
    """

    def __init__(
        self,
        root: Path,
        foundry: Foundry,
        issuer: Issuer,
        models: Mapping[str, Mapping[str, Any]],
        *,
        ports: NodePorts | None = None,
        core: int | None = None,
        name: str = "node",
        tls: bool = False,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.ports = root, ports or NodePorts.free()
        given: dict[str, Any] = {
            "models": models,
            "state": str(root / "state"),
            "name": name,
            "ca": str(foundry.authority),
            "port": self.ports.http,
            "grpc_port": self.ports.grpc,
            "admin.port": self.ports.admin,
            "limits.requests_per_second": 1e6,
            "limits.burst": 1_000_000,
            "limits.connections": 10_000,
            **issuer.settings(),
            **(certificates(foundry) if tls else {"tls.disabled": True}),
            **(settings or {}),
        }
        scheme = "https" if tls else "http"
        command = [sys.executable, "-m", "fedclaw.serve", *(f"{key}={hydra(value)}" for key, value in given.items())]
        url = f"{scheme}://127.0.0.1:{self.ports.http}"
        paths = os.pathsep.join(path for path in sys.path if path)
        super().__init__(
            name,
            command,
            url,
            "/v2/health/ready",
            root / "node.log",
            core=core,
            environment={"PYTHONPATH": paths, **(environment or {})},
            authority=foundry.authority if tls else None,
        )

    @property
    def admin(self) -> str:
        """The address of the admin port."""
        return f"http://127.0.0.1:{self.ports.admin}"


def certificates(foundry: Foundry) -> dict[str, Any]:
    """The federation's server certificate, which is for 127.0.0.1, as a node's settings."""
    root = foundry.home.root
    return {"tls.certificate": str(root / "server.crt"), "tls.private_key": str(root / "server.key")}


def hydra(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(hydra(item) for item in value) + "]"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return str(value) if isinstance(value, int | float) else json.dumps(str(value))


def mlserver(
    root: Path, python: Path, bundle: Path, model: str, core: int | None = None, rows: int | None = None
) -> Server:
    """MLServer without worker processes, at the graph of a bundle; with `rows`, batching so many as they come."""
    root.mkdir(parents=True, exist_ok=True)
    ports = NodePorts.free()
    settings = {
        "parallel_workers": 0,
        "host": "127.0.0.1",
        "http_port": ports.http,
        "grpc_port": ports.grpc,
        "metrics_port": ports.admin,
        "debug": False,
    }
    batching = {} if rows is None else {"max_batch_size": rows, "max_batch_time": 0.002}
    graph = {"uri": str(bundle / "pipeline.onnx")}
    told = {"name": model, "implementation": "runtime.Model", "parameters": graph, **batching}
    write_atomic(root / "settings.json", json.dumps(settings).encode())
    write_atomic(root / "model-settings.json", json.dumps(told).encode())
    shutil.copyfile(MLSERVER_MODEL, root / "runtime.py")
    begin = "from mlserver.cli import main; main()"
    return Server(
        "MLServer" if rows is None else f"MLServer, batches of {rows}",
        [str(python), "-c", begin, "start", "."],
        f"http://127.0.0.1:{ports.http}",
        f"/v2/models/{model}/ready",
        root / "mlserver.log",
        core=core,
        directory=root,
    )


def mlflow(root: Path, foundry: Foundry, bundle: Path, core: int | None = None) -> Server:
    """`mlflow models serve` of the layout that `fedclaw.layouts` makes of a bundle."""
    root.mkdir(parents=True, exist_ok=True)
    layout = root / "layout"
    if not layout.exists():
        command = [sys.executable, "-m", "fedclaw.layouts", "mlflow", str(bundle)]
        paths = os.pathsep.join(path for path in sys.path if path)
        subprocess.run(
            [*command, f"output={layout}", f"ca={foundry.authority}"],
            env={**os.environ, "PYTHONPATH": paths},
            check=True,
            capture_output=True,
        )
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--model-uri", str(layout)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return Server(
        "mlflow models serve",
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        f"http://127.0.0.1:{port}",
        "/ping",
        root / "mlflow.log",
        core=core,
        environment={"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "PATH": path},
    )
