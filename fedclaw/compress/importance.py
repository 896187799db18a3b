"""How much each channel of a group of coupled layers matters.

Each channel owns numbers of several parameters: those that write it (rows of the layers that give it), those that read
it (columns of the layers that take it) and those that scale it in between (normalisations, depthwise convolutions). The
four importances are made of these, for channel k of a group:

- `magnitude`: sum of |w| over what writes k (Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.1).
- `group_norm`: sum of w^2 over all that k owns (Fang et al. 2023, "DepGraph", section 3.3, without sparse training).
- `taylor`: mean over inputs of (sum of w * dL/dw over what reads k)^2, the squared first-order change of the loss L
  when k alone is removed (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", section 3.1,
  equation 8). Inputs have no labels: the targets are the unpruned model's answers. Of values, whose loss would be zero
  there, the outputs take the place of L.
- `teacher`: the same with L = (sqrt(H) u) . outputs, u of random signs and H the curvature of the distillation loss at
  the unpruned model's outputs. Half its mean is the second-order rise of the distillation loss when k alone is removed;
  the first order vanishes where student and teacher agree (Theis et al. 2018, "Faster gaze prediction with dense
  networks and Fisher pruning", section 2.2; summed over coupled layers before it is squared: Liu et al. 2021, "Group
  Fisher Pruning", section 3.2).

What scales a channel is left out of the last two: with a normalisation it would count the same change again.

Legend: N examples, K outputs, D input shape without the batch, C channels of a group.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fedclaw.compress.channel_groups import ChannelGroup, Traced, output_layer, trace
from fedclaw.compress.pruning_record import Importance
from fedclaw.errors import CompressionError
from fedclaw.learning.tasks.base import Task

TEMPERATURE = 2.0
"""Of the distillation loss that `teacher` and the sensitivity look at: as recovery's."""

Role = Literal["writes", "reads", "scales"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Outputs (1, K) and the unpruned model's (1, K) -> scalar."""


@dataclass(frozen=True)
class Guide:
    """Inputs (N, *D), the unpruned model's outputs (N, K) for them, and what these mean."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    task: Task


@dataclass(frozen=True)
class Share:
    """The numbers of one parameter that each channel of a group owns."""

    parameter: str
    role: Role
    dim: int
    blocks: int
    """Of a grouped convolution's inputs, else 1: `dim` then counts within a block."""
    places: torch.Tensor
    """Along `dim`, a place for each owner."""
    owners: torch.Tensor
    """The channels that own them."""

    def add_to(self, scores: torch.Tensor, values: torch.Tensor) -> None:
        """Add to each channel's score (C,) what it owns of `values`, shaped like the parameter."""
        if self.blocks > 1:
            lined = values.reshape(self.blocks, -1, *values.shape[1:]).movedim(2, 1).flatten(2).sum(2).flatten()
        else:
            lined = values.movedim(self.dim, 0).reshape(values.shape[self.dim], -1).sum(1)
        scores.index_add_(0, self.owners, lined[self.places])


def rank_channels(
    model: nn.Module,
    example: torch.Tensor,
    groups: Mapping[str, ChannelGroup],
    importance: Importance,
    guide: Guide | None,
    seed: int = 0,
) -> dict[str, list[int]]:
    """By group the places in a part, from the least important on; channels of several parts go by their mean.

    Raises CompressionError for an importance that looks at inputs and has none, or that finds nothing in them.
    """
    traced = trace(model, example)
    owned = {name: list(owned_by(traced, group)) for name, group in traced.groups(output_layer(traced.model, example))}
    sizes = {name: group.parts * group.width for name, group in groups.items()}
    if importance in ("magnitude", "group_norm"):
        scores = _by_weights(traced.model, {name: owned[name] for name in groups}, sizes, importance)
    else:
        scores = _by_gradients(traced.model, {name: owned[name] for name in groups}, sizes, importance, guide, seed)
    return {name: _order(scores[name], group) for name, group in groups.items()}


def _order(scores: torch.Tensor, group: ChannelGroup) -> list[int]:
    order: list[int] = torch.argsort(scores.view(group.parts, -1).mean(dim=0), stable=True).tolist()
    return order


Owned = Mapping[str, list[Share]]


def _by_weights(
    model: nn.Module, owned: Owned, sizes: Mapping[str, int], importance: Importance
) -> dict[str, torch.Tensor]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if importance == "magnitude":
        values = {name: tensor.abs() for name, tensor in parameters.items()}
        wanted = {name: _of_role(shares, "writes") for name, shares in owned.items()}
    else:
        values = {name: tensor.square() for name, tensor in parameters.items()}
        wanted = dict(owned)
    return {name: _sum(shares, values, sizes[name]) for name, shares in wanted.items()}


def _of_role(shares: list[Share], role: Role) -> list[Share]:
    """Those of the role; all of them where none has it."""
    return [share for share in shares if share.role == role] or shares


def _sum(shares: list[Share], values: Mapping[str, torch.Tensor], channels: int) -> torch.Tensor:
    scores = torch.zeros(channels, device=next(iter(values.values())).device)
    for share in shares:
        if share.parameter in values:
            share.add_to(scores, values[share.parameter])
    return scores


def _by_gradients(
    model: nn.Module,
    owned: Owned,
    sizes: Mapping[str, int],
    importance: Importance,
    guide: Guide | None,
    seed: int,
) -> dict[str, torch.Tensor]:
    if guide is None:
        raise CompressionError(f"importance={importance} looks at inputs, and none were given")
    readers = {name: _of_role(shares, "reads") for name, shares in owned.items()}
    scores = {name: torch.zeros(sizes[name], device=guide.inputs.device) for name in owned}
    for changes in _changes(model, guide, _loss_of(importance, guide.task, seed)):
        for name, shares in readers.items():
            scores[name] += _sum(shares, changes, sizes[name]).square()
    if not any(score.any() for score in scores.values()):
        raise CompressionError(
            f"importance={importance} finds no channel that matters: the model's outputs do not change on the inputs "
            "that were given"
        )
    return scores


def _changes(model: nn.Module, guide: Guide, loss: Loss) -> Iterator[dict[str, torch.Tensor]]:
    """For each input, w * dL/dw of every parameter that has a gradient."""
    for inputs, outputs in zip(torch.split(guide.inputs, 1), torch.split(guide.outputs, 1), strict=True):
        model.zero_grad()
        with torch.enable_grad():
            loss(model(inputs), outputs).backward()  # type: ignore[no-untyped-call]
        yield {
            name: parameter.detach() * parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def _loss_of(importance: Importance, task: Task, seed: int) -> Loss:
    if importance == "teacher":
        return _curved(task, torch.Generator().manual_seed(seed))
    if task.labels:
        return lambda outputs, wanted: task.loss(outputs, torch.from_numpy(task.answers(wanted)).to(outputs.device))
    return lambda outputs, _: outputs.sum()


def _curved(task: Task, generator: torch.Generator) -> Loss:
    """sqrt(H) u . outputs with H the Hessian of the divergence at the unpruned model's outputs."""

    def loss(outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(_curvature(task, wanted[0].double()))
        signs = 2.0 * torch.randint(2, (len(values),), generator=generator).to(values) - 1.0
        direction = vectors @ (values.clamp(min=0).sqrt() * signs)
        product: torch.Tensor = (outputs[0] * direction.to(outputs)).sum()
        return product

    return loss


def _curvature(task: Task, wanted: torch.Tensor) -> torch.Tensor:
    """(K, K)"""

    def divergence(outputs: torch.Tensor) -> torch.Tensor:
        return task.divergence(outputs[None], wanted[None], TEMPERATURE)

    with torch.enable_grad():
        found: torch.Tensor = torch.autograd.functional.hessian(divergence, wanted)  # type: ignore[no-untyped-call]
    return found


def owned_by(traced: Traced, group: Any) -> Iterator[Share]:
    """What the channels of one of torch-pruning's groups own; see the module's text."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in traced.model.named_parameters()}
    for position, (dependency, places) in enumerate(group):
        owners = group[position].root_idxs
        if any(owner is None for owner in owners):
            continue
        for parameter, role, dim, blocks in _parameters(traced, dependency):
            if parameter in names:
                yield Share(names[parameter], role, dim, blocks, torch.tensor(places), torch.tensor(owners))


def _parameters(traced: Traced, dependency: Any) -> Iterator[tuple[torch.Tensor, Role, int, int]]:
    """The parameters that a dependency shortens: what they do to a channel, the dimension, and the number of blocks."""
    layer = dependency.target.module
    if isinstance(layer, nn.Parameter):
        yield layer, "scales", dependency.target.pruning_dim, 1
    elif isinstance(layer, nn.MultiheadAttention):
        yield from _of_attention(layer)
    elif isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        yield from _of_layer(layer, traced.graph.is_out_channel_pruning_fn(dependency.handler))
    else:
        for name in ("weight", "bias"):
            if isinstance(parameter := getattr(layer, name, None), nn.Parameter):
                yield parameter, "scales", 0, 1


def _of_layer(layer: Any, written: bool) -> Iterator[tuple[torch.Tensor, Role, int, int]]:
    groups = getattr(layer, "groups", 1)
    transposed = getattr(layer, "transposed", False)
    if groups > 1 and groups == layer.in_channels == layer.out_channels:
        yield layer.weight, "scales", 0, 1
    elif written:
        yield layer.weight, "writes", int(transposed), groups if transposed else 1
    else:
        yield layer.weight, "reads", int(not transposed), 1 if transposed else groups
    if written and layer.bias is not None:
        yield layer.bias, "scales", 0, 1


def _of_attention(layer: nn.MultiheadAttention) -> Iterator[tuple[torch.Tensor, Role, int, int]]:
    """Inputs and outputs go together there: a channel reads columns of the projections and writes rows of the last."""
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if isinstance(parameter := getattr(layer, name, None), nn.Parameter):
            yield parameter, "reads", 1, 1
    yield layer.out_proj.weight, "writes", 0, 1
