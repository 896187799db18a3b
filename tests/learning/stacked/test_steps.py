"""Steps of many clients at once, against torch's own optimiser on one client after another."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedclaw.learning.stacked.engines import BatchedModel
from fedclaw.learning.stacked.layout import pack
from fedclaw.learning.stacked.stack import _OUT_OF_CACHE
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


def examples(packing):
    return INPUTS[packing.rows], TARGETS[packing.rows]


def bound(width: int, loss=mean_loss) -> tuple[BatchedModel, torch.Tensor, torch.Tensor, torch.Tensor]:
    """An engine, and what all clients begin with; rows of three clients and of their gradients, full of rubbish."""
    engine = BatchedModel(network(width), loss)
    start = engine.layout.row({name: value.detach().numpy() for name, value in network(width).named_parameters()})
    stack, gradients = torch.full((2, 3, len(start)), 77.0)
    engine.bind(stack, gradients)
    return engine, start, stack, gradients


@pytest.mark.parametrize("width", [16, 260])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.1}, {"momentum": 0.9}, {"optimizer": "adam"}])
def test_many_clients_step_as_each_would_alone(
    width: int, alike: bool, corrected: bool, changes: dict[str, object]
) -> None:
    """Small weights, and large ones: moved one client after another, or as factors where all begin alike."""
    assert (width * width >= _OUT_OF_CACHE) == (width == 260)
    training = LocalTraining(epochs=1, batch_size=4, **{"learning_rate": 0.1, **changes})
    engine, start, stack, gradients = bound(width)
    if not alike:
        stack.copy_(start.expand_as(stack))
    seen, packings = [], pack(BATCHES)
    steps = plain_steps(
        engine, training, start if alike else None, stack, gradients, packings, examples, corrected=corrected
    )
    descends = not corrected and ("weight_decay" in changes or not changes)
    assert isinstance(steps, DescendingSteps if descends else RowSteps)
    assert [layer.factors is not None for layer in engine.layers] == (
        [True, True, False] if descends and alike and width == 260 and not changes else [False] * 3
    )
    correct = (lambda rows, step: seen.append((step, rows[0].shape, rows[0].grad.shape))) if corrected else None
    assert take_steps(packings, steps, correct) == 3
    for row, batches in zip(steps.rows(), BATCHES, strict=True):
        torch.testing.assert_close(row, one_client(width, training, batches), rtol=1e-4, atol=1e-5)
    if corrected:
        size = len(start)
        assert seen == [(0, (3, size), (3, size)), (1, (2, size), (2, size)), (2, (1, size), (1, size))]


@pytest.mark.parametrize("width", [16, 260])
@pytest.mark.parametrize("spare", [0, 40])
def test_a_weighted_change_is_that_of_the_clients_rows(width: int, spare: int) -> None:
    """Twice, the second time with fewer clients and rows: what the first ones saw is forgotten."""
    training = LocalTraining(epochs=1, batch_size=4, learning_rate=0.1)
    engine, start, stack, gradients = bound(width)
    for batches in (BATCHES, [BATCHES[2], [np.arange(3, 5)]]):
        packings, weights = pack(batches, spare), torch.arange(2.0, 2 + len(batches))
        steps = plain_steps(
            engine, training, start, stack[: len(batches)], gradients, packings, examples, corrected=False
        )
        take_steps(packings, steps)
        change = steps.change(weights, start)
        alone = torch.stack([one_client(width, training, own) for own in batches])
        torch.testing.assert_close(change, weights @ (alone - start), rtol=1e-4, atol=1e-5)


def test_gradients_are_of_the_rows_whatever_was_begun() -> None:
    """Factors are for plain steps alone; steps that were broken off leave nothing behind."""
    training = LocalTraining(epochs=1, batch_size=4, learning_rate=0.1)
    engine, start, stack, gradients = bound(260)
    packings = pack(BATCHES)
    steps = plain_steps(engine, training, start, stack, gradients, packings, examples, corrected=False)
    steps.gradients(packings[0])
    stack.copy_(start.expand_as(stack))
    engine.gradients(packings[0], *examples(packings[0]))
    moved = start - 0.1 * gradients[2]
    torch.testing.assert_close(moved, one_client(260, training, BATCHES[2]), rtol=1e-4, atol=1e-5)


def test_rows_with_many_places_each_are_not_kept_as_factors() -> None:
    """How many rows an example has shows in the first step only."""

    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(150, 200)
            self.head = nn.Linear(200, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.body(inputs.view(-1, 2, 150))).mean(1))

    torch.manual_seed(0)
    engine, model = BatchedModel(Sequences(), mean_loss), Sequences()
    model.load_state_dict(engine.model.state_dict())
    start = engine.layout.row({name: value.detach().numpy() for name, value in model.named_parameters()})
    stack, gradients = torch.full((2, 1, len(start)), 77.0)
    engine.bind(stack, gradients)
    training = LocalTraining(epochs=1, batch_size=4, learning_rate=0.1)
    packings = pack(BATCHES[:1])
    steps = plain_steps(engine, training, start, stack, gradients, packings, examples, corrected=False)
    assert engine.layers[0].factors is not None
    take_steps(packings, steps)
    assert engine.layers[0].factors is None
    optimizer = make_optimizer(list(model.parameters()), training)
    for rows in BATCHES[0]:
        optimizer.zero_grad()
        mean_loss(INPUTS, model(INPUTS[rows]), TARGETS[rows]).backward()
        optimizer.step()
    alone = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(steps.change(torch.ones(1), start), alone - start, rtol=1e-4, atol=1e-5)


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
