"""Layers whose every example may have parameters of its own client: one call for all clients of a stack.

A model that treats examples separately can be run on the examples of many clients side by side, as one batch: every
layer without parameters does the same as ever. Only those with parameters have to know whose an example is. They are
batched products here, over segments of clients with equally large batches. Convolutions are products too (windows are
copied side by side first, channels last): for small models that is several times faster than torch's convolutions with
groups, which a plain `vmap` over clients becomes.

Each layer's gradient goes where the stack's `Sink` says. Legend: K clients, N rows, L places a row, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from fedclaw.simulation.packing import Packing, Segment


@dataclass
class Stack:
    """What the layers of one model share: the step that is being taken, and what becomes of the gradients."""

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


class StackedLayer(Protocol):
    """A layer with parameters. `forward` and `backward` see all rows of a step."""

    module: nn.Module
    places: tuple[int, ...]
    """Where its parameters stand among the model's."""

    def bind(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """Use these (K, *shape) views from now on, in the order of `places`."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs of rows (N, ...)."""

    def backward(self, inputs: torch.Tensor, gradient: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        """From the outputs' gradient deal with the parameters' and, if it is `wanted`, return that of the inputs."""


class Through(torch.autograd.Function):
    """A stacked layer as a node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, _token: torch.Tensor, layer: "StackedLayer", stack: Stack) -> Any:
        """See StackedLayer."""
        ctx.layer, ctx.stack = layer, stack
        ctx.save_for_backward(inputs)
        return layer.forward(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        """See StackedLayer."""
        (inputs,) = ctx.saved_tensors
        layer, stack = ctx.layer, ctx.stack
        if stack.recorded is not None:
            stack.recorded.append((layer, inputs, gradient))
        return layer.backward(inputs, gradient, ctx.needs_input_grad[0]), None, None, None


class _Product:
    """y = x W^T + b for rows of clients: what a linear layer and a convolution have in common."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._weight = self._bias = self._weight_gradient = self._bias_gradient = torch.empty(0)
        self._biased = False
        self._parts: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def bind(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """Weights (K, out, in) and biases (K, out)."""
        self._weight, self._weight_gradient = parameters[0], gradients[0]
        self._biased = len(parameters) > 1
        if self._biased:
            self._bias, self._bias_gradient = parameters[1], gradients[1]
        self._parts.clear()

    def forward(self, inputs: torch.Tensor, places: int) -> torch.Tensor:
        """(N * places, in) -> (N * places, out)."""
        outputs = inputs.new_empty(len(inputs), self._weight.shape[1])
        for segment in self._stack.segments:
            weight, bias, *_ = self._part(segment)
            rows = slice(segment.row * places, segment.end * places)
            if segment.clients == 1:
                own = weight[0].t()
                if self._biased:
                    torch.addmm(bias[0], inputs[rows], own, out=outputs[rows])
                else:
                    torch.mm(inputs[rows], own, out=outputs[rows])
                continue
            shape = (segment.clients, segment.size * places, -1)
            ours, theirs = inputs[rows].view(shape), outputs[rows].view(shape)
            if self._biased:
                torch.baddbmm(bias[:, None], ours, weight.transpose(1, 2), out=theirs)
            else:
                torch.bmm(ours, weight.transpose(1, 2), out=theirs)
        return outputs

    def backward(self, inputs: torch.Tensor, gradient: torch.Tensor, places: int, wanted: bool) -> torch.Tensor | None:
        """Gradients of (N * places, out) -> those of the inputs (N * places, in)."""
        back = gradient.new_empty(len(gradient), self._weight.shape[2]) if wanted else None
        for segment in self._stack.segments:
            weight = self._part(segment)[0]
            rows = slice(segment.row * places, segment.end * places)
            shape = (segment.clients, segment.size * places, -1)
            if back is not None:
                if segment.clients == 1:
                    torch.mm(gradient[rows], weight[0], out=back[rows])
                else:
                    torch.bmm(gradient[rows].view(shape), weight, out=back[rows].view(shape))
            if self._stack.recorded is None:
                self._dispose(segment, inputs[rows].view(shape), gradient[rows].view(shape))
        return back

    def _dispose(self, segment: Segment, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Of the parameters' gradients of one segment."""
        weight, bias, weight_gradient, bias_gradient = self._part(segment)
        rate, decay = self._stack.rate, self._stack.decay
        if segment.clients == 1:
            if rate is None:
                torch.mm(gradient[0].t(), inputs[0], out=weight_gradient[0])
            else:
                weight[0].addmm_(gradient[0].t(), inputs[0], beta=decay, alpha=-rate)
        elif rate is None:
            torch.bmm(gradient.transpose(1, 2), inputs, out=weight_gradient)
        else:
            weight.baddbmm_(gradient.transpose(1, 2), inputs, beta=decay, alpha=-rate)
        if self._biased:
            _dispose_sums(self._stack, bias, bias_gradient, gradient)

    def _part(self, segment: Segment) -> tuple[torch.Tensor, ...]:
        key = segment.first, segment.last
        part = self._parts.get(key)
        if part is None:
            cut = slice(*key)
            part = self._parts[key] = (
                self._weight[cut],
                self._bias[cut],
                self._weight_gradient[cut],
                self._bias_gradient[cut],
            )
        return part


def _dispose_sums(stack: Stack, values: torch.Tensor, gradients: torch.Tensor, parts: torch.Tensor) -> None:
    """Of parameters (k, C) whose gradient is the sum of parts (k, ..., C) over the middle."""
    if stack.rate is None:
        torch.sum(parts, 1, out=gradients)
        return
    if stack.decay != 1.0:
        values.mul_(stack.decay)
    values.sub_(parts.sum(1), alpha=stack.rate)


class StackedLinear:
    """A linear layer; inputs (N, ..., in)."""

    def __init__(self, module: nn.Linear, places: tuple[int, ...], stack: Stack) -> None:
        self.module, self.places = module, places
        self._product = _Product(stack)

    def bind(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """See StackedLayer."""
        self._product.bind(parameters, gradients)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """See StackedLayer."""
        places = math.prod(inputs.shape[1:-1])
        outputs = self._product.forward(inputs.reshape(-1, inputs.shape[-1]), places)
        return outputs.view(*inputs.shape[:-1], -1)

    def backward(self, inputs: torch.Tensor, gradient: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        """See StackedLayer."""
        places = math.prod(inputs.shape[1:-1])
        flat = gradient.reshape(-1, gradient.shape[-1])
        back = self._product.backward(inputs.reshape(-1, inputs.shape[-1]), flat, places, wanted)
        return None if back is None else back.view(inputs.shape)


class StackedConvolution:
    """A convolution (groups 1, padded with zeros) in two dimensions; inputs (N, C, H, W), best with channels last.

    Its weights lie in memory as (out, height, width, in): see `ORDER`.
    """

    ORDER = (0, 2, 3, 1)

    def __init__(self, module: nn.Conv2d, places: tuple[int, ...], stack: Stack) -> None:
        self.module, self.places = module, places
        self._product = _Product(stack)
        self._kernel = module.kernel_size
        self._stride, self._padding, self._dilation = module.stride, module.padding, module.dilation
        self._benches: dict[tuple[int, ...], _Bench] = {}

    def bind(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """See StackedLayer."""
        self._product.bind(_as_matrices(parameters), _as_matrices(gradients))
        self._benches.clear()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """See StackedLayer."""
        bench = self._bench(inputs)
        bench.middle.copy_(inputs.permute(0, 2, 3, 1))
        bench.windows.copy_(bench.taken)
        outputs = self._product.forward(bench.columns, math.prod(bench.places))
        return outputs.view(len(inputs), *bench.places, -1).permute(0, 3, 1, 2)

    def backward(self, inputs: torch.Tensor, gradient: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        """See StackedLayer."""
        bench = self._bench(inputs)
        flat = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
        back = self._product.backward(bench.columns, flat, math.prod(bench.places), wanted)
        return None if back is None else bench.gather(back.view(bench.windows.shape))

    def _bench(self, inputs: torch.Tensor) -> "_Bench":
        key = tuple(inputs.shape)
        bench = self._benches.get(key)
        if bench is None:
            if len(self._benches) == _BENCHES_KEPT:
                self._benches.clear()
            bench = self._benches[key] = _Bench(
                inputs, *(_pair(part) for part in (self._kernel, self._stride, self._padding, self._dilation))
            )
        return bench


_BENCHES_KEPT = 32


class _Bench:
    """Memory of a convolution for inputs of one shape: padded inputs (N, H, W, C), and all windows side by side."""

    def __init__(
        self,
        inputs: torch.Tensor,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> None:
        count, channels = inputs.shape[:2]
        sides = [size + 2 * side for size, side in zip(inputs.shape[2:], padding, strict=True)]
        self.places = tuple(
            (side - far * (wide - 1) - 1) // step + 1
            for side, wide, step, far in zip(sides, kernel, stride, dilation, strict=True)
        )
        self._kernel, self._stride, self._dilation = kernel, stride, dilation
        self._padded = inputs.new_zeros(count, *sides, channels)
        self.middle = self._inner(self._padded, inputs.shape[2:], padding)
        one, down, right, _ = self._padded.stride()
        self.taken = self._padded.as_strided(
            (count, *self.places, *kernel, channels),
            (one, down * stride[0], right * stride[1], down * dilation[0], right * dilation[1], 1),
        )
        self.windows = inputs.new_empty(self.taken.shape)
        self.columns = self.windows.view(count * math.prod(self.places), -1)
        self._size, self._padding = inputs.shape[2:], padding

    def gather(self, windows: torch.Tensor) -> torch.Tensor:
        """The gradients of inputs (N, C, H, W) from those of all windows that they were in."""
        padded = torch.zeros_like(self._padded)
        for down in range(self._kernel[0]):
            for right in range(self._kernel[1]):
                first = down * self._dilation[0], right * self._dilation[1]
                ends = [
                    begin + (places - 1) * step + 1
                    for begin, places, step in zip(first, self.places, self._stride, strict=True)
                ]
                part = padded[:, first[0] : ends[0] : self._stride[0], first[1] : ends[1] : self._stride[1]]
                part.add_(windows[:, :, :, down, right])
        return self._inner(padded, self._size, self._padding).permute(0, 3, 1, 2)

    @staticmethod
    def _inner(padded: torch.Tensor, size: Sequence[int], padding: tuple[int, int]) -> torch.Tensor:
        return padded.narrow(1, padding[0], size[0]).narrow(2, padding[1], size[1])


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _as_matrices(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Weights (K, out, in, height, width), which lie in memory as (K, out, height, width, in), as (K, out, numbers)."""
    weight = parts[0].permute(0, 1, 3, 4, 2)
    return [weight.reshape(*weight.shape[:2], -1) if weight.numel() == 0 else weight.flatten(2), *parts[1:]]


class StackedNormalisation:
    """A normalisation over each row with a scale and a shift by channel (GroupNorm) or number (LayerNorm)."""

    def __init__(self, module: nn.GroupNorm | nn.LayerNorm, places: tuple[int, ...], stack: Stack) -> None:
        self.module, self.places = module, places
        self._stack = stack
        self._parameters: Sequence[torch.Tensor] = ()
        self._gradients: Sequence[torch.Tensor] = ()
        self._kept: tuple[torch.Tensor, ...] = ()

    def bind(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """See StackedLayer."""
        self._parameters = [part.flatten(1) for part in parameters]
        self._gradients = [part.flatten(1) for part in gradients]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """See StackedLayer."""
        normal, *self._kept = self._normalise(inputs)
        self._kept = (normal, *self._kept)
        outputs = torch.empty_like(normal)
        ours, theirs = self._last(normal), self._last(outputs)
        for segment in self._stack.segments:
            scale = self._parameters[0][segment.first : segment.last, None]
            rows = slice(segment.row, segment.end)
            part, into = (_by_client(whole[rows], segment) for whole in (ours, theirs))
            if len(self._parameters) > 1:
                shift = self._parameters[1][segment.first : segment.last, None]
                torch.addcmul(shift, part, scale, out=into)
            else:
                torch.mul(part, scale, out=into)
        return outputs

    def backward(self, inputs: torch.Tensor, gradient: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        """See StackedLayer."""
        normal = self._kept[0]
        ours, theirs = self._last(normal), self._last(gradient)
        scaled = torch.empty_like(normal)
        into = self._last(scaled)
        for segment in self._stack.segments:
            rows = slice(segment.row, segment.end)
            part, own, target = (_by_client(whole[rows], segment) for whole in (theirs, ours, into))
            cut = slice(segment.first, segment.last)
            scale = self._parameters[0][cut]
            if wanted:
                torch.mul(part, scale[:, None], out=target)
            if self._stack.recorded is None:
                _dispose_sums(self._stack, scale, self._gradients[0][cut], part * own)
                if len(self._parameters) > 1:
                    _dispose_sums(self._stack, self._parameters[1][cut], self._gradients[1][cut], part)
        return self._back(inputs, scaled) if wanted else None

    def _last(self, values: torch.Tensor) -> torch.Tensor:
        """(N, ...) with what has a scale of its own last, (N, L, numbers)."""
        if isinstance(self.module, nn.LayerNorm):
            return values.reshape(len(values), -1, self.module.weight.numel())
        moved = values.movedim(1, -1)
        return moved.reshape(len(values), -1, values.shape[1])

    def _normalise(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        module = self.module
        if isinstance(module, nn.LayerNorm):
            return torch.native_layer_norm(inputs.contiguous(), module.normalized_shape, None, None, module.eps)
        count, channels, *sizes = inputs.shape
        return torch.native_group_norm(
            inputs, None, None, count, channels, math.prod(sizes), module.num_groups, module.eps
        )

    def _back(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        module, (_, mean, scale) = self.module, self._kept
        if isinstance(module, nn.LayerNorm):
            return torch.ops.aten.native_layer_norm_backward(
                gradient, inputs.contiguous(), module.normalized_shape, mean, scale, None, None, [True, False, False]
            )[0]
        count, channels, *sizes = inputs.shape
        return torch.ops.aten.native_group_norm_backward(
            gradient,
            inputs,
            mean,
            scale,
            None,
            count,
            channels,
            math.prod(sizes),
            module.num_groups,
            [True, False, False],
        )[0]


def _by_client(rows: torch.Tensor, segment: Segment) -> torch.Tensor:
    """(rows, L, C) of a segment as (clients, rows of one x L, C)."""
    return rows.view(segment.clients, -1, rows.shape[-1])


def stacked(module: nn.Module, places: tuple[int, ...], stack: Stack) -> StackedLayer | None:
    """The stacked form of a layer whose parameters stand at `places`; None if there is none."""
    kind = type(module)
    if kind is nn.Linear:
        return StackedLinear(module, places, stack)  # type: ignore[arg-type]
    if kind is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return StackedConvolution(module, places, stack) if plain else None  # type: ignore[arg-type]
    if kind in (nn.GroupNorm, nn.LayerNorm):
        return StackedNormalisation(module, places, stack)  # type: ignore[arg-type]
    return None
