"""What settings, a run's record and its plans say in the same words is copied by the class, so nothing is forgotten."""

from typing import Any

import pytest

from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.terms import (
    PLAN_VERSION,
    CentralNoise,
    Distillation,
    LocalTraining,
    ModelSpec,
    Plan,
    PrivacyRequest,
    RoundRules,
    SharedTerms,
    StrategyRecord,
    Terms,
)
from fedclaw.server.early_checks import record_of
from fedclaw.server.run_directory import RunRecord
from fedclaw.server.settings import RunSettings, WorkloadChoice
from tests.samples import plan_of, run_record

CHANGED: dict[str, Any] = {
    "rounds": 7,
    "training": LocalTraining(steps=3, batch_size=5, learning_rate=0.25),
    "privacy": PrivacyRequest(epsilon=3, delta=1e-6, max_grad_norm=2),
    "compression": {"method": "randk", "fraction": 0.5, "feedback": False},
    "weighting": "capped",
    "weight_cap": 11,
    "metrics": ("loss", "auroc"),
    "score_bins": 64,
    "federation": "wards",
    "run": "another",
    "workload": "tabular",
    "model": ModelSpec(name="mlp", args={"hidden": [4]}),
    "central": CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1),
    "distillation": Distillation(teacher=ModelSpec(name="mlp"), weight=0.5),
    "personal": ("head",),
    "preprocessing": "{}",
}


def said(value: SharedTerms, fields: type[SharedTerms]) -> dict[str, Any]:
    return {name: value.model_dump(mode="json")[name] for name in fields.model_fields if name != "secure"}


def test_a_plan_says_what_its_record_says() -> None:
    assert set(CHANGED) == set(Terms.model_fields) - {"secure"}, "a new field is to be tried here too"
    record = run_record(**CHANGED)
    assert said(plan_of(record), Terms) == said(record, Terms)


def test_a_record_says_what_its_settings_say() -> None:
    shared = {name: CHANGED[name] for name in SharedTerms.model_fields}
    settings = RunSettings(workload=WorkloadChoice(name="tabular"), strategy={"name": "fedavg"}, seed=3, **shared)
    strategy = StrategyRecord(name="fedavg")
    record = record_of(
        settings,
        RoundRules(minimum=4),
        run="r",
        federation="f",
        strategy=strategy,
        schema=None,
        model=ModelSpec(name="mlp"),
        central=None,
    )
    assert said(record, SharedTerms) == said(settings, SharedTerms)
    assert (record.seed, record.rules.minimum, record.strategy) == (3, 4, strategy)


def refusal_of(kind: type[Terms], plain: dict[str, Any]) -> str:
    """A record is refused as it is made; a plan where a site reads it, or asks its mechanism."""
    try:
        made = kind.model_validate(plain)
    except ValueError as error:
        return str(error)
    return mechanism_of(made).contradiction() or "nothing is refused"


@pytest.mark.parametrize("asked", [run_record(), plan_of(run_record())], ids=["record", "plan"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_cap": 3}, "weight_cap goes with weighting: capped"),
        ({"privacy": None, "central": {**CHANGED["central"].model_dump(), "sample_rate": 0.5}}, "weighting: uniform"),
        ({"central": {**CHANGED["central"].model_dump(), "unit": "example"}}, "without local noise"),
        ({"rounds": 10**6}, "less than or equal to 100000"),
    ],
)
def test_record_and_plan_refuse_the_same(asked: Terms, changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal_of(type(asked), {**asked.model_dump(), **changes})


def test_other_fields_in_a_plan_are_another_version() -> None:
    assert PLAN_VERSION == 4
    assert " ".join(sorted(Plan.model_fields)) == (
        "central cohort compression distillation federation metrics model personal preprocessing privacy round rounds "
        "run schema_digest score_bins secure strategy strategy_fields strategy_settings training version weight_cap "
        "weighting workload"
    )


def test_the_order_of_fields_in_a_run_json_is_nothing() -> None:
    record = run_record(**CHANGED)
    plain = record.model_dump(mode="json")
    assert RunRecord.model_validate(dict(sorted(plain.items()))) == record
