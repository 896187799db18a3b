"""The models of both workloads: what pruning, privacy, export and an empty batch ask of them."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
import torch_pruning
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.func import functional_call, grad, vmap

from fedclaw.clients.tabular import TabularWorkload
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.clients.vision import VisionWorkload
from fedclaw.clients.vision_schema import VisionSchema
from fedclaw.errors import PluginError
from fedclaw.learning.workload import Workload
from fedclaw.protocol.terms import ModelSpec

TABLE = """
columns:
  - {name: a, kind: numeric}
  - {name: b, kind: categorical, levels: [x, y, z]}
  - {name: c, kind: boolean}
target: {name: t, labels: [low, high, other]}
"""
PAIR = TABLE.replace("[low, high, other]", "[low, high]")
IMAGES = "{shape: [1, 8, 8], labels: [a, b, c, d]}"
COLOUR = "{shape: [3, 15, 21], labels: [a, b]}"

CASES = [
    ("table", ModelSpec(name="logistic")),
    ("pair", ModelSpec(name="binary_logistic")),
    ("table", ModelSpec(name="mlp", args={"hidden": [12, 8]})),
    ("images", ModelSpec(name="cnn")),
    ("images", ModelSpec(name="cnn", args={"channels": [8, 8, 8, 8], "hidden": 12})),
    ("colour", ModelSpec(name="cnn", args={"channels": [10, 20], "grid": 3, "hidden": 10})),
    ("images", ModelSpec(name="resnet", args={"channels": [10, 12, 12, 12, 14]})),
    ("colour", ModelSpec(name="resnet", args={"channels": [12, 21], "blocks": [[15], [11, 19]]})),
]
IDS = [
    *("logistic", "binary-logistic", "mlp", "cnn", "cnn-deep-hidden", "cnn-odd-sizes"),
    *("resnet-deep", "resnet-odd-sizes"),
]


def workload_of(kind: str) -> Workload:
    if kind in ("table", "pair"):
        return TabularWorkload(TabularSchema.parse(TABLE if kind == "table" else PAIR, "schema.yaml"))
    return VisionWorkload(VisionSchema.parse(IMAGES if kind == "images" else COLOUR, "schema.yaml"))


def batch_of(workload: Workload, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    inputs = torch.from_numpy(workload.schema.synthetic_inputs(count, generator))
    return inputs, torch.from_numpy(generator.integers(0, len(workload.schema.labels), count))


@pytest.mark.parametrize(("kind", "spec"), CASES, ids=IDS)
def test_seed_alone_decides_the_first_weights(kind: str, spec: ModelSpec) -> None:
    workload = workload_of(kind)
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(workload.build(spec))
    first, again, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("kind", "spec"), CASES, ids=IDS)
def test_spec_of_a_fresh_model_builds_the_same_shapes(kind: str, spec: ModelSpec) -> None:
    workload = workload_of(kind)
    model = workload.build(spec)
    workload.build(workload.spec_of(model)).load_state_dict(model.state_dict())
    assert workload.build(workload.default_model())(batch_of(workload, 2)[0]).shape == (2, len(workload.schema.labels))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
@pytest.mark.parametrize(("kind", "spec"), CASES[2:], ids=IDS[2:])
def test_spec_of_a_pruned_model_builds_its_shapes_and_function(kind: str, spec: ModelSpec, ratio: float) -> None:
    workload = workload_of(kind)
    torch.manual_seed(0)
    model = workload.build(spec)
    before = sum(p.numel() for p in model.parameters())
    inputs, _ = batch_of(workload, 3)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[model.head],
    )
    pruner.step()
    rebuilt = workload.build(workload.spec_of(model))
    rebuilt.load_state_dict(model.state_dict())
    assert sum(p.numel() for p in rebuilt.parameters()) < before
    assert torch.equal(rebuilt(inputs), model(inputs))


@pytest.mark.parametrize(("kind", "spec"), CASES, ids=IDS)
def test_opacus_and_vmap_give_the_gradients_of_one_example_at_a_time(kind: str, spec: ModelSpec) -> None:
    workload = workload_of(kind)
    model = workload.build(spec)
    inputs, targets = batch_of(workload, 3)

    slow: list[list[torch.Tensor]] = []
    for row in range(3):
        loss = workload.loss(model(inputs[row : row + 1]), targets[row : row + 1])
        slow.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    oracle = [torch.stack(parts) for parts in zip(*slow, strict=True)]

    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    (workload.loss(wrapped(inputs), targets) * 3).backward()

    def loss_of(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return workload.loss(functional_call(model, parameters, (x[None],)), y[None])

    detached = {name: p.detach() for name, p in model.named_parameters()}
    stacked = vmap(grad(loss_of), in_dims=(None, 0, 0))(detached, inputs, targets)

    for want, by_opacus, by_vmap in zip(oracle, wrapped.parameters(), stacked.values(), strict=True):
        torch.testing.assert_close(by_opacus.grad_sample, want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(by_vmap, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(("kind", "spec"), CASES, ids=IDS)
def test_an_empty_batch_has_no_loss_and_a_zero_gradient(kind: str, spec: ModelSpec, private: bool) -> None:
    workload = workload_of(kind)
    model = workload.build(spec)
    if private:
        model = GradSampleModule(model)
    logits = model(torch.zeros(0, *workload.schema.input_shape))
    assert logits.shape == (0, len(workload.schema.labels))
    loss = workload.loss(logits, torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize(("kind", "spec"), CASES, ids=IDS)
def test_one_example_is_a_batch(kind: str, spec: ModelSpec) -> None:
    workload = workload_of(kind)
    model = workload.build(spec)
    inputs, _ = batch_of(workload, 5)
    torch.testing.assert_close(model(inputs[2:3]), model(inputs)[2:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "spec"), CASES, ids=IDS)
def test_export_takes_any_batch(kind: str, spec: ModelSpec, tmp_path) -> None:
    workload = workload_of(kind)
    model = workload.build(spec).eval()
    example, _ = batch_of(workload, 2)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (example,), str(path), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 2, 7):
        inputs, _ = batch_of(workload, count, seed=count)
        expected = model(inputs).detach()
        torch.testing.assert_close(program.module()(inputs), expected, atol=1e-6, rtol=1e-5)
        (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_no_model_has_buffers() -> None:
    for kind, spec in CASES:
        assert not list(workload_of(kind).build(spec).buffers()), spec


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        (
            "table",
            ModelSpec(name="cnn"),
            "no model is called 'cnn' here; there are: binary_logistic, linear, log",
        ),
        ("table", ModelSpec(name="binary_logistic"), "'binary_logistic' tells two classes apart, and the schema has 3"),
        ("table", ModelSpec(name="logistic", args={"hidden": 3}), "'logistic': hidden: Extra inputs"),
        ("table", ModelSpec(name="mlp", args={"hidden": []}), "hidden: Tuple should have at least 1 item"),
        ("table", ModelSpec(name="mlp", args={"hidden": [0]}), "hidden.0: Input should be greater"),
        ("table", ModelSpec(name="mlp", args={"hidden": [10**9]}), "hidden.0: Input should be less"),
        ("table", ModelSpec(name="mlp", args={"hidden": [4] * 1000}), "hidden: Tuple should have at most 16"),
        ("images", ModelSpec(name="cnn", args={"channels": [1, "x"]}), "channels.1: Input should be a valid integer"),
        ("images", ModelSpec(name="cnn", args={"channels": [2048]}), "channels.0: Input should be less"),
        (
            "table",
            ModelSpec(name="mlp", args={"hidden": [8192] * 6}),
            "a model of 335659011 parameters; at most 268435456",
        ),
        ("images", ModelSpec(name="cnn", args={"hidden": 0}), "hidden: Input should be greater"),
        (
            "images",
            ModelSpec(name="resnet", args={"channels": [4, 4], "blocks": [[4]]}),
            "1 stages, and channels names",
        ),
        ("images", ModelSpec(name="resnet", args={"channels": [4], "blocks": [[4] * 17]}), "a stage has 1 to 16 bloc"),
        (
            "images",
            ModelSpec(name="resnet", args={"channels": [1024] * 6, "blocks": [[1024] * 3] * 6}),
            "parameters; at most 268435456",
        ),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(kind: str, spec: ModelSpec, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        workload_of(kind).build(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stranger_has_no_spec() -> None:
    for kind in ("table", "images"):
        with pytest.raises(PluginError, match="Linear is no model of the"):
            workload_of(kind).spec_of(nn.Linear(2, 2))


def test_the_models_learn() -> None:
    """A wrong sign, a dead layer or a detached head would not fit 60 examples of four clear classes."""
    workload = workload_of("images")
    torch.manual_seed(0)
    model = workload.build(workload.default_model())
    targets = torch.arange(60) % 4
    inputs = 0.1 * torch.randn(60, 1, 8, 8)
    for row, target in enumerate(targets):
        inputs[row, 0, 4 * (target // 2) : 4 * (target // 2) + 4, 4 * (target % 2) : 4 * (target % 2) + 4] += 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    first = workload.loss(model(inputs), targets).item()
    for _ in range(40):
        optimizer.zero_grad()
        workload.loss(model(inputs), targets).backward()
        optimizer.step()
    measured = workload.evaluate(model(inputs), targets)
    assert measured["loss"] < first / 4
    assert measured["accuracy"] > 0.95


def test_binary_logistic_has_the_loss_and_the_gradient_of_binary_cross_entropy() -> None:
    workload = workload_of("pair")
    torch.manual_seed(0)
    model = workload.build(ModelSpec(name="binary_logistic"))
    torch.manual_seed(0)
    one = nn.Linear(workload.schema.input_shape[0], 1)
    inputs, targets = batch_of(workload, 11)
    inputs *= 20  # also where a sigmoid would be 0 or 1
    assert len(targets.unique()) == 2

    workload.loss(model(inputs), targets).backward()
    loss = nn.BCEWithLogitsLoss()(one(inputs)[:, 0], targets.float())
    loss.backward()

    torch.testing.assert_close(workload.loss(model(inputs), targets), loss)
    for ours, theirs in zip(model.parameters(), one.parameters(), strict=True):
        assert torch.equal(ours, theirs), "not torch's own first weights"
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(model(inputs).argmax(dim=1), (one(inputs)[:, 0] > 0).long())
