"""What two nodes need around them: one PostgreSQL that they share, and Debian's HAProxy in front."""

import getpass
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from experiments.processes import free_port
from experiments.serving.bundles import Foundry
from experiments.serving.servers import Node, Server
from fedclaw.errors import UsageError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.serve.proxies.haproxy import HaproxySettings, ProxyLimits, configuration

_BINARIES = "/usr/lib/postgresql"
"""Where Debian has them, by version."""
_USER, _DATABASE = "fedclaw", "postgres"


def postgres_binaries() -> Path | None:
    """The directory of `initdb` and `postgres`, if there is one."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path(_BINARIES).glob("*/bin"), reverse=True)
    return next((path for path in found if (path / "initdb").exists() and (path / "postgres").exists()), None)


class Postgres:
    """A server in a temporary directory. A context manager.

    PostgreSQL refuses to run as root, so root runs it as `postgres` or `nobody`.
    """

    def __init__(self) -> None:
        binaries = postgres_binaries()
        if binaries is None:
            raise UsageError("no PostgreSQL server is installed; on Debian: apt-get install postgresql")
        self._binaries, self._port = binaries, free_port()
        self._password = secrets.token_hex(16)

    def __enter__(self) -> Self:
        self._home = Path(tempfile.mkdtemp(prefix="fedclaw-postgres-"))
        if (owner := _owner()) is not None:
            shutil.chown(self._home, owner)
        password = self._home / "password"
        password.write_text(self._password)
        if owner is not None:
            shutil.chown(password, owner)
        password.chmod(PRIVATE_MODE)
        cluster = ["-A", "scram-sha-256", "--no-locale", "-E", "UTF8"]
        self._call("initdb", "-D", "data", "-U", _USER, "--pwfile", "password", *cluster)
        options = f"-p {self._port} -k {self._home} -c listen_addresses=127.0.0.1"
        self._call("pg_ctl", "start", "-D", "data", "-l", "log", "-w", "-o", options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call("pg_ctl", "stop", "-D", "data", "-w", "-m", "immediate")
        shutil.rmtree(self._home, ignore_errors=True)

    def place(self, path: Path) -> str:
        """A file at `path` with the address and the password, as a node's `database` names it."""
        url = f"postgresql://{_USER}:{self._password}@127.0.0.1:{self._port}/{_DATABASE}"
        write_atomic(path, url.encode(), PRIVATE_MODE)
        return f"file:{path}"

    def _call(self, program: str, *arguments: str) -> None:
        more: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if (owner := _owner()) is not None:
            more |= {"user": owner, "group": pwd.getpwnam(owner).pw_gid, "extra_groups": []}
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(self._home)}
        command = [str(self._binaries / program), *arguments]
        subprocess.run(command, cwd=self._home, env=environment, check=True, timeout=120, **more)


def _owner() -> str | None:
    """Whom root becomes; None: this is not root."""
    if getpass.getuser() != "root":
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def haproxy(root: Path, foundry: Foundry, nodes: Sequence[Node]) -> Server:
    """Debian's HAProxy before `nodes`, with FedClaw's configuration and limits that no client here reaches."""
    if (program := shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")) is None:
        raise UsageError("haproxy is not installed; on Debian: apt-get install haproxy")
    root.mkdir(parents=True, exist_ok=True)
    port, path, certificate = free_port(), root / "haproxy.cfg", root / "front.pem"
    home = foundry.home.root
    write_atomic(certificate, (home / "server.crt").read_bytes() + (home / "server.key").read_bytes(), PRIVATE_MODE)
    much = dict.fromkeys(ProxyLimits.model_fields, 1000000)
    settings = HaproxySettings(
        nodes=tuple(f"127.0.0.1:{node.ports.http}" for node in nodes),
        plaintext=True,
        certificate=str(certificate),
        bind=f"127.0.0.1:{port}",
        user=None,
        limits=ProxyLimits(**{**much, "connections": 10_000}),
    )
    write_atomic(path, configuration(settings).encode())
    return Server(
        "haproxy",
        [program, "-db", "-f", str(path)],
        f"https://127.0.0.1:{port}",
        "/v2/health/ready",
        root / "haproxy.log",
        authority=foundry.authority,
    )
