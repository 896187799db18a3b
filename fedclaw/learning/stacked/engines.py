"""Ways of getting the gradients of clients that each have parameters of their own.

`BatchedModel` (see `batched`) is the fastest for models that it takes, for many clients and for one. Others are mapped
over clients by torch.func where that works (`VmapModel`), or taken one client at a time (`PlainModel`), which always
does.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from torch.func import grad, vmap

from fedclaw.learning.stacked.batched import BatchedModel, Loss
from fedclaw.learning.stacked.convolution import CHANNELS_LAST
from fedclaw.learning.stacked.layout import Layout
from fedclaw.learning.stacked.packing import Packing
from fedclaw.privacy.gradients.interface import functional

Build = Callable[[], nn.Module]
"""A fresh model."""


class Engine(Protocol):
    """Gradients of the first clients of a stack."""

    layout: Layout

    def bind(self, parameters: torch.Tensor, gradients: torch.Tensor) -> None:
        """Work on these rows (K, D) from now on."""

    def gradients(self, packing: Packing, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Write the gradient of each client's mean loss over its rows: inputs (N, *D), targets (N, ...).

        The gradient of a client without rows is left as it was.
        """


class PlainModel:
    """One client: the model's parameters are the row itself, and autograd writes into the row of gradients."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        """Takes `model` over."""
        self.model = model.train()
        self._loss = loss
        self._parameters = list(model.parameters())
        # Pooling, and to a lesser degree convolutions, are faster with channels last.
        orders = {name: CHANNELS_LAST for name, value in model.named_parameters() if value.dim() == 4}
        self.layout = Layout({name: value.shape for name, value in model.named_parameters()}, orders)
        self._gradients = torch.empty(0)

    def bind(self, parameters: torch.Tensor, gradients: torch.Tensor) -> None:
        """See Engine; K = 1."""
        views, changes = self.layout.views(parameters), self.layout.views(gradients)
        for parameter, view, change in zip(self._parameters, views, changes, strict=True):
            parameter.data = view[0]
            parameter.grad = change[0] if parameter.requires_grad else None
        self._gradients = gradients

    def gradients(self, packing: Packing, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """See Engine."""
        if len(inputs):
            self._gradients.zero_()
            self._loss(inputs, self.model(inputs), targets).backward()  # type: ignore[no-untyped-call]


class VmapModel:
    """torch.func over stacked parameters: for models whose layers have no stacked form of their own."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        """Takes `model` over."""
        self._model = model.train()
        self._names = [name for name, _ in model.named_parameters()]
        self.layout = Layout({name: value.shape for name, value in model.named_parameters()})
        self._views: list[torch.Tensor] = []
        self._changes: list[torch.Tensor] = []

        call = functional(model)

        def of_one(
            moving: dict[str, torch.Tensor], fixed: dict[str, torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor
        ) -> torch.Tensor:
            return loss(inputs, call(fixed | moving, inputs), targets)

        self._map = vmap(grad(of_one), in_dims=(0, None, 0, 0), randomness="different")

    def bind(self, parameters: torch.Tensor, gradients: torch.Tensor) -> None:
        """See Engine."""
        self._views, self._changes = self.layout.views(parameters), self.layout.views(gradients)

    def gradients(self, packing: Packing, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """See Engine. Batches must not be filled up."""
        fixed = {name: buffer.detach() for name, buffer in self._model.named_buffers()}
        for segment in packing.segments:
            own, rows = slice(segment.first, segment.last), slice(segment.row, segment.row + segment.rows)
            moving = {name: view[own] for name, view in zip(self._names, self._views, strict=True)}
            shape = segment.clients, segment.size
            parts = (part[rows].view(*shape, *part.shape[1:]) for part in (inputs, targets))
            found = self._map(moving, fixed, *parts)
            for name, change in zip(self._names, self._changes, strict=True):
                change[own].copy_(found[name])


__all__ = ["Build", "Engine", "BatchedModel", "PlainModel", "VmapModel"]
