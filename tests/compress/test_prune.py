"""Pruning of real models: sizes, shapes, which channels go, and what cannot be done."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedclaw.clients.tabular import TabularWorkload
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.clients.vision import VisionWorkload
from fedclaw.clients.vision_schema import VisionSchema
from fedclaw.compress.models import compare_latency, rebuild, threads_for
from fedclaw.compress.prune import prune_to_fraction
from fedclaw.compress.size import count_parameters, multiply_adds
from fedclaw.errors import CompressionError, UsageError
from fedclaw.protocol.terms import ModelSpec

VISION = VisionWorkload(VisionSchema.parse("{shape: [3, 12, 12], labels: [a, b, c, d]}", "here"))
NUMERIC = "kind: numeric, center: 0, scale: 1, range: [0, 1]"
TABULAR = TabularWorkload(
    TabularSchema.parse(
        f"{{columns: [{{name: x, {NUMERIC}}}, {{name: y, {NUMERIC}}}], target: {{name: t, labels: [healthy, ill]}}}}",
        "here",
    )
)


def build(workload, name, **arguments):
    torch.manual_seed(0)
    return workload.build(ModelSpec(name=name, args=arguments))


class Residual(nn.Module):
    """A skip connection couples `stem` and `second`; GroupNorm with several groups couples channels within them."""

    def __init__(self, width=16, groups=4):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.first = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm = nn.GroupNorm(groups, 2 * width)
        self.second = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Linear(width * 16, 10)

    def forward(self, images):
        maps = torch.relu(self.stem(images))
        maps = maps + self.second(torch.relu(self.norm(self.first(maps))))
        return self.head(nn.functional.max_pool2d(maps, 2).flatten(1))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.06, 0.95), st.sampled_from([(16, 32), (8, 8, 24), (40,)]), st.sampled_from([None, 20]))
def test_cnn_fraction_is_met_and_near(fraction, channels, hidden):
    model = build(VISION, "cnn", channels=list(channels), hidden=hidden)
    before = count_parameters(model)
    try:
        pruned = prune_to_fraction(model, (3, 12, 12), fraction)
    except CompressionError:
        assert fraction < 0.12
        return
    assert pruned.parameters_before == before == count_parameters(model)
    assert pruned.parameters_after == count_parameters(pruned.model) <= fraction * before
    # Nearest: one channel more anywhere is too much, or there is none left to give back.
    spec = VISION.spec_of(pruned.model).args
    widths = [*spec["channels"], *([spec["hidden"]] if hidden else [])]
    most = [*channels, *([hidden] if hidden else [])]
    for index in range(len(widths)):
        if widths[index] < most[index]:
            wider = [width + (position == index) for position, width in enumerate(widths)]
            arguments = {"channels": wider[: len(channels)], "hidden": wider[-1] if hidden else None}
            assert count_parameters(build(VISION, "cnn", **arguments)) > fraction * before


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.95), st.lists(st.integers(4, 40), min_size=1, max_size=3))
def test_mlp_fraction_is_met(fraction, hidden):
    model = build(TABULAR, "mlp", hidden=hidden)
    try:
        pruned = prune_to_fraction(model, TABULAR.schema.input_shape, fraction)
    except CompressionError:
        assert (
            count_parameters(build(TABULAR, "mlp", hidden=[1] * len(hidden))) > fraction * count_parameters(model) - 1
        )
        return
    assert pruned.parameters_after <= fraction * pruned.parameters_before
    assert pruned.model(torch.zeros(5, *TABULAR.schema.input_shape)).shape == (5, 2)


@pytest.mark.parametrize(
    ("workload", "spec"),
    [
        (VISION, {"name": "cnn", "args": {"channels": [12, 20], "grid": 2, "hidden": 16}}),
        (VISION, {"name": "cnn", "args": {"channels": [12, 20, 20], "grid": 3, "hidden": None}}),
        (TABULAR, {"name": "mlp", "args": {"hidden": [24, 12]}}),
    ],
)
def test_the_spec_builds_the_same_function(workload, spec):
    model = workload.build(ModelSpec.model_validate(spec))
    pruned = prune_to_fraction(model, workload.schema.input_shape, 0.3)
    described, rebuilt = rebuild(workload, pruned.model)
    assert described.name == spec["name"]
    assert described.args != spec["args"]
    inputs = torch.randn(6, *workload.schema.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(inputs), pruned.model(inputs))
        assert rebuilt(inputs).shape == (6, len(workload.schema.labels))


def test_a_spec_that_builds_another_function_is_noticed():
    class Forgetful(VisionWorkload):
        def spec_of(self, model):
            return super().spec_of(model).model_copy(update={"args": {"channels": [4, 4], "grid": 1}})

    workload = Forgetful(VISION.schema)
    with pytest.raises(CompressionError, match="builds other shapes"):
        rebuild(workload, build(VISION, "cnn", channels=[4, 4], grid=2))

    class Twisted(VisionWorkload):
        def build(self, spec):
            model = super().build(spec)
            model.blocks[0].normalisation.num_groups = 2
            return model

    with pytest.raises(CompressionError, match="computes something else"):
        rebuild(Twisted(VISION.schema), build(VISION, "cnn", channels=[4, 4]))


@pytest.mark.parametrize("fraction", [0.15, 0.3, 0.6])
def test_residual_groups_stay_coupled(fraction):
    model = Residual()
    pruned = prune_to_fraction(model, (1, 8, 8), fraction)
    assert pruned.parameters_after <= fraction * pruned.parameters_before
    net = pruned.model
    assert net.stem.out_channels == net.second.out_channels == net.first.in_channels
    assert net.norm.num_groups == 4
    assert net.norm.num_channels == net.first.out_channels
    assert net.first.out_channels % 4 == 0
    assert net.head.out_features == 10
    assert net(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_the_weakest_channels_go():
    model = build(TABULAR, "mlp", hidden=[4])
    with torch.no_grad():
        model.hidden[0].weight.copy_(torch.tensor([[3.0], [0.1], [2.0], [0.2]]).expand(4, 2))
        model.head.weight.fill_(1.0)
    pruned = prune_to_fraction(model, TABULAR.schema.input_shape, 0.6)
    assert pruned.model.hidden[0].weight[:, 0].tolist() == [3.0, 2.0]


def test_dead_channels_go_first_and_cost_nothing():
    model = build(TABULAR, "mlp", hidden=[24])
    with torch.no_grad():
        for tensor in (model.hidden[0].weight, model.hidden[0].bias, model.head.weight.T):
            tensor[5:17] = 0
    rows = torch.randn(9, 2)
    pruned = prune_to_fraction(
        model, (2,), count_parameters(build(TABULAR, "mlp", hidden=[12])) / count_parameters(model)
    )
    assert pruned.widths == {"hidden.0": 12}
    torch.testing.assert_close(pruned.model(rows), model(rows))


def test_pruning_changes_nothing_in_the_original():
    model = build(VISION, "cnn", channels=[8, 16])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune_to_fraction(model, (3, 12, 12), 0.3)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_of_one_layer_cannot_be_pruned():
    with pytest.raises(CompressionError, match="cannot be pruned"):
        prune_to_fraction(build(TABULAR, "logistic"), TABULAR.schema.input_shape, 0.5)
    with pytest.raises(CompressionError, match="nothing to prune"):
        prune_to_fraction(nn.Sequential(nn.LayerNorm(3)), (3,), 0.5)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 2.0, -0.5, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(UsageError, match="between 0 and 1"):
        prune_to_fraction(build(TABULAR, "mlp"), TABULAR.schema.input_shape, fraction)


def test_without_torch_pruning_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UsageError, match=r"pip install fedclaw\[compress\]"):
        prune_to_fraction(build(TABULAR, "mlp"), TABULAR.schema.input_shape, 0.5)


def test_multiply_adds_by_hand():
    # 3 -> 4 channels at 12x12, 4 -> 6 at 6x6 (3x3 kernels), then 6 x 2 x 2 features -> 4 classes.
    model = build(VISION, "cnn", channels=[4, 6], grid=2)
    assert multiply_adds(model, (3, 12, 12)) == 144 * 4 * 27 + 36 * 6 * 36 + 24 * 4
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 4, 5))
    assert multiply_adds(grouped, (4, 4, 4)) == 4 * 8 * (2 * 9) + 32 * 5


def test_latency_restores_threads_and_tells_models_apart():
    small, large = nn.Linear(64, 2), nn.Sequential(*[nn.Linear(64, 64) for _ in range(60)], nn.Linear(64, 2))
    threads = torch.get_num_threads()
    slower, faster = compare_latency(large, small, torch.randn(3, 64), repeats=15)
    assert torch.get_num_threads() == threads
    assert slower.keys() == faster.keys() == {1, 32}
    assert all(0 < faster[size] < slower[size] for size in (1, 32))


def test_threads_are_one_for_small_models_only():
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(1000):
            assert torch.get_num_threads() == 1
        with threads_for(10**9):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)


class Fussy(nn.Module):
    """A forward pass that fails by itself."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 2)

    def forward(self, inputs):
        return self.head(inputs)[{}]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2)),
        Fussy(),
    ],
    ids=["weight-norm", "failing"],
)
def test_what_the_pruning_library_cannot_take_is_said_in_our_words(model):
    with pytest.raises(CompressionError, match="cannot be pruned"):
        prune_to_fraction(model, (6,), 0.5)
