"""Valid records to change one thing in: what many tests begin with."""

from datetime import UTC, datetime
from typing import Any

import numpy as np

from fedclaw.compress.record import Compression, CoordinatorReport, Measure, Side
from fedclaw.learning.workload import Schema
from fedclaw.privacy.statistics import Design, Records, estimate
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.statistics import StatisticsReceipt
from fedclaw.protocol.terms import LocalTraining, ModelSpec, Plan, PrivacyRequest, RoundRules, StrategyRecord
from fedclaw.server.run_directory import RunRecord
from fedclaw.server.session import make_plan, make_strategy
from fedclaw.server.statistics_release import Release, ReleaseMechanism


def run_record(**changes: Any) -> RunRecord:
    """A small private run of two rounds, with `changes`."""
    fields: dict[str, Any] = {
        "run": "run-1",
        "federation": "clinic",
        "workload": "tabular",
        "schema_text": "{}",
        "model": ModelSpec(name="logistic"),
        "strategy": StrategyRecord(name="fedavg"),
        "rounds": 2,
        "training": LocalTraining(epochs=1, batch_size=8, learning_rate=0.1),
        "privacy": PrivacyRequest(epsilon=2, delta=1e-5, max_grad_norm=1),
        "rules": RoundRules(minimum=2),
    }
    return RunRecord(**{**fields, **changes})


def plan_of(record: RunRecord) -> Plan:
    """What the record's first round asks of each of three sites."""
    return make_plan(record, make_strategy(record), 1, 3)


def receipt(**changes: Any) -> Receipt:
    """What a private round cost, with `changes`."""
    fields: dict[str, Any] = {
        "mechanism": "dp-sgd",
        "sampler": "poisson",
        "accountant": "pld",
        "sample_rate": 0.1,
        "steps": 20,
        "noise_multiplier": 1.2,
        "max_grad_norm": 1.0,
        "delta": 1e-5,
        "rounds": 3,
        "epsilon_run": 2.0,
        "epsilon_lifetime": 3.5,
        "epsilon_left": 4.5,
        "ledger_head": "ab" * 32,
    }
    return Receipt(**{**fields, **changes})


def compression_record(measure: Measure = "evaluation file", **changes: Any) -> Compression:
    """What a compression of `run_record` to a third of its size left, with `changes`."""
    side: dict[str, Any] = {"multiply_adds": 50, "file_bytes": 1000, "latency_ms": {"1": 0.1}}
    record = Compression(
        run="table",
        model=ModelSpec(name="mlp", args={"hidden": [3, 2]}),
        teacher_sha256="00" * 32,
        fraction=0.5,
        parameters_before=86,
        parameters_after=29,
        accuracy_measure=measure,
        accuracy_examples=200,
        accuracy_before=0.9,
        accuracy_pruned=0.5,
        accuracy_after=0.85,
        before=Side(parameters=86, metrics={"accuracy": 0.9}, **side),
        after=Side(parameters=29, metrics={"accuracy": 0.85}, **side),
        recovery=CoordinatorReport(inputs="100 synthetic", steps=1, agreement_pruned=0.5, agreement_after=0.9),
        seed=0,
    )
    return record.model_copy(update=changes)


def statistics_release(
    record: RunRecord, schema: Schema, rows: Records, deviation: float = 10.0, bins: int = 64, **changes: Any
) -> Release:
    """What a release of statistics of `rows` says: noise of the standard deviation `deviation` in each coordinate."""
    columns = [column for column in schema.statistic_columns() if column.name in rows.columns]
    design = Design(columns, schema.labels, bins)
    random = np.random.default_rng(changes.pop("seed", 0))
    noised = design.vector([rows]) + random.normal(0.0, deviation, design.dimension)
    receipt = StatisticsReceipt(
        noise_multiplier=max(deviation, 0.1),
        delta=1e-5,
        epsilon_run=0.5,
        epsilon_lifetime=0.5,
        epsilon_left=1.0,
        ledger_head="ab" * 32,
    )
    fields: dict[str, Any] = {
        "federation": record.federation,
        "run": "release",
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "workload": record.workload,
        "schema_digest": record.schema_digest,
        "epsilon": 0.5,
        "delta": 1e-5,
        "mechanism": ReleaseMechanism(
            name="gaussian",
            placement="sites",
            trust="nobody",
            noise={"north": max(deviation, 0.1)},
            deviation=max(deviation, 0.1),
        ),
        "sites": {"north": receipt},
        "statistics": estimate(design, noised, deviation, (0.5,)),
    }
    return Release(**{**fields, **changes})
