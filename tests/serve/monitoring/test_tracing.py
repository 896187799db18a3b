"""Traces, as a collector gets them: a server on loopback that parses what arrives."""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic, time_ns

import pytest

from fedclaw.errors import UsageError
from fedclaw.serve.models.batching import BatchMoments
from fedclaw.serve.monitoring.tracing import RequestTimes, RequestTracer, open_tracer
from fedclaw.serve.refusals import Code
from fedclaw.serve.settings import TracingSettings

pytest.importorskip("opentelemetry.sdk", reason="the extra tracing is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
TIMES = RequestTimes(began=1_000, ended=9_000, queued=2_000, batch_began=4_000, batch_ended=8_000)


class Collector:
    """An OTLP receiver."""

    def __init__(self) -> None:
        collector = self
        self.requests: list[ExportTraceServiceRequest] = []
        self.paths: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.headers["content-type"] == "application/x-protobuf"
                collector.paths.append(self.path)
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def spans(self):
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector():
    found = Collector()
    yield found
    found.server.shutdown()
    found.server.server_close()


def attributes(span) -> dict[str, object]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def opened(collector: Collector, **settings: object) -> RequestTracer:
    tracer = open_tracer(TracingSettings(endpoint=collector.address, **{"share": 1.0, **settings}), "worker-0")
    assert tracer is not None
    return tracer


def infer(tracer: RequestTracer, traceparent: str | None = None, code: Code | None = None) -> None:
    if tracer.wants(traceparent):
        route = "/v2/models/{model}/infer"
        tracer.record("http", "POST", route, "heart", "ab12", 3, TIMES, traceparent, code)


def test_a_request_is_a_span_with_its_queue_and_its_inference_below(collector: Collector):
    tracer = opened(collector)
    infer(tracer, TRACEPARENT)
    tracer.close()
    request, queue, inference = sorted(collector.spans(), key=lambda span: span.start_time_unix_nano)
    assert collector.paths == ["/v1/traces"]
    assert request.name == "POST /v2/models/{model}/infer"
    assert request.kind == request.SPAN_KIND_SERVER
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == PARENT
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v2/models/{model}/infer",
        "http.response.status_code": 200,
        "fedclaw.model.name": "heart",
        "fedclaw.model.version": "ab12",
        "fedclaw.rows": 3,
    }
    assert (queue.name, inference.name) == ("queue", "inference")
    assert {queue.parent_span_id, inference.parent_span_id} == {request.span_id}
    assert (queue.start_time_unix_nano, queue.end_time_unix_nano) == (2_000, 4_000)
    assert (inference.start_time_unix_nano, inference.end_time_unix_nano) == (4_000, 8_000)
    assert (request.start_time_unix_nano, request.end_time_unix_nano) == (1_000, 9_000)
    named = {item.key: item.value.string_value for item in collector.requests[0].resource_spans[0].resource.attributes}
    assert (named["service.name"], named["service.instance.id"]) == ("fedclaw-serve", "worker-0")


def test_moments_of_the_batcher_become_spans_in_their_order(collector: Collector):
    tracer, moments = opened(collector), BatchMoments()
    began = monotonic()
    moments.preparing, moments.queued, moments.began = began + 0.001, began + 0.003, began + 0.007
    times = RequestTimes.until_now(began, moments)
    tracer.record("http", "POST", "/predict/{model}", "heart", "ab12", 3, times, code="deadline_exceeded")
    before = time_ns()
    tracer.close()
    found = {span.name: span for span in collector.spans()}
    request = found.pop("POST /predict/{model}")
    assert {span.parent_span_id for span in found.values()} == {request.span_id}
    # To the microsecond: what the clock's numbers hold.
    since = {
        name: [round((moment - request.start_time_unix_nano) / 1e6, 3) for moment in interval]
        for name, span in found.items()
        if (interval := (span.start_time_unix_nano, span.end_time_unix_nano))
    }
    ended = round((request.end_time_unix_nano - request.start_time_unix_nano) / 1e6, 3)
    assert since == {"preprocessing": [1.0, 3.0], "queue": [3.0, 7.0], "inference": [7.0, ended]}
    assert request.end_time_unix_nano <= before


def test_a_refusal_says_its_code_and_a_failure_is_an_error(collector: Collector):
    tracer = opened(collector)
    infer(tracer, code="unauthenticated")
    infer(tracer, code="overloaded")
    tracer.close()
    spans = [span for span in collector.spans() if span.kind == 2]
    assert {attributes(span).get("error.type"): span.status.code for span in spans} == {
        "unauthenticated": 0,
        "overloaded": 2,
    }
    assert {attributes(span)["http.response.status_code"] for span in spans} == {401, 503}


def test_grpc_by_its_own_conventions(collector: Collector):
    tracer = opened(collector)
    times = RequestTimes(1, 2)
    codes: tuple[Code | None, ...] = (None, "bad_request", "deadline_exceeded")
    for code in codes:
        tracer.record("grpc", "ModelInfer", "inference.GRPCInferenceService", "heart", "ab12", 1, times, code=code)
    tracer.close()
    spans = collector.spans()
    assert {span.name for span in spans} == {"inference.GRPCInferenceService/ModelInfer"}
    assert {attributes(span)["rpc.system"] for span in spans} == {"grpc"}
    # OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, of which by the conventions the last one alone is the server's error.
    assert [(attributes(span)["rpc.grpc.status_code"], span.status.code) for span in spans] == [(0, 0), (3, 0), (4, 2)]


def test_the_share_is_the_nodes_choice_and_a_client_cannot_raise_it(collector: Collector):
    tracer = opened(collector, share=0.25)
    draws = iter([0.2, 0.3, 0.9, 0.25])
    tracer._chance = lambda: next(draws)
    for _ in range(4):
        infer(tracer, TRACEPARENT)
    tracer.close()
    assert len([span for span in collector.spans() if span.name.startswith("POST")]) == 1


def test_a_trusted_front_says_what_is_recorded(collector: Collector):
    tracer = opened(collector, share=0.0, follow_parent=True)
    for traceparent in (TRACEPARENT, TRACEPARENT[:-2] + "00", None, TRACEPARENT[:-2] + "zz", "01", ""):
        infer(tracer, traceparent)
    tracer.close()
    assert len([span for span in collector.spans() if span.name.startswith("POST")]) == 1


@pytest.mark.parametrize(
    "hostile",
    ["", "x" * 55, "00-" + "0" * 32 + "-" + "0" * 16 + "-01", TRACEPARENT + "-more", "ff" + TRACEPARENT[2:], "é" * 55],
)
def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(collector: Collector, hostile: str):
    tracer = opened(collector)
    infer(tracer, hostile)
    tracer.close()
    (request,) = [span for span in collector.spans() if span.kind == 2]
    assert request.parent_span_id == b""
    assert request.trace_id.hex() not in (TRACE, "0" * 32)


def test_a_collector_that_is_away_costs_spans_and_no_request(collector: Collector):
    tracer = opened(collector)
    collector.server.server_close()
    for _ in range(5000):
        infer(tracer)  # more than the queue holds
    assert collector.requests == []
    threading.Thread(target=tracer.close, daemon=True).start()


def test_off_is_none():
    assert open_tracer(TracingSettings(), "worker-0") is None
    assert open_tracer(TracingSettings(endpoint="http://127.0.0.1:1", share=0.0), "worker-0") is None


@pytest.mark.parametrize("address", ["collector:4318", "ftp://a", "http://", "http://user:secret@collector:4318"])
def test_an_address_that_is_none_is_refused(address: str):
    with pytest.raises(UsageError, match=r"tracing\.endpoint"):
        open_tracer(TracingSettings(endpoint=address), "worker-0")
