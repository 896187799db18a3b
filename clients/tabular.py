"""The tabular workload: (N, D) features to the task's outputs (N, K), logits of C classes or one number."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from fedclaw.clients.models import built, known
from fedclaw.errors import PluginError, UnknownModel
from fedclaw.learning.workload import Workload
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import ModelSpec

MAX_WIDTH = 8192
MAX_LAYERS = 16


class LogisticArguments(Frozen):
    """Arguments of `logistic`: none."""


class BinaryLogisticArguments(Frozen):
    """Arguments of `binary_logistic`: none."""


class LinearArguments(Frozen):
    """Arguments of `linear`: none."""


class MlpArguments(Frozen):
    """Arguments of `mlp`. A site builds what a server names, so the sizes have limits."""

    hidden: tuple[Annotated[int, Field(ge=1, le=MAX_WIDTH)], ...] = Field(
        default=(64, 32), min_length=1, max_length=MAX_LAYERS
    )
    """Widths of the hidden layers, inputs first."""


class Linear(nn.Module):
    """One linear layer: with the link of the task a linear or a log-linear model."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, K)."""
        outputs: torch.Tensor = self.head(inputs)
        return outputs


class Logistic(Linear):
    """Multinomial logistic regression: one linear layer to the logits of C classes."""


class BinaryLogistic(nn.Module):
    """Logistic regression of two classes: one linear output z, and the logits (0, z).

    softmax((0, z)) = (1 - sigmoid(z), sigmoid(z)), so cross-entropy is the binary cross-entropy of sigmoid(z). Half the
    parameters of `Logistic`, whose second output is not needed to tell two classes apart.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, 2)."""
        return functional.pad(self.head(inputs), (1, 0))


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        widths = (inputs, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, hidden, strict=False))
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, K)."""
        features = inputs
        for layer in self.hidden:
            features = torch.relu(layer(features))
        outputs: torch.Tensor = self.head(features)
        return outputs


Arguments = LogisticArguments | BinaryLogisticArguments | LinearArguments | MlpArguments


class TabularWorkload(Workload):
    """Models for a schema whose inputs are (N, D): `mlp`; of classes `logistic` and, of two, `binary_logistic`; of a
    number `linear`."""

    name: ClassVar[str] = "tabular"
    models: ClassVar[dict[str, type[Arguments]]] = {
        "logistic": LogisticArguments,
        "binary_logistic": BinaryLogisticArguments,
        "linear": LinearArguments,
        "mlp": MlpArguments,
    }

    def default_model(self) -> ModelSpec:
        """`mlp` with its default widths."""
        return ModelSpec(name="mlp", args=MlpArguments().model_dump(mode="json"))

    def build(self, spec: ModelSpec) -> nn.Module:
        """The named model with fresh weights from torch's generator. Raises UnknownModel."""
        arguments = known(spec, self.models)
        (inputs,), outputs = self.schema.input_shape, self.task.outputs
        if isinstance(arguments, MlpArguments):
            hidden = arguments.hidden
            return built(lambda: Mlp(inputs, hidden, outputs))
        if isinstance(arguments, LinearArguments) == bool(self.schema.labels):
            other = "tells classes apart" if spec.name != "linear" else "gives a number"
            raise UnknownModel(f"model {spec.name!r} {other}, and the schema's task is {self.task.name}")
        if isinstance(arguments, LinearArguments):
            return built(lambda: Linear(inputs, outputs))
        if isinstance(arguments, BinaryLogisticArguments):
            if outputs != 2:
                raise UnknownModel(f"model {spec.name!r} tells two classes apart, and the schema has {outputs} labels")
            return built(lambda: BinaryLogistic(inputs))
        return built(lambda: Logistic(inputs, outputs))

    def spec_of(self, model: nn.Module) -> ModelSpec:
        """The spec with the model's present widths. Raises PluginError for a model that is not of this workload."""
        if isinstance(model, Mlp):
            widths = [layer.weight.shape[0] for layer in model.hidden if isinstance(layer, nn.Linear)]
            return ModelSpec(name="mlp", args=MlpArguments(hidden=tuple(widths)).model_dump(mode="json"))
        for kind, name in ((Logistic, "logistic"), (BinaryLogistic, "binary_logistic"), (Linear, "linear")):
            if isinstance(model, kind):
                return ModelSpec(name=name)
        raise PluginError(f"a {type(model).__name__} is no model of the tabular workload")
