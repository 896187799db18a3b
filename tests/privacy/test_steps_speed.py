"""However fast a private step is made, it stays the same step."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedclaw.errors import PrivacyError, UsageError
from fedclaw.privacy.gradients import choice
from fedclaw.privacy.gradients.choice import ENGINES, made
from fedclaw.privacy.gradients.interface import Clip, trainable
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import Mode, StepSpeed
from fedclaw.privacy.steps import PrivateGradients
from fedclaw.protocol.frozen import check_settings
from tests.chance import scale_is_right

EAGER: tuple[Mode, ...] = ("opacus", "vmap", "bookkeeping")
SPEEDS = [StepSpeed(mode=mode, chunk_size=chunk) for mode in (*EAGER, "auto") for chunk in (None, 1, 3)]
NOT_FOR_OPACUS = ("tied", "in place")
CLASSES = 3
BOUND = 0.7
EXPECTED = 3.0


def loss(_: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, targets)


class Sequence(nn.Module):
    """Linear layers over several places, a layer norm, and a mean over the places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.first(inputs)))).mean(1)


class Tied(nn.Module):
    """Uses one matrix both as a layer and by itself, which only the whole gradient shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(inputs)) + inputs @ self.layer.weight)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(torch.tanh(self.layer(inputs))))


class Residual(nn.Module):
    """The two summands of a residual connection get one and the same gradient tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.left(inputs) + self.right(inputs))


def make(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model and the shape of one input."""
    convolutions = {
        "conv": (nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, (2, 3), stride=(2, 1), dilation=(1, 2))),
        "many": (nn.Conv2d(2, 20, 3, padding=1, bias=False), nn.Conv2d(20, 3, 3)),
    }
    if kind in convolutions:
        first, second = convolutions[kind]
        layers = (first, nn.GroupNorm(2, first.out_channels), nn.ReLU(), second, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(12, CLASSES)), (2, 8, 8)
    if kind == "signal":
        return nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (2, 8)
    if kind == "linear":
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES, bias=False)), (5,)
    if kind == "in place":
        return nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, CLASSES)), (5,)
    models = {"sequence": Sequence, "tied": Tied, "twice": Twice, "residual": Residual}
    return models[kind](), (4, 5) if kind == "sequence" else (5,)


KINDS = ["conv", "many", "signal", "linear", "sequence", "residual", "tied", "twice", "in place"]


def taker(model: nn.Module, speed: StepSpeed, **changes: float) -> PrivateGradients:
    values = {"max_grad_norm": BOUND, "noise_multiplier": 0.0, "expected_batch_size": EXPECTED, **changes}
    return PrivateGradients(model, loss, source=GaussianSource(), speed=speed, **values)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def gradient(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, speed: StepSpeed) -> torch.Tensor:
    with taker(model, speed) as steps:
        steps.gradients(inputs, targets)
        return flat(model).clone()


def one_by_one(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The oracle: each example's gradient by a backward pass of its own."""
    total = torch.zeros(sum(parameter.numel() for parameter in model.parameters()), dtype=torch.float64)
    for index in range(len(inputs)):
        model.zero_grad()
        loss(inputs, model(inputs[index : index + 1]), targets[index : index + 1]).backward()
        single = flat(model).double()
        total += single * min(1.0, BOUND / float(single.norm())) / EXPECTED
    model.zero_grad()
    return total


def batch(shape: tuple[int, ...], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, *shape), torch.randint(0, CLASSES, (count,))


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """To 2e-6 of the whole update: 1e-6 is the margin that a norm is enlarged by."""
    assert float((ours - expected).norm()) <= 2e-6 * float(expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_every_way_leaves_the_same_update(kind: str, count: int) -> None:
    model, shape = make(kind)
    inputs, targets = batch(shape, count)
    expected = one_by_one(model, inputs, targets)
    for speed in SPEEDS:
        if speed.mode != "opacus" or kind not in NOT_FOR_OPACUS:
            assert_same(gradient(model, inputs, targets, speed), expected)


@pytest.mark.parametrize("mode", EAGER)
@pytest.mark.parametrize("kind", ["linear", "conv", "sequence"])
def test_batches_of_changing_sizes_one_after_another(mode: Mode, kind: str) -> None:
    model, shape = make(kind)
    twin = copy.deepcopy(model)
    with taker(model, StepSpeed(mode=mode)) as steps:
        assert steps.engine is None
        for count in (3, 0, 7, 1, 5):
            inputs, targets = batch(shape, count)
            steps.gradients(inputs, targets)
            assert steps.engine == mode
            assert_same(flat(model), one_by_one(twin, inputs, targets))


@pytest.mark.parametrize("speed", SPEEDS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_example_without_a_finite_gradient_adds_nothing(speed: StepSpeed, bad: float) -> None:
    for kind in ("linear", "conv"):
        model, shape = make(kind)
        inputs, targets = batch(shape, 4)
        inputs[1] = bad
        kept = torch.tensor([0, 2, 3])
        assert_same(gradient(model, inputs, targets, speed), one_by_one(model, inputs[kept], targets[kept]))
        inputs[:] = bad
        assert not bool(gradient(model, inputs, targets, speed).any())


@pytest.mark.parametrize("speed", SPEEDS, ids=str)
def test_an_example_counts_though_its_activations_are_too_large_to_square(speed: StepSpeed) -> None:
    model = nn.Linear(5, CLASSES)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([40.0, -40.0, -40.0]))
    inputs, targets = batch((5,), 3)
    inputs[1] = 1e25
    targets[:] = 0
    # What is left of this example's loss is about exp(-80), so its gradient is finite: about 1e25 exp(-80) = 1e-10.
    assert_same(gradient(model, inputs, targets, speed), one_by_one(model, inputs, targets))


@pytest.mark.parametrize("speed", SPEEDS, ids=str)
@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(1, 7),
    kind=st.sampled_from(["linear", "conv", "sequence", "tied"]),
    scale=st.sampled_from([1e-25, 1e-3, 1.0, 1e4, 1e22]),
    threads=st.sampled_from([1, 2]),
)
def test_on_neighbouring_data_sets_no_speed_moves_the_step_further_than_the_sensitivity(
    speed: StepSpeed, count: int, kind: str, scale: float, threads: int
) -> None:
    model, shape = make(kind)
    inputs, targets = batch(shape, count)
    inputs[0] *= scale
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with taker(model, speed) as steps:
            steps.gradients(inputs, targets)
            whole = flat(model).clone()
            steps.gradients(inputs[1:], targets[1:])
            moved = float((whole - flat(model)).norm())
            assert steps.sensitivity == pytest.approx(BOUND / EXPECTED)
            assert moved <= steps.sensitivity * (1 + 1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [1.0, 1e22, float("nan")])
@pytest.mark.parametrize("mode", ["auto", "bookkeeping"])
def test_no_example_decides_in_which_way_the_others_are_clipped(mode: Mode, scale: float) -> None:
    """Else a step with it and one without it differ by more than it can add itself."""
    for _ in range(20):
        model, shape = make("tied")
        inputs, targets = batch(shape, 5)
        inputs[0] *= scale
        with taker(model, StepSpeed(mode=mode)) as steps:
            steps.gradients(inputs, targets)
            assert steps.engine == "vmap"


@pytest.mark.parametrize("speed", SPEEDS, ids=str)
def test_every_way_reaches_the_sensitivity_with_one_large_gradient(speed: StepSpeed) -> None:
    model, shape = make("linear")
    inputs, targets = batch(shape, 1)
    assert float(gradient(model, inputs * 1e3, 2 - targets.fill_(0), speed).norm()) <= BOUND / EXPECTED
    with taker(model, speed, max_grad_norm=1e-3) as steps:
        steps.gradients(inputs, targets)
        assert float(flat(model).norm()) == pytest.approx(1e-3 / EXPECTED, rel=1e-4)


@pytest.mark.parametrize("speed", SPEEDS, ids=str)
def test_activations_too_small_to_square_do_not_pass_unclipped(speed: StepSpeed) -> None:
    model = nn.Linear(5, CLASSES, bias=False)
    steps = PrivateGradients(
        model,
        lambda _inputs, outputs, _targets: outputs.sum(1).mean() * 1e18,
        max_grad_norm=1e-6,
        noise_multiplier=0.0,
        expected_batch_size=1.0,
        source=GaussianSource(),
        speed=speed,
    )
    with steps:
        steps.gradients(torch.full((1, 5), 1e-23), torch.zeros(1, dtype=torch.int64))
    assert 0 < float(flat(model).norm()) <= 1e-6 * (1 + 1e-5)


@pytest.mark.parametrize("speed", SPEEDS, ids=str)
@pytest.mark.parametrize(("off", "right"), [(1.0, True), (0.9, False)])
def test_every_way_has_the_same_noise(speed: StepSpeed, off: float, right: bool) -> None:
    model = nn.Sequential(nn.Linear(50, 200), nn.Linear(200, CLASSES))
    inputs, targets = batch((50,), 3)
    bare = gradient(model, inputs, targets, speed)
    with taker(model, speed, noise_multiplier=1.5 * off) as steps:
        steps.gradients(inputs, targets)
    assert scale_is_right(flat(model) - bare, 1.5 * BOUND / EXPECTED) == right


@pytest.mark.parametrize("kind", ["tied", "twice", "in place"])
def test_bookkeeping_notices_what_it_cannot_take_and_gives_way(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, shape = make(kind)
    choice._said.clear()
    with caplog.at_level(logging.INFO), taker(model, StepSpeed(mode="bookkeeping")) as steps:
        steps.gradients(*batch(shape, 4))
        assert steps.engine == "vmap"
    assert "bookkeeping cannot take this model" in caplog.text
    assert not any(module._forward_hooks for module in model.modules())


def test_parameters_outside_of_known_layers_give_way_before_the_first_step() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, CLASSES))
    assert made("bookkeeping", model, loss, Clip(1.0)).name == "vmap"
    frozen, _ = make("linear")
    frozen[0].bias.requires_grad_(False)
    assert made("bookkeeping", frozen, loss, Clip(1.0)).name == "vmap"


@pytest.mark.parametrize("mode", EAGER)
def test_couplings_are_refused_whatever_the_way(mode: Mode) -> None:
    model, shape = make("linear")
    summed = PrivateGradients(
        model,
        lambda _, outputs, targets: functional.cross_entropy(outputs, targets, reduction="sum"),
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=4.0,
        source=GaussianSource(),
        speed=StepSpeed(mode=mode),
    )
    with pytest.raises(PrivacyError, match="not the mean"), summed:
        summed.gradients(*batch(shape, 4))


@pytest.mark.parametrize("steps_ahead", [1, 10_000])
def test_auto_takes_a_way_and_says_so(steps_ahead: int, caplog: pytest.LogCaptureFixture) -> None:
    model, shape = make("conv")
    state = torch.random.get_rng_state()
    steps = PrivateGradients(
        model,
        loss,
        max_grad_norm=1.0,
        noise_multiplier=0.0,
        expected_batch_size=4.0,
        source=GaussianSource(),
        steps_ahead=steps_ahead,
    )
    inputs, targets = torch.zeros(4, *shape), torch.zeros(4, dtype=torch.int64)
    with caplog.at_level(logging.DEBUG, logger="fedclaw.privacy"), steps:
        steps.gradients(inputs, targets)
    assert steps.engine in ENGINES
    assert f"private steps by {steps.engine}" in caplog.text
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_wrong_mode_or_chunk_is_one_clear_error() -> None:
    with pytest.raises(UsageError, match="mode: Input should be 'auto', 'opacus', 'vmap', 'compiled' or 'bookkeeping'"):
        check_settings({"mode": "fastest"}, StepSpeed)
    with pytest.raises(UsageError, match="chunk_size"):
        check_settings({"chunk_size": 0}, StepSpeed)
    model, _ = make("linear")
    with pytest.raises(PrivacyError, match="there are: auto, bookkeeping, opacus, vmap, compiled"):
        made("fastest", model, loss, Clip(1.0))


def test_totals_are_added_to_unless_fresh() -> None:
    model, shape = make("conv")
    inputs, targets = batch(shape, 4)
    for mode in EAGER:
        way = made(mode, model, loss, Clip(1.0))
        totals = [torch.ones_like(parameter, dtype=torch.float64) for parameter in trainable(model)]
        way.add(totals, inputs, targets, fresh=True)
        once = [total.clone() for total in totals]
        way.add(totals, inputs, targets, fresh=False)
        way.close()
        for total, single in zip(totals, once, strict=True):
            torch.testing.assert_close(total, 2 * single)
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_leaves_the_same_update_for_every_size_of_batch() -> None:
    model, shape = make("linear")
    twin = copy.deepcopy(model)
    with taker(model, StepSpeed(mode="compiled", chunk_size=8)) as steps:
        for count in (3, 0, 7, 1, 8, 11):
            inputs, targets = batch(shape, count)
            steps.gradients(inputs, targets)
            assert steps.engine == "compiled"
            assert_same(flat(model), one_by_one(twin, inputs, targets))
        inputs, targets = batch(shape, 3)
        inputs[1] = float("inf")
        steps.gradients(inputs, targets)
        kept = torch.tensor([0, 2])
        assert_same(flat(model), one_by_one(twin, inputs[kept], targets[kept]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_a_compiler_it_is_the_eager_way_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    # Another model than above, whose compiled code is there already.
    model, shape = make("signal")
    inputs, targets = batch(shape, 5)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        caplog.at_level(logging.INFO, logger="fedclaw.privacy"),
        taker(model, StepSpeed(mode="compiled")) as steps,
    ):
        steps.gradients(inputs, targets)
        assert steps.engine == "vmap"
        ours = flat(model).clone()
    assert "compiled cannot take this model (torch.compile says" in caplog.text
    assert_same(ours, one_by_one(model, inputs, targets))
