"""What the control process shows of a store that a real plan, real feedback and real counts lie in."""

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedclaw.export.check import Trust
from fedclaw.serve.models.bundle_store import BundleStore
from fedclaw.serve.monitoring.drift_watch import InputWatch
from fedclaw.serve.monitoring.metrics import NodeMetrics
from fedclaw.serve.observer import NodeObserver, inputs_of, routing_figures
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.releases import first_release
from fedclaw.serve.routing.plan import BreakerState, read_plan
from fedclaw.serve.settings import DriftSettings, NodeSettings, TlsSettings, TokenSettings
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.version_catalogue import VersionCatalogue


@pytest.fixture
def store(tmp_path: Path):
    with StateStore.open(f"sqlite:///{tmp_path / 'state.db'}") as found:
        yield found


def node_settings(drift: DriftSettings) -> NodeSettings:
    return NodeSettings(
        ca=None,
        federation=None,
        crl=None,
        expired="accept",
        tls=TlsSettings(disabled=True),
        tokens=TokenSettings(disabled=True),
        drift=drift,
    )


@pytest.fixture
def node(tmp_path: Path, store, marginals_bundle, home):
    trust = Trust(home.signer().ca_pem)
    bundles = BundleStore(tmp_path / "bundles")
    digest = bundles.put(marginals_bundle, trust)
    VersionCatalogue(store).add("heart", "first", digest, "table", "configuration")
    first_release(store, "heart", "first")
    settings = node_settings(DriftSettings(share=1.0, window_seconds=10))
    metrics = NodeMetrics(tmp_path / "metrics", 2)
    return NodeObserver(settings, store, bundles, trust, tmp_path / "audit", metrics), metrics, bundles, digest, trust


def shown(metrics: NodeMetrics, name: str) -> dict[tuple[str, ...], float]:
    found = [family for family in text_string_to_metric_families(metrics.render()[0].decode()) if family.name == name]
    return {tuple(one.labels.values()): one.value for family in found for one in family.samples}


def test_a_plan_its_feedback_and_its_inputs_are_shown(node, store):
    observer, metrics, bundles, digest, trust = node
    for number, truth in enumerate(("benign", "benign", "malignant", "malignant")):
        store.credit(f"receipt-{number}", "heart", "first", {"predicted": ["benign"], "truth": [truth]})
    inputs, labels = inputs_of(bundles, digest, trust)
    assert labels == ("benign", "malignant")
    watch = InputWatch(store, "node/worker-1", DriftSettings(share=1.0, window_seconds=10), lambda: 1_000.0)
    watch.serves("heart", "first", inputs.features)
    observer.step()
    assert shown(metrics, "fedclaw_serve_version_share") == {("heart", "first"): 1.0}
    assert shown(metrics, "fedclaw_serve_canary_share") == {("heart",): 0.0}
    assert shown(metrics, "fedclaw_serve_feedback_accuracy") == {("heart", "first"): 0.5}
    assert shown(metrics, "fedclaw_serve_feedback_recall") == {("heart", "first"): 0.0}
    assert shown(metrics, "fedclaw_serve_drift_rows") == {("heart", "first"): 0.0}
    assert shown(metrics, "fedclaw_serve_drift_alarm") == {}
    quality = json.loads(json.dumps(observer.quality("heart"), allow_nan=False))
    assert quality["drift"]["first"]["baseline"] == "the charged question release"
    assert quality["feedback"]["first"]["feedback"] == 4
    assert observer.quality("lung") is None


@pytest.mark.parametrize(
    ("drift", "code"),
    [
        ({"baseline": "first_rows"}, None),
        ({"baseline": "auto"}, "conflict"),
        ({"baseline": "charged"}, "conflict"),
        ({"baseline": "first_rows", "share": 0.0}, "conflict"),
    ],
)
def test_a_baseline_begins_anew_where_it_is_the_first_rows(node, store, tmp_path, drift, code):
    _, metrics, bundles, digest, trust = node
    settings = node_settings(DriftSettings(window_seconds=10, **drift))
    observer = NodeObserver(settings, store, bundles, trust, tmp_path / "audit", metrics)
    name = f"drift-baseline/heart/{inputs_of(bundles, digest, trust)[0].features.digest}"
    assert store.swap(name, None, {"counts": {}, "until": 7})
    if code is None:
        observer.begin_baseline("heart", "ann")
        assert store.read(name)[1].keys() == {"since"}
        last = store.events("heart")[-1]
        assert (last.kind, last.body) == ("new_baseline", {"by": "ann"})
    else:
        with pytest.raises(ServeRefusal) as refused:
            observer.begin_baseline("heart", "ann")
        assert refused.value.code == code
        assert store.read(name) == (1, {"counts": {}, "until": 7})
    with pytest.raises(ServeRefusal, match="no such model"):
        observer.begin_baseline("lung", "ann")


def test_a_breaker_that_is_open_and_a_canary_are_shown(store, node):
    plan = read_plan(store, "heart").plan
    broken = BreakerState(state="open", epoch=1, since=1.0, wait=5.0)
    canary = plan.model_copy(update={"mode": "canary", "candidate": "second", "breakers": {"second": broken}})
    found = routing_figures(canary)
    assert found.shares == {"first": 0.95, "second": 0.05}
    assert found.breakers == {"first": "closed", "second": "open"}
    assert found.candidate == "second"


def test_decisions_are_counted_once_from_the_first_look_on(node, store):
    observer, metrics, *_ = node
    store.append_event("published", "heart", {})
    for _ in range(2):
        observer.step()
    assert shown(metrics, "fedclaw_serve_decisions") == {}
    for kind in ("canary_began", "canary_grew", "canary_grew"):
        store.append_event(kind, "heart", {})
    for _ in range(2):
        observer.step()
    expected = {("canary_began", "heart"): 1.0, ("canary_grew", "heart"): 2.0}
    assert shown(metrics, "fedclaw_serve_decisions") == expected


def test_a_bundle_that_is_gone_costs_its_own_figures_alone(node, store):
    observer, metrics, bundles, digest, _ = node
    bundles.remove(digest)
    observer.step()
    assert shown(metrics, "fedclaw_serve_version_share") == {("heart", "first"): 1.0}
    assert shown(metrics, "fedclaw_serve_drift_rows") == {}


def test_a_store_that_is_away_leaves_the_figures_and_is_counted(node, store, monkeypatch):
    import threading

    from fedclaw.serve.state.store import StateUnavailable

    observer, metrics, *_ = node
    observer.step()

    def away(*_):
        raise StateUnavailable("the database does not answer")

    monkeypatch.setattr(StateStore, "names", away)
    ended = threading.Event()
    ended.set()
    observer.run(ended)
    assert shown(metrics, "fedclaw_serve_state_store_errors") == {(): 1.0}
    assert shown(metrics, "fedclaw_serve_version_share") == {("heart", "first"): 1.0}


def test_an_audit_log_that_somebody_changed_is_shown(node, tmp_path):
    from fedclaw.serve.state.audit_log import AuditLog

    observer, metrics, *_ = node
    observer.step()
    assert shown(metrics, "fedclaw_serve_audit_valid") == {}
    log = AuditLog(tmp_path / "audit", "node.worker-1")
    for number in range(3):
        log.append(
            principal="anna", peer="p", model="heart", version="first", request=str(number), rows=1, status=200, code=""
        )
    observer.step()
    assert shown(metrics, "fedclaw_serve_audit_valid") == {(): 1.0}
    log.close()
    (file,) = [path for path in (tmp_path / "audit").iterdir() if b"anna" in path.read_bytes()]
    file.write_bytes(file.read_bytes().replace(b"anna", b"emma", 1))
    observer._audit_at = 0.0
    observer.step()
    assert shown(metrics, "fedclaw_serve_audit_valid") == {(): 0.0}
