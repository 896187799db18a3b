"""Closed-loop load from outside: wrk over HTTP/1.1 (REST), h2load over HTTP/2 (gRPC), one thread each, on one core.

Each of the connections sends its next request when the last one is answered. Latencies are those of whole answers.
"""

import json
import os
import shutil
import statistics
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedclaw.errors import FedClawError, UsageError

TIMEOUT = 10
"""Seconds after which wrk counts a request as failed."""

_SCRIPT = """
wrk.method = "POST"
local file = io.open({body}, "rb")
wrk.body = file:read("*a")
file:close()
{headers}
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{{"requests": %d, "microseconds": %d, "lost": %d, "refused": %d, "p50": %.1f, "p99": %.1f}}\\n',
    summary.requests, summary.duration, errors.connect + errors.read + errors.write + errors.timeout, errors.status,
    latency:percentile(50), latency:percentile(99)))
end
"""


class LoadError(FedClawError):
    """The load could not be made."""


@dataclass(frozen=True)
class Asked:
    """One request, which is sent again and again."""

    url: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """What came of it. Latencies in milliseconds."""

    rate: float
    """Answers a second that were no errors."""
    p50: float
    p99: float
    answered: int
    errors: int
    """Requests that were refused, or lost."""


def require(tool: str, package: str) -> None:
    """Raise UsageError where a program is not installed."""
    if shutil.which(tool) is None:
        raise UsageError(f"{tool} is not installed; on Debian: apt-get install {package}")


def pinned(core: int | None, command: Sequence[str]) -> list[str]:
    """The command on one core; on all for None."""
    return list(command) if core is None else ["taskset", "--cpu-list", str(core), *command]


def http_load(asked: Asked, connections: int, seconds: float, core: int | None = None) -> Load:
    """Ask by `connections` at once for so long. Raises LoadError where nothing was answered."""
    with tempfile.TemporaryDirectory(prefix="fedclaw-load-") as name:
        body, script = Path(name) / "body", Path(name) / "ask.lua"
        body.write_bytes(asked.body)
        headers = "\n".join(f"wrk.headers[{_lua(key)}] = {_lua(value)}" for key, value in asked.headers.items())
        script.write_text(_SCRIPT.format(body=_lua(str(body)), headers=headers))
        script.chmod(0o600)
        command = ["wrk", "--threads", "1", "--connections", str(connections), "--timeout", f"{TIMEOUT}s"]
        command += ["--duration", f"{max(1, round(seconds))}s", "--script", str(script), asked.url]
        told = _run(pinned(core, command))
    found = json.loads(told.splitlines()[-1])
    good = found["requests"] - found["refused"]
    if good <= 0:
        raise LoadError(f"{asked.url}: none of {found['requests']} requests was answered")
    return Load(
        rate=good / (found["microseconds"] / 1e6),
        p50=found["p50"] / 1e3,
        p99=found["p99"] / 1e3,
        answered=good,
        errors=found["lost"] + found["refused"],
    )


def grpc_load(asked: Asked, connections: int, seconds: float, core: int | None = None) -> Load:
    """The same over gRPC: `url` is http://HOST:PORT/SERVICE/METHOD, `body` the message's bytes.

    h2load does not read gRPC's status: the caller makes sure that the request is one that is answered.
    """
    with tempfile.TemporaryDirectory(prefix="fedclaw-load-") as name:
        body, log = Path(name) / "body", Path(name) / "log"
        body.write_bytes(struct.pack(">BI", 0, len(asked.body)) + asked.body)
        headers = {"content-type": "application/grpc", "te": "trailers", **asked.headers}
        fields = [part for key, value in headers.items() for part in ("-H", f"{key}: {value}")]
        command = ["h2load", "-t", "1", "-c", str(connections), "-m", "1", "-D", str(max(1, round(seconds)))]
        command += ["--data", str(body), "--log-file", str(log), *fields, asked.url]
        _run(pinned(core, command))
        lines = [line.split("\t") for line in log.read_text().splitlines()]
    if not (answered := sorted(int(line[2]) / 1e3 for line in lines if line[1] == "200")):
        raise LoadError(f"{asked.url}: none of {len(lines)} requests was answered")
    times = [int(line[0]) for line in lines]
    whole = max((max(times) - min(times)) / 1e6, 1e-3)
    return Load(
        rate=len(answered) / whole,
        p50=statistics.median(answered),
        p99=answered[int(0.99 * (len(answered) - 1))],
        answered=len(answered),
        errors=len(lines) - len(answered),
    )


def median_load(loads: Sequence[Load]) -> Load:
    """Of several rounds: the median of each figure, and all of the errors."""
    return Load(
        rate=statistics.median(load.rate for load in loads),
        p50=statistics.median(load.p50 for load in loads),
        p99=statistics.median(load.p99 for load in loads),
        answered=sum(load.answered for load in loads),
        errors=sum(load.errors for load in loads),
    )


def two_cores() -> tuple[int | None, int | None]:
    """(the server's core, the load's); (None, None) where there is one only."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


def _lua(text: str) -> str:
    """As a string of Lua, all of its bytes by number."""
    return '"' + "".join(f"\\{byte:03d}" for byte in text.encode()) + '"'


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "unable to connect" in done.stderr + done.stdout:
        raise LoadError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout
