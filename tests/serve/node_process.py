"""A node of real processes, for tests: started, asked, and ended."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import environment

PATIENCE = 120.0
INSECURE = ("tls.disabled=true", "tokens.disabled=true")


@dataclass
class RunningNode:
    """One node, and where it listens."""

    process: subprocess.Popen[bytes]
    log: Path
    http: str
    grpc: str
    admin: str
    token: str | None = None

    def ask(self, method: str, url: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """One request: status, parsed body, headers."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, content, method=method)
        if self.token is not None:
            request.add_header("authorization", f"Bearer {self.token}")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, parsed(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, parsed(error.read()), dict(error.headers)

    def processes(self) -> dict[str, int]:
        """Process ids by name."""
        _, node, _ = self.ask("GET", f"{self.admin}/admin/node")
        return {process["name"]: process["pid"] for process in node["processes"]}

    def wait_for(self, condition: Any) -> Any:
        """What `condition` gives, once it is something."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if (found := condition()) is not None:
                return found
            time.sleep(0.05)
        raise AssertionError(f"it did not come about\n{self.log.read_text()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Tell it to stop; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@contextmanager
def running_node(root: Path, *settings: str, token: str | None = None) -> Iterator[RunningNode]:
    """A node on free ports whose directory is root/node."""
    log = root / "node.log"
    command = [sys.executable, "-m", "fedclaw.serve", f"state={root / 'node'}", "port=0", "grpc_port=0", "admin.port=0"]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *settings], stdout=output, stderr=output, env=environment())
    try:
        yield _ready(process, log, token)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()


def _ready(process: "subprocess.Popen[bytes]", log: Path, token: str | None) -> RunningNode:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        lines = dict(line.split(None, 1) for line in log.read_text().splitlines() if len(line.split(None, 1)) == 2)
        if "admin" in lines:
            http, grpc, admin = lines["ready"].split()[0], lines["grpc"].strip(), lines["admin"].strip()
            return RunningNode(process, log, http, grpc, admin, token)
        time.sleep(0.05)
    raise AssertionError(f"the node did not start\n{log.read_text()}")


def parsed(content: bytes) -> Any:
    """JSON, if it is some."""
    try:
        return json.loads(content)
    except ValueError:
        return content
