"""The reference: a bare bidirectional gRPC stream with mutual TLS 1.3, no protocol, no seal, no files.

    python -m experiments.benchmarks.bare PORT SITE_DIRECTORY

is its client process: it echoes small messages, and answers an empty one with a flood of chunks.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.bare", __doc__)

import queue
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from experiments.benchmarks.loopback import process
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.site_home import SiteKeys
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.allocator import tune_allocator

PATH = "/benchmark.Bare/Stream"
CHUNK = 1 << 20
FLOOD_CHUNKS = 40


class BareStream:
    """The server's end of the one stream."""

    def __init__(self) -> None:
        self._out: queue.Queue[bytes | None] = queue.Queue()
        self._in: queue.Queue[Iterator[bytes]] = queue.Queue()
        self._requests: Iterator[bytes] = iter(())

    def handle(self, requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        """gRPC's handler."""
        self._in.put(requests)
        while (item := self._out.get()) is not None:
            yield item

    def connect(self) -> None:
        """Wait for the client."""
        self._requests = self._in.get(timeout=60)
        next(self._requests)

    def echo(self, payload: bytes) -> float:
        """Seconds for `payload` there and back."""
        began = time.perf_counter()
        self._out.put(payload)
        next(self._requests)
        return time.perf_counter() - began

    def flood(self) -> float:
        """Seconds until FLOOD_CHUNKS chunks have arrived."""
        began = time.perf_counter()
        self._out.put(b"")
        for _ in range(FLOOD_CHUNKS):
            next(self._requests)
        return time.perf_counter() - began

    def close(self) -> None:
        """End the stream."""
        self._out.put(None)


@contextmanager
def bare_stream(home: FederationHome, site: Path) -> Iterator[BareStream]:
    """A server here and a client process, connected."""
    tune_allocator()
    stream = BareStream()
    tls = home.tls()
    server = grpc.server(ThreadPoolExecutor(2), options=frames.common_options())
    handler = grpc.stream_stream_rpc_method_handler(stream.handle)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Bare", {"Stream": handler}),))
    credentials = grpc.ssl_server_credentials([(tls.key, tls.certificate)], tls.ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        with process("experiments.benchmarks.bare", [str(port), str(site)]):
            stream.connect()
            yield stream
            stream.close()
    finally:
        server.stop(0).wait()


def _answers(next_answer: Callable[[], list[bytes] | None]) -> Iterator[bytes]:
    yield b"hello"
    while (answer := next_answer()) is not None:
        yield from answer


def main(port: str, site: str) -> None:
    """The client process."""
    tune_allocator()
    tls = SiteKeys.open(Path(site)).tls()
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
    flood = [bytes(CHUNK)] * FLOOD_CHUNKS
    answers: queue.Queue[list[bytes] | None] = queue.Queue()
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, frames.common_options()) as channel:
        call = channel.stream_stream(PATH, request_serializer=None, response_deserializer=None)
        try:
            for payload in call(_answers(answers.get)):
                answers.put([payload] if payload else flood)
        except grpc.RpcError:
            return
        finally:
            answers.put(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
