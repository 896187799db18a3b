"""Normalisations over each row whose scale and shift are each client's own."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from fedclaw.learning.stacked.packing import Segment
from fedclaw.learning.stacked.stack import Stack, StackedLayer


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
        return torch.native_group_norm(inputs, None, None, count, channels, math.prod(sizes), norm.num_groups, norm.eps)

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
            gradient,
            inputs,
            self._mean,
            self._root,
            None,
            *(count, channels, math.prod(sizes), norm.num_groups, only),
        )
        return found[0]
