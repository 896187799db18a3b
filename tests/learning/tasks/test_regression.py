"""Regression: losses and metrics worked out by hand, sums that add up over sites, bounds that hold on neighbours."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.errors import DataError, UpdateError
from fedclaw.learning.tasks.base import Sums
from fedclaw.learning.tasks.regression import (
    ABSOLUTE_ERROR,
    BOUNDS,
    SQUARED_ERROR,
    TARGET,
    TARGET_SQUARE,
    Regression,
    unit_deviance,
)
from fedclaw.learning.workload import Workload
from fedclaw.privacy.noise import GaussianSource
from fedclaw.site.evaluation import bounded_sums, bounded_together, noised
from fedclaw.site.policy.policy import Policy

PLAIN = Regression("y", minimum=0.0, maximum=10.0, center=5.0, scale=5.0)
COUNTS = Regression("n", minimum=0.0, maximum=20.0, kind="poisson")
HUBER = Regression("y", minimum=0.0, maximum=10.0, kind="huber", center=5.0, scale=5.0, huber_delta=0.5)
TASKS = pytest.mark.parametrize("task", [PLAIN, HUBER, COUNTS], ids=["squared", "huber", "poisson"])
BOUND = 3.0


def column(*outputs: float) -> np.ndarray:
    return np.array(outputs, np.float64)[:, None]


def numbers(*targets: float) -> np.ndarray:
    return np.array(targets, np.float32)


def loss_of(task: Regression, outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(task.loss(torch.from_numpy(outputs), torch.from_numpy(targets).double()))


def test_metrics_by_hand() -> None:
    """Outputs 0, 1, -1 and 3 are the values 5, 10, 0 and, cut off, 10; errors are 1, -2, 4 and -10."""
    found = PLAIN.evaluate(column(0, 1, -1, 3), numbers(6, 8, 4, 0))
    mean = (6 + 8 + 4 + 0) / 4
    spread = sum((y - mean) ** 2 for y in (6, 8, 4, 0))
    squares = 1 + 4 + 16 + 100
    assert found["rmse"] == pytest.approx(math.sqrt(squares / 4))
    assert found["mae"] == pytest.approx((1 + 2 + 4 + 10) / 4)
    assert found["r2"] == pytest.approx(1 - squares / spread)
    # Of the outputs as they are: targets are 0.2, 0.6, -0.2 and -1 in units of the scale.
    assert found["loss"] == pytest.approx((0.2**2 + 0.4**2 + 0.8**2 + 4**2) / 4)
    assert tuple(found) == PLAIN.metrics == ("loss", "rmse", "mae", "r2")


def test_deviance_by_hand() -> None:
    """Values 1 and e: 2 (3 ln 3 - 3 + 1), and 2 e of a count of none."""
    found = COUNTS.evaluate(column(0, 1), numbers(3, 0))
    first, second = 2 * (3 * math.log(3) - 2), 2 * math.e
    assert found["deviance"] == pytest.approx((first + second) / 2)
    assert found["loss"] == pytest.approx((first + second) / 4)
    assert found["mae"] == pytest.approx((2 + math.e) / 2)


def test_hubers_loss_by_hand() -> None:
    """Errors of 0.2 and 2 in units of the scale: half a square, and a line from 0.5 on."""
    assert loss_of(HUBER, column(0.2, 2), numbers(5, 5)) == pytest.approx((0.02 + 0.5 * (2 - 0.25)) / 2)


def test_poissons_loss_stays_finite_and_pulls_back() -> None:
    """Beyond the range's upper end exp goes on as its tangent; its slope there is the end less the count."""
    outputs = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    loss = COUNTS.loss(outputs, torch.tensor([3.0, 3.0]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert outputs.grad[:, 0].tolist() == pytest.approx([(20 - 3) / 2, -3 / 2])


@TASKS
def test_an_empty_batch_has_no_loss_and_no_metrics(task: Regression) -> None:
    outputs = torch.zeros((0, 1), requires_grad=True)
    loss = task.loss(outputs, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0
    assert task.evaluate(np.zeros((0, 1)), numbers()) == {}


@TASKS
def test_both_halves_of_the_link_agree(task: Regression) -> None:
    outputs = np.linspace(-30, 30, 601)[:, None]
    assert task.values(outputs) == pytest.approx(task.link(torch.from_numpy(outputs))[:, 0].numpy())
    assert task.values(column(math.inf, -math.inf, math.nan)).tolist() == [task.maximum, task.least, task.least]


@TASKS
def test_outputs_of_targets_are_the_links_inverse(task: Regression) -> None:
    targets = torch.tensor([task.least, 4.0, task.maximum])
    assert task.link(task.outputs_of(targets))[:, 0].tolist() == pytest.approx(targets.tolist(), rel=1e-5)
    assert task.agreement(task.outputs_of(targets), task.outputs_of(targets)) == pytest.approx(1.0)


sites = st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 10, width=32)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(sites, min_size=1, max_size=4), st.sampled_from([PLAIN, HUBER, COUNTS]))
def test_the_figures_are_those_of_all_examples_together(
    parts: list[list[tuple[float, float]]], task: Regression
) -> None:
    """Not the mean of the sites' figures: a site of one target has no R2, and its examples count all the same."""
    tally = task.tally(task.metrics, None)
    for part in parts:
        outputs, targets = column(*(o for o, _ in part)), numbers(*(y for _, y in part))
        tally.add(task.sums(task.metrics, None, task.evaluate(outputs, targets), outputs, targets), len(part))
    everything = [pair for part in parts for pair in part]
    together = task.evaluate(column(*(o for o, _ in everything)), numbers(*(y for _, y in everything)))
    if "r2" not in together or abs(together["r2"]) > 1e6:
        # All targets are the same but for rounding.
        together.pop("r2", None)
    found = tally.metrics
    for name, value in together.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_a_site_that_sends_less_leaves_the_others_figures() -> None:
    """R2 is of the sites that let all its sums leave, the mean absolute error of all."""
    tally = PLAIN.tally(("mae", "r2"), None)
    first, second = (column(0, 1), numbers(4, 8)), (column(0), numbers(0))
    tally.add(PLAIN.sums(("mae", "r2"), None, {}, *first), 2)
    tally.add(PLAIN.sums(("mae",), None, {}, *second), 1)
    assert tally.metrics["r2"] == pytest.approx(PLAIN.evaluate(*first)["r2"])
    assert tally.metrics["mae"] == pytest.approx((1 + 2 + 5) / 3)
    assert tally.over_sites["mae"]["sites"] == 2
    assert tally.over_sites["r2"]["sites"] == 1


def test_no_metric_is_asked_for_that_the_task_does_not_have() -> None:
    with pytest.raises(
        DataError, match="a regression task has no metric accuracy, deviance; it has loss, rmse, mae, r2"
    ):
        PLAIN.check_metrics(("mae", "accuracy", "deviance"))
    COUNTS.check_metrics(("deviance",))


# ---- noise


def policy() -> Policy:
    return Policy(
        workloads=("tabular",),
        strategies=("fedavg",),
        epsilon=8.0,
        metrics_epsilon=0.5,
        metrics_budget={"epsilon": 5.0, "delta": 1e-5},
        metrics_loss_bound=BOUND,
    )


def bounded(task: Regression, outputs: np.ndarray, targets: np.ndarray, wanted: tuple[str, ...]):
    class Only:
        loss = staticmethod(task.loss)

    workload = Only()
    workload.task = task
    tensors = torch.from_numpy(outputs), torch.from_numpy(targets)
    return bounded_sums(policy(), cast(Workload, workload), wanted, None, *tensors)


@TASKS
@pytest.mark.parametrize("output", [0.0, 1.0, 1e30, -1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_one_example_moves_the_sums_by_at_most_what_the_noise_is_made_for(
    task: Regression, output: float, end: float
) -> None:
    """Whatever a server's model says of it; targets lie at the ends of the range, where they move the sums most."""
    random = np.random.default_rng(3)
    outputs, targets = random.normal(size=(200, 1)), random.uniform(task.minimum, task.maximum, 200).astype(np.float32)
    one = np.float32(task.minimum + end * task.width)
    wanted = task.metrics
    without = bounded(task, outputs, targets, wanted)
    with_one = bounded(task, np.vstack([outputs, [[output]]]), np.append(targets, one), wanted)
    assert set(without) == {"loss", SQUARED_ERROR, ABSOLUTE_ERROR, TARGET, TARGET_SQUARE} | (
        {"deviance"} if task is COUNTS else set()
    )
    moved = {name: float(with_one[name].values - own.values) for name, own in without.items()}
    for name, own in without.items():
        assert own.least - 1e-9 <= moved[name] <= own.most + 1e-9
        assert abs(moved[name]) <= own.sensitivity + 1e-9
    assert math.hypot(*moved.values()) <= bounded_together(without).sensitivity + 1e-9


def test_the_bounds_are_reached() -> None:
    """So no noise is wasted: at the lower end, with the answer at the upper one, each of four sums moves by one."""
    found = bounded(PLAIN, column(5.0), numbers(0.0), ("rmse", "mae", "r2"))
    assert {name: float(own.values) for name, own in found.items()} == {
        SQUARED_ERROR: 1.0,
        ABSOLUTE_ERROR: 1.0,
        TARGET: -1.0,
        TARGET_SQUARE: 1.0,
    }


def test_a_rounded_end_of_the_range_is_no_more_than_the_end() -> None:
    """0.1 as float32 is larger than 0.1."""
    task = Regression("y", minimum=0.0, maximum=0.1, center=0.05, scale=0.05)
    found = bounded(task, column(-9.0), numbers(0.1), ("mae", "r2"))
    assert float(np.float32(0.1)) > 0.1
    assert all(abs(float(own.values)) <= 1.0 for own in found.values())


# ---- what a dishonest site may say

HONEST = {SQUARED_ERROR: 5.0, ABSOLUTE_ERROR: 8.0, TARGET: 2.0, TARGET_SQUARE: 6.0, "loss": 4.0}


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        ({SQUARED_ERROR: 20.1}, "squared_error of 1.005 an example is not within 0 and 1"),
        ({SQUARED_ERROR: -0.1}, "squared_error"),
        ({ABSOLUTE_ERROR: 21.0}, "absolute_error"),
        ({TARGET: -20.5}, "target of -1.025 an example is not within -1 and 1"),
        ({TARGET_SQUARE: 20.5}, "target_square"),
        ({SQUARED_ERROR: 9.0}, "contradict each other"),
        ({SQUARED_ERROR: 3.0}, "contradict each other"),
        ({TARGET: 12.0}, "contradict each other"),
        ({"loss": -1.0}, "loss"),
        ({"loss": 1e9}, "loss"),
    ],
)
def test_sums_that_no_examples_add_up_to_are_unusable(lie: dict[str, float], says: str) -> None:
    tally = PLAIN.tally(PLAIN.metrics, None)
    tally.add(Sums(HONEST), 20)
    before = tally.metrics
    with pytest.raises(UpdateError, match=says):
        tally.add(Sums({**HONEST, **lie}), 20)
    assert tally.metrics == before


def test_with_noise_sums_may_contradict_each_other_and_keep_their_bounds() -> None:
    tally = PLAIN.tally(PLAIN.metrics, None)
    tally.add(Sums({**HONEST, TARGET: 12.0}, noised=True), 20)
    assert "r2" not in tally.metrics
    with pytest.raises(UpdateError, match="not within"):
        tally.add(Sums({**HONEST, TARGET: 21.0}, noised=True), 20)


@pytest.mark.parametrize("task", [COUNTS, Regression("n", minimum=3.0, maximum=40.0, kind="poisson")])
def test_no_deviance_is_larger_than_the_largest(task: Regression) -> None:
    targets = np.linspace(task.minimum, task.maximum, 41)
    values = np.linspace(task.least, task.maximum, 200)
    largest = max(float(unit_deviance(targets, np.full(41, value)).max()) for value in values)
    assert largest == pytest.approx(task.most_deviance)
    tally = task.tally(("deviance",), None)
    with pytest.raises(UpdateError, match="deviance"):
        tally.add(Sums({"deviance": 10.1 * task.most_deviance}), 10)


@pytest.mark.parametrize("task", [COUNTS, Regression("n", minimum=1.0, maximum=3.0, kind="poisson"), PLAIN])
@pytest.mark.parametrize("noise", [-1e3, 1e3])
def test_whatever_the_noise_does_an_honest_answer_is_one(task: Regression, noise: float) -> None:
    """It was paid for; a bound that is wider than what the server takes would have it thrown away."""

    class Drawn(GaussianSource):
        def perturb_(self, values: torch.Tensor, std: float) -> torch.Tensor:
            return values.add_(noise)

    sums = bounded(task, column(0.0, 1.0), numbers(task.minimum, task.maximum), task.metrics)
    left = noised(policy(), bounded_together(sums), 2, Drawn()).value
    tally = task.tally(task.metrics, None)
    tally.add(left, 2)
    assert set(left.numbers) == set(sums)


def test_every_sum_has_a_bound() -> None:
    assert set(PLAIN.told_with(PLAIN.metrics)) == set(BOUNDS)


# ---- words


def test_a_model_that_is_no_better_than_the_mean_is_called_that() -> None:
    assert "does not beat the mean: its R2 is -0.1000" in (PLAIN.nothing_learned({"metrics": {"r2": -0.1}}) or "")
    assert PLAIN.nothing_learned({"metrics": {"r2": 0.1}}) is None
    assert PLAIN.nothing_learned({"metrics": {"mae": 1.0}}) is None


def test_an_answer_is_a_value() -> None:
    assert PLAIN.columns == ("value",)
    assert PLAIN.cells(np.array([7.25], np.float32), None) == ("7.25",)
    assert dict(PLAIN.facts())["Target"] == "y, a number from 0 to 10"
