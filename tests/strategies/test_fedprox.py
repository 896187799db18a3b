"""FedProx's client half."""

import math

import pytest
import torch

from fedclaw.learning.strategy import StepContext
from fedclaw.strategies.fedavg import FedAvg
from fedclaw.strategies.fedprox import FedProx


def parameter(values: list[float], gradient: list[float] | None) -> torch.Tensor:
    made = torch.tensor(values, requires_grad=True)
    made.grad = None if gradient is None else torch.tensor(gradient)
    return made


def context(mu: float, start: list[torch.Tensor]) -> StepContext:
    return StepContext({"mu": mu}, start)


def test_the_term_by_hand() -> None:
    # 0.5 + 0.1 * (3 - 1) = 0.7 and 0.5 + 0.1 * (1 - 2) = 0.4
    moved = parameter([3.0, 1.0], [0.5, 0.5])
    FedProx.correct_gradients([moved], context(0.1, [torch.tensor([1.0, 2.0])]))
    torch.testing.assert_close(moved.grad, torch.tensor([0.7, 0.4]))
    assert moved.tolist() == [3.0, 1.0]


def test_it_is_the_gradient_of_the_papers_term() -> None:
    start = torch.randn(4, 3)
    moved = (start + torch.randn(4, 3)).requires_grad_()
    (0.25 / 2 * (moved - start).square().sum()).backward()
    expected = moved.grad.clone()
    moved.grad.zero_()
    FedProx.correct_gradients([moved], context(0.25, [start]))
    torch.testing.assert_close(moved.grad, expected)


def test_local_steps_are_pulled_back_to_the_start() -> None:
    start = torch.tensor([1.0, -2.0])
    moved = parameter([5.0, 2.0], None)
    optimizer = torch.optim.SGD([moved], lr=0.5)
    for step in range(1, 4):
        moved.grad = torch.zeros(2)
        FedProx.correct_gradients([moved], context(0.5, [start]))
        optimizer.step()
        assert (moved.detach() - start).tolist() == pytest.approx([4 * 0.75**step] * 2)


def test_nothing_is_added_at_the_start_or_to_a_frozen_parameter() -> None:
    fresh, frozen = parameter([1.0], [0.25]), parameter([9.0], None)
    FedProx.correct_gradients([fresh, frozen], context(10.0, [torch.tensor([1.0]), torch.tensor([0.0])]))
    assert fresh.grad.tolist() == [0.25]
    assert frozen.grad is None


def test_the_plan_carries_what_the_client_half_needs() -> None:
    assert FedProx(mu=0.125).client_fields() == {"mu": 0.125}
    moved = parameter([3.0], [0.0])
    FedProx.correct_gradients([moved], StepContext(FedProx(mu=0.125).client_fields(), [torch.tensor([1.0])]))
    assert moved.grad.tolist() == [0.25]


def test_a_server_that_sends_nonsense_is_refused() -> None:
    with pytest.raises(KeyError, match="mu"):
        FedProx.check_fields({})
    for mu in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="mu"):
            FedProx.check_fields({"mu": mu})
    FedProx.check_fields({"mu": 0.0})
    moved = parameter([3.0], [0.0])
    with pytest.raises(ValueError, match="shorter"):
        FedProx.correct_gradients([moved], context(1.0, []))
    assert moved.grad.tolist() == [0.0]


def test_fedavg_corrects_nothing() -> None:
    moved = parameter([3.0], [0.5])
    assert FedAvg().client_fields() == {}
    FedAvg.correct_gradients([moved], StepContext({}, [torch.tensor([1.0])]))
    assert moved.grad.tolist() == [0.5]
