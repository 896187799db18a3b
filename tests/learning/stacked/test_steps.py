"""Steps of many clients at once, against torch's own optimiser on one client after another."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedclaw.learning.stacked.batched import BatchedModel
from fedclaw.learning.stacked.packing import pack
from fedclaw.learning.stacked.product import _OUT_OF_CACHE
from fedclaw.learning.stacked.steps import DescendingSteps, RowSteps, plain_steps
from fedclaw.learning.step_loop import make_optimizer, take_steps
from fedclaw.protocol.terms import LocalTraining

INPUTS = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(1))
BATCHES = [
    [np.arange(0, 4), np.arange(4, 8), np.arange(2, 5)],
    [np.arange(8, 12), np.arange(12, 15)],
    [np.arange(15, 20)],
]
"""By client; the last ones drop off."""


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def mean_loss(_inputs: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, targets)


def one_client(width: int, training: LocalTraining, batches: list[np.ndarray]) -> torch.Tensor:
    model = network(width)
    optimizer = make_optimizer(list(model.parameters()), training)
    for rows in batches:
        optimizer.zero_grad()
        mean_loss(INPUTS, model(INPUTS[rows]), TARGETS[rows]).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("width", [16, 260])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.1}, {"momentum": 0.9}, {"optimizer": "adam"}])
def test_many_clients_step_as_each_would_alone(width: int, corrected: bool, changes: dict[str, object]) -> None:
    """Small weights, and those that are moved one client after another because they do not stay in the cache."""
    assert (width * width >= _OUT_OF_CACHE) == (width == 260)
    training = LocalTraining(epochs=1, batch_size=4, **{"learning_rate": 0.1, **changes})
    engine = BatchedModel(network(width), mean_loss)
    start = engine.layout.row({name: value.detach().numpy() for name, value in network(width).named_parameters()})
    stack = start.expand(3, -1).clone()
    gradients = torch.zeros_like(stack)
    engine.bind(stack, gradients)

    def examples(packing):
        return INPUTS[packing.rows], TARGETS[packing.rows]

    steps = plain_steps(engine, training, stack, gradients, examples, corrected=corrected)
    assert isinstance(steps, RowSteps if corrected or ("weight_decay" not in changes and changes) else DescendingSteps)
    seen = []
    correct = (lambda rows, step: seen.append((step, rows[0].shape, rows[0].grad.shape))) if corrected else None
    assert take_steps(pack(BATCHES), steps, correct) == 3
    for row, batches in zip(stack, BATCHES, strict=True):
        torch.testing.assert_close(row, one_client(width, training, batches), rtol=1e-4, atol=1e-5)
    if corrected:
        size = len(start)
        assert seen == [(0, (3, size), (3, size)), (1, (2, size), (2, size)), (2, (1, size), (1, size))]


def test_the_loop_stops_when_it_is_told_to() -> None:
    taken: list[int] = []

    class Counting:
        def gradients(self, batch: int) -> list[torch.Tensor]:
            taken.append(batch)
            return []

        def update(self) -> None:
            taken.append(-taken[-1])

    assert take_steps(range(1, 9), Counting(), stop=lambda count: count == 3) == 3
    assert taken == [1, -1, 2, -2, 3, -3]
