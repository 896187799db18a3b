"""Per-example gradients by torch.func: the gradient of one example's loss, mapped over the batch.

Takes every model that vmap takes, whatever its layers. Compiled, the map becomes a few fused loops, which is fastest
for small models; but compiling takes seconds for each shape, so batches are padded to a few sizes, with examples that
count nothing.
"""

import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.func import grad, vmap

from fedclaw.privacy.gradients.interface import (
    LARGEST_NORM,
    NORM_MARGIN,
    Clip,
    ClippedSums,
    Loss,
    Products,
    Unsuited,
    add_clipped,
    filled,
    functional,
)
from fedclaw.privacy.gradients.segments import Segments

logger = logging.getLogger(__name__)

Parameters = dict[str, torch.Tensor]
_SMALLEST_PAD = 8


class Vmap(ClippedSums):
    """See ClippedSums."""

    name = "vmap"

    def __init__(self, model: torch.nn.Module, loss: Loss, clip: Clip) -> None:
        super().__init__(model, loss, clip)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._samples = vmap(grad(_loss_of_one(model, loss)), in_dims=(None, None, 0, 0), randomness="different")

    def add(
        self,
        totals: Sequence[torch.Tensor],
        inputs: torch.Tensor,
        targets: torch.Tensor,
        *,
        fresh: bool,
        padding: int = 0,
        products: Products | None = None,
        units: Segments | None = None,
    ) -> None:
        """See ClippedSums."""
        moving, fixed = self._split()
        try:
            samples = self._samples(moving, fixed, inputs, targets)
        except RuntimeError as error:
            raise Unsuited(f"torch.func.vmap says: {_first_line(error)}") from error
        add_clipped(totals, list(samples.values()), self._clip, fresh=fresh, padding=padding, units=units)

    def _split(self) -> tuple[Parameters, Parameters]:
        """The trainable parameters by name, and everything else."""
        moving = {self._names[parameter]: parameter.detach() for parameter in self._parameters}
        fixed = {name: value.detach() for name, value in self._model.named_parameters() if name not in moving}
        return moving, fixed | dict(self._model.named_buffers())


class CompiledVmap(Vmap):
    """See ClippedSums. Becomes eager, with a line in the log, where compiling fails (no C++ compiler, say)."""

    name = "compiled"

    def __init__(self, model: torch.nn.Module, loss: Loss, clip: Clip) -> None:
        super().__init__(model, loss, clip)
        _keep_compiled_code_private()
        self._sums: Callable[..., list[torch.Tensor]] = torch.compile(
            _padded_sums(self._samples, clip), dynamic=False, fullgraph=True
        )
        self._sizes: set[int] = set()

    def add(
        self,
        totals: Sequence[torch.Tensor],
        inputs: torch.Tensor,
        targets: torch.Tensor,
        *,
        fresh: bool,
        padding: int = 0,
        products: Products | None = None,
        units: Segments | None = None,
    ) -> None:
        """See ClippedSums. Raises Unsuited if the model cannot be compiled. Units of several rows are summed by code
        that is not compiled: their sizes are others in each batch."""
        if units is not None:
            super().add(totals, inputs, targets, fresh=fresh, padding=padding, units=units)
            return
        count = len(inputs)
        size = max(_SMALLEST_PAD, 1 << math.ceil(math.log2(count)))
        weights = inputs.new_zeros(size, dtype=torch.float64)
        weights[: count - padding] = 1.0
        moving, fixed = self._split()
        arguments = moving, fixed, filled(inputs, size - count), filled(targets, size - count), weights
        sums = self._sums(*arguments) if size in self._sizes else self._first(size, arguments)
        for total, clipped in zip(totals, sums, strict=True):
            total.copy_(clipped) if fresh else total.add_(clipped)

    def _first(self, size: int, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
        try:
            with torch._inductor.config.patch(compile_threads=1, cpp_cache_precompile_headers=False):
                sums = self._sums(*arguments)
        except Exception as error:  # the compilers behind torch.compile raise whatever they like
            raise Unsuited(f"torch.compile says: {_first_line(error)}") from error
        self._sizes.add(size)
        return sums


def _loss_of_one(model: torch.nn.Module, loss: Loss) -> Callable[..., torch.Tensor]:
    call = functional(model)

    def loss_of_one(moving: Parameters, fixed: Parameters, example: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        inputs = example[None]
        outputs = call(fixed | moving, inputs)
        return loss(inputs, outputs, target[None])

    return loss_of_one


def _padded_sums(samples: Callable[..., Parameters], clip: Clip) -> Callable[..., list[torch.Tensor]]:
    """What `add_clipped` does, without a branch that a compiler could not follow; weights (B,) are 0 for padding."""

    def sums(
        moving: Parameters, fixed: Parameters, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> list[torch.Tensor]:
        rows = [sample.flatten(1).to(torch.float64) for sample in samples(moving, fixed, inputs, targets).values()]
        norms = torch.stack([row.square().sum(1) for row in rows]).sum(0).sqrt()
        counts = (norms <= LARGEST_NORM) & (weights > 0)
        factors = torch.where(counts, (clip.max_norm / (norms * NORM_MARGIN)).clamp(max=1.0) * clip.scale, 0.0)
        summed = [(torch.where(counts[:, None], row, 0.0) * factors[:, None]).sum(0) for row in rows]
        return [total.view_as(value) for total, value in zip(summed, moving.values(), strict=True)]

    return sums


def _keep_compiled_code_private() -> None:
    """Compiled code is loaded from a directory of this process alone: torch's usual one has a name in /tmp that
    another user could have taken before."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        directory = tempfile.TemporaryDirectory(prefix="fedclaw-compiled-")
        _kept.append(directory)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory.name


_kept: list["tempfile.TemporaryDirectory[str]"] = []


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
