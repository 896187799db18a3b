"""What the stacked layers of one model share, what a stacked layer is, and the product that most of them are.

A model that treats examples separately can be run on the examples of many clients side by side, as one batch: every
layer without parameters does the same as ever. Only those with parameters have to know whose an example is. They are
batched products here, over segments of clients with equally large batches.

At the sizes that are simulated a call costs more than what it computes, so a step that is one segment, as most are,
goes without slicing, and views and memory are kept. Legend: K clients, N rows, L places a row, C channels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedclaw.learning.stacked.factors import FactoredWeight
from fedclaw.learning.stacked.layout import Packing, Segment


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


_OUT_OF_CACHE = 1 << 16
"""Numbers of one client's weight (256 KiB) from which those of several clients do not stay in a core's own cache."""
_WORTH_FACTORING = 1 << 14
"""Numbers of a weight (64 KiB) from which its factors cost less, calls included, as long as they have fewer numbers."""


@dataclass(frozen=True)
class _Part:
    """Views of the parameters and gradients of clients that follow one another; of one client, without its axis."""

    weight: torch.Tensor
    turned: torch.Tensor
    """The weight as the right factor, (k, in, out)."""
    bias: torch.Tensor | None
    """As what is added, (k, 1, out)."""
    biases: torch.Tensor
    weight_gradient: torch.Tensor
    bias_gradient: torch.Tensor


class Product:
    """y = x W^T + b with a W and a b for each client: what a linear layer and a convolution have in common.

    x are rows of clients, `places` for each example.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._weight = self._weight_gradient = torch.empty(0)
        self._bias: torch.Tensor | None = None
        self._bias_gradient: torch.Tensor | None = None
        self._parts: dict[tuple[int, int], _Part] = {}

    def bind(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """Weights (K, out, in) and biases (K, out)."""
        self._weight, self._weight_gradient = parameters[0], gradients[0]
        self._bias, self._bias_gradient = (parameters[1], gradients[1]) if len(parameters) > 1 else (None, None)
        self._parts.clear()

    def forward(self, inputs: torch.Tensor, places: int) -> torch.Tensor:
        """(N * places, in) -> (N * places, out)."""
        segments = self._stack.segments
        if len(segments) == 1:
            return _multiply(inputs, segments[0], self._part(segments[0]))
        parts = torch.split(inputs, [segment.rows * places for segment in segments])
        return torch.cat(
            [_multiply(part, segment, self._part(segment)) for part, segment in zip(parts, segments, strict=True)]
        )

    def backward(self, inputs: torch.Tensor, gradient: torch.Tensor, places: int, into: torch.Tensor | None) -> None:
        """Gradients (N * places, out) -> the parameters' and, where it is wanted, `into`: the inputs' (N * places, in).

        The inputs' first: the parameters may be changed afterwards.
        """
        segments = self._stack.segments
        if len(segments) == 1:
            self._back(segments[0], inputs, gradient, into)
            return
        sizes = [segment.rows * places for segment in segments]
        own, changes = torch.split(inputs, sizes), torch.split(gradient, sizes)
        targets = torch.split(into, sizes) if into is not None else [None] * len(segments)
        for segment, part, change, target in zip(segments, own, changes, targets, strict=True):
            self._back(segment, part, change, target)

    def _back(self, segment: Segment, inputs: torch.Tensor, gradient: torch.Tensor, into: torch.Tensor | None) -> None:
        part, count = self._part(segment), segment.clients
        if count == 1:
            if into is not None:
                torch.mm(gradient, part.weight, out=into)
            if self._stack.recorded is None:
                self._dispose_one(part, inputs, gradient)
            return
        gradient = gradient.view(count, -1, gradient.shape[-1])
        if into is not None and self._stack.rate is not None and part.weight[0].numel() >= _OUT_OF_CACHE:
            self._descend_by_client(part, inputs.view(count, -1, inputs.shape[-1]), gradient, into)
            return
        if into is not None:
            torch.bmm(gradient, part.weight, out=into.view(count, -1, into.shape[-1]))
        if self._stack.recorded is None:
            self._dispose(part, inputs.view(count, -1, inputs.shape[-1]), gradient)

    def _descend_by_client(self, part: _Part, inputs: torch.Tensor, gradient: torch.Tensor, into: torch.Tensor) -> None:
        """What `_back` does, one client after another: a large weight is still in the cache when it is moved.

        For all clients at once each weight comes from memory twice; measured with 10 of a megabyte beside other busy
        processes, 274 us a client against 481.
        """
        stack, back = self._stack, into.view(len(gradient), -1, into.shape[-1])
        assert stack.rate is not None
        for weight, seen, change, target in zip(part.weight, inputs, gradient, back, strict=True):
            torch.mm(change, weight, out=target)
            weight.addmm_(change.t(), seen, beta=stack.decay, alpha=-stack.rate)
        if part.bias is not None:
            stack.dispose_sums(part.biases, part.bias_gradient, gradient)

    def _dispose(self, part: _Part, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Of the parameters' gradients."""
        stack = self._stack
        if stack.rate is None:
            torch.bmm(gradient.transpose(1, 2), inputs, out=part.weight_gradient)
        else:
            part.weight.baddbmm_(gradient.transpose(1, 2), inputs, beta=stack.decay, alpha=-stack.rate)
        if part.bias is not None:
            stack.dispose_sums(part.biases, part.bias_gradient, gradient)

    def _dispose_one(self, part: _Part, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        stack = self._stack
        if stack.rate is None:
            torch.mm(gradient.t(), inputs, out=part.weight_gradient)
        else:
            part.weight.addmm_(gradient.t(), inputs, beta=stack.decay, alpha=-stack.rate)
        if part.bias is not None:
            stack.dispose_sums(part.biases, part.bias_gradient, gradient[None])

    def _part(self, segment: Segment) -> _Part:
        key = segment.first, segment.last
        if key not in self._parts:
            own = slice(*key)
            alone = segment.clients == 1
            weight, change = self._weight[own], self._weight_gradient[own]
            bias = self._bias[own] if self._bias is not None else None
            self._parts[key] = _Part(
                weight=weight[0] if alone else weight,
                turned=weight[0].t() if alone else weight.transpose(1, 2),
                bias=None if bias is None else (bias[0] if alone else bias[:, None]),
                biases=weight if bias is None else bias,
                weight_gradient=change[0] if alone else change,
                bias_gradient=change if self._bias_gradient is None else self._bias_gradient[own],
            )
        return self._parts[key]


def _multiply(inputs: torch.Tensor, segment: Segment, part: _Part) -> torch.Tensor:
    if segment.clients == 1:
        return torch.mm(inputs, part.turned) if part.bias is None else torch.addmm(part.bias, inputs, part.turned)
    rows = inputs.view(segment.clients, -1, inputs.shape[-1])
    found = torch.bmm(rows, part.turned) if part.bias is None else torch.baddbmm(part.bias, rows, part.turned)
    return found.view(len(inputs), -1)


class StackedLinear(StackedLayer):
    """A linear layer; inputs (N, ..., in)."""

    def __init__(self, module: nn.Linear, places: tuple[int, ...], stack: Stack) -> None:
        super().__init__(module, places, stack)
        self._product = Product(stack)
        self._kept: FactoredWeight | None = None
        self._has_bias = module.bias is not None
        self._weights = self._biases = self._bias_gradients = torch.empty(0)

    def bind(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """See StackedLayer."""
        self._product.bind(parameters, gradients)
        self._weights, self._biases, self._bias_gradients = parameters[0], parameters[-1], gradients[-1]

    def begin(self, start: torch.Tensor | None, clients: int, rows: int) -> None:
        """See StackedLayer."""
        self.factors = None
        if start is None or start.numel() < _WORTH_FACTORING or rows * sum(start.shape) > start.numel():
            return
        if self._kept is None or not self._kept.takes(clients, rows):
            self._kept = FactoredWeight(start, clients, rows)
        self._kept.begin(start, clients)
        self.factors = self._kept

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """See StackedLayer."""
        if inputs.dim() == 2:
            inputs, factors = inputs.contiguous(), self._factors_in_use
            return self._product.forward(inputs, 1) if factors is None else self._forward_factored(factors, inputs)
        # How many rows an example has was not known when the factors began.
        self.write()
        outputs = self._product.forward(inputs.reshape(-1, inputs.shape[-1]), math.prod(inputs.shape[1:-1]))
        return outputs.view(*inputs.shape[:-1], -1)

    def backward(self, inputs: torch.Tensor, gradient: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        """See StackedLayer."""
        rows, change = inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        factors = self._factors_in_use
        if factors is not None:
            return self._backward_factored(factors, rows, change, wanted)
        back = torch.empty_like(rows) if wanted else None
        self._product.backward(rows, change, math.prod(inputs.shape[1:-1]), back)
        return None if back is None else back.view(inputs.shape)

    def write(self) -> None:
        """See StackedLayer."""
        if self.factors is not None:
            self.factors.write(self._weights)
            self.factors = None

    @property
    def _factors_in_use(self) -> FactoredWeight | None:
        """None outside of plain steps: gradients are of the rows as they are."""
        return self.factors if self.stack.rate is not None else None

    def _forward_factored(self, factors: FactoredWeight, inputs: torch.Tensor) -> torch.Tensor:
        outputs = factors.forward(inputs, self.stack.segments)
        if self._has_bias:
            for segment in self.stack.segments:
                segment.of(outputs).add_(self._biases[segment.own, None])
        return outputs

    def _backward_factored(
        self, factors: FactoredWeight, rows: torch.Tensor, change: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        stack = self.stack
        assert stack.packing is not None
        assert stack.rate is not None
        back = factors.backward(change, stack.segments) if wanted else None
        factors.descend(rows, change * stack.rate, stack.packing)
        if self._has_bias:
            for segment in stack.segments:
                stack.dispose_sums(self._biases[segment.own], self._bias_gradients[segment.own], segment.of(change))
        return back
