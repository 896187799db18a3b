"""A server that goes on from a checkpoint takes the very steps that it would have taken."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.learning.registry import strategy_class
from fedclaw.strategies.adaptive import Yogi

NAMES = ("fedadagrad", "fedadam", "fedavg", "fedavgm", "fedprox", "fedyogi")


def fresh() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]


def advance(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], rounds: range) -> None:
    for number in rounds:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def through_storage(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it comes back from plain files: tensors as arrays, settings as JSON."""
    groups = json.loads(json.dumps(state["param_groups"]))
    stored = {
        index: {
            key: torch.from_numpy(np.array(value)) if isinstance(value, torch.Tensor) else value
            for key, value in slots.items()
        }
        for index, slots in state["state"].items()
    }
    return {"state": stored, "param_groups": groups}


@pytest.mark.parametrize("interrupted_after", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip_goes_on_bit_for_bit(name: str, interrupted_after: int) -> None:
    strategy = strategy_class(name)()
    straight = fresh()
    advance(strategy.server_optimizer(straight), straight, range(6))

    stopped = fresh()
    first = strategy.server_optimizer(stopped)
    advance(first, stopped, range(interrupted_after))
    saved = through_storage(copy.deepcopy(first.state_dict()))
    resumed = [parameter.clone() for parameter in stopped]
    second = strategy.server_optimizer(resumed)
    second.load_state_dict(saved)
    advance(second, resumed, range(interrupted_after, 6))
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedavgm", "fedyogi"])
def test_the_state_matters(name: str) -> None:
    strategy = strategy_class(name)()
    straight = fresh()
    advance(strategy.server_optimizer(straight), straight, range(6))
    forgetful = fresh()
    advance(strategy.server_optimizer(forgetful), forgetful, range(3))
    advance(strategy.server_optimizer(forgetful), forgetful, range(3, 6))
    assert not torch.equal(straight[0], forgetful[0])


@settings(deadline=None, max_examples=50)
@given(
    gradients=st.lists(st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=1, max_size=6),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    eps=st.floats(1e-3, 1),
)
def test_yogi_against_a_slow_loop(gradients: list[list[float]], beta1: float, beta2: float, eps: float) -> None:
    """v can come near 0 from above but never below: (1 - beta2) g^2 is taken from it only while g^2 < v."""
    moved = torch.zeros(3, dtype=torch.float64)
    optimizer = Yogi([moved], lr=0.1, betas=(beta1, beta2), eps=eps, initial_accumulator_value=eps**2)
    place, mean, square = [0.0] * 3, [0.0] * 3, [eps**2] * 3
    for row in gradients:
        moved.grad = torch.tensor(row, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(row):
            mean[i] = beta1 * mean[i] + (1 - beta1) * g
            if square[i] > g * g:
                square[i] -= (1 - beta2) * g * g
            elif square[i] < g * g:
                square[i] += (1 - beta2) * g * g
            place[i] -= 0.1 * mean[i] / (square[i] ** 0.5 + eps)
    assert moved.tolist() == pytest.approx(place, rel=1e-9, abs=1e-12)


def test_yogi_runs_a_closure_and_leaves_parameters_without_a_gradient() -> None:
    moved, idle = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Yogi([moved, idle], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = moved.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert (moved < 1).all()
    assert idle.tolist() == [1, 1]
