"""The vision workload: (N, K, H, W) images of K channels to logits (N, C)."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from fedclaw.clients.models import built, known
from fedclaw.clients.residual import ResNet, ResNetArguments
from fedclaw.errors import PluginError
from fedclaw.learning.workload import Workload
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import ModelSpec

MAX_CHANNELS = 1024
MAX_BLOCKS = 8
MAX_GRID = 8
MAX_HIDDEN = 4096


class CnnArguments(Frozen):
    """Arguments of `cnn`. A site builds what a server names, so the sizes have limits."""

    channels: tuple[Annotated[int, Field(ge=1, le=MAX_CHANNELS)], ...] = Field(
        default=(16, 32), min_length=1, max_length=MAX_BLOCKS
    )
    """Output channels of the blocks; each block halves height and width while both are at least 2."""
    grid: int = Field(default=2, ge=1, le=MAX_GRID)
    """Cells a side, at most, to which the last block's maps are averaged before the linear layers."""
    hidden: int | None = Field(default=None, ge=1, le=MAX_HIDDEN)
    """Width of a hidden linear layer before the head; None: no such layer."""


class ConvolutionBlock(nn.Module):
    """3x3 convolution, group normalisation with one group, ReLU, and a 2x2 maximum where the map is large enough.

    One group: no statistics are shared between examples, which example-level privacy needs (Opacus refuses batch
    normalisation), and any number of channels divides into it, which structured pruning needs.
    """

    def __init__(self, inputs: int, outputs: int, *, halve: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
        self.normalisation = nn.GroupNorm(1, outputs)
        self.pool = nn.MaxPool2d(2) if halve else nn.Identity()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H/2, W/2), rounded down, or with H and W as they were."""
        pooled: torch.Tensor = self.pool(torch.relu(self.normalisation(self.convolution(maps))))
        return pooled


class Cnn(nn.Module):
    """Convolutional blocks, averaging to a small grid, then one or two linear layers."""

    def __init__(self, shape: tuple[int, int, int], arguments: CnnArguments, classes: int) -> None:
        super().__init__()
        inputs, height, width = shape
        blocks = []
        for outputs in arguments.channels:
            halve = min(height, width) >= 2
            blocks.append(ConvolutionBlock(inputs, outputs, halve=halve))
            inputs, height, width = outputs, height >> halve, width >> halve
        cells = (min(height, arguments.grid), min(width, arguments.grid))
        features = inputs * cells[0] * cells[1]
        self.grid = arguments.grid
        self.blocks = nn.ModuleList(blocks)
        self.average = nn.AdaptiveAvgPool2d(cells)
        self.hidden = nn.Linear(features, arguments.hidden) if arguments.hidden else None
        self.head = nn.Linear(arguments.hidden or features, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, K, H, W) -> (N, C)."""
        maps = images
        for block in self.blocks:
            maps = block(maps)
        features = torch.flatten(self.average(maps), 1)
        if self.hidden is not None:
            features = torch.relu(self.hidden(features))
        logits: torch.Tensor = self.head(features)
        return logits


class VisionWorkload(Workload):
    """Models `cnn` and `resnet` for a `VisionSchema`, or any schema whose inputs are (N, K, H, W)."""

    name: ClassVar[str] = "vision"
    models: ClassVar[dict[str, type[CnnArguments] | type[ResNetArguments]]] = {
        "cnn": CnnArguments,
        "resnet": ResNetArguments,
    }

    def default_model(self) -> ModelSpec:
        """`cnn` with its default sizes."""
        return ModelSpec(name="cnn", args=CnnArguments().model_dump(mode="json"))

    def build(self, spec: ModelSpec) -> nn.Module:
        """The named model with fresh weights from torch's generator. Raises PluginError."""
        channels, height, width = self.schema.input_shape
        arguments, classes = known(spec, self.models), len(self.schema.labels)
        if isinstance(arguments, ResNetArguments):
            return built(lambda: ResNet((channels, height, width), arguments, classes))
        return built(lambda: Cnn((channels, height, width), arguments, classes))

    def spec_of(self, model: nn.Module) -> ModelSpec:
        """The spec with the model's present widths. Raises PluginError for a model that is not of this workload."""
        if isinstance(model, ResNet):
            return ModelSpec(name="resnet", args=model.arguments().model_dump(mode="json"))
        if not isinstance(model, Cnn):
            raise PluginError(f"a {type(model).__name__} is no model of the vision workload")
        channels = [block.convolution.weight.shape[0] for block in model.blocks if isinstance(block, ConvolutionBlock)]
        hidden = model.hidden.weight.shape[0] if model.hidden is not None else None
        arguments = CnnArguments(channels=tuple(channels), grid=model.grid, hidden=hidden)
        return ModelSpec(name="cnn", args=arguments.model_dump(mode="json"))
