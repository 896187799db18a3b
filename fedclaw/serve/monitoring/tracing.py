"""OpenTelemetry traces of requests, where a collector is configured: OTLP over HTTP, from the extra `tracing`.

The batcher notes the moments of a request that is traced. When it is answered, one call makes the spans of it:

    request          SERVER; by the semantic conventions for HTTP or RPC, with model, version and rows
      preprocessing  where it is in batches of its own, shared by versions: until its rows are prepared
      queue          from its queue to its first batch
      inference      its batches in ONNX Runtime, from the first one's begin to the last one's end

No span holds an input, an answer, a token, a principal, a routing key or an address. Off, tracing costs a request one
`is None`; on, one that is not chosen costs it a random number. Spans leave in a thread of their own, from a queue that
is bounded: a collector that is slow or away costs spans, never a request.

Which requests are traced is the node's own choice: each with the probability `share`. A client's `traceparent` (W3C
Trace Context) says whose child the span is. That it must be recorded it says only where `follow_parent` trusts whoever
sends it: else anybody could have every request of theirs recorded. `tracestate` is not read.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import urlsplit

from fedclaw.errors import UsageError
from fedclaw.serve.models.batching import BatchMoments
from fedclaw.serve.refusals import STATUS, Code
from fedclaw.serve.settings import TracingSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.util.types import AttributeValue

SERVICE = "fedclaw-serve"
TRACES = "/v1/traces"
TRACEPARENT_LENGTH = 55
PATIENCE = 5.0
"""Seconds that the collector has for an answer, and that a worker waits for its last spans as it ends."""


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Moments of a request, in nanoseconds of Unix time (`time.time_ns`); None: it did not get there."""

    began: int
    ended: int
    queued: int | None = None
    batch_began: int | None = None
    batch_ended: int | None = None
    preparing: int | None = None

    @classmethod
    def until_now(cls, began: float, moments: BatchMoments) -> Self:
        """Of a request that began at `began`, by `time.monotonic`, and has ended now."""
        now, today = monotonic(), time_ns()

        def moment(when: float | None) -> int | None:
            return None if when is None else today - int((now - when) * 1e9)

        return cls(
            began=today - int((now - began) * 1e9),
            ended=today,
            queued=moment(moments.queued),
            batch_began=moment(moments.began),
            batch_ended=moment(moments.ended),
            preparing=moment(moments.preparing),
        )


class RequestTracer:
    """Makes the spans of a worker's requests."""

    def __init__(
        self,
        exporter: "SpanExporter",
        worker: str,
        share: float,
        follow_parent: bool = False,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Send to `exporter`; `worker` tells the processes of a service apart."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        whose = {"service.name": SERVICE, "service.version": version("fedclaw"), "service.instance.id": worker}
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=Resource.create(whose), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fedclaw.serve")
        self._propagator = TraceContextTextMapPropagator()
        self._share, self._follow, self._chance = share, follow_parent, chance
        self._server, self._error = SpanKind.SERVER, StatusCode.ERROR

    def wants(self, traceparent: str | None) -> bool:
        """Whether a request that begins now is traced; `traceparent` is its client's header."""
        recorded = self._follow and traceparent is not None and _recorded(traceparent)
        return recorded or self._chance() < self._share

    def record(
        self,
        protocol: Literal["http", "grpc"],
        method: str,
        route: str,
        model: str,
        version: str,
        rows: int,
        times: RequestTimes,
        traceparent: str | None = None,
        code: Code | None = None,
    ) -> None:
        """A request that was wanted, and was answered, or refused with `code`.

        `method` and `route` are the node's words for what was asked (POST, /v2/models/{model}/infer; of gRPC, the
        method and the service), never a client's path.
        """
        from opentelemetry.trace import set_span_in_context

        parent = None
        if traceparent is not None and len(traceparent) == TRACEPARENT_LENGTH:
            parent = self._propagator.extract({"traceparent": traceparent})
        name, attributes = _conventions(protocol, method, route, code)
        attributes |= {"fedclaw.model.name": model, "fedclaw.model.version": version, "fedclaw.rows": rows}
        span = self._tracer.start_span(name, parent, self._server, attributes, start_time=times.began)
        within = set_span_in_context(span)
        if times.preparing is not None:
            preprocessing = self._tracer.start_span("preprocessing", within, start_time=times.preparing)
            preprocessing.end(times.queued or times.ended)
        if times.queued is not None:
            queue = self._tracer.start_span("queue", within, start_time=times.queued)
            queue.end(times.batch_began or times.ended)
        if times.batch_began is not None:
            shared = {"fedclaw.model.name": model, "fedclaw.model.version": version}
            inference = self._tracer.start_span("inference", within, attributes=shared, start_time=times.batch_began)
            inference.end(times.batch_ended or times.ended)
        if code is not None:
            span.set_attribute("error.type", code)
            if STATUS[code] >= HTTPStatus.INTERNAL_SERVER_ERROR:
                span.set_status(self._error)
        span.end(times.ended)

    def close(self) -> None:
        """Send what is left, for at most a few seconds; spans recorded later are lost."""
        self._provider.force_flush(int(1000 * PATIENCE))
        self._provider.shutdown()


def open_tracer(settings: TracingSettings, worker: str) -> RequestTracer | None:
    """The tracer that the settings ask for; None: traces are off.

    Raises UsageError for an address that is none, and where the extra is not installed.
    """
    if settings.endpoint is None or (settings.share == 0 and not settings.follow_parent):
        return None
    address = urlsplit(settings.endpoint)
    if address.scheme not in ("http", "https") or not address.hostname or address.username is not None:
        raise UsageError(
            f"tracing.endpoint={settings.endpoint!r:.200} is not the address of a collector, as https://collector:4318"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise UsageError("traces need the extra: pip install 'fedclaw[tracing]'") from error
    place = settings.endpoint.rstrip("/")
    exporter = OTLPSpanExporter(
        endpoint=place if place.endswith(TRACES) else place + TRACES,
        certificate_file=None if settings.certificate is None else str(settings.certificate),
        timeout=PATIENCE,
    )
    return RequestTracer(exporter, worker, settings.share, settings.follow_parent)


def _recorded(traceparent: str) -> bool:
    """Whether the flags say that the parent is recorded."""
    try:
        return bool(int(traceparent[-2:], 16) & 1) and len(traceparent) == TRACEPARENT_LENGTH
    except ValueError:
        return False


def _conventions(protocol: str, method: str, route: str, code: Code | None) -> tuple[str, dict[str, "AttributeValue"]]:
    """The span's name and attributes, by the semantic conventions for HTTP and RPC servers."""
    named: dict[str, AttributeValue]
    if protocol == "grpc":
        from fedclaw.serve.inference.grpc_service import STATUS as GRPC_STATUS

        status = 0 if code is None else GRPC_STATUS[code].value[0]
        named = {"rpc.system": "grpc", "rpc.service": route, "rpc.method": method, "rpc.grpc.status_code": status}
        return f"{route}/{method}", named
    status = int(HTTPStatus.OK if code is None else STATUS[code])
    named = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
    return f"{method} {route}", named
