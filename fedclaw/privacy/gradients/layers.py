"""Each example's own gradient of a layer, from what went into the layer and the gradient of what came out of it.

Legend: B examples; for convolutions C input and O output channels, K numbers in one window (C x kernel), L places that
the kernel goes to.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

Spread = Callable[[torch.Tensor], list[torch.Tensor]]
"""A weighted sum (n,) of rows -> the same in the shapes of the parameters: weight, then bias if there is one."""


class LayerRule(Protocol):
    """How one kind of layer gives each example's gradient."""

    def rows(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """(B, n): each example's gradient of all the layer's parameters, in an order of the rule's own, for inputs
        (B, ...) and the loss's gradient (B, ...) by the layer's output."""

    def spread(self, total: torch.Tensor) -> list[torch.Tensor]:
        """A weighted sum (n,) of such rows in the shapes of the parameters: weight, then bias if there is one."""


class LinearRule:
    """A linear layer that is applied at several places of an example: inputs (B, ..., in), gradient (B, ..., out)."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def rows(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """See LayerRule."""
        places = inputs.flatten(1, -2)
        if self._layer.bias is not None:
            places = functional.pad(places, (0, 1), value=1.0)
        return torch.bmm(gradient.flatten(1, -2).transpose(1, 2), places).flatten(1)

    def spread(self, total: torch.Tensor) -> list[torch.Tensor]:
        """See LayerRule."""
        matrix = total.view(self._layer.out_features, -1)
        bias = [] if self._layer.bias is None else [matrix[:, -1]]
        return [matrix[:, : self._layer.in_features], *bias]


class ConvolutionRule:
    """A convolution without groups, padded with zeros: a matrix product of the gradient with all windows.

    The windows are copied out in one of two orders, whichever copies longer runs: window by window (the kernel's last
    axis with all channels), or kernel cell by kernel cell (the map's last axis). Ones beside them give the gradient of
    the bias. The memory for both is kept, as fresh memory costs more than the copy.
    """

    def __init__(self, layer: "nn.Conv1d | nn.Conv2d | nn.Conv3d") -> None:
        self._layer = layer
        self._kernel = layer.kernel_size
        self._numbers = layer.in_channels * math.prod(layer.kernel_size)
        self._padding = [int(side) for side in layer.padding]
        self._by_window = True
        self._padded = self._windows = torch.empty(0)
        self._made_for: object = None
        self._views: dict[int, _Views] = {}

    def rows(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """See LayerRule."""
        count = inputs.shape[0]
        if (inputs.shape[1:], inputs.dtype, inputs.device) != self._made_for or count > self._padded.shape[0]:
            self._allocate(inputs, gradient.shape[2:])
        views = self._views.get(count)
        if views is None:
            views = self._views[count] = self._make_views(count, inputs.shape[2:], gradient.shape[2:])
        views.inputs.copy_(inputs.movedim(1, -1) if self._by_window else inputs)
        views.windows.copy_(views.taken)
        return torch.bmm(gradient.flatten(2), views.matrix).flatten(1)

    def spread(self, total: torch.Tensor) -> list[torch.Tensor]:
        """See LayerRule."""
        matrix = total.view(self._layer.out_channels, -1)
        weight = matrix[:, : self._numbers]
        if self._by_window:
            weight = weight.view(len(matrix), *self._kernel, self._layer.in_channels).movedim(-1, 1)
        else:
            weight = weight.view(self._layer.weight.shape)
        return [weight] if self._layer.bias is None else [weight, matrix[:, -1]]

    def _allocate(self, inputs: torch.Tensor, places: torch.Size) -> None:
        count, channels = len(inputs), self._layer.in_channels
        self._made_for = inputs.shape[1:], inputs.dtype, inputs.device
        self._views.clear()
        self._by_window = self._kernel[-1] * channels >= places[-1]
        sides = [size + 2 * side for size, side in zip(inputs.shape[2:], self._padding, strict=True)]
        columns = self._numbers + (self._layer.bias is not None)
        if self._by_window:
            self._padded = inputs.new_zeros(count, *sides, channels)
            self._windows = inputs.new_ones(count, math.prod(places), columns)
        else:
            self._padded = inputs.new_zeros(count, channels, *sides)
            self._windows = inputs.new_ones(count, columns, math.prod(places))

    def _make_views(self, count: int, sizes: torch.Size, places: torch.Size) -> "_Views":
        padded, windows = self._padded[:count], self._windows[:count]
        first, strides = (1 if self._by_window else 2), padded.stride()
        middle = padded
        for axis, (side, size) in enumerate(zip(self._padding, sizes, strict=True)):
            middle = middle.narrow(first + axis, side, size)
        steps = [strides[first + axis] * step for axis, step in enumerate(self._layer.stride)]
        taps = [strides[first + axis] * step for axis, step in enumerate(self._layer.dilation)]
        channels = self._layer.in_channels
        if self._by_window:
            shape, order = (count, *places, *self._kernel, channels), (strides[0], *steps, *taps, 1)
            target, matrix = windows[:, :, : self._numbers], windows
        else:
            shape, order = (count, channels, *self._kernel, *places), (*strides[:2], *taps, *steps)
            target, matrix = windows[:, : self._numbers], windows.transpose(1, 2)
        return _Views(middle, padded.as_strided(shape, order), target.view(shape), matrix)


@dataclass(frozen=True)
class _Views:
    """Views of a convolution's memory for one number of examples."""

    inputs: torch.Tensor
    """Where the inputs go, between the padding."""
    taken: torch.Tensor
    """All windows of the padded inputs, overlapping."""
    windows: torch.Tensor
    """Where they are copied to."""
    matrix: torch.Tensor
    """(B, L, K), or K + 1 with the ones."""


class NormalisationRule:
    """A normalisation with a scale and a shift each channel (GroupNorm) or number (LayerNorm)."""

    def __init__(
        self,
        layer: "nn.GroupNorm | nn.LayerNorm",
        normalise: Callable[[torch.Tensor], torch.Tensor],
        total_over: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """`normalise` gives what the layer scales; `total_over` sums (B, ...) to (B, numbers of the scale)."""
        self._layer = layer
        self._normalise = normalise
        self._total_over = total_over

    def rows(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """See LayerRule."""
        scale = self._total_over(self._normalise(inputs).mul_(gradient))
        return scale if self._layer.bias is None else torch.cat([scale, self._total_over(gradient)], 1)

    def spread(self, total: torch.Tensor) -> list[torch.Tensor]:
        """See LayerRule."""
        shape = self._layer.weight.shape
        return [part.view(shape) for part in torch.split(total, shape.numel())]


def group_norm_rule(layer: nn.GroupNorm) -> NormalisationRule:
    """Inputs (B, C, ...)."""
    return NormalisationRule(
        layer,
        lambda inputs: torch.group_norm(inputs, layer.num_groups, eps=layer.eps),
        lambda values: values.flatten(2).sum(2) if values.dim() > 2 else values,
    )


def layer_norm_rule(layer: nn.LayerNorm) -> NormalisationRule:
    """Inputs (B, ..., *normalised shape)."""
    numbers = layer.weight.numel()
    return NormalisationRule(
        layer,
        lambda inputs: functional.layer_norm(inputs, layer.normalized_shape, eps=layer.eps),
        lambda values: values.reshape(len(values), -1, numbers).sum(1),
    )


def rule_for(layer: nn.Module) -> LayerRule | None:
    """The rule of a layer whose parameters are all trainable; None if there is none."""
    kind = type(layer)
    if kind is nn.Linear:
        return LinearRule(layer)  # type: ignore[arg-type]
    if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return ConvolutionRule(layer) if plain else None  # type: ignore[arg-type]
    if kind is nn.GroupNorm:
        return group_norm_rule(layer)  # type: ignore[arg-type]
    return layer_norm_rule(layer) if kind is nn.LayerNorm else None  # type: ignore[arg-type]
