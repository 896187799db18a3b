"""A node of real processes as Prometheus and a collector of traces see it."""

import time
from collections import defaultdict

import numpy as np
import pytest
import tritonclient.grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.monitoring.test_tracing import TRACE, TRACEPARENT, Collector, attributes
from tests.serve.node_process import INSECURE, RunningNode, running_node

pytestmark = pytest.mark.slow

ROW = {"rows": [{"age": 61, "smoker": "yes", "ward": "surgery"}]}


@pytest.fixture(scope="module")
def seen(tmp_path_factory, marginals_bundle, home):
    """What a node shows after ten answers and two refusals by HTTP and an answer by gRPC: its metrics, its spans, its
    model's quality."""
    collector = Collector()
    settings = (
        f"bundle={marginals_bundle}",
        "model=heart",
        f"ca={home.root / 'ca.crt'}",
        f"tracing.endpoint={collector.address}",
        "tracing.share=1.0",
        *INSECURE,
    )
    with running_node(tmp_path_factory.mktemp("node"), *settings) as node:
        for _ in range(10):
            assert node.ask("POST", f"{node.http}/predict/heart", ROW, content_type="application/json")[0] == 200
        assert node.ask("POST", f"{node.http}/predict/heart", b"{", content_type="application/json")[0] == 400
        assert node.ask("POST", f"{node.http}/predict/made-up", ROW, content_type="application/json")[0] == 404
        _ask_by_grpc(node)

        def quality():
            status, found, _ = node.ask("GET", f"{node.admin}/admin/models/heart/quality")
            return found if status == 200 else None

        told = node.wait_for(quality)
        page = node.ask("GET", f"{node.admin}/metrics")[1].decode()
        node.stop()
    end = time.monotonic() + 20
    while len(collector.spans()) < 33 and time.monotonic() < end:
        time.sleep(0.05)
    collector.server.shutdown()
    collector.server.server_close()
    return page, collector.spans(), told


def _ask_by_grpc(node: RunningNode) -> None:
    client = tritonclient.grpc.InferenceServerClient(node.grpc)
    inputs = []
    for name, kind, values in (("age", "FP32", [61.0]), ("smoker", "BYTES", [b"yes"]), ("ward", "BYTES", [b"surgery"])):
        tensor = tritonclient.grpc.InferInput(name, [1, 1], kind)
        tensor.set_data_from_numpy(np.array([values], np.float32 if kind == "FP32" else object))
        inputs.append(tensor)
    client.infer("heart", inputs, headers={"traceparent": TRACEPARENT})
    client.close()


def total(page: str, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == f"fedclaw_serve_{name}" and labels.items() <= sample.labels.items()
    )


def test_requests_batches_and_versions_are_counted(seen):
    page, _, _ = seen
    assert total(page, "requests_total", model="heart", protocol="predict", status="200") == 10
    assert total(page, "requests_total", status="400") == 1
    assert total(page, "requests_total", status="404") == 1
    assert total(page, "requests_total", model="heart", protocol="grpc", status="200") == 1
    assert total(page, "batch_rows_sum", model="heart") == 11
    assert total(page, "queue_wait_seconds_count", model="heart") == total(page, "batch_rows_count", model="heart") > 0
    assert total(page, "models_loaded", model="heart") == 1
    assert total(page, "model_memory_bytes", model="heart") > 0
    assert total(page, "model_load_duration_seconds_count", model="heart") == 1
    assert total(page, "audit_lines_total") == 13
    assert total(page, "version_share", model="heart") == 1
    assert total(page, "worker_ready") == 1
    assert total(page, "process_resident_memory_bytes", process="supervisor") > 0
    assert "made-up" not in page


def test_each_request_is_a_span(seen):
    _, spans, _ = seen
    requests = [span for span in spans if span.kind == span.SPAN_KIND_SERVER]
    grpc = "inference.GRPCInferenceService/ModelInfer"
    assert {span.name for span in requests} == {"POST /predict/{model}", grpc}
    (good,) = {attributes(span)["fedclaw.model.name"] for span in requests if not attributes(span).get("error.type")}
    assert good == "heart"
    assert "made-up" not in str(spans)
    (called,) = [span for span in requests if span.name == grpc]
    assert called.trace_id.hex() == TRACE
    assert attributes(called)["rpc.grpc.status_code"] == 0


def test_below_an_answer_are_its_queue_and_its_inference_in_their_order(seen):
    _, spans, _ = seen
    below = defaultdict(dict)
    for span in spans:
        below[span.parent_span_id][span.name] = span
    answered = [span for span in spans if span.kind == span.SPAN_KIND_SERVER and "error.type" not in attributes(span)]
    assert len(answered) == 11
    for request in answered:
        queue, inference = below[request.span_id]["queue"], below[request.span_id]["inference"]
        assert queue.trace_id == inference.trace_id == request.trace_id
        moments = [
            request.start_time_unix_nano,
            queue.start_time_unix_nano,
            queue.end_time_unix_nano,
            inference.end_time_unix_nano,
            request.end_time_unix_nano,
        ]
        assert moments == sorted(moments)
        assert queue.end_time_unix_nano == inference.start_time_unix_nano < inference.end_time_unix_nano


def test_the_models_quality_names_its_baseline(seen):
    (drift,) = seen[2]["drift"].values()
    assert (drift["state"], drift["baseline"]) == ("too few rows", "the charged question release")
