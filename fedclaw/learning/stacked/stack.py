"""What the stacked layers of one model share, and what a stacked layer is.

A model that treats examples separately can be run on the examples of many clients side by side, as one batch: every
layer without parameters does the same as ever. Only those with parameters have to know whose an example is. They are
batched products here, over segments of clients with equally large batches.

At the sizes that are simulated a call costs more than what it computes, so a step that is one segment, as most are,
goes without slicing, and views and memory are kept. Legend: K clients, N rows, L places a row, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedclaw.learning.stacked.factors import FactoredWeight
from fedclaw.learning.stacked.packing import Packing, Segment


@dataclass
class Stack:
    """The step that is being taken, and what becomes of the gradients."""

    packing: Packing | None = None
    rate: float | None = None
    """Each gradient is taken off its parameters at once, times this; None: it is written to the gradients."""
    decay: float = 1.0
    """With `rate`: what the parameters are multiplied by first."""
    recorded: "list[tuple[StackedLayer, torch.Tensor, torch.Tensor]] | None" = None
    """Where layer, inputs and output gradients go instead, if the gradients of single examples are wanted."""
    used: set[int] = field(default_factory=set)
    token: torch.Tensor = field(default_factory=lambda: torch.zeros(0, requires_grad=True))
    """Goes into every layer, so that the backward pass reaches the first one too."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Those of the step."""
        assert self.packing is not None
        return self.packing.segments

    def dispose_sums(self, values: torch.Tensor, gradients: torch.Tensor, parts: torch.Tensor) -> None:
        """Of parameters (k, C) whose gradient is the sum of parts (k, rows, C) over the rows."""
        if self.rate is None:
            torch.sum(parts, 1, out=gradients)
            return
        if self.decay != 1.0:
            values.mul_(self.decay)
        values.sub_(parts.sum(1), alpha=self.rate)


class StackedLayer(ABC):
    """A layer with parameters, for all rows of a step. `places`: where its parameters stand among the model's."""

    order: tuple[int, ...] | None = None
    """The axes of its weights as they lie in memory, where that is another order."""
    factors: FactoredWeight | None = None
    """What plain steps make of its first parameter, where that is not written to the clients' rows."""

    def __init__(self, module: nn.Module, places: tuple[int, ...], stack: Stack) -> None:
        self.module = module
        self.places = places
        self.stack = stack

    @abstractmethod
    def bind(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """Use these (K, *shape) views from now on, in the order of `places`."""

    def begin(self, start: torch.Tensor | None, clients: int, rows: int) -> None:  # noqa: B027
        """Plain steps of so many clients begin, each of which will see at most so many rows. All begin with `start` as
        the layer's first parameter, which may be kept as `factors` from now on; None: it differs."""

    def write(self) -> None:  # noqa: B027
        """The clients' parameters to their rows, if `factors` are where they are."""

    @abstractmethod
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs of rows (N, ...)."""

    @abstractmethod
    def backward(self, inputs: torch.Tensor, gradient: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        """From the outputs' gradient deal with the parameters' and, if it is `wanted`, return that of the inputs."""


class Through(torch.autograd.Function):
    """A stacked layer as a node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, _token: torch.Tensor, layer: StackedLayer) -> Any:
        """See StackedLayer."""
        ctx.layer = layer
        ctx.save_for_backward(inputs)
        return layer.forward(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """See StackedLayer."""
        (inputs,) = ctx.saved_tensors
        layer: StackedLayer = ctx.layer
        if layer.stack.recorded is not None:
            layer.stack.recorded.append((layer, inputs, gradient))
        return layer.backward(inputs, gradient, ctx.needs_input_grad[0]), None, None
