"""Ways of getting the gradients of clients that each have parameters of their own.

`BatchedModel` is the fastest for models that it takes, for many clients and for one. Others are mapped over clients by
torch.func where that works (`VmapModel`), or taken one client at a time (`PlainModel`), which always does.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn.functional import adaptive_avg_pool2d

from fedclaw.errors import FedClawError
from fedclaw.learning.stacked.layers import CHANNELS_LAST, stacked
from fedclaw.learning.stacked.layout import Layout, Packing
from fedclaw.learning.stacked.stack import Stack, StackedLayer, Through
from fedclaw.privacy.gradients.interface import functional

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(inputs, outputs, targets) -> mean loss."""


class NotStackable(FedClawError):
    """A model cannot be trained for many clients at once in this way. Its text says why."""


class BatchedModel:
    """A model run on the examples of many clients as one batch, each example with its own client's parameters.

    Goes for models whose parameters all belong to layers that have a stacked form (`layers`), each called once in a
    forward pass, and that treat examples separately; with a loss that is a mean over examples. Whether a model is one
    is not believed but compared, on examples, with the plain gradient of each client (`choice.agrees`). `layout` says
    how parameters lie in a row of the stack.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        """Takes `model` over: its layers' forward passes are replaced. Raises NotStackable."""
        self._loss = loss
        self._stack = Stack()
        self.layers: list[StackedLayer] = []
        self.model = model.train()
        orders = self._find_layers()
        self.layout = Layout.of(model, orders)
        self._bound: tuple[int, int, int] | None = None
        self._rows = torch.empty(0)
        for layer in self.layers:
            layer.module.forward = self._through(layer)
        for module in self.model.modules():
            if type(module) is nn.AdaptiveAvgPool2d:
                module.forward = _average(module)  # type: ignore[assignment, method-assign]

    def bind(self, parameters: torch.Tensor, gradients: torch.Tensor) -> None:
        """Work on these rows (K, D) from now on."""
        key = parameters.data_ptr(), gradients.data_ptr(), len(parameters)
        if key == self._bound:
            return
        views, changes = self.layout.views(parameters), self.layout.views(gradients)
        self._rows = parameters
        for layer in self.layers:
            layer.bind([views[place] for place in layer.places], [changes[place] for place in layer.places])
        self._bound = key

    def gradients(self, packing: Packing, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Write the gradient of each client's mean loss over its rows: inputs (N, *D), targets (N, ...).

        The gradient of a client without rows is left as it was.
        """
        self._run(packing, inputs, targets)

    def begin(self, start: torch.Tensor | None, packings: Sequence[Packing]) -> None:
        """Have the clients begin with the parameters `start` (D,), to `descend` by `packings`; None: with their rows.

        What they come to is in their rows after `write`, or told by `change`.
        """
        clients = packings[0].clients if packings else 0
        rows = sum(max((segment.size for segment in packing.segments), default=0) for packing in packings)
        views = None if start is None else self.layout.views(start[None])
        for layer in self.layers:
            layer.begin(None if views is None else views[layer.places[0]][0], clients, rows)
        if start is not None:
            for run in self._runs():
                self._rows[:clients, run] = start[run]

    def descend(self, packing: Packing, inputs: torch.Tensor, targets: torch.Tensor, rate: float, decay: float) -> None:
        """parameters <- decay x parameters - rate x gradient, without ever holding a gradient."""
        self._stack.rate, self._stack.decay = rate, decay
        try:
            self._run(packing, inputs, targets)
        finally:
            self._stack.rate = None

    def write(self) -> None:
        """See `begin`."""
        for layer in self.layers:
            layer.write()

    def change(self, weights: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The sum (D,) over the first k clients of weights (k,) times what their parameters are more than `start`.

        Uses their rows up.
        """
        total = torch.empty_like(start)
        for run in self._runs():
            torch.mv(self._rows[: len(weights), run].sub_(start[run]).t(), weights, out=total[run])
        views = self.layout.views(total[None])
        for layer in self.layers:
            if layer.factors is not None:
                views[layer.places[0]][0].copy_(layer.factors.change(weights))
        return total

    def _runs(self) -> list[slice]:
        """What of a client's row is its own: all but what is kept as factors."""
        return self.layout.runs({layer.places[0] for layer in self.layers if layer.factors is not None})

    def recorded(
        self, packing: Packing, inputs: torch.Tensor, targets: torch.Tensor
    ) -> list[tuple[StackedLayer, torch.Tensor, torch.Tensor]]:
        """Inputs and output gradients of each layer, of each row's own loss (not divided by the number of rows)."""
        records: list[tuple[StackedLayer, torch.Tensor, torch.Tensor]] = []
        self._stack.recorded = records
        try:
            self._stack.packing = packing
            self._stack.used.clear()
            outputs = self.model(inputs)
            (self._loss(inputs, outputs, targets) * len(inputs)).backward()  # type: ignore[no-untyped-call]
        finally:
            self._stack.recorded = None
        return records

    def _run(self, packing: Packing, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        if not packing.segments:
            return
        stack = self._stack
        stack.packing = packing
        stack.used.clear()
        outputs = self.model(inputs)
        if len(stack.used) < len(self.layers):
            raise NotStackable("not all layers with parameters are used in a forward pass")
        # The loss is a mean over rows, so this is the sum of their losses, each of which counts by its client's batch.
        if packing.even is None:
            weights = packing.weights
            outputs.register_hook(lambda gradient: gradient * weights.view(-1, *(1,) * (gradient.dim() - 1)))
            scale = float(len(inputs))
        else:
            scale = float(packing.clients)
        (self._loss(inputs, outputs, targets) * scale).backward()  # type: ignore[no-untyped-call]

    def _find_layers(self) -> dict[str, tuple[int, ...]]:
        names = {parameter: (place, name) for place, (name, parameter) in enumerate(self.model.named_parameters())}
        orders: dict[str, tuple[int, ...]] = {}
        owned = 0
        for name, module in self.model.named_modules():
            own = list(module.parameters(recurse=False))
            if not own:
                continue
            if not all(parameter.requires_grad for parameter in own):
                raise NotStackable(f"layer {name!r} has parameters that are not trained")
            layer = stacked(module, tuple(names[parameter][0] for parameter in own), self._stack)
            if layer is None:
                raise NotStackable(f"layer {name!r} ({type(module).__name__}) has no stacked form")
            if layer.order is not None:
                orders[names[own[0]][1]] = layer.order
            self.layers.append(layer)
            owned += len(own)
        if owned != len(names) or not owned:
            raise NotStackable("layers share parameters, or there are none")
        return orders

    def _through(self, layer: StackedLayer) -> Callable[[torch.Tensor], torch.Tensor]:
        stack, identity = self._stack, id(layer)

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            if identity in stack.used:
                raise NotStackable("a layer is used more than once in a forward pass")
            stack.used.add(identity)
            outputs: torch.Tensor = Through.apply(inputs, stack.token, layer)  # type: ignore[no-untyped-call]
            return outputs

        return forward


def _average(module: nn.AdaptiveAvgPool2d) -> Callable[[torch.Tensor], torch.Tensor]:
    """Its forward pass, but for maps that have the wanted size already: torch copies those, cell by cell."""
    wanted = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,) * 2

    def forward(maps: torch.Tensor) -> torch.Tensor:
        return maps if tuple(maps.shape[-2:]) == tuple(wanted) else adaptive_avg_pool2d(maps, wanted)

    return forward


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
        self.layout = Layout.of(model, orders)
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
        self.layout = Layout.of(model)
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
