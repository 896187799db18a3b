"""Speaking to a proxy: bytes as they are, or as a client of good manners does."""

import hashlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path

import grpc

from tests.serve.proxies import http2
from tests.serve.proxies.certificates import Certificates
from tests.serve.proxies.requests import HOSTILE, HOSTILE_HTTP2, LEGITIMATE, Legitimate, get, post
from tests.serve.proxies.standin import Node

PATIENCE = 30.0
"""Seconds after which a proxy hangs."""


@dataclass(frozen=True)
class Proxy:
    """A proxy that runs, and how to know it."""

    port: int
    ca: Path
    grpc_port: int = 0

    def connect(self, protocol: str = "http/1.1", timeout: float = PATIENCE, port: int | None = None) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=self.ca)
        context.set_alpn_protocols([protocol])
        raw = socket.create_connection(("127.0.0.1", port or self.port), timeout)
        try:
            connection = context.wrap_socket(raw, server_hostname="127.0.0.1")
        except BaseException:
            raw.close()
            raise
        assert connection.selected_alpn_protocol() == protocol
        return connection

    def status(self, data: bytes, timeout: float = 5.0) -> int:
        """The status of the answer to what is sent; 0: the connection was closed without one, or nothing came."""
        with self.connect(timeout=timeout) as connection:
            with suppress(OSError):
                connection.sendall(data)
            return status_of(connection)

    def ask(self, request: Legitimate) -> tuple[int, dict[str, str]]:
        """Status and answer, as a client of good manners gets them."""
        connection = HTTPSConnection(
            "127.0.0.1", self.port, timeout=PATIENCE, context=ssl.create_default_context(cafile=self.ca)
        )
        try:
            connection.request(request.method, request.target, request.body, request.headers)
            answer = connection.getresponse()
            content = answer.read()
            told = json.loads(content) if content and answer.status == 200 else {"refusal": content.decode()}
            return answer.status, told
        finally:
            connection.close()


def status_of(connection: socket.socket) -> int:
    """The status in the first line that comes."""
    line = b""
    with suppress(OSError):
        while b"\n" not in line and (part := connection.recv(4096)):
            line += part
    words = line.split(b"\r\n")[0].split(b" ")
    return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") else 0


def wait_for(proxy: Proxy, ready: Legitimate = LEGITIMATE["ready"]) -> None:
    """Return when the proxy answers and a node is behind it."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with suppress(OSError):
            if proxy.ask(ready)[0] == 200:
                return
        time.sleep(0.05)
    raise TimeoutError("the proxy does not answer")


def not_stopped(proxy: Proxy, node: Node, cases: Iterable[str] = tuple(HOSTILE)) -> list[str]:
    """The hostile requests that the node saw, or that were answered as if all were well."""
    found = []
    for case in cases:
        node.arrived.clear()
        status = proxy.status(HOSTILE[case])
        if node.arrived or 200 <= status < 400:
            found.append(f"{case}: {status}, {len(node.arrived)} at the node")
    return found


def not_stopped_over_http2(proxy: Proxy, node: Node, cases: Iterable[str] = tuple(HOSTILE_HTTP2)) -> list[str]:
    """The same of those over HTTP/2."""
    found = []
    for case in cases:
        sent = HOSTILE_HTTP2[case]
        node.arrived.clear()
        with proxy.connect("h2", timeout=5.0) as connection:
            with suppress(OSError):
                connection.sendall(http2.opening() + sent)
            came = http2.frames(connection)
        fine = any(kind == http2.HEADERS and b"\x88" in payload[:1] for kind, _, _, payload in came)  # :status 200
        if node.arrived or fine:
            found.append(f"{case}: {len(node.arrived)} at the node")
    return found


def not_passed(proxy: Proxy, node: Node) -> list[str]:
    """The legitimate requests that were refused, or that came to the node otherwise than they were sent."""
    found = []
    for case, request in LEGITIMATE.items():
        node.arrived.clear()
        status, answer = proxy.ask(request)
        whole = hashlib.sha256(request.body or b"").hexdigest()
        if status != 200 or answer != {"target": request.target, "digest": whole}:
            found.append(f"{case}: {status} {answer}")
        elif missing := _changed(node, request):
            found.append(f"{case}: {missing}")
    return found


def _changed(node: Node, request: Legitimate) -> str:
    (came,) = node.arrived
    sent = {name.lower(): value for name, value in request.headers.items()}
    return ", ".join(name for name, value in sent.items() if came.headers.get(name) != value)


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Return when it is so. Raises AssertionError when it never is."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(what)


def statuses(proxy: Proxy, number: int, sent: bytes) -> list[int]:
    """The answers to one request, asked so often, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: proxy.status(sent), range(number)))


def beside_slow_clients(proxy: Proxy, node: Node) -> tuple[set[int], list[int]]:
    """What a hundred clients are told that send a byte a second of headers and bodies, and what 20 others are."""
    header, body = get("/v2", "fedclaw-key: " + "a" * 100), post("/predict", b'{"rows": [{"age": 63}]}')
    stop, slow = threading.Event(), [proxy.connect() for _ in range(100)]

    def drip() -> None:
        place = 0
        while not stop.wait(1.0):
            for number, connection in enumerate(slow):
                data = header[40:-4] if number % 2 else body[-20:-1]
                with suppress(OSError):
                    connection.sendall(data[place : place + 1])
            place += 1

    for number, connection in enumerate(slow):
        connection.sendall(header[:40] if number % 2 else body[:-20])
    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        node.arrived.clear()
        quick = [proxy.status(get("/v2")) for _ in range(20)]
        told = {status_of(connection) for connection in slow}
        assert len(node.arrived) == len(quick), "a slow one came through"
        return told, quick
    finally:
        stop.set()
        dripping.join()
        for connection in slow:
            connection.close()


GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"


class _AnyMethod(grpc.GenericRpcHandler):
    """Answers every gRPC method with what it was sent, and remembers which."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        self.asked.append(details.method)
        return grpc.unary_unary_rpc_method_handler(lambda request, _: request)


@contextmanager
def grpc_standing_in(certificates: Certificates) -> Iterator[tuple[str, list[str]]]:
    """A gRPC server in a node's place: its address, and what it was asked."""
    handler, pem = _AnyMethod(), certificates.node.read_bytes()
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, handlers=[handler])
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pem, pem)]))
        server.start()
        try:
            yield f"127.0.0.1:{port}", handler.asked
        finally:
            server.stop(0).wait(PATIENCE)


def through_grpc(proxy: Proxy) -> list[str]:
    """What is wrong with the gRPC port: a tensor is answered, and nothing else is."""
    found, tensor = [], bytes(range(256)) * 1000
    credentials = grpc.ssl_channel_credentials(proxy.ca.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{proxy.grpc_port}", credentials) as channel:
        if channel.unary_unary(GRPC_METHOD)(tensor, timeout=PATIENCE, wait_for_ready=True) != tensor:
            found.append("a tensor has changed")
        for method in ("/admin.Service/Publish", "/inference.GRPCInferenceService/../Publish", "/grpc.reflection/List"):
            with suppress(grpc.RpcError):
                channel.unary_unary(method)(b"", timeout=PATIENCE)
                found.append(method)
    page = [(":method", "POST"), (":scheme", "https"), (":authority", "node-front"), (":path", GRPC_METHOD)]
    with proxy.connect("h2", port=proxy.grpc_port) as connection:
        connection.sendall(http2.opening() + http2.request([*page, ("content-type", "text/html")]))
        came = http2.frames(connection)
    return found + ["a web page" for kind, _, _, payload in came if kind == http2.HEADERS and payload[:1] == b"\x88"]
