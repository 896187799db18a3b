"""The HTTP side of a worker: a plain ASGI application, for each layer more costs every request.

| path | what |
| --- | --- |
| `GET /v2/health/live`, `GET /v2/health/ready` | for whoever balances load; no token |
| `GET /v2`, `GET /v2/models/NAME[/versions/VERSION][/ready]` | Open Inference Protocol |
| `POST /v2/models/NAME[/versions/VERSION]/infer` | the same |
| `POST /predict[/NAME]` | rows as they lie in a table |
| `POST /feedback` | what became of an answer |
| `GET /openapi.json`, `GET /docs` | what can be asked |
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

import orjson

from fedclaw.serve.inference.docs import docs_headers, docs_page
from fedclaw.serve.inference.metadata import model_metadata, not_supported, server_metadata
from fedclaw.serve.inference.openapi import openapi_document
from fedclaw.serve.inference.rest import Asker, write_refusal, write_response
from fedclaw.serve.inference.tables import SentTable, only_model, parse_query, predict_table
from fedclaw.serve.node import ServingNode
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Caller
from fedclaw.serve.security.http_protocol import CERTIFICATE, RESPOND
from fedclaw.serve.security.tokens import only_header

log = logging.getLogger("fedclaw.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Mapping[bytes, bytes]

JSON = "application/json"
_OK, _UNAVAILABLE = int(HTTPStatus.OK), int(HTTPStatus.SERVICE_UNAVAILABLE)
_HEADER_LENGTH = b"inference-header-content-length"
_ONCE = frozenset({b"authorization", b"content-length", b"content-type", b"fedclaw-key", b"fedclaw-deadline-ms"})
"""Headers of which a second one would be read by one and overlooked by another."""
_STATUS_LINES = {int(status): f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
_FIXED = "cache-control: no-store\r\nx-content-type-options: nosniff\r\n"
_MOST_DEADLINE = 3600_000
PRINCIPAL = "fedclaw.principal"
"""In a request's scope, once it is known: who asks."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What goes back."""

    status: int
    body: bytes = b""
    media_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request, its body yet to be read."""

    method: str
    path: str
    query: bytes
    headers: Headers
    peer: str
    certificate: str | None
    """Thumbprint of the client's certificate."""
    receive: Receive
    scope: Scope


class HttpApplication:
    """ASGI. Whatever goes wrong is an answer with an `error`; a client never sees a traceback."""

    def __init__(self, node: ServingNode, body_bytes: int, deadline_seconds: float) -> None:
        self._node, self._most, self._usual_deadline = node, body_bytes, deadline_seconds
        self._plain: dict[str, tuple[str, Callable[[HttpRequest], Awaitable[HttpAnswer]]]] = {
            "/v2/health/live": ("GET", self._live),
            "/v2/health/ready": ("GET", self._ready),
            "/v2": ("GET", self._server),
            "/v2/": ("GET", self._server),
            "/feedback": ("POST", self._feedback),
            "/openapi.json": ("GET", self._openapi),
            "/docs": ("GET", self._docs),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await _no_http(scope, receive, send)
            return
        try:
            answer = await self._answer(scope, receive)
        except ServeRefusal as refusal:
            answer = self._refused(refusal, scope)
        except _Gone:
            return
        except Exception as error:
            log.error("a request failed: %s", type(error).__name__, exc_info=error)
            answer = refused(ServeRefusal("internal", "the node failed on this request; its log says more"))
        ready = self._node.open
        respond = scope.get(RESPOND) if ready else None
        if respond is None or not respond(_head(answer), answer.body):
            await _send(send, answer, closing=not ready)

    def _refused(self, refusal: ServeRefusal, scope: Scope) -> HttpAnswer:
        try:
            self._node.refused(refusal, _peer(scope), scope.get(PRINCIPAL, ""), _named_model(scope["path"]))
        except ServeRefusal as unavailable:
            return refused(unavailable)
        return refused(refusal)

    async def _answer(self, scope: Scope, receive: Receive) -> HttpAnswer:
        path = scope["path"]
        request = HttpRequest(
            scope["method"],
            path,
            scope.get("query_string", b""),
            _headers(scope["headers"]),
            _peer(scope),
            scope.get(CERTIFICATE),
            receive,
            scope,
        )
        if path.startswith("/v2/models/"):
            return await self._model(request)
        if path == "/predict" or path.startswith("/predict/"):
            _require_method(request, "POST")
            return await self._predict(request)
        plain = self._plain.get(path)
        if plain is not None:
            _require_method(request, plain[0])
            return await plain[1](request)
        raise not_supported(path) or ServeRefusal("not_found", "there is nothing at this path")

    async def _model(self, request: HttpRequest) -> HttpAnswer:
        parts = request.path.split("/")[3:]
        name, version, rest = parts[0], None, parts[1:]
        if len(rest) >= 2 and rest[0] == "versions":
            version, rest = rest[1], rest[2:]
        if rest == ["infer"]:
            _require_method(request, "POST")
            return await self._infer(request, name, version)
        if (other := not_supported(request.path)) is not None:
            raise other
        if rest in ([], ["ready"]):
            _require_method(request, "GET")
            caller = await self._caller(request)
            if rest:
                return _health(self._node.is_ready(caller.principal, name, version))
            return _json(model_metadata(self._node.reader(caller.principal, name, version).model))
        raise ServeRefusal("not_found", "there is nothing at this path")

    async def _infer(self, request: HttpRequest, name: str, version: str | None) -> HttpAnswer:
        caller = await self._caller(request, "rest")
        reader = self._node.reader(caller.principal, name, version)
        body = await read_body(request, self._most)
        header_length = request.headers.get(_HEADER_LENGTH)
        asked, form = reader.read(
            body,
            None if header_length is None else header_length.decode("latin-1"),
            self._asker(request, caller),
            version,
            self._deadline(request),
        )
        response, headers = await self._node.infer(caller, asked, body)
        content, json_bytes = write_response(response, form)
        if json_bytes is None:
            return HttpAnswer(_OK, content, JSON, headers)
        binary = {**headers, "inference-header-content-length": str(json_bytes)}
        return HttpAnswer(_OK, content, "application/octet-stream", binary)

    async def _caller(self, request: HttpRequest, protocol: str = "rest") -> Caller:
        authorization = request.headers.get(b"authorization")
        caller = await self._node.admit(authorization, request.peer, protocol, request.certificate)
        request.scope[PRINCIPAL] = caller.principal.name
        given = request.headers.get(b"traceparent")
        return caller if given is None else replace(caller, traceparent=given.decode("latin-1"))

    def _asker(self, request: HttpRequest, caller: Caller) -> Asker:
        key = request.headers.get(b"fedclaw-key")
        return Asker(caller.principal.name, None if key is None else _text(key, "fedclaw-key"), self._node.new_identity)

    def _deadline(self, request: HttpRequest) -> float:
        given = request.headers.get(b"fedclaw-deadline-ms")
        seconds = self._usual_deadline
        if given is not None:
            if not given.isdigit() or len(given) > 9 or not 0 < int(given) <= _MOST_DEADLINE:
                raise ServeRefusal("bad_request", "fedclaw-deadline-ms is a whole number of milliseconds above 0")
            seconds = min(seconds, int(given) / 1000)
        return time.monotonic() + seconds

    async def _predict(self, request: HttpRequest) -> HttpAnswer:
        """Rows as they lie in a table."""
        caller = await self._caller(request, "predict")
        names = request.path.split("/")[2:]
        if len(names) > 1:
            raise ServeRefusal("not_found", "there is nothing at this path")
        model = names[0] if names and names[0] else only_model(self._node.models(caller.principal))
        sent = SentTable(
            await read_body(request, self._most),
            _text(request.headers.get(b"content-type", b""), "content-type"),
            _text(request.headers.get(b"accept", b""), "accept"),
            parse_query(request.query),
        )
        asker = self._asker(request, caller)
        found = await predict_table(self._node, caller, model, sent, asker, None, self._deadline(request))
        return HttpAnswer(_OK, found.body, found.content_type, found.headers)

    async def _live(self, request: HttpRequest) -> HttpAnswer:
        return _health(self._node.live)

    async def _ready(self, request: HttpRequest) -> HttpAnswer:
        return _health(self._node.ready)

    async def _server(self, request: HttpRequest) -> HttpAnswer:
        await self._caller(request)
        return _json(server_metadata())

    async def _openapi(self, request: HttpRequest) -> HttpAnswer:
        """Of the models that the caller may ask: a stranger learns no names."""
        principal = (await self._caller(request)).principal
        models = [self._node.reader(principal, name).model for name in self._node.models(principal)]
        return _json(openapi_document(models))

    async def _docs(self, request: HttpRequest) -> HttpAnswer:
        headers = dict(docs_headers())
        return HttpAnswer(_OK, docs_page(), headers.pop("content-type"), headers)

    async def _feedback(self, request: HttpRequest) -> HttpAnswer:
        caller = await self._caller(request, "feedback")
        body = await read_body(request, min(self._most, 1 << 20))
        return _json(await self._node.feedback(caller, body))


class _Gone(Exception):
    """The client went away."""


async def read_body(request: HttpRequest, most: int) -> bytes:
    """The whole body. Raises ServeRefusal `too_large` as soon as that is known."""
    declared = request.headers.get(b"content-length")
    if declared is not None and declared.isdigit() and (len(declared) > 15 or int(declared) > most):
        raise ServeRefusal("too_large", f"a body has at most {most} bytes")
    first = await request.receive()
    if first["type"] == "http.disconnect":
        raise _Gone
    body: bytes = first.get("body", b"")
    if not first.get("more_body", False) and len(body) <= most:
        return body
    pieces, size, more = [body], len(body), first.get("more_body", False)
    while more and size <= most:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        piece = message.get("body", b"")
        pieces.append(piece)
        size, more = size + len(piece), message.get("more_body", False)
    if size > most:
        raise ServeRefusal("too_large", f"a body has at most {most} bytes")
    return b"".join(pieces)


def refused(refusal: ServeRefusal) -> HttpAnswer:
    """A refusal as an answer."""
    headers = {}
    if refusal.retry_after is not None:
        headers["retry-after"] = str(max(1, round(refusal.retry_after)))
    if refusal.challenge is not None:
        headers["www-authenticate"] = refusal.challenge
    return HttpAnswer(refusal.status, write_refusal(refusal), JSON, headers)


def _headers(pairs: list[tuple[bytes, bytes]]) -> Headers:
    found = dict(pairs)
    if len(found) != len(pairs):
        for name in _ONCE & found.keys():
            only_header([value for other, value in pairs if other == name])
    return found


def _named_model(path: str) -> str:
    """The model that a path names, for the log of who wanted what; '' where there is none."""
    for start in ("/v2/models/", "/predict/"):
        if path.startswith(start):
            return path[len(start) :].partition("/")[0]
    return ""


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ServeRefusal("bad_request", f"the header {name} is not UTF-8") from error


def _require_method(request: HttpRequest, method: str) -> None:
    if request.method != method:
        raise ServeRefusal("method_not_allowed", f"this path takes {method}")


def _health(good: bool) -> HttpAnswer:
    return HttpAnswer(_OK if good else _UNAVAILABLE)


def _json(content: Any) -> HttpAnswer:
    return HttpAnswer(_OK, orjson.dumps(content))


def _head(answer: HttpAnswer) -> bytes:
    """Status line and headers. Raises ValueError for a header that would be two."""
    told = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
    if told.count("\n") != len(answer.headers) or told.count("\r") != len(answer.headers):
        raise ValueError("a header has a line end")
    status = _STATUS_LINES[answer.status]
    return f"{status}content-type: {answer.media_type}\r\ncontent-length: {len(answer.body)}\r\n{told}{_FIXED}".encode()


async def _send(send: Send, answer: HttpAnswer, closing: bool) -> None:
    """`closing`: the client is to ask somebody else from now on, on another connection."""
    headers = [(b"content-type", answer.media_type.encode()), (b"content-length", str(len(answer.body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    headers += [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
    if closing:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": int(answer.status), "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _no_http(scope: Scope, receive: Receive, send: Send) -> None:
    """A websocket is refused; of a lifespan there is nothing to tell."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
