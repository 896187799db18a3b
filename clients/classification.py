"""What all classifiers share, whatever their inputs: the loss, the metrics, and the checking of model arguments."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from fedclaw.clients import metrics
from fedclaw.errors import PluginError
from fedclaw.learning.workload import Workload
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.protocol.plan import ModelSpec

A = TypeVar("A", bound=Frozen)

MAX_PARAMETERS = 2**28
"""1 GiB as float32. A server names the model and a site builds it: no name may make a site run out of memory."""


class Classification(Workload):
    """A workload whose model gives logits (N, C) for the schema's C labels."""

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats over the batch, a scalar; 0 with a zero gradient for an empty batch.

        With class weights, each example's loss counts by its class's weight, and the sum is still divided by the number
        of examples: so the loss of a batch is the mean of its examples' losses, which clipping each alone rests on.
        """
        weights = self.schema.class_weights
        if weights is None:
            return functional.cross_entropy(logits, targets, reduction="sum") / max(targets.shape[0], 1)
        losses = functional.cross_entropy(logits, targets, reduction="none")
        counted = losses * torch.tensor(weights, dtype=logits.dtype, device=logits.device)[targets]
        return counted.sum() / max(targets.shape[0], 1)

    def evaluate(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        """Loss, accuracy, precision, recall, f1, auroc; which definitions and when left out: `metrics`."""
        return metrics.classification(
            logits.detach().cpu().numpy().astype(np.float64),
            targets.detach().cpu().numpy().astype(np.int64),
        )


def known(spec: ModelSpec, models: Mapping[str, type[A]]) -> A:
    """The checked arguments of the model that `spec` names. Raises PluginError: a server may have sent it."""
    if spec.name not in models:
        raise PluginError(f"no model is called {spec.name!r} here; there are: {', '.join(sorted(models))}")
    try:
        return models[spec.name].model_validate(spec.args)
    except ValidationError as error:
        raise PluginError(f"model {spec.name!r}: {explain(error)}") from error


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """The model that `make` gives, once a copy without memory has shown its size. Raises PluginError if too large."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make().parameters())
    if parameters > MAX_PARAMETERS:
        raise PluginError(f"a model of {parameters} parameters; at most {MAX_PARAMETERS} are built")
    return make()
