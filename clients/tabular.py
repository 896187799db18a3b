"""The tabular workload: (N, D) features to logits (N, C)."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from fedclaw.clients.models import built, known
from fedclaw.errors import PluginError
from fedclaw.learning.workload import Workload
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.plan import ModelSpec

MAX_WIDTH = 8192
MAX_LAYERS = 16


class LogisticArguments(Frozen):
    """Arguments of `logistic`: none."""


class BinaryLogisticArguments(Frozen):
    """Arguments of `binary_logistic`: none."""


class MlpArguments(Frozen):
    """Arguments of `mlp`. A site builds what a server names, so the sizes have limits."""

    hidden: tuple[Annotated[int, Field(ge=1, le=MAX_WIDTH)], ...] = Field(
        default=(64, 32), min_length=1, max_length=MAX_LAYERS
    )
    """Widths of the hidden layers, inputs first."""


class Logistic(nn.Module):
    """Multinomial logistic regression: one linear layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, C)."""
        logits: torch.Tensor = self.head(inputs)
        return logits


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

    def __init__(self, inputs: int, hidden: tuple[int, ...], classes: int) -> None:
        super().__init__()
        widths = (inputs, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, hidden, strict=False))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, C)."""
        features = inputs
        for layer in self.hidden:
            features = torch.relu(layer(features))
        logits: torch.Tensor = self.head(features)
        return logits


class TabularWorkload(Workload):
    """Models `logistic`, `binary_logistic` (two classes) and `mlp` for a schema whose inputs are (N, D)."""

    name: ClassVar[str] = "tabular"
    models: ClassVar[dict[str, type[LogisticArguments | BinaryLogisticArguments | MlpArguments]]] = {
        "logistic": LogisticArguments,
        "binary_logistic": BinaryLogisticArguments,
        "mlp": MlpArguments,
    }

    def default_model(self) -> ModelSpec:
        """`mlp` with its default widths."""
        return ModelSpec(name="mlp", args=MlpArguments().model_dump(mode="json"))

    def build(self, spec: ModelSpec) -> nn.Module:
        """The named model with fresh weights from torch's generator. Raises PluginError."""
        arguments = known(spec, self.models)
        (inputs,), classes = self.schema.input_shape, len(self.schema.labels)
        if isinstance(arguments, MlpArguments):
            hidden = arguments.hidden
            return built(lambda: Mlp(inputs, hidden, classes))
        if isinstance(arguments, BinaryLogisticArguments):
            if classes != 2:
                raise PluginError(f"model {spec.name!r} tells two classes apart, and the schema has {classes} labels")
            return built(lambda: BinaryLogistic(inputs))
        return built(lambda: Logistic(inputs, classes))

    def spec_of(self, model: nn.Module) -> ModelSpec:
        """The spec with the model's present widths. Raises PluginError for a model that is not of this workload."""
        if isinstance(model, Mlp):
            widths = [layer.weight.shape[0] for layer in model.hidden if isinstance(layer, nn.Linear)]
            return ModelSpec(name="mlp", args=MlpArguments(hidden=tuple(widths)).model_dump(mode="json"))
        if isinstance(model, Logistic):
            return ModelSpec(name="logistic")
        if isinstance(model, BinaryLogistic):
            return ModelSpec(name="binary_logistic")
        raise PluginError(f"a {type(model).__name__} is no model of the tabular workload")
