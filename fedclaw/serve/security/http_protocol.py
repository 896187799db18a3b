"""What a connection may do before and while it asks: uvicorn's HTTP/1.1 protocol with limits on time and size.

Refused are slow clients (slow headers, slow bodies, answers that nobody reads), too many connections, too large
requests, and requests that two servers could read differently (RFC 9112, sections 2.2, 3.2, 5.2 and 6.3): there is no
second request to find in the first one's body. The parser itself (llhttp) refuses a bare LF, folded headers and a
Content-Length beside Transfer-Encoding.

    uvicorn.Config(app, http=guarded(ConnectionLimits()), ws="none", ...)
"""

import asyncio
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any, NoReturn

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from fedclaw.errors import UsageError
from fedclaw.serve.security.rate_limits import network_of
from fedclaw.serve.security.tls import thumbprint

CERTIFICATE = "fedclaw.certificate"
"""The key of the ASGI scope with the thumbprint of the client's certificate; None: the client showed none."""
_CLOSE = (b"connection", b"close")
RESPOND = "fedclaw.respond"
"""The key of the ASGI scope with `GuardedHttp.respond`."""

_IDLE, _HEAD, _BODY, _WAIT = range(4)
"""Between requests; reading a request line and headers; reading a body; all is read, the answer is awaited."""
_SINGLE = frozenset(
    {
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"content-type",
        b"content-encoding",
        b"authorization",
        b"expect",
        b"inference-header-content-length",
        b"fedclaw-key",
        b"fedclaw-deadline-ms",
    }
)
"""Headers of which a second one is refused: which of the two counts is what proxies and servers disagree on."""
_ODD_TARGET = re.compile(
    rb"[^\x21-\x7e]|\\|#|^[^?]*(?://|/\.{1,2}(?:/|\?|$)|%(?:2[eEfF]|5[cC]|[01].|7[fF]|(?![0-9a-fA-F]{2})))"
)
"""Targets that lead elsewhere after one more decoding or normalisation: dot segments, encoded separators, controls."""
_SMALL = 64 * 1024
"""A body that comes in one piece of this size is not counted among those that are held."""
_LINGER_BYTES = 1 << 20
_CODES = {
    400: "bad_request",
    408: "bad_request",
    413: "too_large",
    414: "too_large",
    431: "too_large",
    503: "overloaded",
}


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Of one worker. Times in seconds, sizes in bytes."""

    header_seconds: float = 10.0
    """From the first byte of a request, or from the connection's start, to the end of its headers."""
    header_bytes: int = 16 * 1024
    header_count: int = 64
    target_bytes: int = 2048
    body_bytes: int = 32 * 1024 * 1024
    held_bytes: int = 512 * 1024 * 1024
    """Of all bodies together that are being read or answered."""
    body_grace: float = 5.0
    """A body may take so long, and the time that it takes at `body_rate`."""
    body_rate: float = 16 * 1024
    write_seconds: float = 30.0
    """For how long a client may take nothing of an answer."""
    idle_seconds: float = 65.0
    """Between two requests. Longer than proxies keep theirs, so that it is they who close."""
    linger_seconds: float = 2.0
    """After a refusal the connection is read on for so long: closed at once, it would be reset before the client has
    read why."""
    connections: int = 2000
    connections_per_address: int = 200
    proxies: frozenset[str] = frozenset()
    """Addresses that stand for many clients: no limit on their connections."""
    hosts: frozenset[str] = frozenset()
    """Names that the Host header may have, without a port; empty: any. Against DNS rebinding, where a node asks for no
    token."""
    sweep_seconds: float = 0.5
    """How often times are looked at."""

    def __post_init__(self) -> None:
        if self.connections < 1 or self.connections_per_address < 1 or self.body_rate <= 0 or self.sweep_seconds <= 0:
            raise UsageError("limits of connections are numbers above 0")


def guarded(limits: ConnectionLimits) -> "type[GuardedHttp]":
    """The protocol class for one server with these limits: uvicorn makes its instances."""
    own = {"limits": limits, "header_count": limits.header_count, "register": _Register(limits)}
    return type("GuardedHttp", (GuardedHttp,), own)


class GuardedHttp(HttpToolsProtocol):
    """One connection. Made by `guarded`."""

    limits: ConnectionLimits
    header_count: int
    register: "_Register"

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._phase = _IDLE
        self._since = self.loop.time()
        """Of the phase."""
        self._served = 0
        self._head_bytes = self._body_bytes = self._raw_bytes = 0
        self._held = 0
        """Bytes of a body that the node has in memory."""
        self._deaf = False
        self._dropped = 0
        self._unsent, self._unsent_since = 0, 0.0
        self._refusal: tuple[int, str] | None = None
        self._certificate: str | None = None
        self.address = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection, after its TLS handshake."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        if not self.register.admit(self):
            self._refuse(503, "too many connections", linger=False)
        elif (tls := transport.get_extra_info("ssl_object")) is not None:
            self._certificate = thumbprint(tls.getpeercert(binary_form=True))

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self.register.remove(self)
        self._release()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self._deaf:
            self._drop(data)
            return
        if self._phase == _IDLE:
            self._phase, self._head_bytes = _HEAD, 0
            if self._served:
                self._since = self.loop.time()
        if self._phase == _HEAD:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse(*(self._refusal or (400, "not a valid HTTP request")))
            return
        if self._phase == _HEAD:
            if self._head_bytes > self.limits.header_bytes + self.limits.target_bytes:
                self._refuse(431, "the headers are too large")
        elif self._phase == _BODY:
            # What surrounds the pieces of a chunked body is not counted as body.
            self._raw_bytes += len(data)
            if self._raw_bytes > 2 * self.limits.body_bytes + (1 << 16):
                self._refuse(413, "the body is too large")

    def on_message_begin(self) -> None:
        """A request begins. The next one is not read before this one is answered (no pipelining)."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop(400, "one request at a time")
        if self._phase != _HEAD:
            # It begins in what was received with the end of another one: its headers are to be measured.
            self._phase, self._since, self._head_bytes = _HEAD, self.loop.time(), self.limits.header_bytes + 1
        super().on_message_begin()
        self.scope[CERTIFICATE] = self._certificate  # type: ignore[literal-required]
        self.scope[RESPOND] = self.respond  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        self.url += url
        if len(self.url) > self.limits.target_bytes:
            self._stop(414, "the request target is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        headers = self.headers
        headers.append((name.lower(), value))
        if len(headers) > self.header_count:
            self._stop(431, "too many headers")

    def on_headers_complete(self) -> None:
        """All headers are there: the last moment at which nobody has acted on the request."""
        self._check_head()
        super().on_headers_complete()
        # Fields after a chunked body (trailers) go nowhere: the application has its headers, which were checked.
        self.headers = []
        self._phase, self._since = _BODY, self.loop.time()
        self._body_bytes = self._raw_bytes = 0

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        size = len(body)
        if self._body_bytes or size > _SMALL:
            self._hold(size)
        self._body_bytes += size
        if self._body_bytes > self.limits.body_bytes:
            self._stop(413, "the body is too large")
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of the request is there."""
        super().on_message_complete()
        self._served += 1
        self._phase = _WAIT
        if self.cycle.response_complete:
            self._phase, self._since = _IDLE, self.loop.time()

    def respond(self, head: bytes, body: bytes) -> bool:
        """Write a whole answer at once, in the place of two ASGI messages, which cost a small model's request a quarter
        of its time. `head` is the status line and headers with `content-length`, each with its line end.

        False: nothing is written, and the messages are to be sent. They wait for a client that reads slowly.
        """
        cycle = self.cycle
        if cycle.response_started or cycle.disconnected or self.flow.write_paused or cycle.scope["method"] == "HEAD":
            return False
        if _CLOSE in cycle.scope["headers"]:
            cycle.keep_alive = False
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        self.transport.write(b"".join((head, b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n", body)))
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    def on_response_complete(self) -> None:
        """The answer is written. The sweep closes idle connections, so no timer is set for each answer."""
        self.server_state.total_requests += 1
        self._release()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._phase == _WAIT:
            self._phase, self._since = _IDLE, self.loop.time()

    def check_times(self, now: float) -> None:
        """Called by the sweep."""
        limits, waited = self.limits, now - self._since
        if self._stalled(now):
            self.transport.abort()
        elif self._deaf:
            if waited > limits.linger_seconds and self._phase != _WAIT:
                self.transport.close()
        elif self._phase == _HEAD and waited > limits.header_seconds:
            self._refuse(408, "the headers came too slowly")
        elif self._phase == _IDLE and waited > (limits.idle_seconds if self._served else limits.header_seconds):
            self.transport.close()
        elif self._phase == _BODY:
            if self.flow.read_paused:
                # The node itself does not read on: that time is not the client's.
                self._since = now - min(waited, self._body_bytes / limits.body_rate)
            elif waited > limits.body_grace + self._body_bytes / limits.body_rate:
                self._refuse(408, "the body came too slowly")

    def evictable(self) -> tuple[bool, float] | None:
        """How soon this connection gives way to a new one: those that never asked anything first, then the longest
        idle. None: it does not, a request is under way."""
        return (self._served > 0, self._since) if self._phase in (_IDLE, _HEAD) else None

    def _check_head(self) -> None:
        headers = self.headers
        found = dict(headers)
        if len(found) < len(headers):
            self._check_repeated()
        # Where all that came is no more than the headers may be, they need not be measured.
        if self._head_bytes > self.limits.header_bytes and sum(map(_size, headers)) > self.limits.header_bytes:
            self._stop(431, "the headers are too large")
        if _is_odd(self.url):
            self._stop(400, "the request target is not a plain absolute path")
        if self.parser.should_upgrade():
            self._stop(400, "no other protocol is spoken here")
        self._check_framing(found)
        self._check_host(found.get(b"host"))
        self.expect_100_continue = found.get(b"expect", b"").lower() == b"100-continue"

    def _check_repeated(self) -> None:
        for name, times in Counter(name for name, _ in self.headers).items():
            if times > 1 and name in _SINGLE:
                self._stop(400, f"two headers {name.decode()}")

    def _check_framing(self, found: dict[bytes, bytes]) -> None:
        coding = found.get(b"transfer-encoding")
        if coding is not None and (
            coding.lower() != b"chunked" or b"content-length" in found or self.parser.get_http_version() != "1.1"
        ):
            self._stop(400, "a transfer encoding that is not plainly chunked")
        if int(found.get(b"content-length", b"0")) > self.limits.body_bytes:
            self._stop(413, "the body is too large")

    def _check_host(self, host: bytes | None) -> None:
        if host is None and self.parser.get_http_version() != "1.0":
            self._stop(400, "a Host header is needed")
        if self.limits.hosts and (host is None or _name_of(host) not in self.limits.hosts):
            self._stop(400, "this node has another name")

    def _stop(self, status: int, reason: str) -> NoReturn:
        """From inside the parser: end it, then answer."""
        self._refusal = (status, reason)
        raise _Stopped

    def _refuse(self, status: int, reason: str, linger: bool = True) -> None:
        """Answer in the application's place, unless it has begun to, and hear no more."""
        self._deaf, self._since = True, self.loop.time()
        if self._phase == _WAIT:
            # What followed a whole request is refused: the answer to that request is the last.
            self.cycle.keep_alive = False
            return
        if self._phase == _BODY:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        self.transport.write(_answer(status, reason))
        if not linger:
            self.transport.close()

    def _drop(self, data: bytes) -> None:
        self._dropped += len(data)
        if self._dropped > _LINGER_BYTES and self._phase != _WAIT:
            self.transport.close()

    def _hold(self, size: int) -> None:
        if not self.cycle.response_complete:
            if self.register.held + size > self.limits.held_bytes:
                self._stop(503, "too many large requests at once")
            self._held += size
            self.register.held += size

    def _release(self) -> None:
        if self._held:
            self.register.held -= self._held
            self._held = 0

    def _stalled(self, now: float) -> bool:
        """Whether the client has taken nothing of what is written for too long."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        return now - self._unsent_since > self.limits.write_seconds


class _Stopped(Exception):
    """Ends the parser."""


class _Register:
    """The open connections of one server."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self.open: set[GuardedHttp] = set()
        self.held = 0
        """Bytes of bodies in memory."""
        self._by_address: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def admit(self, connection: GuardedHttp) -> bool:
        """Count a connection in. False: there are too many; it is not counted."""
        limits, network = self._limits, network_of(connection.address)
        crowded = self._by_address[network] >= limits.connections_per_address
        if crowded and connection.address not in limits.proxies:
            return False
        if len(self.open) >= limits.connections and not self._evict():
            return False
        self.open.add(connection)
        self._by_address[network] += 1
        if self._timer is None:
            self._timer = connection.loop.call_later(limits.sweep_seconds, self._sweep, connection.loop)
        return True

    def remove(self, connection: GuardedHttp) -> None:
        """Count a connection out, if it was counted in."""
        if connection in self.open:
            self.open.remove(connection)
            network = network_of(connection.address)
            self._by_address[network] -= 1
            if not self._by_address[network]:
                del self._by_address[network]

    def _evict(self) -> bool:
        waiting = [(rank, id(one), one) for one in self.open if (rank := one.evictable()) is not None]
        if not waiting:
            return False
        victim = min(waiting)[2]
        self.remove(victim)
        victim.transport.abort()
        return True

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        try:
            for connection in list(self.open):
                connection.check_times(now)
        finally:
            # Whatever happens to one connection: the next look is at all of them.
            self._timer = loop.call_later(self._limits.sweep_seconds, self._sweep, loop) if self.open else None


def _size(header: tuple[bytes, bytes]) -> int:
    return len(header[0]) + len(header[1])


@lru_cache(maxsize=1024)
def _is_odd(target: bytes) -> bool:
    return not target.startswith(b"/") or _ODD_TARGET.search(target) is not None


@lru_cache(maxsize=256)
def _name_of(host: bytes) -> str:
    name = host.decode("latin-1").lower()
    return name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]


def _answer(status: int, reason: str) -> bytes:
    body = orjson.dumps({"error": f"{HTTPStatus(status).phrase}: {reason}", "code": _CODES.get(status, "too_large")})
    retry = b"retry-after: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else b""
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return STATUS_LINE[status] + retry + head + body
