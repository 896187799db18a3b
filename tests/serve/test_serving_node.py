"""The way of a request through a worker: whatever fails on it, what is counted and noted is that it failed."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedclaw.serve.monitoring.metrics import NodeMetrics, WorkerMetrics
from fedclaw.serve.node import ServingNode
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Caller, InferenceRequest, Principal
from fedclaw.serve.security.rate_limits import Rate, RateLimiter, RateLimits, RateTable
from fedclaw.serve.state.audit_log import AuditLog
from tests.disks import full_after

ANN = Caller(Principal("ann", frozenset({"predict:*"})), "127.0.0.1", "rest")


def rows(count: int) -> InferenceRequest:
    return InferenceRequest("heart", {"age": np.zeros((count, 1), np.float32)}, count, "id", "key")


class _Seen:
    """Takes down with what each of its methods is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **named: self.calls.append((name, values, named))


def test_a_request_that_breaks_the_node_is_noted_as_failed(caplog):
    def choose(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    audit, metrics = _Seen(), _Seen()
    router = SimpleNamespace(choose=choose)
    parts: Any = SimpleNamespace(
        admission=_Seen(), router=router, audit=audit, metrics=metrics, tracer=None, inputs=None
    )
    with pytest.raises(ServeRefusal) as refused:
        asyncio.run(ServingNode(parts).infer(ANN, rows(1)))
    assert refused.value.code == "internal"
    assert "ours" not in str(refused.value)
    (line,) = [named for name, _, named in audit.calls if name == "append"]
    assert (line["principal"], line["status"], line["code"]) == ("ann", 500, "internal")
    assert "a fault of ours" in caplog.text


def test_whoever_asks_for_too_many_rows_is_told_to_come_again_before_a_version_is_chosen():
    limiter = RateLimiter(RateTable.private(), RateLimits(rows=Rate(10, 100)), clock=lambda: 1000.0)
    audit, metrics, router = _Seen(), _Seen(), _Seen()
    parts: Any = SimpleNamespace(
        admission=limiter, router=router, audit=audit, metrics=metrics, tracer=None, inputs=None
    )
    node = ServingNode(parts)
    limiter.admit_rows("ann", 80)
    with pytest.raises(ServeRefusal) as refused:
        asyncio.run(node.infer(ANN, rows(60)))
    assert (refused.value.code, refused.value.retry_after) == ("too_many_requests", pytest.approx(4.0))
    node.refused(refused.value, ANN.peer, "ann", "heart")
    assert [name for name, _, _ in (*router.calls, *audit.calls, *metrics.calls)] == [
        "request",
        "refused",
        "rate_limited",
    ]


def test_answers_that_leave_without_an_audit_line_are_counted_apart(tmp_path: Path):
    metrics = WorkerMetrics.open(tmp_path / "metrics", 0)
    told = NodeMetrics(tmp_path / "metrics")

    def counted() -> list[bytes]:
        return [line for line in told.render()[0].splitlines() if line.startswith(b"fedclaw_serve_audit_")]

    assert counted() == [b"fedclaw_serve_audit_missed_total 0.0"]
    with AuditLog(tmp_path / "audit", "node.worker-1", when_full="go_on") as audit:
        parts: Any = SimpleNamespace(audit=audit, metrics=metrics)
        node = ServingNode(parts)

        def refuse() -> None:
            node.refused(ServeRefusal("not_found", "there is no such model"), "127.0.0.1", "ann", "heart")

        refuse()
        (file,) = (tmp_path / "audit").glob("*.jsonl")
        with full_after(file.stat().st_size):
            refuse()
            refuse()
        refuse()
    assert counted() == [b"fedclaw_serve_audit_lines_total 2.0", b"fedclaw_serve_audit_missed_total 2.0"]
    metrics.close()
