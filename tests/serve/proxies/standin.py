"""A server in a node's place that answers as a node does and remembers every byte that a proxy let through."""

import hashlib
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.serve.proxies.certificates import Certificates

NEVER = 1 << 24
"""Bytes of a body that are read at most."""


@dataclass(frozen=True)
class Arrived:
    """A request that came to the node."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = field(repr=False)


class Node:
    """An HTTPS server on a port of this machine."""

    def __init__(self, port: int, arrived: list[Arrived], free: threading.Event) -> None:
        self.port, self.arrived = port, arrived
        self.free = free
        """While it is not set, /v2/models/busy is not answered."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """A proxy that only looks whether somebody is there is no error."""


@contextmanager
def standing_in(certificates: Certificates) -> Iterator[Node]:
    """A node that answers until the end of the block."""
    arrived: list[Arrived] = []
    free = threading.Event()
    free.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def log_message(self, *said: object) -> None:
            """Nothing is said."""

        def _answer(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = self.rfile.read(min(size, NEVER))
            if self.path == "/v2/health/ready" and self.headers.get("host") == "localhost":
                self._send({"ready": True})  # the proxy's own question
                return
            arrived.append(Arrived(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            if self.path == "/v2/models/busy":
                free.wait(30)
            self._send({"target": self.path, "digest": hashlib.sha256(body).hexdigest()})

        def _send(self, answer: object) -> None:
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def __getattr__(self, name: str) -> object:
            if name.startswith("do_"):  # whatever the method: what the proxy should have stopped arrived
                return self._answer
            raise AttributeError(name)

    server = _Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificates.node)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield Node(server.server_address[1], arrived, free)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
