"""A real PostgreSQL server, in a temporary directory, on a free port: for what two nodes share."""

import getpass
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.ports import free_port

PASSWORD = "of-the-tests-alone"
USER = "fedclaw"


def binaries() -> Path | None:
    """The directory of `initdb` and `postgres`: Debian keeps them out of the path."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((path for path in found if (path / "postgres").exists() and (path / "initdb").exists()), None)


class PostgresServer:
    """One server. It refuses to run as root, so root starts it as the user `postgres` or `nobody`."""

    def __init__(self) -> None:
        """Skips the test where no server is installed."""
        self._binaries = binaries()
        if self._binaries is None:
            pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
        self._home = Path(tempfile.mkdtemp(prefix="fedclaw-postgresql-"))
        self._user = _user()
        if self._user is not None:
            shutil.chown(self._home, self._user)
        self.port = free_port()
        password = self._home / "password"
        password.write_text(PASSWORD)
        settings = [
            "-U",
            USER,
            "-A",
            "scram-sha-256",
            "--pwfile",
            str(password),
            "--no-sync",
            "--no-locale",
            "-E",
            "UTF8",
        ]
        self._call("initdb", "-D", str(self._home / "data"), *settings)
        self.start()

    def start(self, *options: str) -> None:
        """Start it, or start it again. Nothing is synced to disk: these data may go."""
        options = (f"-p {self.port} -k {self._home} -c listen_addresses=127.0.0.1 -c fsync=off", *options)
        log = ["-l", str(self._home / "log"), "-w", "-o", " ".join(options)]
        self._call("pg_ctl", "start", "-D", str(self._home / "data"), *log)

    def stop(self, mode: str = "immediate") -> None:
        """End it, at once: clients' connections break."""
        self._call("pg_ctl", "stop", "-D", str(self._home / "data"), "-w", "-m", mode)

    def url(self, schema: str | None = None) -> str:
        path = "" if schema is None else f"?options=-csearch_path%3D{schema}"
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres{path}"

    def create(self, schema: str) -> None:
        """A schema of its own for a test: as good as a database, and made in a millisecond."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE SCHEMA "{schema}"')  # type: ignore[arg-type]

    def remove(self) -> None:
        """End it and remove all that it kept."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self._home, ignore_errors=True)

    def _call(self, program: str, *arguments: str) -> None:
        rights = {} if self._user is None else {"user": self._user, "group": _group(self._user), "extra_groups": []}
        done = subprocess.run(
            [str(self._binaries / program), *arguments],  # type: ignore[operator]
            cwd=self._home,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(self._home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=120,
            **rights,  # type: ignore[arg-type]
        )
        assert done.returncode == 0, (program, done.stderr.decode())


def _user() -> str | None:
    """Whom to become; None: root is not who we are."""
    import pwd

    if os.geteuid() != 0:
        assert getpass.getuser()
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _group(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid
