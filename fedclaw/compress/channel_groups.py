"""Which channels of which layers can only go together, and how a model becomes narrower without a broken shape.

torch-pruning's dependency graph finds the groups (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning",
sections 3.1 and 3.2). It does not know in which parts a group has to shrink: a normalisation's or a convolution's
groups it sees, the heads of an attention written out in linear layers and a `view` it does not. So each group is tried:
the smallest number of parts is taken with which the model still runs when each loses a channel, and then the smallest
width of a part. A group for which there is none stays as wide as it is.

Legend: D input shape without the batch. Of a group, *parts* must shrink alike; its *width* is the number of channels in
one part, and `parts * width` its layers' channels.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fedclaw.errors import CompressionError, UsageError

PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

Widths = Mapping[str, int]
"""Channels left in each part, by the name of the group's first layer."""
Ranking = Mapping[str, Sequence[int]]
"""By the same name, the places in a part from the least important channel on."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are pruned together."""

    layer: str
    parts: int
    width: int
    least: int = 1
    """The smallest width with which the model runs: 2 where a normalisation would be left with a single number."""

    def removed(self, order: Sequence[int], kept: int) -> list[int]:
        """Indices among all of the layer's output channels that go when `kept` of each part stay."""
        lost = order[: self.width - kept]
        return sorted(part * self.width + index for part in range(self.parts) for index in lost)


@dataclass(frozen=True)
class Traced:
    """A copy of a model with torch-pruning's dependency graph of it (traced through autograd)."""

    model: nn.Module
    graph: Any
    pruning: ModuleType

    def groups(self, output: nn.Module) -> Iterator[tuple[str, Any]]:
        """The prunable groups of all their channels, by their first layer's name; not that of the layer `output`."""
        names = {module: name for name, module in self.model.named_modules()}
        for group in self.graph.get_all_groups(ignored_layers=[output], root_module_types=PRUNABLE):
            yield names[group[0].dep.target.module], group

    def remove(self, name: str, channels: list[int]) -> None:
        """Remove these output channels of a layer, and all that hangs on them."""
        layer = self.model.get_submodule(name)
        prune = self.graph.get_pruner_of_module(layer).prune_out_channels
        with warnings.catch_warnings(action="ignore"):
            self.graph.get_pruning_group(layer, prune, channels).prune()


def trace(model: nn.Module, example: torch.Tensor) -> Traced:
    """A copy of `model` in evaluation mode with its dependency graph.

    Raises UsageError without torch-pruning, and otherwise whatever it raises.
    """
    pruning = _torch_pruning()
    copied = copy.deepcopy(model).eval()
    for parameter in copied.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    with torch.enable_grad(), warnings.catch_warnings(action="ignore"):
        graph = pruning.DependencyGraph().build_dependency(copied, example_inputs=example, verbose=False)
    return Traced(copied, graph, pruning)


def _torch_pruning() -> ModuleType:
    try:
        import torch_pruning
    except ImportError as error:
        raise UsageError("pruning needs torch-pruning: pip install fedclaw[compress]") from error
    module: ModuleType = torch_pruning
    return module


def shrink(
    model: nn.Module, example: torch.Tensor, groups: Mapping[str, ChannelGroup], ranking: Ranking, widths: Widths
) -> nn.Module:
    """A copy of `model` with the given widths; the least important channels of each group are gone."""
    traced = trace(model, example)
    for name, group in groups.items():
        if removed := group.removed(ranking[name], widths[name]):
            traced.remove(name, removed)
    return traced.model


@dataclass(frozen=True)
class FoundGroups:
    """The groups of a model by their first layer's name, and the first layers of those that cannot shrink."""

    groups: dict[str, ChannelGroup]
    kept: tuple[str, ...]


def find_groups(model: nn.Module, example: torch.Tensor) -> FoundGroups:
    """Find and try the groups of `model` (N, *D). Raises CompressionError if there is none that can shrink."""
    traced = trace(model, example)
    shape, groups, kept = _output_shape(traced.model, example), {}, []
    for name, group in traced.groups(output_layer(traced.model, example)):
        found = _tried(model, example, shape, name, group)
        if found is not None:
            groups[name] = found
        else:
            kept.append(name)
    if not groups:
        raise CompressionError(_nothing(kept))
    return FoundGroups(groups, tuple(kept))


def _nothing(kept: Sequence[str]) -> str:
    if not kept:
        return "this architecture cannot be pruned: it has no layer between its inputs and its output layer"
    return (
        f"this architecture cannot be pruned: its layers ({', '.join(kept[:5])}) cannot lose channels, because their "
        "weights are parametrised or the forward pass takes their sizes for granted"
    )


def _tried(model: nn.Module, example: torch.Tensor, shape: torch.Size, name: str, group: Any) -> ChannelGroup | None:
    """The group with the fewest parts with which the model runs; None: it cannot shrink."""
    channels = len(group[0].idxs)
    known = math.lcm(*(_parts(dependency.target.module) for dependency, _ in group))
    step = known if channels % known == 0 else 1
    for parts in range(step, channels // 2 + 1, step):
        candidate = ChannelGroup(name, parts, channels // parts)
        if channels % parts == 0 and _runs_with(model, example, shape, candidate, candidate.width - 1):
            return replace(candidate, least=_least(model, example, shape, candidate))
    return ChannelGroup(name, 1, 1) if channels == 1 else None


def _parts(module: nn.Module | torch.Tensor) -> int:
    """In how many parts a layer needs its channels to shrink alike."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, nn.MultiheadAttention):
        return int(module.num_heads)
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups < module.out_channels:
        return module.groups
    return 1


def _least(model: nn.Module, example: torch.Tensor, shape: torch.Size, group: ChannelGroup) -> int:
    """The smallest width with which the model runs; it does with one channel less."""
    return next(kept for kept in range(1, group.width) if _runs_with(model, example, shape, group, kept))


def _runs_with(model: nn.Module, example: torch.Tensor, shape: torch.Size, group: ChannelGroup, kept: int) -> bool:
    """Whether just the channels that are to go do, and outputs of `shape` come out."""
    try:
        shrunk = shrink(model, example, {group.layer: group}, {group.layer: range(group.width)}, {group.layer: kept})
        left = len(shrunk.get_submodule(group.layer).get_parameter("weight"))
        return left == kept * group.parts and _output_shape(shrunk, example) == shape
    except Exception:  # the library and the forward pass raise whatever they met; then the group does not shrink so
        return False


def _output_shape(model: nn.Module, example: torch.Tensor) -> torch.Size:
    with torch.no_grad():
        shape: torch.Size = model(example).shape
    return shape


def output_layer(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """The last layer with weights that a forward pass goes through. Raises CompressionError if there is none."""
    called = layer_calls(model, example)
    if not called:
        raise CompressionError("the model has no convolution or linear layer, so there is nothing to prune")
    return called[-1][0]


def layer_calls(model: nn.Module, example: torch.Tensor) -> list[tuple[nn.Module, int]]:
    """The prunable layers in the order in which a forward pass calls them, each with how many numbers it gives."""
    called: list[tuple[nn.Module, int]] = []
    layers = [module for module in model.modules() if isinstance(module, PRUNABLE)]
    hooks = [layer.register_forward_hook(lambda of, _, out: called.append((of, out.numel()))) for layer in layers]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return called
