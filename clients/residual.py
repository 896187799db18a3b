"""A residual network with group normalisation, small enough for images of a few dozen pixels a side.

He et al. 2016, "Deep Residual Learning for Image Recognition", section 3.3, with group normalisation in one group in
the place of batch normalisation: no statistics are shared between examples, which example-level privacy needs, and any
number of channels divides into it, which structured pruning needs.
"""

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from fedclaw.protocol.frozen import Frozen

MAX_CHANNELS = 1024
MAX_STAGES = 6
MAX_BLOCKS = 16

Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]


class ResNetArguments(Frozen):
    """Arguments of `resnet`. A site builds what a server names, so the sizes have limits."""

    channels: tuple[Channels, ...] = Field(default=(16, 32, 46), min_length=1, max_length=MAX_STAGES)
    """Channels of the maps in each stage; each stage but the first halves height and width while both are at least 2.
    By default 115,234 parameters for ten classes of grey images."""
    blocks: tuple[tuple[Channels, ...], ...] | None = None
    """For each stage, the channels between the two convolutions of each of its blocks; None: two blocks of the stage's
    own channels."""

    @model_validator(mode="after")
    def _blocks_of_each_stage(self) -> Self:
        if self.blocks is None:
            return self
        if len(self.blocks) != len(self.channels):
            raise ValueError(f"blocks: {len(self.blocks)} stages, and channels names {len(self.channels)}")
        if not all(1 <= len(stage) <= MAX_BLOCKS for stage in self.blocks):
            raise ValueError(f"blocks: a stage has 1 to {MAX_BLOCKS} blocks")
        return self

    @property
    def inner(self) -> tuple[tuple[int, ...], ...]:
        """`blocks`, written out."""
        return self.blocks if self.blocks is not None else tuple((width, width) for width in self.channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation, added to their input.

    Where the number of channels changes or the map is halved, the input goes through a 1x1 convolution first.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, *, halve: bool, widen: bool) -> None:
        super().__init__()
        stride = 2 if halve else 1
        self.first = nn.Conv2d(inputs, inner, kernel_size=3, stride=stride, padding=1, bias=False)
        self.first_normalisation = nn.GroupNorm(1, inner)
        self.second = nn.Conv2d(inner, outputs, kernel_size=3, padding=1, bias=False)
        self.second_normalisation = nn.GroupNorm(1, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False) if widen else nn.Identity()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W), or with H and W halved, rounded up."""
        inner = torch.relu(self.first_normalisation(self.first(maps)))
        added: torch.Tensor = self.second_normalisation(self.second(inner)) + self.shortcut(maps)
        return torch.relu(added)


class ResNet(nn.Module):
    """A convolution, stages of residual blocks, the mean over the map, and a linear layer."""

    def __init__(self, shape: tuple[int, int, int], arguments: ResNetArguments, classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        inputs = arguments.channels[0]
        self.stem = nn.Conv2d(channels, inputs, kernel_size=3, padding=1, bias=False)
        self.stem_normalisation = nn.GroupNorm(1, inputs)
        stages = []
        for number, (outputs, inner) in enumerate(zip(arguments.channels, arguments.inner, strict=True)):
            blocks = []
            for place, between in enumerate(inner):
                # The first block of every stage but the first has a shortcut of its own, whatever its widths: so a
                # pruned network, two of whose stages may have become equally wide, is built with the same layers.
                begins = number > 0 and place == 0
                halve = begins and min(height, width) >= 2
                blocks.append(ResidualBlock(inputs, between, outputs, halve=halve, widen=begins))
                inputs = outputs
                if halve:
                    height, width = -(-height // 2), -(-width // 2)
            stages.append(nn.ModuleList(blocks))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, K, H, W) -> (N, C)."""
        maps = torch.relu(self.stem_normalisation(self.stem(images)))
        for blocks in self.stages:
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                maps = block(maps)
        logits: torch.Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits

    def arguments(self) -> ResNetArguments:
        """The arguments that give a network of the present widths."""
        stages = [
            [block for block in stage if isinstance(block, ResidualBlock)]
            for stage in self.stages
            if isinstance(stage, nn.ModuleList)
        ]
        return ResNetArguments(
            channels=tuple(stage[-1].second.weight.shape[0] for stage in stages),
            blocks=tuple(tuple(block.first.weight.shape[0] for block in stage) for stage in stages),
        )
