"""The protocol's gRPC service of some node, on a real port, for tests."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import grpc.aio

from fedclaw.serve.inference.grpc_service import add_inference, server_options
from fedclaw.serve.security.tls import GrpcClients, ServerTls


@contextmanager
def grpc_served(node: Any, max_message: int = 2**20, tls: ServerTls | None = None) -> Iterator[str]:
    """`node` on a free port, in a thread with an event loop of its own: HOST:PORT. With `tls`, clients' certificates
    are looked at."""
    found, started, stopped = list[str](), Event(), Event()

    async def serve() -> None:
        server = grpc.aio.server(options=server_options(max_message))
        add_inference(server, node, None if tls is None else GrpcClients(tls.files))
        free = "127.0.0.1:0"
        port = server.add_insecure_port(free) if tls is None else server.add_secure_port(free, tls.grpc_credentials())
        found.append(f"127.0.0.1:{port}")
        await server.start()
        started.set()
        await asyncio.to_thread(stopped.wait)
        await server.stop(0)

    thread = Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(30)
    try:
        yield found[0]
    finally:
        stopped.set()
        thread.join(30)
