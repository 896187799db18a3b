"""The demo's last step: a node that answers from the signed bundle, asked over HTTP with a token.

Usually one request, and the node ends. With serve=true two versions stay, one a canary of the other, until Ctrl-C.
"""

import http.client
import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.processes import Processes, free_port
from fedclaw import startup
from fedclaw.errors import FedClawError

MODEL, ISSUER, AUDIENCE = "demo", "demo", "demo-node"
SCOPES = (f"predict:{MODEL}", f"feedback:{MODEL}", "admin:read", "admin:publish", "admin:route")
ROWS = 10
PATIENCE = 60.0
NPZ, CSV = "application/x-npz", "text/csv"


@dataclass(frozen=True)
class ServedDemo:
    """A node of the demo, on this machine alone."""

    root: Path
    processes: Processes
    console: Console
    port: int
    admin_port: int

    @classmethod
    def start(cls, root: Path, bundle: Path, authority: Path, processes: Processes, console: Console) -> "ServedDemo":
        """Make a key and a token, start the node with the bundle, and wait until it is ready. Raises FedClawError."""
        keys, token = root / "node-keys", root / "token"
        if not keys.exists():
            processes.run("serve", "keys", f"directory={keys}")
        issued = (f"issuer={ISSUER}", f"audience={AUDIENCE}")
        scopes = f"scopes=[{','.join(SCOPES)}]"
        processes.run("serve", "token", f"keys={keys}", *issued, "subject=demo", scopes, f"output={token}")
        node = cls(root, processes, console, free_port(), free_port())
        processes.start(
            "node",
            "serve",
            f"bundle={bundle}",
            f"model={MODEL}",
            f"ca={authority}",
            f"state={root / 'node'}",
            f"port={node.port}",
            "grpc_port=null",
            f"admin.port={node.admin_port}",
            "tls.disabled=true",
            f"tokens.jwks={keys / 'keys.json'}",
            f"tokens.issuer={ISSUER}",
            f"tokens.audience={AUDIENCE}",
        )
        node.wait()
        return node

    def wait(self) -> None:
        """Until it is ready. Raises FedClawError if it ends, or takes too long."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self.processes.check()
            try:
                if self._ask("GET", "/v2/health/ready")[0] == http.client.OK:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise FedClawError(f"the node was not ready after {PATIENCE:g} s; {self.root / 'logs' / 'node.log'} says why")

    def answer(self, inputs: Path, rows: int) -> int:
        """Let it answer the first `rows` of a file, and show that; how many it answered. Raises FedClawError."""
        body, media_type = first_rows(inputs, rows)
        status, answer = self._ask("POST", f"/predict/{MODEL}", body, media_type)
        if status != http.client.OK:
            raise FedClawError(f"the node answered {status}: {answer.decode(errors='replace')[:300]}")
        lines = answer.decode().splitlines()
        self.console.print(f"POST http://127.0.0.1:{self.port}/predict/{MODEL}  {rows} of {inputs}", markup=False)
        for line in lines:
            self.console.print(f"  {line}", markup=False)
        return len(lines) - 1

    def canary(self, bundle: Path) -> None:
        """Publish another version, which a few of the keys get first."""
        self.processes.run(
            "serve",
            "publish",
            f"bundle={bundle}",
            f"model={MODEL}",
            f"node=http://127.0.0.1:{self.admin_port}",
            f"token=file:{self.root / 'token'}",
            "mode=canary",
            show=True,
        )

    def stay(self, inputs: Path) -> None:
        """Say what to try, and serve until a signal comes."""
        token = f'-H "authorization: Bearer $(cat {self.root / "token"})"'
        at, admin = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"
        media_type = NPZ if inputs.suffix == ".npz" else CSV
        self.console.print("The node answers until Ctrl-C. What to try next:", style="bold")
        for line in (
            f'curl -s {token} -H "content-type: {media_type}" --data-binary @{inputs} {at}/predict',
            f"curl -s {token} {admin}/admin/models/{MODEL}/release",
            f"curl -s {token} {admin}/admin/models/{MODEL}/events",
            f"curl -s -X POST {token} -d '{{}}' {admin}/admin/models/{MODEL}/roll_back",
            f"curl -s {token} {admin}/metrics",
            f"{at}/docs",
        ):
            self.console.print(f"  {line}", markup=False, soft_wrap=True)
        startup.next_step("the node has ended, and the demo's output stays")
        while True:
            time.sleep(1.0)
            self.processes.check()

    def _ask(self, method: str, path: str, body: bytes | None = None, media_type: str = CSV) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {"content-type": media_type, "accept": CSV}
        token = self.root / "token"
        if body is not None:
            headers["authorization"] = f"Bearer {token.read_text().strip()}"
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def first_rows(inputs: Path, rows: int) -> tuple[bytes, str]:
    """The first rows of a CSV, or the first examples of an archive, and what they are for HTTP."""
    if inputs.suffix != ".npz":
        return b"".join(inputs.read_bytes().splitlines(keepends=True)[: rows + 1]), CSV
    buffer = io.BytesIO()
    with np.load(inputs, allow_pickle=False) as archive:
        np.savez(buffer, **{name: archive[name][:rows] for name in archive.files})
    return buffer.getvalue(), NPZ
