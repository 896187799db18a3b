"""Which engine clips the gradients of a step: the one that is asked for, or the fastest.

`auto` decides by cost. With few steps ahead it takes book-keeping, which is never far from the best, where that can
take the model, and torch.func's vmap elsewhere. With enough steps ahead that looking pays, each eager engine works off
one made-up batch (zeros of the batch's shape: the choice cannot depend on anybody's data) a few times, and the fastest
is taken. Opacus' hooks are left to those who ask for them and to models that nothing else takes: they are about as fast
as vmap, but do not see a parameter that a model uses otherwise than through its layer. Compiling is tried only if the
steps ahead would last many times longer than it takes.

The engines that hold each example's gradient are here: by Opacus' hooks, or by torch.func, compiled or not. Opacus'
hooks take the most models, and are what the other engines are tested against. torch.func maps the gradient of
one example's loss over the batch, for every model that vmap takes. Compiled, the map becomes a few fused loops, which
is fastest for small models; but compiling takes seconds for each shape, so batches are padded to a few sizes, with
examples that count nothing.
"""

import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch.func import grad, vmap

from fedclaw.errors import PrivacyError
from fedclaw.privacy.gradients.bookkeeping import Bookkeeping
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
    trainable,
)
from fedclaw.privacy.speed import Mode, StepSpeed

logger = logging.getLogger(__name__)

# Opacus' hooks sit on the first layer too, whose inputs need no gradient; that is meant.
warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")

_LEFT_BEHIND = ("activations", "max_batch_len")
# What Opacus leaves on modules when a backward pass was broken off.
_SMALLEST_PAD = 8

Parameters = dict[str, torch.Tensor]


class OpacusHooks(ClippedSums):
    """See ClippedSums."""

    name = "opacus"

    def __init__(self, model: torch.nn.Module, loss: Loss, clip: Clip) -> None:
        super().__init__(model, loss, clip)
        self._hooked: GradSampleModule | None = GradSampleModule(model, batch_first=True, loss_reduction="sum")

    def add(
        self,
        totals: Sequence[torch.Tensor],
        inputs: torch.Tensor,
        targets: torch.Tensor,
        *,
        fresh: bool,
        padding: int = 0,
        products: Products | None = None,
    ) -> None:
        """See ClippedSums."""
        assert self._hooked is not None
        try:
            loss = self._loss(inputs, self._hooked(inputs), targets)
            # Times the number of examples, the gradient of the mean is that of the examples' own losses: not a share of
            # it by their number, which would round otherwise with each more.
            loss.backward(loss.new_full((), len(inputs)))  # type: ignore[no-untyped-call]
            used, samples = [], []
            for total, parameter in zip(totals, self._parameters, strict=True):
                sample: torch.Tensor | None = getattr(parameter, "grad_sample", None)
                # A parameter that the model did not use has none: its sum stays as it is, and gets its noise.
                if sample is not None:
                    used.append(total)
                    samples.append(sample.to(parameter.dtype))
                elif fresh:
                    total.zero_()
            add_clipped(used, samples, self._clip, fresh=fresh, padding=padding)
        finally:
            self._hooked.set_grad_sample_to_none()
            for parameter in self._parameters:
                parameter.grad = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See ClippedSums."""
        assert self._hooked is not None
        self._hooked.disable_hooks()
        try:
            yield
        finally:
            self._hooked.enable_hooks()

    def close(self) -> None:
        """See ClippedSums."""
        if self._hooked is not None:
            for module in self._hooked.to_standard_module().modules():
                for name in _LEFT_BEHIND:
                    module.__dict__.pop(name, None)
            self._hooked = None


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
    ) -> None:
        """See ClippedSums."""
        moving, fixed = self._split()
        try:
            samples = self._samples(moving, fixed, inputs, targets)
        except RuntimeError as error:
            raise Unsuited(f"torch.func.vmap says: {_first_line(error)}") from error
        add_clipped(totals, list(samples.values()), self._clip, fresh=fresh, padding=padding)

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
    ) -> None:
        """See ClippedSums. Raises Unsuited if the model cannot be compiled."""
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


ENGINES: dict[str, type[ClippedSums]] = {
    "bookkeeping": Bookkeeping,
    "opacus": OpacusHooks,
    "vmap": Vmap,
    "compiled": CompiledVmap,
}
"""Every engine by its mode."""
_EAGER: tuple[Mode, ...] = ("bookkeeping", "vmap")
_STEPS_WORTH_LOOKING = 500
_GOES = 4
_SECONDS_WORTH_COMPILING = 120.0
_said: set[tuple[str, str]] = set()
# What the log has been told, so that it is told once and not in every round.


def choose(
    speed: StepSpeed,
    model: torch.nn.Module,
    loss: Loss,
    clip: Clip,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    steps_ahead: int,
) -> ClippedSums:
    """The engine that `speed` asks for, or the next one that can take the model, on `model` now.

    The shapes of a batch's inputs (B, *D) and targets (B, ...), B >= 1, and `steps_ahead` matter for `auto` only.
    """
    if speed.mode != "auto":
        return made(speed.mode, model, loss, clip)
    mode: Mode = "bookkeeping"
    if steps_ahead >= _STEPS_WORTH_LOOKING:
        mode = _fastest(model, loss, clip, torch.zeros_like(inputs), torch.zeros_like(targets), steps_ahead)
    engine = made(mode, model, loss, clip)
    logger.debug("private steps by %s, with %d steps ahead of about %d examples", engine.name, steps_ahead, len(inputs))
    return engine


def made(mode: str, model: torch.nn.Module, loss: Loss, clip: Clip) -> ClippedSums:
    """The engine of that mode, or the next one that can take the model as far as its layers show."""
    if mode not in ENGINES:
        raise PrivacyError(f"no engine of a private step is called {mode!r}; there are: auto, {', '.join(ENGINES)}")
    try:
        return ENGINES[mode](model, loss, clip)
    except Unsuited as reason:
        return instead(mode, reason, model, loss, clip)


def instead(mode: str, reason: Unsuited, model: torch.nn.Module, loss: Loss, clip: Clip) -> ClippedSums:
    """The next engine, when that of `mode` cannot take the model and is off it: vmap, then Opacus' hooks."""
    if mode == "opacus":
        raise reason
    later = "opacus" if mode == "vmap" else "vmap"
    if (mode, str(reason)) not in _said:
        _said.add((mode, str(reason)))
        logger.info("private steps: %s cannot take this model (%s); taking %s", mode, reason, later)
    return made(later, model, loss, clip)


def _fastest(
    model: torch.nn.Module, loss: Loss, clip: Clip, inputs: torch.Tensor, targets: torch.Tensor, steps_ahead: int
) -> Mode:
    with torch.random.fork_rng(devices=[]):
        seconds = {mode: _seconds(mode, model, loss, clip, inputs, targets) for mode in _EAGER}
        best = min(_EAGER, key=lambda mode: seconds[mode])
        if steps_ahead * seconds[best] > _SECONDS_WORTH_COMPILING:
            seconds["compiled"] = _seconds("compiled", model, loss, clip, inputs, targets)
            best = min(best, "compiled", key=lambda mode: seconds[mode])
    logger.debug("private steps: seconds by engine: %s", {mode: round(value, 5) for mode, value in seconds.items()})
    return best


def _seconds(
    mode: Mode, model: torch.nn.Module, loss: Loss, clip: Clip, inputs: torch.Tensor, targets: torch.Tensor
) -> float:
    """Of the faster of a few goes at a made-up batch after the first; infinite if the engine cannot take the model."""
    totals = [torch.empty(p.shape, dtype=torch.float64, device=p.device) for p in trainable(model)]
    times = []
    try:
        with closing(ENGINES[mode](model, loss, clip)) as engine:
            for _ in range(_GOES):
                began = time.perf_counter()
                for start in range(0, len(inputs), engine.chunk_size):
                    part = slice(start, start + engine.chunk_size)
                    engine.add(totals, inputs[part], targets[part], fresh=start == 0)
                times.append(time.perf_counter() - began)
    except Unsuited:
        return math.inf
    return min(times[1:])
