"""What one example adds to what is noised does not depend on the others, though parameters leave nothing but rounding.

A dishonest server sends an `mlp` with hidden neurons h and 3 h and an output c (3 h - 3 h), which is rounding times
c: its sign decides what an example's gradient is, and which answer is right.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedclaw.clients.tabular import Mlp
from fedclaw.learning.step_loop import distilled
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import StepSpeed
from fedclaw.privacy.steps import PrivateGradients
from fedclaw.site.device import one_by_one

ROWS = 64


def rounding(width):
    """The model that answers with its rounding, of so many inputs."""
    model = Mlp(width, (2,), 2)
    weights = torch.randint(-8, 9, (width,), generator=torch.Generator().manual_seed(3)).float() / 8
    with torch.no_grad():
        model.hidden[0].weight.copy_(torch.stack([weights, 3 * weights]))
        model.hidden[0].bias.copy_(torch.tensor([16.0, 48.0]))
        model.head.weight.copy_(torch.tensor([[3e9, -1e9], [0.0, 0.0]]))
        model.head.bias.zero_()
    return model


def rows_of(width):
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(1))


def plain(_inputs, outputs, targets):
    return cross_entropy(outputs, targets)


def from_a_teacher(_inputs, outputs, targets):
    soft = torch.tensor([0.3, 0.9, -0.5]).expand(len(outputs), 3)
    return distilled(outputs, soft, lambda logits: cross_entropy(logits, targets), 1.0, 0.3)


def sums(model, rows, speed, loss=plain):
    """The clipped sum of the rows' gradients before noise, with a bound of 1."""
    with PrivateGradients(
        model,
        loss,
        max_grad_norm=1.0,
        noise_multiplier=0.0,
        expected_batch_size=1.0,
        source=GaussianSource(),
        speed=speed,
    ) as steps:
        steps.gradients(rows, torch.zeros(len(rows), dtype=torch.int64))
        return torch.cat([part.flatten().clone() for part in steps.exact])


@pytest.mark.parametrize("mode", ["vmap", "bookkeeping", "opacus"])
@pytest.mark.parametrize("width", [13, 30])
@pytest.mark.parametrize("chunk", [None, 1, 3, 10])
def test_one_example_less_moves_the_sum_by_its_own_gradient(mode, width, chunk):
    model, rows, speed = rounding(width), rows_of(width), StepSpeed(mode=mode, chunk_size=chunk)
    whole = sums(model, rows, speed)
    for gone in (0, 1, 2, 5, 30, ROWS - 1):
        rest = torch.cat([rows[:gone], rows[gone + 1 :]])
        assert (whole - sums(model, rest, speed)).norm() <= 1


@pytest.mark.parametrize("mode", ["vmap", "bookkeeping", "opacus"])
@pytest.mark.parametrize("loss", [plain, from_a_teacher])
def test_how_many_there_are_turns_no_gradient(mode, loss):
    """What goes back to a layer is c times the sum of what the answers' gradients are, which is 0 but for rounding."""
    torch.manual_seed(0)
    model, rows = Mlp(13, (2,), 3), rows_of(13)
    with torch.no_grad():
        model.hidden[0].weight.mul_(1e-11)
        model.hidden[0].bias.fill_(1e-10)
        model.head.weight.fill_(1e10)
        model.head.bias.copy_(torch.randn(3))
    speed = StepSpeed(mode=mode)
    for count in (61, 49, 41, 25):
        moved = sums(model, rows[:count], speed, loss) - sums(model, rows[: count - 1], speed, loss)
        assert moved.norm() <= 1


@pytest.mark.parametrize("layers", [(30, 64, 2), (13, 16, 2), (30, 1, 2)])
def test_few_examples_are_worked_out_as_many_are(layers):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(layers)))
    rows, seen = rows_of(layers[0]), []
    with torch.no_grad():
        whole = model[0](rows)
    model[0].register_forward_hook(lambda _layer, _inputs, outputs: seen.append(outputs.detach()))
    for count in range(1, 8):
        sums(model, rows[:count], StepSpeed(mode="bookkeeping"))
        assert torch.equal(seen[-1][:count], whole[:count])


@pytest.mark.parametrize("chunk", [None, 8])
def test_several_threads_work_it_out_alike(chunk):
    torch.manual_seed(0)
    usual, speed = torch.get_num_threads(), StepSpeed(mode="bookkeeping", chunk_size=chunk)
    model, rows, seen = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)), rows_of(784), []
    torch.set_num_threads(4)
    try:
        model[2].register_forward_hook(lambda _layer, _inputs, outputs: seen.append(outputs.detach()))
        sums(model, rows, speed)
        expected = seen[-1] if chunk is None else torch.cat(seen[-ROWS // chunk :])
        for count in (1, 3, 4, 8):
            sums(model, rows[:count], speed)
            assert torch.equal(seen[-1][:count], expected[:count])
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("width", [13, 30])
def test_a_row_by_itself_is_the_same_wherever_it_stands(width):
    model, rows = rounding(width).eval(), rows_of(width)
    whole = one_by_one(model, rows)
    for gone in (0, 1, 2, 5):
        assert torch.equal(one_by_one(model, torch.cat([rows[:gone], rows[gone + 1 :]]))[gone:], whole[gone + 1 :])
