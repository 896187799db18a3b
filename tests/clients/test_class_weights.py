"""Class weights: each example's loss by its class's weight, example by example."""

import json

import pytest
import torch
from torch.func import functional_call, grad, vmap

from fedclaw.clients.tabular import TabularWorkload
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.clients.vision_schema import VisionSchema
from fedclaw.errors import DataError
from fedclaw.protocol.terms import ModelSpec


def workload(**target: object) -> TabularWorkload:
    columns = [{"name": name, "kind": "numeric"} for name in "ab"]
    definition = {"columns": columns, "target": {"name": "t", "labels": ["no", "yes"], **target}}
    return TabularWorkload(TabularSchema.parse(json.dumps(definition), "schema.yaml"))


def test_each_example_counts_by_its_class() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    targets = torch.tensor([0, 1, 1])
    each = [float(workload().loss(logits[i : i + 1], targets[i : i + 1])) for i in range(3)]
    weighted = workload(weights={"yes": 4}).loss(logits, targets)
    assert float(weighted) == pytest.approx((each[0] + 4 * each[1] + 4 * each[2]) / 3)
    assert float(workload(weights={"yes": 4}).loss(logits[:0], targets[:0])) == 0


def test_a_batchs_gradient_is_the_mean_of_its_examples_gradients() -> None:
    """What clipping one example at a time rests on."""
    work = workload(weights={"yes": 4})
    model = work.build(ModelSpec(name="logistic"))
    parameters = dict(model.named_parameters())
    inputs, targets = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])

    def loss(values: dict, one: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return work.loss(functional_call(model, values, (one[None],)), target[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
    work.loss(model(inputs), targets).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(each[name].mean(dim=0), parameter.grad)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"maybe": 2}, "weights has 'maybe', which is no label"),
        ({"yes": 0}, "weights.yes: Input should be greater than 0"),
        ({"yes": 1e6}, "weights.yes: Input should be less than or equal to 1000"),
    ],
)
def test_weights_that_are_none(weights: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        workload(weights=weights)


def test_images_have_them_too() -> None:
    schema = VisionSchema.parse('{shape: [1, 2, 2], labels: ["0", "1"], weights: {1: 3}}', "schema.yaml")
    assert schema.class_weights == (1.0, 3.0)
    assert VisionSchema.parse('{shape: [1, 2, 2], labels: ["0", "1"]}', "schema.yaml").class_weights is None
