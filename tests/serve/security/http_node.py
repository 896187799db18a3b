"""A real uvicorn server with the guarded protocol, in a thread, and raw sockets to it."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from fedclaw.serve.security.http_protocol import CERTIFICATE, ConnectionLimits, guarded
from fedclaw.serve.security.tls import ServerTls


@dataclass
class Seen:
    """What reached the application."""

    port: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes | None] = field(default_factory=list)
    """None: the client went away, or was sent away, before the body's end."""
    most: int = 0
    """Bytes of a body that the application got, whether or not it was whole."""
    protocol: Any = None
    server: Any = None

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30, source_address=(source, 0))

    def ask(self, request: bytes, source: str = "127.0.0.1") -> tuple[int, bytes]:
        """Send these bytes on a connection of their own; the first answer's status, and all that came."""
        with self.connect(source) as connection:
            connection.sendall(request)
            return answer(connection)


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """What comes until the connection is closed, or until one whole answer is there. 0: nothing came."""
    got = b""
    try:
        while b"\r\n\r\n" not in got or len(got.partition(b"\r\n\r\n")[2]) < _length(got):
            if not (chunk := connection.recv(65536)):
                break
            got += chunk
    except ConnectionResetError:
        pass
    return (int(got.split(b" ", 2)[1]) if got else 0), got


def _length(got: bytes) -> int:
    head = got.partition(b"\r\n\r\n")[0].lower()
    return int(head.partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)


def rest_of(connection: socket.socket) -> bytes:
    """All that still comes until the server closes."""
    got = b""
    try:
        while chunk := connection.recv(65536):
            got += chunk
    except ConnectionResetError:
        pass
    return got


@contextmanager
def node(limits: ConnectionLimits, loop: str = "uvloop", tls: ServerTls | None = None) -> Iterator[Seen]:
    """`/slow` waits for a moment, `/hasty` answers before it reads the body, `/large` answers 8 MB, `/deaf` reads no
    body until the client is gone."""
    seen = Seen()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        seen.requests.append({**scope, "headers": scope["headers"]})
        content = json.dumps({"path": scope["path"], "certificate": scope.get(CERTIFICATE)}).encode()
        if scope["path"] == "/hasty":
            await reply(send, content)
        if scope["path"] == "/slow":
            await asyncio.sleep(0.2)
        body: bytes | None = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                body = None
                break
            body += message["body"]
            seen.most = max(seen.most, len(body))
            if not message["more_body"]:
                break
        seen.bodies.append(body)
        if scope["path"] != "/hasty":
            await reply(send, content if scope["path"] != "/large" else bytes(8 << 20))

    async def reply(send: Any, content: bytes) -> None:
        length = str(len(content)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": content})

    seen.protocol = guarded(limits)
    more: dict[str, Any] = {} if tls is None else {"ssl_context_factory": lambda *_: tls.context}
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, http=seen.protocol, ws="none", loop=loop, lifespan="off", log_config=None, **more
    )
    seen.server = server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.005)
        assert thread.is_alive()
    seen.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield seen
    finally:
        server.force_exit = server.should_exit = True
        thread.join(timeout=20)
