"""The Open Inference Protocol v2 over gRPC.

Values come as raw bytes (`raw_input_contents`, one an input) or typed (`contents`); the answer has them in the same
way. What the protocol's REST half says of ids, keys, types and parameters (`fedclaw.serve.inference.rest`) holds here.
What answers a request is in the answer's parameters, and in the trailing metadata: `fedclaw-version`,
`fedclaw-prediction`. The client's gRPC deadline is the request's.

    metadata       authorization  Bearer TOKEN; for all but ServerLive and ServerReady
                   fedclaw-key    by what the request is routed
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from time import monotonic
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from fedclaw.serve.inference.metadata import model_metadata, server_metadata
from fedclaw.serve.inference.node import Headers, Node
from fedclaw.serve.inference.protocol import SERVICE
from fedclaw.serve.inference.protocol import open_inference_pb2 as messages
from fedclaw.serve.inference.rest import Asker, RequestReader, deadline_of, identity_of, key_of, require_supported
from fedclaw.serve.inference.tensors import OF_OUTPUT, ColumnTensor, as_bytes
from fedclaw.serve.refusals import Code, ServeRefusal
from fedclaw.serve.requests import Caller, InferenceRequest, InferenceResponse
from fedclaw.serve.security.tls import GrpcClients
from fedclaw.serve.security.tokens import only_header

LOG = logging.getLogger(__name__)
AUTHORIZATION, KEY, RETRY_AFTER, CODE = "authorization", "fedclaw-key", "retry-after", "fedclaw-code"
TRACEPARENT = "traceparent"
MAX_METADATA = 16 * 2**10
STATUS: dict[Code, grpc.StatusCode] = {
    "bad_request": grpc.StatusCode.INVALID_ARGUMENT,
    "unprocessable": grpc.StatusCode.INVALID_ARGUMENT,
    "unsupported_media_type": grpc.StatusCode.INVALID_ARGUMENT,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "forbidden": grpc.StatusCode.PERMISSION_DENIED,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "method_not_allowed": grpc.StatusCode.UNIMPLEMENTED,
    "conflict": grpc.StatusCode.ABORTED,
    "too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "too_many_requests": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "overloaded": grpc.StatusCode.UNAVAILABLE,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "not_supported": grpc.StatusCode.UNIMPLEMENTED,
    "internal": grpc.StatusCode.INTERNAL,
}
CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""By type: where typed values are. FP16 and BF16 have no place there."""


_PRINCIPAL: ContextVar[str] = ContextVar("principal", default="")
"""Of the call that this task answers, once it is known: who asks."""


def server_options(max_message: int) -> list[tuple[str, int]]:
    """Options of a `grpc.aio.server` for messages of at most so many bytes."""
    return [
        ("grpc.max_receive_message_length", max_message),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MAX_METADATA),
        ("grpc.absolute_max_metadata_size", MAX_METADATA),
        # A connection that does not finish its handshake, or has had no call for long, is closed.
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 300_000),
        ("grpc.max_concurrent_streams", 256),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def add_inference(server: grpc.aio.Server, node: Node, clients: GrpcClients | None = None) -> None:
    """Let `server` answer the protocol's calls by `node`; `clients` looks at the certificates of clients."""
    server.add_generic_rpc_handlers((_Handlers(node, clients),))


def address_of(peer: str) -> str:
    """The IP address of a call's `peer()`, which has a port, as in ipv4:10.0.0.1:5000 or ipv6:%5B::1%5D:5000."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in {"ipv4", "ipv6"} else peer


def read_request(
    reader: RequestReader, message: Any, asker: Asker, deadline: float | None = None
) -> tuple[InferenceRequest, bool]:
    """A ModelInferRequest, and whether its values are raw bytes. Raises ServeRefusal, and nothing else."""
    parameters = _parameters(message.parameters)
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise ServeRefusal("bad_request", "raw_input_contents: one for each input is needed")
    columns, rows = dict[str, Any](), list[int]()
    for place, tensor in enumerate(message.inputs):
        own = reader.column(tensor.name, columns)
        require_supported(tensor.parameters)
        rows.append(own.rows_of(list(tensor.shape)))
        if raw and tensor.HasField("contents"):
            raise own.refusal("it has contents and raw_input_contents, and can have but one of them")
        columns[own.column.name] = (
            own.of_bytes(tensor.datatype, rows[-1], memoryview(raw[place]))
            if raw
            else own.of_values(tensor.datatype, rows[-1], _values(own, tensor))
        )
    count = reader.rows(columns, rows)
    outputs = list[str]()
    for output in message.outputs:
        require_supported(output.parameters)
        outputs.append(reader.require_output(output.name, outputs))
    identity = identity_of(message.id, asker)
    key = key_of(parameters, asker, identity)
    version, wanted = message.model_version or None, tuple(outputs) or None
    deadline = deadline_of(parameters, deadline)
    request = InferenceRequest(message.model_name, columns, count, identity, key, version, wanted, deadline)
    return request, bool(raw)


def write_answer(response: InferenceResponse, headers: Headers, raw: bool) -> Any:
    """A ModelInferResponse."""
    answer = messages.ModelInferResponse(
        model_name=response.model, model_version=response.version, id=response.identity
    )
    for name, value in headers.items():
        answer.parameters[name].string_param = value
    for name, values in response.outputs.items():
        datatype = OF_OUTPUT[values.dtype.char]
        output = answer.outputs.add(name=name, datatype=datatype, shape=values.shape)
        if raw:
            answer.raw_output_contents.append(as_bytes(values))
            continue
        flat = values.ravel().tolist()
        given = [str(text).encode() for text in flat] if datatype == "BYTES" else flat
        getattr(output.contents, CONTENTS[datatype]).extend(given)
    return answer


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Finds who answers a call."""

    def __init__(self, node: Node, clients: GrpcClients | None) -> None:
        self._node, self._clients = node, clients
        calls: Mapping[str, tuple[Any, Callable[[Any, Any], Awaitable[Any]]]] = {
            "ServerLive": (messages.ServerLiveRequest, self._server_live),
            "ServerReady": (messages.ServerReadyRequest, self._server_ready),
            "ModelReady": (messages.ModelReadyRequest, self._model_ready),
            "ServerMetadata": (messages.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": (messages.ModelMetadataRequest, self._model_metadata),
            "ModelInfer": (messages.ModelInferRequest, self._model_infer),
        }
        self._methods = {
            f"/{SERVICE}/{name}": grpc.unary_unary_rpc_method_handler(
                self._refusing(call), request.FromString, _serialized
            )
            for name, (request, call) in calls.items()
        }
        # A stream of any messages: whatever the client sends, the answer comes at once.
        self._others = grpc.stream_stream_rpc_method_handler(_not_supported)

    def service(self, details: Any) -> Any:
        """The handler of a call; None for another service's."""
        found = self._methods.get(details.method)
        return self._others if found is None and details.method.startswith(f"/{SERVICE}/") else found

    def _refusing(self, call: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        """`call`, with a status for each refusal, noted; of what went wrong in here the client learns nothing."""

        async def answered(request: Any, context: Any) -> Any:
            try:
                return await call(request, context)
            except ServeRefusal as refusal:
                await _abort(context, self._noted(refusal, request, context))
            except Exception:
                LOG.exception("a gRPC call failed")
                broken = ServeRefusal("internal", "the node failed on this request")
                await _abort(context, self._noted(broken, request, context))

        return answered

    def _noted(self, refusal: ServeRefusal, request: Any, context: Any) -> ServeRefusal:
        """What the client is told: `refusal`, or that it cannot be noted."""
        named = getattr(request, "model_name", "") or getattr(request, "name", "")
        try:
            self._node.refused(refusal, address_of(context.peer()), _PRINCIPAL.get(), named)
        except ServeRefusal as unavailable:
            return unavailable
        return refusal

    async def _server_live(self, _request: Any, _context: Any) -> Any:
        return messages.ServerLiveResponse(live=self._node.live)

    async def _server_ready(self, _request: Any, _context: Any) -> Any:
        return messages.ServerReadyResponse(ready=self._node.ready)

    async def _model_ready(self, request: Any, context: Any) -> Any:
        caller, _ = await self._who(context)
        ready = self._node.is_ready(caller.principal, request.name, request.version or None)
        return messages.ModelReadyResponse(ready=ready)

    async def _server_metadata(self, _request: Any, context: Any) -> Any:
        await self._who(context)
        return messages.ServerMetadataResponse(**server_metadata())

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        caller, _ = await self._who(context)
        reader = self._node.reader(caller.principal, request.name, request.version or None)
        return messages.ModelMetadataResponse(**model_metadata(reader.model))

    async def _model_infer(self, message: Any, context: Any) -> Any:
        caller, key = await self._who(context)
        reader = self._node.reader(caller.principal, message.model_name, message.model_version or None)
        left = context.time_remaining()
        deadline = None if left is None else monotonic() + left
        request, raw = read_request(reader, message, Asker(caller.principal.name, key), deadline)
        response, headers = await self._node.infer(caller, request)
        context.set_trailing_metadata(tuple(headers.items()))
        return write_answer(response, headers, raw)

    async def _who(self, context: Any) -> tuple[Caller, str | None]:
        """Who asks, and by what the request is to be routed. Raises ServeRefusal."""
        given, key, traceparent = list[bytes](), None, None
        for name, value in context.invocation_metadata():
            if name == AUTHORIZATION:
                given.append(value.encode() if isinstance(value, str) else value)
            elif name == KEY:
                key = value
            elif name == TRACEPARENT and isinstance(value, str):
                traceparent = value
        certificate = None if self._clients is None else self._clients.certificate(context.auth_context())
        caller = await self._node.admit(only_header(given), address_of(context.peer()), "grpc", certificate)
        _PRINCIPAL.set(caller.principal.name)
        return caller if traceparent is None else replace(caller, traceparent=traceparent), key


async def _not_supported(_requests: Any, context: Any) -> None:
    words = "this call of the protocol is not supported: models are published by an administrator, metrics are at "
    await _abort(context, ServeRefusal("not_supported", f"{words}the admin port, and there are no extensions"))


async def _abort(context: Any, refusal: ServeRefusal) -> None:
    metadata: list[tuple[str, str]] = [(CODE, refusal.code)]
    if refusal.retry_after is not None:
        metadata.append((RETRY_AFTER, f"{refusal.retry_after:.3f}"))
    await context.abort(STATUS[refusal.code], str(refusal), tuple(metadata))


def _serialized(message: Any) -> bytes:
    """The message's bytes."""
    found: bytes = message.SerializeToString()
    return found


def _parameters(given: Any) -> Mapping[str, Any]:
    """Parameters as plain values. Raises ServeRefusal for those that mean what is not supported."""
    if not given:
        return {}
    require_supported(given)
    return {name: getattr(value, chosen) for name, value in given.items() if (chosen := _choice(value)) is not None}


def _choice(parameter: Any) -> str | None:
    found: str | None = parameter.WhichOneof("parameter_choice")
    return found


def _values(own: ColumnTensor, tensor: Any) -> Sequence[Any]:
    """Typed values as a list. Raises ServeRefusal."""
    field = CONTENTS.get(tensor.datatype)
    values = [] if field is None else list(getattr(tensor.contents, field))
    if field != "bytes_contents":
        return values
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError as error:
        raise own.refusal("its bytes are not UTF-8 texts") from error
