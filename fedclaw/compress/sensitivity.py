"""How much a model suffers when one group of layers alone is narrowed.

Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.2, prune each layer by itself and look at the
accuracy. Here there are no labels: what is looked at is how far the narrowed model is from the whole one.
"""

from collections.abc import Mapping

import torch
from torch import nn

from fedclaw.compress.channel_groups import ChannelGroup, Ranking, shrink
from fedclaw.compress.importance import TEMPERATURE, Guide
from fedclaw.compress.pruning_record import Narrowed

SHARES = (0.5, 0.25, 0.125)
"""Of a group's width, that are tried."""
BATCH = 256


def measure_sensitivity(
    model: nn.Module, example: torch.Tensor, groups: Mapping[str, ChannelGroup], ranking: Ranking, guide: Guide
) -> dict[str, tuple[Narrowed, ...]]:
    """By group, how well the model agrees with itself once that group alone is narrowed to each of `SHARES`.

    A share that leaves as many channels as the one before it, or all of them, is not measured.
    """
    return {
        name: tuple(
            _narrowed(model, example, group, ranking, kept, guide)
            for kept in sorted({max(group.least, round(share * group.width)) for share in SHARES}, reverse=True)
            if kept < group.width
        )
        for name, group in groups.items()
    }


def _narrowed(
    model: nn.Module, example: torch.Tensor, group: ChannelGroup, ranking: Ranking, kept: int, guide: Guide
) -> Narrowed:
    shrunk = shrink(model, example, {group.layer: group}, ranking, {group.layer: kept})
    with torch.no_grad():
        outputs = torch.cat([shrunk(part) for part in torch.split(guide.inputs, BATCH)])
        divergence = guide.task.divergence(outputs, guide.outputs, TEMPERATURE).item() / len(outputs)
    return Narrowed(
        share=kept / group.width,
        agreement=guide.task.agreement(outputs, guide.outputs),
        divergence=max(0.0, divergence),
    )
