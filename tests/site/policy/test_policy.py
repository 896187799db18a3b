from typing import Any

import pytest
from pydantic import ValidationError

from fedclaw.learning.tasks.classification import METRICS
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.terms import LocalTraining, ModelSpec, Plan, PrivacyRequest
from fedclaw.site.policy.checks import check_plan, check_request, permitted_metrics
from fedclaw.site.policy.policy import Policy, sentences

POLICY: dict[str, Any] = {
    "workloads": ["tabular"],
    "strategies": ["fedavg", "fedprox"],
    "federations": ["hospitals"],
    "epsilon": 8.0,
    "delta": 1e-5,
    "epsilon_per_run": 4.0,
    "minimum_cohort": 3,
    "max_local_steps": 20,
    "max_update_mb": 1.0,
}
PLAN: dict[str, Any] = {
    "federation": "hospitals",
    "run": "run-1",
    "round": 1,
    "rounds": 10,
    "cohort": 3,
    "workload": "tabular",
    "schema_digest": "00",
    "model": ModelSpec(name="mlp"),
    "strategy": "fedavg",
    "training": LocalTraining(steps=20, batch_size=16, learning_rate=0.1),
    "privacy": PrivacyRequest(epsilon=4.0, delta=1e-5, max_grad_norm=1.0),
}
WITHOUT_PRIVACY = {"allow_training_without_privacy": True, "epsilon": None}


def check(
    policy: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    examples: int = 1000,
    parameters: int = 250_000,
) -> None:
    check_plan(Policy(**{**POLICY, **(policy or {})}), Plan(**{**PLAN, **(plan or {})}), examples, parameters)


def privacy(**changes: float) -> dict[str, Any]:
    return {"privacy": PrivacyRequest(**{"epsilon": 4.0, "delta": 1e-5, "max_grad_norm": 1.0, **changes})}


def test_a_plan_at_every_limit_is_allowed() -> None:
    check()


@pytest.mark.parametrize(
    ("code", "policy", "plan", "reason"),
    [
        (RefusalCode.FEDERATION, {}, {"federation": "banks"}, "'banks' was asked for; this site allows hospitals"),
        (RefusalCode.WORKLOAD, {}, {"workload": "vision"}, "'vision' was asked for; this site allows tabular"),
        (
            RefusalCode.STRATEGY,
            {},
            {"strategy": "fedadam"},
            "'fedadam' was asked for; this site allows fedavg, fedprox",
        ),
        (RefusalCode.COHORT, {}, {"cohort": 2}, "round of 2 .* at least 3"),
        (RefusalCode.PRIVACY_REQUIRED, {}, {"privacy": None}, "without differential privacy was asked for"),
        (RefusalCode.EPSILON, {}, privacy(epsilon=4.01), "epsilon 4.01 was asked for; .* at most 4 per run"),
        (RefusalCode.EPSILON, {"epsilon_per_run": None}, privacy(epsilon=9), "epsilon 9 .* at most 8 per data set"),
        (RefusalCode.EPSILON, {}, privacy(delta=1.1e-5), "delta 1.1e-05 .* at most 1e-05"),
        (
            RefusalCode.LOCAL_STEPS,
            {},
            {"training": LocalTraining(steps=21, batch_size=16, learning_rate=0.1)},
            "21 local steps .* at most 20",
        ),
        (
            RefusalCode.LOCAL_STEPS,
            {},
            {"training": LocalTraining(epochs=3, batch_size=100, learning_rate=0.1)},
            "3 epochs in batches of 100 .* at most 20",
        ),
    ],
)
def test_each_clause_is_refused_with_its_code_and_reason(
    code: RefusalCode, policy: dict[str, Any], plan: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Refusal, match=reason) as caught:
        check(policy, plan)
    assert caught.value.code is code


def test_an_update_that_is_too_large_is_refused() -> None:
    with pytest.raises(Refusal, match=r"1\.2 MB .* at most 1 MB") as caught:
        check(parameters=300_000)
    assert caught.value.code is RefusalCode.UPDATE_SIZE


@pytest.mark.parametrize(("delta", "refused"), [(1e-3, True), (2e-3, True), (9.9e-4, False)])
def test_a_delta_of_one_over_the_examples_promises_nothing(delta: float, refused: bool) -> None:
    if not refused:
        return check({"delta": 0.1}, privacy(delta=delta))
    with pytest.raises(Refusal, match="below one over the number of examples") as caught:
        check({"delta": 0.1}, privacy(delta=delta))
    assert caught.value.code is RefusalCode.EPSILON
    assert "1000" not in caught.value.reason
    return None


def test_what_is_not_limited_is_allowed() -> None:
    unlimited = {"federations": None, "max_local_steps": None, "max_update_mb": None, "epsilon_per_run": None}
    training = LocalTraining(steps=10**5, batch_size=16, learning_rate=0.1)
    check(unlimited, {"federation": "banks", "training": training, **privacy(epsilon=8.0)}, parameters=10**9)


@pytest.mark.parametrize("training", [{"steps": 10_000}, {"epochs": 100}])
def test_a_run_of_too_many_private_steps_is_refused_however_they_are_dealt_out(training: dict[str, Any]) -> None:
    """They are refused before the noise is calibrated for them, which would keep the site busy."""
    asked = {"training": LocalTraining(**training, batch_size=10, learning_rate=0.1)}
    generous = {"max_local_steps": 10_000}
    check(generous, {**asked, "rounds": 100})
    with pytest.raises(Refusal, match=r"in each of 101 rounds .* at most 1000000 local steps") as caught:
        check(generous, {**asked, "rounds": 101})
    assert caught.value.code is RefusalCode.LOCAL_STEPS
    check({**generous, **WITHOUT_PRIVACY}, {**asked, "rounds": 101, "privacy": None})


def test_left_out_limits_are_finite() -> None:
    cautious = Policy(workloads=("tabular",), strategies=("fedavg",), epsilon=8.0)
    asked = Plan(**{**PLAN, "training": LocalTraining(steps=10_001, batch_size=16, learning_rate=0.1)})
    with pytest.raises(Refusal, match="at most 10000 local steps"):
        check_plan(cautious, asked, 1000, 1)
    with pytest.raises(Refusal, match="at most 1024 MB"):
        check_plan(cautious, Plan(**PLAN), 1000, 257 * 10**6)


@pytest.mark.parametrize(
    "changes", [{"rounds": 10**8}, {"training": {"steps": 10**8}}, {"training": {"epochs": 1e9}}, {"training": {}}]
)
def test_a_plan_has_limits_of_its_own(changes: dict[str, Any]) -> None:
    fields = {**PLAN, **changes}
    if "training" in changes:
        fields["training"] = {"batch_size": 10**9, "learning_rate": 0.1, **(changes["training"] or {"steps": 1})}
    with pytest.raises(ValidationError, match="less than or equal"):
        Plan(**fields)


def test_a_reason_does_not_say_how_many_steps_the_epochs_are_here() -> None:
    """Steps and batch size together tell the number of examples."""
    asked = LocalTraining(epochs=1, batch_size=1, learning_rate=0.1)
    for plan, allowed in (({"training": asked}, 1), ({"training": asked, "rounds": 100}, None)):
        with pytest.raises(Refusal) as caught:
            check({"max_local_steps": allowed}, plan, examples=54_321)
        assert caught.value.code is RefusalCode.LOCAL_STEPS
        assert "54" not in caught.value.reason


def test_the_request_holds_for_evaluation_too() -> None:
    check_request(Policy(**POLICY), Plan(**PLAN))
    with pytest.raises(Refusal) as caught:
        check_request(Policy(**POLICY), Plan(**{**PLAN, "cohort": 2}))
    assert caught.value.code is RefusalCode.COHORT


def test_training_without_privacy_needs_permission() -> None:
    check({**WITHOUT_PRIVACY}, {"privacy": None})
    with pytest.raises(Refusal) as caught:
        check({"epsilon": None}, {"privacy": None})
    assert caught.value.code is RefusalCode.PRIVACY_REQUIRED


def test_metrics_that_may_not_leave_are_left_out() -> None:
    policy = Policy(**POLICY)
    assert "loss" not in policy.metrics
    assert permitted_metrics(policy, METRICS) == ("accuracy", "precision", "recall", "f1", "auroc")
    assert permitted_metrics(Policy(**{**POLICY, "metrics": ["loss"]}), METRICS) == ("loss",)
    assert permitted_metrics(policy, ("auroc", "loss", "accuracy"), examples=10) == ("auroc", "accuracy")
    assert permitted_metrics(policy, ()) == ()


@pytest.mark.parametrize(
    ("metrics", "asked", "examples", "reason"),
    [
        (["accuracy"], ("loss",), 100, "metrics loss were asked for; this site shares accuracy"),
        ([], METRICS, 100, "this site shares none"),
        (["accuracy"], ("accuracy",), 9, "at least 10 test examples"),
    ],
)
def test_metrics_of_which_none_may_leave_are_refused(
    metrics: list[str], asked: tuple[str, ...], examples: int, reason: str
) -> None:
    with pytest.raises(Refusal, match=reason) as caught:
        permitted_metrics(Policy(**{**POLICY, "metrics": metrics}), asked, examples)
    assert caught.value.code is RefusalCode.METRICS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["accuracy", "salary"]}, "unknown salary"),
        ({"allow_training_without_privacy": True}, "needs epsilon: null"),
        ({"epsilon_per_run": 9.0}, "larger than the budget"),
        ({"epsilon": 0}, "epsilon: Input should be greater than 0"),
        ({"epsilon": float("inf")}, "epsilon: Input should be a finite number"),
        ({"delta": 1.0}, "delta"),
        ({"minimum_cohort": 0}, "minimum_cohort"),
        ({"workloads": []}, "workloads"),
        ({"metrics_loss_bound": 1.1e6}, "metrics_loss_bound: Input should be less than or equal to 1000000"),
        ({"epsilom": 1.0}, "epsilom: Extra inputs are not permitted"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_when_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Policy(**{**POLICY, **changes})
    assert message in explain(caught.value)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"epsilon": True}, "epsilon"),
        ({"metrics_epsilon": True}, "metrics_epsilon"),
        ({"maximum_shared_test_rows": True}, "maximum_shared_test_rows"),
        ({"minimum_cohort": True}, "minimum_cohort"),
        ({"statistics": {"epsilon": True}}, "statistics.epsilon"),
        ({"budgets": {"a": {"epsilon": True, "delta": 1e-5}}}, "budgets.a.epsilon"),
    ],
)
def test_yes_is_no_number(changes: dict[str, Any], where: str) -> None:
    """It was 1: a budget of 1, or all of the test rows allowed to be training rows."""
    plain = {**POLICY, **changes}
    with pytest.raises(ValidationError) as caught:
        Policy.model_validate(plain)
    assert explain(caught.value, plain, Policy) == f"{where}: Input should be a number, not yes"
    assert Policy(**POLICY, allow_part_of_a_run=False, statistics={"epsilon": 1, "survival": True}).statistics


def test_the_budget_must_be_stated() -> None:
    with pytest.raises(ValidationError, match="epsilon"):
        Policy(workloads=("tabular",), strategies=("fedavg",))


def test_the_explanation_names_every_limit() -> None:
    text = "\n".join(sentences(Policy(**POLICY)))
    for part in ("tabular", "fedavg, fedprox", "hospitals", "epsilon 8 at delta 1e-05", "at most epsilon 4"):
        assert part in text
    for part in ("at least 3 sites", "at most 20 local steps", "at most 1 megabytes", "accuracy", "privacy is refused"):
        assert part in text
    unlimited = Policy(
        workloads=("vision",),
        strategies=("fedavg",),
        epsilon=None,
        allow_training_without_privacy=True,
        max_local_steps=None,
    )
    bare = "\n".join(sentences(unlimited))
    for part in ("without limit", "any whose descriptor", "any number of local steps", "WITHOUT differential privacy"):
        assert part in bare
