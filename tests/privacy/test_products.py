"""Large sums that are multiplied out, noised and rounded some rows at a time: same sum, same noise, same bound.

The sum before noise is nowhere as a whole, so each test looks at what a step leaves: with hardly any noise, which is
the sum; with noise from one fixed key twice, whose difference is that of the sums; with no gradient, which is noise.
"""

import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from fedclaw.errors import PrivacyError
from fedclaw.privacy.gradients import bookkeeping
from fedclaw.privacy.gradients.bookkeeping import _WORTH_LEAVING
from fedclaw.privacy.noise import CHUNK, GaussianSource
from fedclaw.privacy.speed import StepSpeed
from fedclaw.privacy.steps import PrivateGradients

BOUND, EXPECTED = 0.5, 5.0
KEY = bytes(range(32))


def mean_loss(_inputs: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, targets)


def network(scale: float = 1.0) -> nn.Module:
    """Two weights that are left as factors, of more rows than one chunk takes and of fewer, between others."""
    torch.manual_seed(0)
    layers = (nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 900), nn.Tanh(), nn.Linear(900, 130, bias=False), nn.Tanh())
    model = nn.Sequential(*layers, nn.LayerNorm(130), nn.Linear(130, 3))
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.dim() == 2]
    assert sum(size >= _WORTH_LEAVING for size in sizes) == 2
    assert max(sizes) > CHUNK > sizes[1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def rows(count: int, loud: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(count, 30, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    inputs[0] *= loud
    return inputs, targets


def step(
    model: nn.Module,
    noise: float,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    units: torch.Tensor | None = None,
    **speed: object,
) -> torch.Tensor:
    """What is left in the parameters' `.grad`, float64."""
    with PrivateGradients(
        model,
        mean_loss,
        max_grad_norm=BOUND,
        noise_multiplier=noise,
        expected_batch_size=EXPECTED,
        source=GaussianSource(insecure_fixed_key_for_tests=KEY),
        speed=StepSpeed(mode="bookkeeping", **speed),
    ) as steps:
        steps.gradients(inputs, targets, units)
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


def one_at_a_time(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The definition, with a margin of a millionth."""
    total = torch.zeros(sum(parameter.numel() for parameter in model.parameters()), dtype=torch.float64)
    for example, target in zip(inputs, targets, strict=True):
        loss = mean_loss(example[None], model(example[None]), target[None])
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))]).double()
        if bool(gradient.isfinite().all()):
            total += gradient * min(1.0, BOUND / (1 + 1e-6) / float(gradient.norm()))
    return total / EXPECTED


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("loud", [1.0, math.inf])
@pytest.mark.parametrize("chunk", [None, 4])
def test_with_hardly_any_noise_it_is_the_clipped_sum(count: int, loud: float, chunk: int | None) -> None:
    """In one chunk and in several, of which the sum is written out."""
    inputs, targets = rows(count, loud)
    found = step(network(), 1e-9, inputs, targets, chunk_size=chunk)
    torch.testing.assert_close(found, one_at_a_time(network(), inputs, targets), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("loud", [1.0, math.inf])
@pytest.mark.parametrize("cancels", [16, 0])
def test_it_is_the_clipped_sum_of_units(loud: float, cancels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise of its own a step writes the sum out; and a unit that has its own written out is in it too."""
    monkeypatch.setattr(bookkeeping, "_CANCELS", cancels)
    units = torch.tensor([0, 0, 0, 1, 1, 2])
    noised, written = (step(network(), noise, *rows(6, loud), units) for noise in (1e-9, 0.0))
    torch.testing.assert_close(noised, written, rtol=1e-4, atol=1e-8)
    assert float(written.norm()) > BOUND / EXPECTED


def test_each_number_of_each_parameter_gets_noise_of_its_own() -> None:
    """An example without a finite gradient adds nothing, so that all that is left is noise."""
    model = network()
    found = step(model, 2.0, *rows(1, math.inf)) / (2.0 * BOUND / EXPECTED)
    parts = torch.split(found, [parameter.numel() for parameter in model.parameters()])
    for part in parts:
        assert part.count_nonzero() == part.numel()
        if part.numel() >= 20:
            assert stats.kstest(part.numpy(), "norm").pvalue > 1e-6
    assert len(found.unique()) > 0.99 * len(found), "no noise is used twice"
    again = step(model, 0.0, *rows(1, math.inf))
    assert not again.any()


@pytest.mark.parametrize("loud", [0.0, 1e-30, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-20])
def test_one_example_moves_what_is_noised_by_at_most_the_bound(loud: float, scale: float) -> None:
    inputs, targets = rows(7, loud)
    there, gone = (step(network(scale), 1.0, inputs[first:], targets[first:]) for first in (0, 1))
    # Both are rounded once, to float32.
    slack = 2.0**-23 * float(torch.maximum(there.norm(), gone.norm()))
    assert float((there - gone).norm()) <= BOUND / EXPECTED + slack
    if loud == scale == 1.0:
        assert float((there - gone).norm()) > 0.99 * BOUND / EXPECTED


def test_the_sum_without_its_noise_is_not_there_to_be_read() -> None:
    model = network()
    with PrivateGradients(
        model,
        mean_loss,
        max_grad_norm=BOUND,
        noise_multiplier=1.0,
        expected_batch_size=EXPECTED,
        source=GaussianSource(),
    ) as steps:
        steps.gradients(*rows(4))
        with pytest.raises(PrivacyError, match="without it"):
            _ = steps.exact
