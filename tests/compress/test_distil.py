"""The distillation loss against numbers worked out by hand, and its gradient against the closed form."""

import math

import pytest
import torch

from fedclaw.errors import CompressionError
from fedclaw.learning.step_loop import distillation_loss, distilled


def test_value_by_hand():
    # T = 2: the student is softmax(0, 0) = (1/2, 1/2); the teacher softmax(2 ln 3 / 2, 0) = (3/4, 1/4).
    student = torch.zeros(1, 2)
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    expected = 0.7 * 4 * divergence + 0.3 * 5.0
    assert distillation_loss(student, teacher, torch.tensor(5.0), 2.0, 0.7).item() == pytest.approx(expected, rel=1e-6)


def test_direction_of_the_divergence():
    student = torch.tensor([[math.log(9), 0.0]])  # (0.9, 0.1)
    teacher = torch.zeros(1, 2)  # (0.5, 0.5)
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    backward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    value = distillation_loss(student, teacher, None, 1.0, 1.0).item()
    assert value == pytest.approx(forward, rel=1e-6)
    assert value != pytest.approx(backward, rel=1e-2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_the_closed_form(temperature):
    # d/dz of T^2 KL, mean over N, is T / N * (softmax(z / T) - softmax(t / T)).
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    distillation_loss(student, teacher, None, temperature, 1.0).backward()
    expected = temperature / 5 * (torch.softmax(student / temperature, 1) - torch.softmax(teacher / temperature, 1))
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


def test_equal_logits_cost_nothing():
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(logits, logits + 10.0, None, 3.0, 1.0).item() == pytest.approx(0.0, abs=1e-5)


def test_weight_zero_is_the_loss_on_targets():
    targets_loss = torch.tensor(1.25)
    assert distillation_loss(torch.zeros(2, 3), torch.randn(2, 3), targets_loss, 2.0, 0.0).item() == 1.25


def test_empty_batch_is_zero_with_a_zero_gradient():
    weight = torch.ones(3, 2, requires_grad=True)
    student = torch.zeros(0, 3) @ weight
    loss = distillation_loss(student, torch.zeros(0, 2), torch.zeros(()), 2.0, 0.7)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros(3, 2))


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = distillation_loss(student, torch.tensor([[-1e4, 1e4]]), None, 1.0, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_wrong_use_is_refused():
    with pytest.raises(CompressionError, match=r"\(2, 3\).*\(2, 4\)"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4), None, 1.0, 1.0)
    with pytest.raises(CompressionError, match="needs the loss on targets"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), None, 1.0, 0.5)


@pytest.mark.parametrize(("temperature", "weight"), [(2.0, 0.7), (1.0, 0.0), (3.0, 1.0)])
def test_the_form_for_clipping_is_the_same_loss(temperature, weight):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn((5, 3), generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()

    def own(logits):
        return torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1]))

    expected = distillation_loss(student, teacher, own(student), temperature, weight)
    got = distilled(student, teacher, own, temperature, weight)
    torch.testing.assert_close(got, expected)
    gradients = (torch.autograd.grad(loss, student)[0] for loss in (got, expected))
    torch.testing.assert_close(*gradients)


def test_the_form_for_clipping_takes_an_empty_batch():
    student = torch.zeros((0, 3), requires_grad=True)
    distilled(student, torch.zeros((0, 3)), lambda logits: logits.sum(), 2.0, 0.7).backward()
    assert student.grad is not None
