"""Hostile connections over real sockets."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from fedclaw.errors import UsageError
from fedclaw.serve.security.http_protocol import ConnectionLimits
from tests.serve.security.http_node import Seen, answer, node, rest_of

QUICK = ConnectionLimits(
    header_seconds=0.6,
    header_bytes=4096,
    header_count=20,
    target_bytes=200,
    body_bytes=200_000,
    held_bytes=1_000_000,
    body_grace=0.6,
    body_rate=2_000,
    write_seconds=0.6,
    idle_seconds=0.6,
    linger_seconds=0.5,
    connections=60,
    connections_per_address=30,
    sweep_seconds=0.1,
)
GET = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    with node(QUICK) as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(seen: Seen) -> Iterator[None]:
    seen.requests.clear()
    seen.bodies.clear()
    seen.most = 0
    yield
    until(lambda: not seen.protocol.register.open)
    assert seen.protocol.register.held == 0
    assert not seen.protocol.register._by_address


def until(true: object) -> None:
    end = time.monotonic() + 30
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def post(path: bytes, body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_requests_one_after_another_on_a_connection(seen: Seen) -> None:
    with seen.connect() as connection:
        for i in range(3):
            connection.sendall(post(b"/v2/%d" % i, b"x" * i))
            assert answer(connection)[0] == 200
        connection.sendall(
            b"POST /c HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        )
        assert answer(connection)[0] == 200
    assert seen.bodies == [b"", b"x", b"xx", b"abcde"]


def test_standard_clients_are_answered(seen: Seen) -> None:
    client = http.client.HTTPConnection("127.0.0.1", seen.port, timeout=30)
    for body in (b"", b"y" * 150_000):
        client.request("POST", "/v2/models/heart.v2/infer?x=../%2f", body, {"Expect": "100-continue"} if body else {})
        assert client.getresponse().read()
    client.request("GET", "/v2/models/h%C3%A9art/versions/1.0/ready")
    assert client.getresponse().status == 200
    client.close()
    assert [len(body or b"") for body in seen.bodies] == [0, 150_000, 0]
    assert seen.ask(b"GET / HTTP/1.0\r\n\r\n")[0] == 200


HEAD = b"POST /v2 HTTP/1.1\r\nHost: x\r\n"
AMBIGUOUS = {
    "length and chunked": HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "the same length twice": HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "list of lengths": HEAD + b"Content-Length: 3, 3\r\n\r\nabc",
    "signed length": HEAD + b"Content-Length: +3\r\n\r\nabc",
    "negative length": HEAD + b"Content-Length: -3\r\n\r\nabc",
    "hex length": HEAD + b"Content-Length: 0x3\r\n\r\nabc",
    "empty length": HEAD + b"Content-Length: \r\n\r\nabc",
    "length above 64 bits": HEAD + b"Content-Length: 18446744073709551619\r\n\r\nabc",
    "space before colon": HEAD + b"Content-Length : 3\r\n\r\nabc",
    "folded header": HEAD + b"X-A: b\r\n Content-Length: 3\r\n\r\nabc",
    "folded with a tab": HEAD + b"X-A: b\r\n\tc\r\n\r\n",
    "folded first header": b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: x\n\n",
    "bare LF in headers": b"GET / HTTP/1.1\r\nHost: x\nX-A: b\r\n\r\n",
    "bare LF at the end": b"GET / HTTP/1.1\r\nHost: x\r\n\n",
    "bare CR in a value": b"GET / HTTP/1.1\r\nHost: x\r\nX-A: b\rX-B: c\r\n\r\n",
    "NUL in a value": b"GET / HTTP/1.1\r\nHost: x\r\nX-A: b\0c\r\n\r\n",
    "coding that is not the last": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "coding before chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "two codings": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "nearly chunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "quoted chunked": HEAD + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "vertical tab": HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "two tokens": b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\r\nauthorization: Bearer b\r\n\r\n",
    "two keys": b"GET / HTTP/1.1\r\nHost: x\r\nFedclaw-Key: a\r\nfedclaw-key: b\r\n\r\n",
    "two types": HEAD + b"Content-Type: text/csv\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/3.0": b"GET / HTTP/3.0\r\nHost: x\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(100),
    "absolute form": b"GET http://y/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "no slash": b"GET v2 HTTP/1.1\r\nHost: x\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "tunnel": b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "websocket": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "h2c": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
    "dots": b"GET /v2/../admin HTTP/1.1\r\nHost: x\r\n\r\n",
    "dots at the end": b"GET /v2/.. HTTP/1.1\r\nHost: x\r\n\r\n",
    "one dot": b"GET /v2/./x HTTP/1.1\r\nHost: x\r\n\r\n",
    "encoded dots": b"GET /v2/%2e%2E/admin HTTP/1.1\r\nHost: x\r\n\r\n",
    "half encoded dots": b"GET /v2/.%2e/admin HTTP/1.1\r\nHost: x\r\n\r\n",
    "encoded slash": b"GET /v2%2Fadmin HTTP/1.1\r\nHost: x\r\n\r\n",
    "two slashes": b"GET //v2 HTTP/1.1\r\nHost: x\r\n\r\n",
    "backslash": b"GET /v2\\admin HTTP/1.1\r\nHost: x\r\n\r\n",
    "encoded backslash": b"GET /v2%5cadmin HTTP/1.1\r\nHost: x\r\n\r\n",
    "encoded NUL": b"GET /v2%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "encoded line break": b"GET /v2%0d%0aX:y HTTP/1.1\r\nHost: x\r\n\r\n",
    "broken encoding": b"GET /v2%zz HTTP/1.1\r\nHost: x\r\n\r\n",
    "fragment": b"GET /v2#x HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes above ASCII": b"GET /v2/\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
    "tab in the target": b"GET /v2\t/x HTTP/1.1\r\nHost: x\r\n\r\n",
    "method of none": b"G@T / HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_two_servers_could_read_differently_is_refused(seen: Seen, name: str) -> None:
    status, got = seen.ask(AMBIGUOUS[name])
    assert status == 400, got
    assert got.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in got
    assert b'"code":"bad_request"' in got
    assert not seen.requests


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nabc\r\n",
        b"-3\r\nabc\r\n",
        b"0x3\r\nabc\r\n",
        b" 3\r\nabc\r\n",
        b"3\nabc\n0\n\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"ffffffffffffffff1\r\nabc\r\n",
        b"3;\nx\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabc0\r\n\r\n",
    ],
)
def test_chunks_that_are_none_end_the_request(seen: Seen, body: bytes) -> None:
    status, got = seen.ask(CHUNKED + body)
    assert status == 400, got
    until(lambda: seen.bodies)
    assert seen.bodies == [None]


def test_trailers_are_no_headers(seen: Seen) -> None:
    """A header list that the application holds must not grow after the checks."""
    with seen.connect() as connection:
        connection.sendall(CHUNKED + b"3\r\nabc\r\n0\r\nAuthorization: Bearer late\r\nContent-Type: x\r\n\r\n")
        assert answer(connection)[0] == 200
        connection.sendall(GET)
        assert answer(connection)[0] == 200
    for request in seen.requests:
        assert not {name for name, _ in request["headers"]} & {b"authorization", b"content-type"}
    status, _ = seen.ask(CHUNKED + b"0\r\n" + b"a: b\r\n" * 200_000)
    assert status in (400, 408, 413, 431)


def test_a_second_request_in_the_same_bytes_is_not_answered(seen: Seen) -> None:
    with seen.connect() as connection:
        connection.sendall(post(b"/slow", b"abc") + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        got = rest_of(connection)
    assert got.count(b"HTTP/1.1 200") == got.count(b"HTTP/1.1 ") == 1
    assert [request["path"] for request in seen.requests] == ["/slow"]
    assert seen.bodies == [b"abc"]


def test_nonsense_after_a_request_does_not_take_its_answer(seen: Seen) -> None:
    with seen.connect() as connection:
        connection.sendall(post(b"/slow", b"abc") + b"\x00\x01nonsense\r\n\r\n" * 10)
        got = rest_of(connection)
    assert got.startswith(b"HTTP/1.1 200")
    assert got.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"a" * 300 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /" + b"a" * 100_000, 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 30 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 100_000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 5000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 100_000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"b" * 100_000, 431),
        (b"\r\n" * 50_000, 431),
    ],
)
def test_heads_that_are_too_large(seen: Seen, request_: bytes, status: int) -> None:
    with seen.connect() as connection:
        with suppress(ConnectionError):
            for start in range(0, len(request_), 1000):
                connection.sendall(request_[start : start + 1000])
        got = answer(connection)
    assert got[0] == status, got
    assert not seen.requests


def test_a_body_that_is_said_to_be_too_large_is_not_read(seen: Seen) -> None:
    status, got = seen.ask(HEAD + b"Content-Length: 200001\r\n\r\n")
    assert (status, b'"code":"too_large"' in got) == (413, True)
    assert not seen.requests
    assert seen.ask(post(b"/v2", b"x" * 200_000))[0] == 200


@pytest.mark.parametrize("piece", [10, 5000, 60_000])
def test_a_chunked_body_that_is_too_large_is_stopped_while_it_comes(seen: Seen, piece: int) -> None:
    sent = 0
    with seen.connect() as connection:
        connection.sendall(CHUNKED)
        with suppress(ConnectionError):
            while sent < 3_000_000:
                connection.sendall(b"%x\r\n" % piece * 1 + b"x" * piece + b"\r\n")
                sent += piece
                if piece < 100 and sent % 5000 == 0:
                    time.sleep(0)
        status, _ = answer(connection)
    assert status in (413, 0)
    until(lambda: seen.bodies)
    assert seen.bodies == [None]
    assert seen.most <= 200_000


def test_what_surrounds_the_pieces_of_a_body_is_bounded_too(seen: Seen) -> None:
    with seen.connect() as connection:
        connection.sendall(CHUNKED)
        with suppress(ConnectionError):
            for _ in range(300):
                connection.sendall(b"1;" + b"a" * 5000 + b"\r\nx\r\n")
        assert answer(connection)[0] in (413, 400)
    until(lambda: seen.bodies)
    assert seen.bodies == [None]


def test_the_refusal_reaches_a_client_that_still_sends(seen: Seen) -> None:
    """Closed at once, the connection would be reset, and the answer lost."""
    with seen.connect() as connection:
        connection.sendall(CHUNKED)
        for _ in range(8):
            connection.sendall(b"%x\r\n" % 60_000 + b"x" * 60_000 + b"\r\n")
        assert answer(connection)[0] == 413


def test_bodies_in_memory_are_bounded_together(seen: Seen) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(seen.connect()) for _ in range(9)]
        statuses: list[int] = []

        def send(connection: socket.socket) -> None:
            with suppress(OSError):
                connection.sendall(HEAD + b"Content-Length: 200000\r\n\r\n" + b"x" * 190_000)
                statuses.append(answer(connection)[0])

        threads = [threading.Thread(target=send, args=(one,)) for one in connections]
        for thread in threads:
            thread.start()
        until(lambda: statuses)
        assert set(statuses) == {503}
        assert seen.protocol.register.held <= 1_000_000
        for connection in connections:
            connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(timeout=60)


def test_an_answer_before_the_body_came_leaves_the_connection_in_order(seen: Seen) -> None:
    with seen.connect() as connection:
        connection.sendall(HEAD.replace(b"/v2", b"/hasty") + b"Content-Length: 6\r\n\r\nabc")
        assert answer(connection)[0] == 200
        connection.sendall(b"def")
        connection.sendall(GET)
        assert answer(connection)[0] == 200
    # What is refused after the answer is not answered a second time.
    with seen.connect() as connection:
        connection.sendall(CHUNKED.replace(b"/v2", b"/hasty") + b"3\r\nabc\r\n")
        assert answer(connection)[0] == 200
        connection.sendall(b"nonsense\r\n")
        assert rest_of(connection) == b""


def test_a_connection_that_says_nothing_is_closed(seen: Seen) -> None:
    with seen.connect() as connection:
        assert rest_of(connection) == b""


def test_an_idle_connection_is_closed_after_its_answer(seen: Seen) -> None:
    for path in (b"/v2", b"/hasty"):
        with seen.connect() as connection:
            connection.sendall(HEAD.replace(b"/v2", path) + b"Content-Length: 3\r\n\r\n")
            time.sleep(0.05)
            connection.sendall(b"abc")
            assert answer(connection)[0] == 200
            assert rest_of(connection) == b""


def test_slow_headers_end_in_408(seen: Seen) -> None:
    with seen.connect() as connection:
        connection.sendall(GET)
        assert answer(connection)[0] == 200
        for byte in GET * 10:
            with suppress(ConnectionError):
                connection.sendall(bytes([byte]))
            time.sleep(0.05)
            if not seen.protocol.register.open or byte == 10:
                break
        assert answer(connection)[0] == 408
    assert len(seen.requests) == 1


def test_a_slow_body_ends_in_408_and_a_steady_one_does_not(seen: Seen) -> None:
    with seen.connect() as slow, seen.connect() as steady:
        for connection in (slow, steady):
            connection.sendall(HEAD + b"Content-Length: 20000\r\n\r\n")
        for _ in range(20):
            with suppress(ConnectionError):
                slow.sendall(b"x" * 10)
            steady.sendall(b"x" * 1000)
            time.sleep(0.08)
        assert answer(slow)[0] == 408
        assert answer(steady)[0] == 200
    assert sorted(seen.bodies, key=bool) == [None, b"x" * 20_000]


def test_a_client_that_reads_nothing_is_cut_off(seen: Seen) -> None:
    with seen.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(GET.replace(b"/v2", b"/large"))
        until(lambda: seen.bodies)
        until(lambda: not seen.protocol.register.open)
    with seen.connect() as connection:
        connection.sendall(GET.replace(b"/v2", b"/large"))
        assert len(answer(connection)[1]) > 8 << 20


def test_connections_per_address_are_limited(seen: Seen) -> None:
    with ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(seen.connect("127.0.0.7"))
        until(lambda: len(seen.protocol.register.open) == 30)
        with seen.connect("127.0.0.7") as one_more:
            status, got = answer(one_more)
            assert (status, b"retry-after" in got) == (503, True)
        assert seen.ask(GET, "127.0.0.8")[0] == 200
    until(lambda: not seen.protocol.register.open)
    assert seen.ask(GET, "127.0.0.7")[0] == 200


def test_hundreds_that_dribble_do_not_keep_others_out(seen: Seen) -> None:
    """200 connections from ten addresses, of which only 60 fit: whoever sends a whole request is answered."""
    stop = threading.Event()
    with ExitStack() as stack:
        dribbling = [stack.enter_context(seen.connect(f"127.0.1.{1 + i % 10}")) for i in range(200)]

        def dribble() -> None:
            step = 0
            while not stop.wait(0.02):
                for i, connection in enumerate(dribbling):
                    with suppress(OSError):
                        connection.send(GET[step % len(GET) : step % len(GET) + 1])
                    with suppress(OSError):
                        if step % 20 == 19:
                            connection.close()
                            dribbling[i] = stack.enter_context(seen.connect(f"127.0.1.{1 + i % 10}"))
                step += 1

        thread = threading.Thread(target=dribble)
        thread.start()
        try:
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                assert seen.ask(post(b"/v2", b"x" * 50_000))[0] == 200
            with seen.connect() as connection:
                for _ in range(40):
                    connection.sendall(GET)
                    assert answer(connection)[0] == 200
            assert len(seen.protocol.register.open) <= 60
        finally:
            stop.set()
            thread.join(timeout=60)


def test_a_request_under_way_gives_way_to_nobody(seen: Seen) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(seen.connect(f"127.0.2.{1 + i % 3}")) for i in range(60)]
        for connection in connections:
            connection.sendall(HEAD + b"Content-Length: 6\r\n\r\nabc")
        until(lambda: len(seen.requests) == 60)
        with seen.connect() as one_more:
            assert answer(one_more)[0] == 503
        for connection in connections:
            connection.sendall(b"def")
            assert answer(connection)[0] == 200


def test_other_limits() -> None:
    """Names that a node answers to, and proxies that stand for many clients, on asyncio's own loop."""
    limits = ConnectionLimits(hosts=frozenset({"localhost", "127.0.0.1", "[::1]"}), connections_per_address=2)
    with node(limits, "asyncio") as seen:
        for host, status in (
            (b"localhost", 200),
            (b"LOCALHOST:8443", 200),
            (b"127.0.0.1:8443", 200),
            (b"[::1]:8443", 200),
            (b"evil.example", 400),
            (b"localhost.evil.example", 400),
            (b"", 400),
        ):
            assert seen.ask(GET.replace(b"Host: x", b"Host: " + host))[0] == status
        until(lambda: not seen.protocol.register.open)
        with ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(seen.connect())
            until(lambda: len(seen.protocol.register.open) == 2)
            assert seen.ask(GET)[0] == 503
    with (
        node(ConnectionLimits(connections_per_address=2, proxies=frozenset({"127.0.0.1"}))) as seen,
        ExitStack() as stack,
    ):
        for _ in range(5):
            connection = stack.enter_context(seen.connect())
            connection.sendall(GET)
            assert answer(connection)[0] == 200


def test_limits_that_are_none() -> None:
    for more in ({"connections": 0}, {"body_rate": 0.0}, {"sweep_seconds": 0.0}):
        with pytest.raises(UsageError):
            ConnectionLimits(**more)  # type: ignore[arg-type]
