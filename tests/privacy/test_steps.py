import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn import functional

from fedclaw.errors import PrivacyError
from fedclaw.privacy.gradients.interface import Clip, add_clipped
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import Mode, StepSpeed
from fedclaw.privacy.steps import PlainGradients, PrivateGradients, poisson_batches, shuffled_batches
from tests.chance import counts_fit, scale_is_right, uncorrelated

HUGE = 1e6
CLASSES = 3


def loss(inputs: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, targets)


def linear(features: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, CLASSES))


def batch(model: nn.Module, count: int, features: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (count, 1, 6, 6) if isinstance(next(model.children()), nn.Conv2d) else (count, features)
    return torch.randn(shape), torch.randint(0, CLASSES, (count,))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def private(model: nn.Module, **changes: object) -> PrivateGradients:
    chunk = changes.pop("chunk_size", None)
    values = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "expected_batch_size": 8.0, **changes}
    values["speed"] = StepSpeed(chunk_size=chunk)
    return PrivateGradients(model, loss, source=GaussianSource(), **values)


def clipped_sums(samples: list[torch.Tensor], bound: float) -> list[torch.Tensor]:
    totals = [torch.ones(sample.shape[1:], dtype=torch.float64) for sample in samples]
    add_clipped(totals, samples, Clip(bound), fresh=True)
    return [total.to(torch.float32) for total in totals]


def gradient(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], **changes: object) -> torch.Tensor:
    with private(model, **changes) as steps:
        steps.gradients(*data)
    return flat(model).clone()


def microbatch_oracle(
    model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], bound: float, expected: float
) -> torch.Tensor:
    """One example at a time, by hand."""
    total = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
    for index in range(len(data[0])):
        model.zero_grad()
        loss(data[0], model(data[0][index : index + 1]), data[1][index : index + 1]).backward()
        single = flat(model)
        total += single * min(1.0, bound / float(single.norm()))
    model.zero_grad()
    return total / expected


class UnderTwoNames(nn.Module):
    """One layer that the model has twice, and one weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = self.first
        self.one, self.other = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.other.weight = self.one.weight
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = self.again(torch.tanh(self.first(inputs)))
        outputs: torch.Tensor = self.head(self.other(torch.tanh(self.one(features))))
        return outputs


@pytest.mark.parametrize("mode", ["auto", "vmap"])
def test_a_layer_under_two_names_against_one_example_at_a_time(mode: Mode) -> None:
    model = UnderTwoNames()
    data, before = batch(model, 6), dict(model.named_parameters())
    expected = microbatch_oracle(model, data, 0.5, 8.0)
    values = {"max_grad_norm": 0.5, "noise_multiplier": 0.0, "expected_batch_size": 8.0}
    with PrivateGradients(model, loss, source=GaussianSource(), speed=StepSpeed(mode=mode), **values) as steps:
        steps.gradients(*data)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    torch.testing.assert_close(flat(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [linear, conv])
@pytest.mark.parametrize("count", [1, 8])
def test_without_noise_and_clipping_it_is_the_plain_gradient(make: type[nn.Module], count: int) -> None:
    model = make()
    data = batch(model, count)
    with PlainGradients(model, loss) as steps:
        steps.gradients(*data)
    plain = flat(model).clone()
    torch.testing.assert_close(gradient(model, data, max_grad_norm=HUGE, expected_batch_size=count), plain)
    assert not torch.allclose(gradient(model, data, max_grad_norm=0.01, expected_batch_size=count), plain)
    noisy = gradient(model, data, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=count)
    assert not torch.allclose(noisy, plain)


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 9), features=st.integers(1, 7), bound=st.floats(0.01, 3.0), chunk=st.sampled_from([None, 1, 4])
)
def test_linear_net_against_one_example_at_a_time(count: int, features: int, bound: float, chunk: int | None) -> None:
    model = linear(features)
    data = batch(model, count, features)
    expected = microbatch_oracle(model, data, bound, 8.0)
    torch.testing.assert_close(
        gradient(model, data, max_grad_norm=bound, chunk_size=chunk), expected, rtol=1e-4, atol=1e-6
    )


@settings(max_examples=8, deadline=None)
@given(count=st.integers(1, 6), bound=st.floats(0.01, 3.0), chunk=st.sampled_from([None, 2]))
def test_conv_net_against_one_example_at_a_time(count: int, bound: float, chunk: int | None) -> None:
    model = conv()
    data = batch(model, count)
    expected = microbatch_oracle(model, data, bound, 8.0)
    torch.testing.assert_close(
        gradient(model, data, max_grad_norm=bound, chunk_size=chunk), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("make", [linear, conv])
def test_the_same_update_as_opacus(make: type[nn.Module]) -> None:
    model = make()
    data = batch(model, 7)
    ours = gradient(model, data, max_grad_norm=0.3, expected_batch_size=5.0)
    hooked = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(hooked.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=5
    )
    optimizer.zero_grad()
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()
    loss(data[0], hooked(data[0]), data[1]).backward()
    optimizer.step()
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(before - after, ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("off", "right"), [(1.0, True), (0.9, False), (1.1, False)])
@pytest.mark.parametrize("count", [0, 3])
def test_noise_scale_at_the_output(count: int, off: float, right: bool) -> None:
    model = nn.Sequential(nn.Linear(50, 200), nn.Linear(200, CLASSES))
    data = batch(model, count, 50)
    settings_ = {"max_grad_norm": 2.0, "expected_batch_size": 4.0}
    with private(model, noise_multiplier=1.5 * off, **settings_) as steps:
        assert steps.noise_std == pytest.approx(1.5 * off * 2.0 / 4.0)
    noise = gradient(model, data, noise_multiplier=1.5 * off, **settings_) - gradient(model, data, **settings_)
    assert scale_is_right(noise, 1.5 * 2.0 / 4.0) == right


def test_every_step_and_every_taker_has_noise_of_its_own() -> None:
    model = nn.Linear(100, 30)
    data = torch.zeros(0, 100), torch.zeros(0, dtype=torch.int64)
    draws = []
    for _ in range(2):
        with private(model, noise_multiplier=1.0) as steps:
            for _ in range(2):
                steps.gradients(*data)
                draws.append(flat(model).clone())
    for left, right in itertools.combinations(draws, 2):
        assert uncorrelated(left, right)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 9), scale=st.sampled_from([0.1, 1.0, 1e4]), weird=st.booleans(), chunk=st.integers(1, 9))
def test_one_example_more_moves_the_gradient_by_at_most_the_sensitivity(
    count: int, scale: float, weird: bool, chunk: int
) -> None:
    model = linear()
    inputs, targets = batch(model, count)
    inputs = inputs * scale
    if weird:
        inputs[0, 0] = float("inf")
    kept = torch.arange(1, count)
    with private(model, max_grad_norm=0.7, expected_batch_size=3.0, chunk_size=chunk) as steps:
        steps.gradients(inputs, targets)
        whole = flat(model).clone()
        steps.gradients(inputs[kept], targets[kept])
        assert bool(whole.isfinite().all())
        assert float((whole - flat(model)).norm()) <= steps.sensitivity * (1 + 1e-5)
        assert steps.sensitivity == pytest.approx(0.7 / 3.0)


def test_the_sensitivity_is_reached() -> None:
    model = linear()
    assert float(gradient(model, batch(model, 1), max_grad_norm=1e-3).norm()) == pytest.approx(1e-3 / 8, rel=1e-4)


def test_an_example_without_a_finite_gradient_adds_nothing() -> None:
    good = [torch.tensor([[3.0, 4.0], [0.3, 0.4]])]
    for bad in (float("nan"), float("inf"), 3e38):
        samples = [torch.cat([good[0], torch.tensor([[bad, bad]])])]
        torch.testing.assert_close(clipped_sums(samples, 1.0)[0], torch.tensor([0.9, 1.2]))


def test_clipping_goes_over_all_tensors_together() -> None:
    sums = clipped_sums([torch.tensor([[3.0]]), torch.tensor([[[0.0, 4.0]]])], 1.0)
    torch.testing.assert_close(sums[0], torch.tensor([0.6]))
    torch.testing.assert_close(sums[1], torch.tensor([[0.0, 0.8]]))
    assert clipped_sums([], 1.0) == []


def test_an_empty_batch_is_a_step() -> None:
    model = linear()
    empty = batch(model, 0)
    assert float(gradient(model, empty).abs().sum()) == 0
    assert float(gradient(model, empty, noise_multiplier=1.0).abs().min()) > 0
    with PlainGradients(model, loss) as steps:
        steps.gradients(*empty)
    assert float(flat(model).abs().sum()) == 0


def test_a_parameter_that_is_not_used_gets_noise_and_a_frozen_one_stays() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(5, CLASSES), nn.Linear(2, 2), nn.Linear(5, CLASSES)
            self.frozen.requires_grad_(False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.used(inputs) + self.frozen(inputs)

    model = Half()
    with private(model, noise_multiplier=1.0) as steps:
        steps.gradients(torch.randn(4, 5), torch.zeros(4, dtype=torch.int64))
    assert float(model.unused.weight.grad.abs().min()) > 0
    assert float(model.used.weight.grad.abs().min()) > 0
    assert model.frozen.weight.grad is None


def test_the_model_is_left_as_it_was() -> None:
    model = conv()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    data = batch(model, 3)
    with private(model) as steps:
        steps.gradients(*data)
        with pytest.raises(RuntimeError):
            steps.gradients(data[0][:, :, :2], data[1])
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_hooks
        assert not module._backward_hooks
    for parameter in model.parameters():
        assert not hasattr(parameter, "grad_sample")
        assert not hasattr(parameter, "_forward_counter")
    steps.close()
    with pytest.raises(PrivacyError, match="after close"):
        steps.gradients(*data)
    gradient(model, data)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False), nn.InstanceNorm1d(5, affine=True, track_running_stats=True)],
)
def test_layers_that_mix_examples_are_refused_before_training(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(5, 5), layer, nn.Linear(5, CLASSES))
    inputs = torch.randn(8, 5)
    with pytest.raises(PrivacyError, match="privacy"), private(model) as steps:
        steps.gradients(inputs, torch.zeros(8, dtype=torch.int64))


def test_a_model_that_centres_its_batch_is_refused() -> None:
    class Centred(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs - inputs.mean(0))

    with pytest.raises(PrivacyError, match="depends on other examples"), private(Centred(5, CLASSES)) as steps:
        steps.gradients(torch.randn(8, 5), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda _, outputs, targets: functional.cross_entropy(outputs, targets, reduction="sum"),
        lambda _, outputs, targets: functional.cross_entropy(outputs, targets, torch.tensor([1.0, 20.0, 1.0])),
    ],
)
def test_a_loss_that_couples_examples_is_refused(wrong: object) -> None:
    model = linear()
    steps = PrivateGradients(
        model, wrong, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0, source=GaussianSource()
    )
    with pytest.raises(PrivacyError, match="not the mean"), steps:
        steps.gradients(torch.randn(4, 5), torch.tensor([0, 1, 2, 1]))


def test_the_loss_may_depend_on_the_inputs() -> None:
    model, teacher = linear(), linear().requires_grad_(False)

    def distil(inputs: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs, teacher(inputs).softmax(1))

    data = batch(model, 6)
    with PlainGradients(model, distil) as steps:
        steps.gradients(*data)
    plain = flat(model).clone()
    settings_ = {"max_grad_norm": HUGE, "noise_multiplier": 0.0, "expected_batch_size": 6.0}
    settings_["speed"] = StepSpeed(chunk_size=4)
    with PrivateGradients(model, distil, source=GaussianSource(), **settings_) as steps:
        steps.gradients(*data)
    torch.testing.assert_close(flat(model), plain)


def test_dropout_is_no_coupling() -> None:
    model = nn.Sequential(nn.Linear(5, 20), nn.Dropout(0.5), nn.Linear(20, CLASSES))
    assert bool(gradient(model, batch(model, 8)).isfinite().all())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_grad_norm": 0.0},
        {"max_grad_norm": float("inf")},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"expected_batch_size": 0.0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PrivacyError):
        private(linear(), **wrong)


def test_poisson_batches_take_each_row_independently() -> None:
    count, q, steps = 50, 0.1, 4000
    batches = list(poisson_batches(count, q, steps, GaussianSource()))
    assert len(batches) == steps
    sizes = np.array([len(rows) for rows in batches])
    assert counts_fit(sizes.sum(), count * steps, q)
    # A variance of 4000 such sizes is off by 2.3% (its standard error): 0.15 are 6.5 of them.
    assert sizes.var() == pytest.approx(count * q * (1 - q), rel=0.15)
    often = np.bincount(torch.cat(batches).numpy(), minlength=count)
    assert counts_fit(often, steps, q)
    assert all(len(set(rows.tolist())) == len(rows) for rows in batches)
    assert (sizes == 0).any()


def test_poisson_batches_at_the_ends() -> None:
    assert [rows.tolist() for rows in poisson_batches(3, 1.0, 2, GaussianSource())] == [[0, 1, 2]] * 2
    assert [len(rows) for rows in poisson_batches(3, 0.0, 2, GaussianSource())] == [0, 0]
    assert [len(rows) for rows in poisson_batches(0, 0.5, 2, GaussianSource())] == [0, 0]
    sizes = Counter(len(rows) for rows in poisson_batches(1, 0.5, 2000, GaussianSource()))
    assert counts_fit(sizes[1], 2000, 0.5)


def test_shuffled_batches_go_through_epochs() -> None:
    batches = [rows.tolist() for rows in shuffled_batches(5, 2, 7, GaussianSource())]
    assert [len(rows) for rows in batches] == [2, 2, 1, 2, 2, 1, 2]
    for epoch in (batches[:3], batches[3:6]):
        assert sorted(row for rows in epoch for row in rows) == [0, 1, 2, 3, 4]
    assert [len(rows) for rows in shuffled_batches(0, 2, 3, GaussianSource())] == [0, 0, 0]
