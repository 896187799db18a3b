"""The stacked form of a layer: of a linear one (see `stack`), a convolution or a normalisation.

For a convolution all windows of the inputs are copied side by side first, channels last, and the rest are batched
products. For small models that is several times faster than torch's convolutions with groups, which is what a `vmap`
over clients makes of a convolution. A normalisation is over each row; its scale and shift are each client's own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedclaw.learning.stacked.layout import Segment
from fedclaw.learning.stacked.stack import Product, Stack, StackedLayer, StackedLinear

CHANNELS_LAST = (0, 2, 3, 1)
_BENCHES_KEPT = 64


class StackedConvolution(StackedLayer):
    """A convolution (groups 1, padded with zeros) in two dimensions; inputs (N, C, H, W), best with channels last."""

    order = CHANNELS_LAST

    def __init__(self, module: nn.Conv2d, places: tuple[int, ...], stack: Stack) -> None:
        super().__init__(module, places, stack)
        self._product = Product(stack)
        self._geometry = [_pair(part) for part in (module.kernel_size, module.stride, module.padding, module.dilation)]
        self._benches: dict[torch.Size, _Bench] = {}

    def bind(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """See StackedLayer."""
        self._product.bind(_as_matrices(parameters), _as_matrices(gradients))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """See StackedLayer."""
        bench = self._bench(inputs)
        bench.middle.copy_(inputs.permute(0, 2, 3, 1))
        bench.windows.copy_(bench.taken)
        outputs = self._product.forward(bench.columns, bench.count)
        return outputs.view(len(inputs), *bench.places, -1).permute(0, 3, 1, 2)

    def backward(self, inputs: torch.Tensor, gradient: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        """See StackedLayer. What it returns is good until the next step."""
        bench = self._bench(inputs)
        change = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
        back = bench.changes() if wanted else None
        self._product.backward(bench.columns, change, bench.count, back)
        return bench.gathered() if wanted else None

    def _bench(self, inputs: torch.Tensor) -> "_Bench":
        bench = self._benches.get(inputs.shape)
        if bench is None:
            if len(self._benches) == _BENCHES_KEPT:
                self._benches.clear()
            bench = self._benches[inputs.shape] = _Bench(inputs, *self._geometry)
        return bench


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
        rows, channels = inputs.shape[:2]
        sides = [size + 2 * side for size, side in zip(inputs.shape[2:], padding, strict=True)]
        self.places = [
            (side - far * (wide - 1) - 1) // step + 1
            for side, wide, step, far in zip(sides, kernel, stride, dilation, strict=True)
        ]
        self.count = math.prod(self.places)
        """Places a row."""
        self._padded = inputs.new_zeros(rows, *sides, channels)
        self._inner = [(padding[0], inputs.shape[2]), (padding[1], inputs.shape[3])]
        self.middle = self._middle(self._padded)
        """Where the inputs go, between the padding."""
        one, down, right, _ = self._padded.stride()
        self.taken = self._padded.as_strided(
            (rows, *self.places, *kernel, channels),
            (one, down * stride[0], right * stride[1], down * dilation[0], right * dilation[1], 1),
        )
        """All windows, overlapping."""
        self.windows = inputs.new_empty(self.taken.shape)
        """Where they are copied to."""
        self.columns = self.windows.view(rows * self.count, -1)
        self._geometry = kernel, stride, dilation
        self._changes: torch.Tensor | None = None
        self._sum = torch.empty(0)
        self._targets: list[torch.Tensor] = []
        self._parts: list[torch.Tensor] = []

    def changes(self) -> torch.Tensor:
        """Memory for the gradients of the windows, as `columns` has these."""
        if self._changes is None:
            windows = torch.empty_like(self.windows)
            self._changes = windows.view(self.columns.shape)
            self._sum = torch.zeros_like(self._padded)
            (high, wide), stride, dilation = self._geometry
            for down in range(high):
                for right in range(wide):
                    starts = down * dilation[0], right * dilation[1]
                    rows, columns = (
                        slice(start, start + (places - 1) * step + 1, step)
                        for start, places, step in zip(starts, self.places, stride, strict=True)
                    )
                    self._targets.append(self._sum[:, rows, columns])
                    self._parts.append(windows[:, :, :, down, right])
        return self._changes

    def gathered(self) -> torch.Tensor:
        """The gradients of inputs (N, C, H, W) from `changes`: each from all windows that it was in."""
        self._sum.zero_()
        torch._foreach_add_(self._targets, self._parts)
        return self._middle(self._sum).permute(0, 3, 1, 2)

    def _middle(self, padded: torch.Tensor) -> torch.Tensor:
        return padded.narrow(1, *self._inner[0]).narrow(2, *self._inner[1])


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _as_matrices(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Weights (K, out, in, height, width), which lie in memory as (K, out, height, width, in), as (K, out, numbers)."""
    weight = parts[0].permute(0, 1, 3, 4, 2)
    return [weight.view(*weight.shape[:2], -1), *parts[1:]]


class StackedNormalisation(StackedLayer):
    """A normalisation with a scale and a shift by channel (GroupNorm) or number (LayerNorm)."""

    def __init__(self, module: nn.GroupNorm | nn.LayerNorm, places: tuple[int, ...], stack: Stack) -> None:
        super().__init__(module, places, stack)
        self._norm = module
        self._scale = self._scale_gradient = torch.empty(0)
        self._shift: torch.Tensor | None = None
        self._shift_gradient = torch.empty(0)
        self._normal = self._mean = self._root = torch.empty(0)

    def bind(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """See StackedLayer."""
        (self._scale, *more), (self._scale_gradient, *changes) = (
            [part.flatten(1) for part in parts] for parts in (parameters, gradients)
        )
        self._shift = more[0] if more else None
        self._shift_gradient = changes[0] if changes else torch.empty(0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """See StackedLayer."""
        self._normal, self._mean, self._root = self._normalise(inputs)
        outputs = torch.empty_like(self._normal)
        segments = self.stack.segments
        ours, theirs = (self._by_client(part, segments) for part in (self._normal, outputs))
        for segment, part, into in zip(segments, ours, theirs, strict=True):
            own = slice(segment.first, segment.last)
            if self._shift is None:
                torch.mul(part, self._scale[own, None], out=into)
            else:
                torch.addcmul(self._shift[own, None], part, self._scale[own, None], out=into)
        return outputs

    def backward(self, inputs: torch.Tensor, gradient: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        """See StackedLayer."""
        scaled, segments = torch.empty_like(self._normal), self.stack.segments
        parts = [self._by_client(part, segments) for part in (gradient, self._normal, scaled)]
        for segment, theirs, ours, into in zip(segments, *parts, strict=True):
            own = slice(segment.first, segment.last)
            scale = self._scale[own]
            if wanted:
                torch.mul(theirs, scale[:, None], out=into)
            if self.stack.recorded is None:
                self.stack.dispose_sums(scale, self._scale_gradient[own], theirs * ours)
                if self._shift is not None:
                    self.stack.dispose_sums(self._shift[own], self._shift_gradient[own], theirs)
        return self._back(inputs, scaled) if wanted else None

    def _by_client(self, values: torch.Tensor, segments: Sequence[Segment]) -> list[torch.Tensor]:
        """(N, ...) as (clients, L of all its rows, numbers with a scale of their own), by segment."""
        if isinstance(self._norm, nn.LayerNorm):
            last = values.reshape(len(values), -1, self._scale.shape[1])
        else:
            last = values.movedim(1, -1).reshape(len(values), -1, values.shape[1])
        if len(segments) == 1:
            return [last.view(segments[0].clients, -1, last.shape[-1])]
        parts = torch.split(last, [segment.rows for segment in segments])
        return [part.view(segment.clients, -1, part.shape[-1]) for segment, part in zip(segments, parts, strict=True)]

    def _normalise(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        norm = self._norm
        if isinstance(norm, nn.LayerNorm):
            return torch.native_layer_norm(inputs.contiguous(), list(norm.normalized_shape), None, None, norm.eps)
        count, channels, *sizes = inputs.shape
        normal, mean, root = torch.native_group_norm(
            _as_kernels_take(inputs), None, None, count, channels, math.prod(sizes), norm.num_groups, norm.eps
        )
        # With channels last, as convolutions leave maps: rows of one client are then one after another.
        return normal.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else normal, mean, root

    def _back(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        norm, only = self._norm, [True, False, False]
        found: Sequence[torch.Tensor]
        if isinstance(norm, nn.LayerNorm):
            found = torch.ops.aten.native_layer_norm_backward(
                gradient, inputs.contiguous(), norm.normalized_shape, self._mean, self._root, None, None, only
            )
            return found[0]
        count, channels, *sizes = inputs.shape
        found = torch.ops.aten.native_group_norm_backward(
            _as_kernels_take(gradient),
            _as_kernels_take(inputs),
            self._mean,
            self._root,
            None,
            *(count, channels, math.prod(sizes), norm.num_groups, only),
        )
        return found[0]


def _as_kernels_take(maps: torch.Tensor) -> torch.Tensor:
    """Maps (N, C, ...) as a group normalisation takes them: in any order on the CPU, elsewhere with channels first."""
    return maps if maps.device.type == "cpu" else maps.contiguous()


def stacked(module: nn.Module, places: tuple[int, ...], stack: Stack) -> StackedLayer | None:
    """That of a layer whose parameters stand at `places`; None if there is none."""
    # The very classes: a subclass may do something else.
    if type(module) is nn.Linear:
        return StackedLinear(module, places, stack)
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return StackedConvolution(module, places, stack) if plain else None
    if type(module) is nn.GroupNorm or type(module) is nn.LayerNorm:
        return StackedNormalisation(module, places, stack)
    return None
