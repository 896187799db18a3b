"""Structured pruning to a fraction of the parameters, by the weights alone.

torch-pruning's dependency graph (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", sections 3.1 and
3.2) finds which channels of which layers can only go together; a channel's importance is the group's mean L2
magnitude (section 3.3 without the sparse training). No data is looked at, so pruning costs no privacy.

Legend: D input shape without the batch. A *width* is the number of channels that a group of coupled layers has,
counted within one normalisation or convolution group where there are such (they all must shrink alike).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fedclaw.errors import CompressionError, FedClawError, UsageError

PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

Widths = Mapping[str, int]
"""Channels left, by the name of the group's first layer."""

Fits = Callable[[dict[str, int]], bool]
"""Whether a model of these widths is small enough."""


@dataclass(frozen=True)
class Pruned:
    """A pruned copy of a model."""

    model: nn.Module
    widths: dict[str, int]
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class _Group:
    """Channels that are pruned together; `order` lists those of one sub-group from the least important on."""

    layer: str
    repeats: int
    """Number of sub-groups (GroupNorm groups, grouped convolutions) that lose the same channels."""
    order: tuple[int, ...]

    @property
    def width(self) -> int:
        return len(self.order)

    def removed(self, kept: int) -> list[int]:
        """Indices among all of the layer's output channels that go when `kept` of each sub-group stay."""
        lost = self.order[: self.width - kept]
        return sorted(part * self.width + index for part in range(self.repeats) for index in lost)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def prune_to_fraction(model: nn.Module, input_shape: tuple[int, ...], fraction: float) -> Pruned:
    """A copy of `model` (N, *D) -> (N, C) with at most `fraction` of its parameters, and as near as possible.

    Every group of layers loses the same share of its channels; the share is found by bisection over the
    widths that exist, and what the rounding leaves over is given back a channel at a time, first where the largest
    share was cut. The output layer keeps its outputs, and every layer at least one channel.

    Raises:
        UsageError: torch-pruning is not installed, or `fraction` is not between 0 and 1.
        CompressionError: the model cannot become that small (the message has the smallest that it can be), or its
            architecture cannot be pruned.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"fraction={fraction}: the share of parameters to keep lies between 0 and 1")
    pruning = _torch_pruning()
    try:
        return _pruned(pruning, model, input_shape, fraction)
    except FedClawError:
        raise
    except Exception as error:  # torch-pruning raises whatever it meets in an architecture that it does not know
        raise CompressionError(
            f"this architecture cannot be pruned: torch-pruning does not understand one of its layers "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def _pruned(pruning: ModuleType, model: nn.Module, input_shape: tuple[int, ...], fraction: float) -> Pruned:
    example = torch.zeros(1, *input_shape, device=next(model.parameters()).device)
    groups = _groups_of(pruning, model, example)
    before = count_parameters(model)
    target = int(Fraction(fraction).limit_denominator(10**9) * before)

    def shrunk(widths: Widths) -> nn.Module:
        return _shrink(pruning, model, example, groups, widths)

    smallest = count_parameters(shrunk(dict.fromkeys(groups, 1)))
    if smallest > target:
        raise CompressionError(
            f"the model has {before} parameters and cannot be pruned to {fraction:g} of them ({target}): one channel "
            f"a layer leaves {smallest}, which is fraction={_ceil_share(smallest, before)}; ask for at least that"
        )
    widths = _search(groups, lambda candidate: count_parameters(shrunk(candidate)) <= target)
    pruned = shrunk(widths)
    _check_output(model, pruned, example)
    return Pruned(pruned, widths, before, count_parameters(pruned))


def _torch_pruning() -> ModuleType:
    try:
        import torch_pruning
    except ImportError as error:
        raise UsageError("pruning needs torch-pruning: pip install fedclaw[compress]") from error
    module: ModuleType = torch_pruning
    return module


def _groups_of(pruning: ModuleType, model: nn.Module, example: torch.Tensor) -> dict[str, _Group]:
    """The prunable groups by the name of their first layer, each with its channels ranked."""
    copied, graph = _graph_of(pruning, model, example)
    names = {module: name for name, module in copied.named_modules()}
    importance = pruning.importance.GroupMagnitudeImportance(p=2)
    groups = {}
    for group in graph.get_all_groups(ignored_layers=[_output_layer(copied, example)], root_module_types=PRUNABLE):
        repeats = max(_sub_groups(dependency.target.module) for dependency, _ in group)
        scores = importance(group).view(repeats, -1).mean(dim=0)
        order = torch.argsort(scores, stable=True).tolist()
        name = names[group[0].dep.target.module]
        groups[name] = _Group(name, repeats, tuple(order))
    return groups


def _sub_groups(module: Any) -> int:
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups < module.out_channels:
        return module.groups
    return 1


def _shrink(
    pruning: ModuleType, model: nn.Module, example: torch.Tensor, groups: Mapping[str, _Group], widths: Widths
) -> nn.Module:
    """A copy of `model` with the given widths."""
    copied, graph = _graph_of(pruning, model, example)
    for name, group in groups.items():
        removed = group.removed(widths[name])
        if removed:
            layer = copied.get_submodule(name)
            prune = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, prune, removed).prune()
    return copied


def _graph_of(pruning: ModuleType, model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, Any]:
    """A copy of `model`, and torch-pruning's dependency graph of it (traced through autograd)."""
    copied = copy.deepcopy(model).eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        graph = pruning.DependencyGraph().build_dependency(copied, example_inputs=example)
    return copied, graph


def _search(groups: Mapping[str, _Group], fits: Fits) -> dict[str, int]:
    """The largest widths that fit: bisection over the common share, then a channel more where there is room."""
    shares = sorted({Fraction(kept, group.width) for group in groups.values() for kept in range(1, group.width + 1)})

    def at(share: Fraction) -> dict[str, int]:
        return {name: max(1, int(share * group.width)) for name, group in groups.items()}

    low, high = 0, len(shares)  # shares[low] fits (one channel everywhere was tried), shares[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(at(shares[middle])) else (low, middle)
    return _fill(groups, at(shares[low]), fits)


def _fill(groups: Mapping[str, _Group], widths: dict[str, int], fits: Fits) -> dict[str, int]:
    """Give channels back one at a time, first where the largest share was cut, until no group can take one more."""
    open_groups = [name for name in groups if widths[name] < groups[name].width]
    while open_groups:
        name = min(open_groups, key=lambda name: Fraction(widths[name], groups[name].width))
        wider = {**widths, name: widths[name] + 1}
        if fits(wider):
            widths = wider
        if widths is not wider or widths[name] == groups[name].width:
            open_groups.remove(name)
    return widths


def _output_layer(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """The last layer with weights that a forward pass goes through."""
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


def _check_output(model: nn.Module, pruned: nn.Module, example: torch.Tensor) -> None:
    with torch.no_grad():
        expected, got = model(example).shape, pruned(example).shape
    if expected != got:
        raise CompressionError(
            f"pruning changed the shape of the model's output from {tuple(expected)} to {tuple(got)}; "
            "this architecture cannot be pruned"
        )


def _ceil_share(part: int, whole: int) -> float:
    """part / whole, rounded up to four digits: as a fraction it can be asked for."""
    return -(-part * 10_000 // whole) / 10_000
