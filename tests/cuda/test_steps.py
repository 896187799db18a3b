"""One step, plain and private, by every engine: the sums of the CPU, and the noise of the cryptographic source."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedclaw.learning.step_loop import ModelSteps, make_optimizer, take_steps
from fedclaw.privacy.gradients.choice import ENGINES
from fedclaw.privacy.noise import CHUNK, GaussianSource
from fedclaw.privacy.speed import StepSpeed
from fedclaw.privacy.steps import PlainGradients, PrivateGradients, poisson_batches
from fedclaw.protocol.terms import LocalTraining
from fedclaw.site.device import SMALL_MODEL, precision
from tests.cuda.conftest import CPU, SAME, SAME_MODEL, nothing_drawn

KEY = bytes(range(32))
CLASSES, EXAMPLES = 3, 24
COMPILED = pytest.param("compiled", marks=pytest.mark.slow)
MODES = [COMPILED if mode == "compiled" else mode for mode in ENGINES]


def loss(_, outputs, targets):
    return functional.cross_entropy(outputs, targets)


def network(kind):
    torch.manual_seed(0)
    if kind == "linear":
        # Large enough that sums are kept as factors where they can be.
        return nn.Sequential(nn.Linear(64, 300), nn.LayerNorm(300), nn.Tanh(), nn.Linear(300, CLASSES))
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten()
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Linear(36, CLASSES))


def examples():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(EXAMPLES, 64, generator=generator)
    return inputs, torch.randint(0, CLASSES, (EXAMPLES,), generator=generator)


def private(model, mode="auto", noise=0.0, source=None, chunk=None):
    return PrivateGradients(
        model,
        loss,
        max_grad_norm=0.5,
        noise_multiplier=noise,
        expected_batch_size=8.0,
        source=source or GaussianSource(),
        speed=StepSpeed(mode=mode, chunk_size=chunk),
    )


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The L2 norm of the difference by that of `theirs`."""
    one, other = (torch.cat([part.detach().cpu().double().flatten() for part in parts]) for parts in (ours, theirs))
    return float((one - other).norm() / other.norm())


def clipped_sum(kind, mode, device, persons=None, chunk=None):
    model = network(kind).to(device)
    with nothing_drawn(device), precision(device, 0, private=True), private(model, mode, chunk=chunk) as steps:
        steps.gradients(*(part.to(device) for part in examples()), persons)
        assert steps.engine == mode
        assert {own.device.type for own in steps.exact} == {device.type}
        return [own.clone() for own in steps.exact]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_every_engine_gives_the_sum_of_the_cpu(device, kind, mode):
    """Against Opacus' hooks on the CPU: another engine, and another device."""
    expected = clipped_sum(kind, "opacus", CPU)
    assert distance(clipped_sum(kind, mode, device), expected) < SAME
    assert all(torch.isfinite(own).all() for own in expected)


@pytest.mark.parametrize("mode", [mode for mode in ENGINES if mode != "compiled"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("chunk", [None, 8])
def test_every_engine_gives_the_sum_of_persons_of_the_cpu(device, kind, mode, chunk):
    """Persons of one row and of several; with small chunks, one of more rows than go together."""
    persons = torch.repeat_interleave(torch.arange(5), torch.tensor([1, 4, 12, 2, 5]))
    expected = clipped_sum(kind, "opacus", CPU, persons)
    assert distance(clipped_sum(kind, mode, device, persons, chunk), expected) < SAME
    assert distance(clipped_sum(kind, mode, device), expected) > 0.1


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_plain_step_gives_the_gradient_of_the_cpu(device, kind):
    found = []
    for where in (CPU, device):
        model = network(kind).to(where)
        with precision(where, 0, private=False), PlainGradients(model, loss) as steps:
            steps.gradients(*(part.to(where) for part in examples()))
        found.append([parameter.grad for parameter in model.parameters()])
    assert distance(found[1], found[0]) < SAME


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_what_the_source_gives(device, dtype):
    """The same key, the same numbers; in float64 to the last digits, in float32 rounded once."""
    count, std = 2 * CHUNK + 5, 0.7
    start = torch.linspace(-1, 1, count, dtype=dtype)
    with nothing_drawn(device):
        there = GaussianSource(insecure_fixed_key_for_tests=KEY).perturb_(start.to(device, copy=True), std)
    drawn = GaussianSource(insecure_fixed_key_for_tests=KEY).standard(count)
    expected = (start.double() + std * drawn).to(dtype)
    torch.testing.assert_close(there.cpu(), expected, rtol=2e-7 if dtype == torch.float32 else 1e-12, atol=1e-12)
    assert float(there.double().cpu().sub(start).std()) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_has_the_noise_of_its_source_on_it(device, mode):
    """With one key, the noised step less the noise that the key gives is the sum without noise."""
    sums = clipped_sum("convolution", "opacus", CPU)
    model = network("convolution").to(device)
    source = GaussianSource(insecure_fixed_key_for_tests=KEY)
    with nothing_drawn(device), precision(device, 0, private=True), private(model, mode, 1.5, source) as steps:
        steps.gradients(*(part.to(device) for part in examples()))
        std = steps.noise_std
    noise = noise_of_the_block(sums, std)
    without = [parameter.grad.cpu().double() - own for parameter, own in zip(model.parameters(), noise, strict=True)]
    assert distance(without, sums) < SAME
    assert distance([parameter.grad for parameter in model.parameters()], sums) > 0.1


def noise_of_the_block(shapes, std):
    """What a source with KEY adds to a block of all parameters, in the order in which it draws."""
    source = GaussianSource(insecure_fixed_key_for_tests=KEY)
    block = torch.zeros(sum(own.numel() for own in shapes), dtype=torch.float64)
    for part in torch.split(block, CHUNK):
        source.perturb_(part, std)
    sizes = [own.numel() for own in shapes]
    return [part.view(own.shape) for part, own in zip(torch.split(block, sizes), shapes, strict=True)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_same_seed_leads_to_the_same_model(device, optimizer):
    """Ten private steps on Poisson samples, some of them empty, with their noise."""
    rate = 0.1 if optimizer == "sgd" else 0.01
    training = LocalTraining(epochs=1, batch_size=8, learning_rate=rate, optimizer=optimizer)
    start, ends = network("linear"), []
    for where in (CPU, device):
        model, source = copy.deepcopy(start).to(where), GaussianSource(insecure_fixed_key_for_tests=KEY)
        inputs, targets = (part.to(where) for part in examples())
        # Written out on the CPU too: as factors, sums get their noise in another order.
        parameters = list(model.parameters())
        with nothing_drawn(where), precision(where, 0, private=True), private(model, "vmap", 0.3, source) as taker:
            update = make_optimizer(parameters, training).step
            steps = ModelSteps(lambda rows: taker.gradients(inputs[rows], targets[rows]), parameters, update)  # noqa: B023
            assert take_steps(poisson_batches(EXAMPLES, 0.05, 10, source), steps) == 10
        ends.append(
            [parameter.detach().cpu() - own for parameter, own in zip(parameters, start.parameters(), strict=True)]
        )
    assert distance(ends[1], ends[0]) < SAME_MODEL


@pytest.mark.parametrize("private_step", [True, False])
def test_mixed_precision_is_for_large_models_without_privacy(device, private_step):
    """On a card that has bfloat16 a large model's plain step is taken in it, and only that one."""
    inputs, weight = torch.randn(4, 8, device=device), torch.randn(8, 8, device=device)
    with precision(device, SMALL_MODEL, private=private_step):
        found = (inputs @ weight).dtype
    mixed = device.type == "cuda" and not private_step and torch.cuda.is_bf16_supported()
    assert found == (torch.bfloat16 if mixed else torch.float32)
    with precision(device, SMALL_MODEL - 1, private=False):
        assert (inputs @ weight).dtype == torch.float32


def test_a_step_in_mixed_precision_goes_the_same_way(device):
    """bfloat16 has 8 bits: the step is the same to a few per cent, and its parameters stay float32."""
    found = []
    for large in (0, SMALL_MODEL):
        model = network("linear").to(device)
        with precision(device, large, private=False), PlainGradients(model, loss) as steps:
            steps.gradients(*(part.to(device) for part in examples()))
        found.append([parameter.grad for parameter in model.parameters()])
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert distance(found[1], found[0]) < 0.05


def test_a_step_in_32_bits_is_one(device):
    """Without mixed precision a product has the 23 bits of float32, not the 10 of TF32: convolutions, too."""
    wide = torch.linspace(1, 2, 4096, dtype=torch.float64).view(1, 64, 8, 8)
    kernel = torch.linspace(1, 2, 64 * 64, dtype=torch.float64).view(64, 64, 1, 1)
    exact = functional.conv2d(wide, kernel)
    for private_step in (True, False):
        with precision(device, 0, private=private_step), torch.no_grad():
            product = wide[0].flatten(1).t().float().to(device) @ kernel[:, :, 0, 0].t().float().to(device)
            maps = functional.conv2d(wide.float().to(device), kernel.float().to(device))
        assert float((product.cpu().t().view_as(exact) / exact - 1).abs().max()) < 1e-5
        assert float((maps.cpu() / exact - 1).abs().max()) < 1e-5
