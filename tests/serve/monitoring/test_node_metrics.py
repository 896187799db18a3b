"""A node of real processes as Prometheus and a collector of traces see it."""

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.monitoring.test_tracing import Collector, attributes
from tests.serve.node_process import INSECURE, running_node

pytestmark = pytest.mark.slow

ROW = {"rows": [{"age": 61, "smoker": "yes", "ward": "surgery"}]}


@pytest.fixture(scope="module")
def seen(tmp_path_factory, marginals_bundle, home):
    """What a node shows after ten answers and two refusals: its metrics, its spans, its model's quality."""
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

        def quality():
            status, found, _ = node.ask("GET", f"{node.admin}/admin/models/heart/quality")
            return found if status == 200 else None

        told = node.wait_for(quality)
        page = node.ask("GET", f"{node.admin}/metrics")[1].decode()
        node.stop()
    end = time.monotonic() + 20
    while len(collector.spans()) < 10 and time.monotonic() < end:
        time.sleep(0.05)
    collector.server.shutdown()
    collector.server.server_close()
    return page, collector.spans(), told


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
    assert total(page, "batch_rows_sum", model="heart") == 10
    assert total(page, "queue_wait_seconds_count", model="heart") == total(page, "batch_rows_count", model="heart") > 0
    assert total(page, "models_loaded", model="heart") == 1
    assert total(page, "model_memory_bytes", model="heart") > 0
    assert total(page, "model_load_duration_seconds_count", model="heart") == 1
    assert total(page, "audit_lines_total") == 12
    assert total(page, "version_share", model="heart") == 1
    assert total(page, "worker_ready") == 1
    assert total(page, "process_resident_memory_bytes", process="supervisor") > 0
    assert "made-up" not in page


def test_each_request_is_a_span(seen):
    _, spans, _ = seen
    assert {span.name for span in spans} == {"POST /predict/{model}"}
    (good,) = {attributes(span)["fedclaw.model.name"] for span in spans if not attributes(span).get("error.type")}
    assert good == "heart"
    assert "made-up" not in str(spans)


def test_the_models_quality_names_its_baseline(seen):
    (drift,) = seen[2]["drift"].values()
    assert (drift["state"], drift["baseline"]) == ("too few rows", "the charged question release")
