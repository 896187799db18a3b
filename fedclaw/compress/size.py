"""What a model of given widths would have of parameters and multiply-adds, without building it.

A parameter's dimension falls by the same number with each channel that a group loses. So narrowing each group once
tells every size: the product of the dimensions, summed over the parameters; for multiply-adds each weighted with how
many positions of one example it is applied to.

Legend: D input shape without the batch.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import nn

from fedclaw.compress.channel_groups import PRUNABLE, ChannelGroup, Widths, shrink


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one example (1, *D) in linear and convolution layers and in the projections of attentions.

    Biases, norms, activations and the products between tokens are left out.
    """
    example = torch.zeros(1, *input_shape, device=next(model.parameters()).device)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters(remove_duplicate=False)}
    return int(sum(positions * sizes[name] for name, positions in positions_of(model, example).items()))


def positions_of(model: nn.Module, example: torch.Tensor) -> dict[str, Fraction]:
    """How many times each number of a weight is multiplied in a forward pass, by the weight's name."""
    found: defaultdict[str, Fraction] = defaultdict(Fraction)

    def linear(name: str, layer: Any, _: object, __: object, outputs: torch.Tensor) -> None:
        found[f"{name}.weight"] += Fraction(outputs.numel(), len(layer.weight))

    def attention(name: str, layer: Any, given: tuple[Any, ...], named: dict[str, Any], _: object) -> None:
        tensors = [*given[:3], *(named[key] for key in ("query", "key", "value") if key in named)]
        tokens = [tensor.numel() // tensor.shape[-1] for tensor in tensors]
        if layer.in_proj_weight is not None:
            found[f"{name}.in_proj_weight"] += Fraction(sum(tokens), 3)
        else:
            for part, count in zip("qkv", tokens, strict=True):
                found[f"{name}.{part}_proj_weight"] += count
        found[f"{name}.out_proj.weight"] += tokens[0]

    hooks = []
    for name, module in model.named_modules():
        note = attention if isinstance(module, nn.MultiheadAttention) else linear
        if note is attention or isinstance(module, PRUNABLE):
            hooks.append(module.register_forward_hook(partial(note, name), with_kwargs=True))
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(found)


@dataclass(frozen=True)
class Sizes:
    """Every parameter's shape as a function of the widths."""

    full: Widths
    shapes: Mapping[str, torch.Size]
    slopes: Mapping[str, Mapping[str, tuple[int, ...]]]
    """By parameter and group: by how much each dimension falls with a channel less in each part."""
    positions: Mapping[str, Fraction]

    def parameters(self, widths: Widths) -> int:
        """Number of parameters at these widths."""
        return sum(self._numel(name, widths) for name in self.shapes)

    def multiply_adds(self, widths: Widths) -> int:
        """Multiply-adds of one example at these widths; see the function of this name."""
        return int(sum(count * self._numel(name, widths) for name, count in self.positions.items()))

    def _numel(self, name: str, widths: Widths) -> int:
        dims = list(self.shapes[name])
        for group, falls in self.slopes[name].items():
            lost = self.full[group] - widths[group]
            dims = [dim - lost * fall for dim, fall in zip(dims, falls, strict=True)]
        return math.prod(dims)


def measure_sizes(model: nn.Module, example: torch.Tensor, groups: Mapping[str, ChannelGroup]) -> Sizes:
    """Narrow each group of `model` by a channel a part, and see what becomes smaller by how much."""
    full = {name: group.width for name, group in groups.items()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    slopes: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in shapes}
    for name, group in groups.items():
        if group.width < 2:
            continue
        narrowed = shrink(model, example, {name: group}, {name: range(group.width)}, {name: group.width - 1})
        for parameter, tensor in narrowed.named_parameters():
            falls = tuple(old - new for old, new in zip(shapes[parameter], tensor.shape, strict=True))
            if any(falls):
                slopes[parameter][name] = falls
    return Sizes(full, shapes, slopes, positions_of(model, example))
