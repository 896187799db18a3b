"""A plan is what it says, or it is refused in words."""

from typing import Any

import pytest

from fedclaw.serve.routing.plan import PlanError, RoutingDecision, RoutingPlan, changed, new_plan, parse_plan

PLAN = new_plan("m", "v1", "ann", 100.0)
CANARY = changed(PLAN, PLAN.decision, mode="canary", candidate="v2", last_good=("v0",))
SPLIT = changed(PLAN, PLAN.decision, mode="ab", arms=("v1", "v2"), propensities=(0.5, 0.5))


@pytest.mark.parametrize("plan", [PLAN, CANARY, SPLIT])
def test_a_plan_comes_back_from_its_document(plan: RoutingPlan):
    assert parse_plan("m", plan.document()) == plan


def test_what_has_to_be_loaded():
    assert PLAN.versions == ("v1",)
    assert CANARY.versions == ("v1", "v2", "v0")
    assert SPLIT.versions == ("v1", "v2")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"mode": "random"}, "mode: Input should be 'single', 'canary', 'shadow' or 'ab'"),
        ({"mode": "single"}, "mode single has no candidate"),
        ({"candidate": None}, "mode canary needs a candidate"),
        ({"candidate": "v1"}, "the candidate is the stable version"),
        ({"stable": "../../etc/passwd"}, "stable: String should match"),
        ({"stable": "a\nb"}, "stable: String should match"),
        ({"stable": "_a"}, "stable: String should match"),
        ({"stable": "a\n"}, "stable: String should match"),
        ({"stable": 65 * "a"}, "stable: String should match"),
        ({"steps": []}, "steps: Tuple should have at least 1 item"),
        ({"steps": [0.5, 0.25, 1.0]}, "steps: shares must rise and end at 1"),
        ({"steps": [0.05, 0.5]}, "steps: shares must rise and end at 1"),
        ({"steps": [0.0, 1.0]}, "steps.0: Input should be greater than 0"),
        ({"steps": [0.05, float("nan")]}, "steps.1: "),
        ({"step": 5}, "step 5 is none of 5 steps"),
        ({"step": True}, "step: Input should be a valid integer"),
        ({"step": "1"}, "step: Input should be a valid integer"),
        ({"mirror": 1.5}, "mirror: Input should be less than or equal to 1"),
        ({"salt": "s"}, "salt: String should match"),
        ({"epoch": -1}, "epoch: Input should be greater than or equal to 0"),
        ({"epoch": 2**70}, "it is no JSON"),
        ({"guards": {"alpha": 0.0}}, "guards.alpha: Input should be greater than 0"),
        ({"breakers": {"v1": {"state": "ajar"}}}, "breakers.v1.state: Input should be"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"model": "other"}, "it is of other"),
    ],
)
def test_a_wrong_document_is_refused_in_words(fields: dict[str, Any], words: str):
    with pytest.raises(PlanError) as refused:
        parse_plan("m", {**CANARY.document(), **fields})
    assert words in str(refused.value)
    assert str(refused.value).startswith("routing plan of 'm' in the state store is not used: ")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"arms": ["v1"], "propensities": [1.0]}, "ab needs two arms or more"),
        ({"arms": ["v1", "v1"]}, "ab needs two arms or more, each once"),
        ({"propensities": [0.5, 0.4]}, "add up to 1"),
        ({"propensities": [0.96, 0.04]}, "each arm keeps at least 5%"),
        ({"floor": 0.01}, "floor: Input should be greater than or equal to 0.05"),
        ({"arms": ["v2", "v3"]}, "the stable version must be one of the arms"),
    ],
)
def test_an_experiment_keeps_its_floor(fields: dict[str, Any], words: str):
    with pytest.raises(PlanError, match=words):
        parse_plan("m", {**SPLIT.document(), **fields})


def test_a_document_nested_without_end_is_refused():
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(PlanError):
        parse_plan("m", {**PLAN.document(), "decision": {"kind": "x", "by": "y", "at": 1.0, "numbers": deep}})


def test_a_change_is_checked_too():
    with pytest.raises(PlanError, match="the candidate is the stable version"):
        changed(PLAN, RoutingDecision(kind="start_canary", by="ann", at=1.0), mode="canary", candidate="v1")
    with pytest.raises(PlanError, match="model"):
        new_plan("a/b", "v1", "ann", 1.0)
