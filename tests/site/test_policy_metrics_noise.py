"""Noise on metrics: its scale, what one test example can move, and that nothing else leaves."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch

from fedclaw.learning.tasks.base import BoundedSum
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.workload import Workload
from fedclaw.privacy.accounting import epsilon_of
from fedclaw.privacy.noise import GaussianSource
from fedclaw.site.evaluation import bounded_sums, bounded_together, metrics_mechanism, noised
from fedclaw.site.policy.policy import Policy
from tests.chance import FAR, scale_is_right, uncorrelated

EXAMPLES, CLASSES = 1000, 3
TRIALS = 5600
BOUND = 2.0


def policy(**changes: Any) -> Policy:
    fields: dict[str, Any] = {
        "workloads": ("tabular",),
        "strategies": ("fedavg",),
        "epsilon": 8.0,
        "metrics": ("accuracy", "loss"),
        "metrics_epsilon": 0.5,
        "metrics_budget": {"epsilon": 5.0, "delta": 1e-5},
        "metrics_loss_bound": BOUND,
    }
    return Policy(**{**fields, **changes})


class ThreeClasses:
    task = Classification(("a", "b", "c"))
    loss = staticmethod(task.loss)


def bounded(
    rules: Policy, wanted: tuple[str, ...], logits: torch.Tensor, targets: torch.Tensor
) -> dict[str, BoundedSum]:
    return bounded_sums(rules, cast(Workload, ThreeClasses()), wanted, None, logits, targets)


@pytest.fixture(scope="module")
def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((EXAMPLES, CLASSES), generator=generator)
    return logits, torch.randint(0, CLASSES, (EXAMPLES,), generator=generator)


def test_the_mechanism_costs_what_the_policy_says_and_hardly_less() -> None:
    mechanism = metrics_mechanism(policy()).event
    assert 0.98 * 0.5 < epsilon_of([mechanism], 1e-5) <= 0.5


@pytest.mark.parametrize("wanted", [("accuracy",), ("loss",), ("accuracy", "loss")])
def test_the_noise_has_the_scale_that_the_sensitivity_asks_for(
    outputs: tuple[torch.Tensor, torch.Tensor], wanted: tuple[str, ...]
) -> None:
    """Deviation z sqrt(k) x what one example adds; 10% off is 10 standard errors off at 5600 trials."""
    logits, targets = outputs
    source, rules = GaussianSource(), policy()
    exact = bounded(rules, wanted, logits, targets)
    drawn = [noised(rules, bounded_together(exact), EXAMPLES, source).value.numbers for _ in range(TRIALS)]
    for name in wanted:
        one = BOUND if name == "loss" else 1.0
        expected = metrics_mechanism(rules).noise_multiplier * math.sqrt(len(wanted)) * one
        values = torch.tensor([sums[name] for sums in drawn], dtype=torch.float64)
        noise = values - exact[name].values * one
        assert abs(noise.mean().item()) < FAR * expected / math.sqrt(TRIALS)
        assert scale_is_right(noise, expected)


def test_two_metrics_have_noise_of_their_own(outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    exact = bounded(policy(), ("accuracy", "loss"), *outputs)
    source = GaussianSource()
    drawn = [noised(policy(), bounded_together(exact), EXAMPLES, source).value.numbers for _ in range(500)]
    assert uncorrelated(*([sums[name] for sums in drawn] for name in ("accuracy", "loss")))


@pytest.mark.parametrize("logit", [[0.0, 0.0, 0.0], [1e30, 0.0, -1e30], [math.inf, 0.0, 0.0], [math.nan] * 3])
def test_one_example_moves_each_sum_by_at_most_what_the_noise_is_made_for(
    outputs: tuple[torch.Tensor, torch.Tensor], logit: list[float]
) -> None:
    """Whatever a model says of it: sure and wrong, infinite, or nothing at all."""
    logits, targets = outputs
    more = torch.cat([logits, torch.tensor([logit])]), torch.cat([targets, torch.tensor([2])])
    without = bounded(policy(), ("accuracy", "loss"), logits, targets)
    with_one = bounded(policy(), ("accuracy", "loss"), *more)
    for name in ("accuracy", "loss"):
        assert -1e-9 <= with_one[name].values - without[name].values <= 1 + 1e-9


def test_sums_stay_within_what_they_can_be() -> None:
    """Ten examples drown in the noise; a mean outside [0, 1] would tell nobody anything."""
    source = GaussianSource()
    sums = {"accuracy": BoundedSum(np.array(6.0)), "loss": BoundedSum(np.array(4.0), unit=BOUND)}
    drawn = [noised(policy(metrics_epsilon=0.01), bounded_together(sums), 10, source).value.numbers for _ in range(200)]
    assert {0.0, 10.0} == {sums["accuracy"] for sums in drawn} & {0.0, 10.0}
    assert all(0 <= sums["accuracy"] <= 10 and 0 <= sums["loss"] <= 10 * BOUND for sums in drawn)
