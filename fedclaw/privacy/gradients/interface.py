"""What a clipping engine is: it adds a batch's clipped gradients to totals, and knows nothing of noise.

Clipped sums of float32 gradients are worked out in float64. Squares of float32 numbers neither vanish nor overflow in
it, so a norm is right to about 2^-52 a number whatever a model's parameters are, without scaling by the largest entry
first; the factor that a gradient is clipped by, bound / norm / batch, may be as small as 1e-50 and is still an ordinary
number, where float32 would round it up to the next denormal; and a sum of a million clipped gradients is right to 1e-7
of one of them. So one example moves a sum by at most the bound: what rounding adds is less than what NORM_MARGIN takes
off.

Whether what a guarantee presumes is true of a model and a loss is found out here too, from their structure and a few
examples.

Legend: B examples in a batch, D input shape, P trainable parameters.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch.func import functional_call

from fedclaw.errors import PrivacyError
from fedclaw.privacy.gradients.segments import Segments

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(inputs (B, *D), outputs (B, ...), targets (B, ...)) -> mean loss over the batch, a scalar."""

Products = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""By a parameter's place, float64 factors (out, B) and (B, in) whose product is its clipped sum."""

CACHED_NUMBERS = 1 << 21
"""Per-example gradients held at a time (8 MiB of float32): larger batches are worked off in chunks, which bounds memory
and is faster besides, as they stay in the cache."""
CARD_NUMBERS = 1 << 26
"""The same on another device (256 MiB, and twice that for their float64 form), which is idle with few examples."""


@dataclass(frozen=True)
class Clip:
    """Example i counts with scale min(1, max_norm / ||g_i||), the norm over all parameters together; 0 if its gradient
    is not finite, or its norm is beyond the range of float32."""

    max_norm: float
    scale: float = 1.0


class ClippedSums(ABC):
    """An engine that works out the sum of clipped gradients of a model, which it may put hooks on until `close`."""

    name: ClassVar[str]
    """The speed mode that asks for it."""

    def __init__(self, model: torch.nn.Module, loss: Loss, clip: Clip) -> None:
        """Raises Unsuited for a model that this engine cannot take, as far as its layers show."""
        self._model = model
        self._loss = loss
        self._clip = clip
        self._parameters = trainable(model)
        self._numbers = sum(parameter.numel() for parameter in self._parameters)
        """That one example takes in memory."""

    @property
    def chunk_size(self) -> int:
        """The number of examples to hand over at once, at most, where nobody has set one."""
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._parameters)
        return max(1, (CACHED_NUMBERS if on_cpu else CARD_NUMBERS) // max(1, self._numbers))

    @abstractmethod
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
        """Add the clipped gradients of B >= 1 examples to `totals`: a contiguous tensor a trainable parameter, float64.

        `units`: it is the sum of each unit's gradients that is clipped; None: each example is a unit. `fresh`: what
        `totals` hold is to be overwritten. The last `padding` examples, and units, count nothing. Where `products` is
        given, the engine may put a large total there as its two factors, and leave its place in `totals` as it was;
        whoever gives it has no more examples to add. Leaves nothing in the parameters' `.grad`. Raises Unsuited, before
        it has touched `totals`, if this engine cannot take the model after all.
        """

    def prepare(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:  # noqa: B027
        """Look at the shapes of inputs (B, *D) and targets (B, ...) of a batch, B >= 1; from then on `chunk_size` stays
        what it is. Raises Unsuited if this engine cannot take the model after all."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While it lasts, the model behaves as if nothing had been put on it."""
        yield

    def close(self) -> None:  # noqa: B027
        """Take everything off the model; calling it again does nothing."""


class Unsuited(PrivacyError):
    """A clipping engine cannot take this model; another one can. Its text says why."""


Called = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""(tensors by the name of parameter or buffer, inputs (B, *D)) -> outputs (B, ...)."""


def functional(model: torch.nn.Module) -> Called:
    """`model` with other parameters and buffers in the place of its own, which stay what they are.

    A layer that the model has under two names is filled once: torch's own tying fills it twice, and then puts its
    tensors back in the place of parameters.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    places = {
        f"{prefix}.{own}" if prefix else own: names[id(tensor)]
        for prefix, module in model.named_modules()
        for own, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }

    def call(values: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        placed = {place: values[name] for place, name in places.items()}
        outputs: torch.Tensor = functional_call(model, placed, (inputs,), tie_weights=False)
        return outputs

    return call


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that a step changes, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


NORM_MARGIN = 1 + 1e-6
"""What a clipped gradient stays below the bound by. Rounding to float32, of a sum that is one gradient, takes 2^-24."""
LARGEST_NORM = float(torch.finfo(torch.float32).max)
"""An example whose gradient has a larger norm, or is not finite, counts as zero."""


def filled(rows: torch.Tensor, padding: int) -> torch.Tensor:
    """`rows` (B, ...), then the last of them again `padding` times."""
    return torch.cat([rows, rows[-1:].expand(padding, *rows.shape[1:])])


def clip_factors(norms: torch.Tensor, clip: Clip, padding: int = 0, *, overflow: bool = True) -> torch.Tensor:
    """The factors (B,) of examples with gradient norms (B,), both float64; the last `padding` examples count nothing.

    `overflow` is that of `overflows`: without it all norms are in range. Of an example that counts as zero the factor
    is 0, and the gradient may be anything: see `without_overflow`.
    """
    factors = torch.div(clip.max_norm / NORM_MARGIN, norms).clamp_(max=1.0).mul_(clip.scale)
    if overflow:
        # A comparison with NaN is false.
        factors = torch.where(norms <= LARGEST_NORM, factors, 0.0)
    if padding:
        factors[-padding:] = 0.0
    return factors


def without_overflow(rows: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """`rows` (B, n), overwritten: those of examples that count as zero become 0, as nothing times infinity is NaN."""
    return rows.masked_fill_((norms <= LARGEST_NORM).logical_not_()[:, None], 0.0)


def overflows(norms: torch.Tensor) -> bool:
    """Whether an example of (B,) norms counts as zero."""
    return not float(norms.max()) <= LARGEST_NORM


def add_clipped(
    totals: Sequence[torch.Tensor],
    samples: Sequence[torch.Tensor],
    clip: Clip,
    *,
    fresh: bool = False,
    padding: int = 0,
    units: Segments | None = None,
) -> None:
    """Add to `totals`, float64, the sum over the examples of gradients (B, *shape), clipped; over `units` if there are.

    The last `padding` of them count nothing.
    """
    if not samples:
        return
    flat = [sample.flatten(1) for sample in samples]
    rows = [row.to(torch.float64) if units is None else units.sums(row) for row in flat]
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows]).norm(2, dim=0)
    overflow = overflows(norms)
    factors = clip_factors(norms, clip, padding, overflow=overflow)
    if overflow:
        rows = [without_overflow(row, norms) for row in rows]
    for total, row in zip(totals, rows, strict=True):
        total.view(-1).addmv_(row.t(), factors, beta=0 if fresh else 1)


PROBE = 4
"""Examples that `check_separate` looks at."""
_SAME_LOSS = 1e-3
_SMALLEST, _LARGEST = 1e-30, 1e30
# Bounds far enough from where float32's ordinary numbers end.


def check_settings(clip: float, noise: float, expected: float) -> None:
    """Raise PrivacyError for a clipping bound, noise multiplier or expected batch size outside its range."""
    if not 0 < clip < math.inf:
        raise PrivacyError(f"max_grad_norm is a number above 0, not {clip}")
    if not 0 <= noise < math.inf:
        raise PrivacyError(f"a noise multiplier is a number of at least 0, not {noise}")
    if not 0 < expected < math.inf:
        raise PrivacyError(f"the expected batch size is a number above 0, not {expected}")
    if not _SMALLEST <= min(clip, clip / expected) <= max(clip, clip / expected) <= _LARGEST:
        raise PrivacyError(
            f"max_grad_norm {clip:g} with an expected batch of {expected:g} leaves gradients for which float32 has no "
            "numbers that are fine enough"
        )


def check_model(model: torch.nn.Module) -> None:
    """Raise PrivacyError for a model with layers that mix examples or keep statistics (batch normalisation)."""
    errors = [*ModuleValidator.validate(model, strict=False), *GradSampleModule.validate(module=model, strict=False)]
    if errors:
        first = " ".join(str(errors[0]).split())
        raise PrivacyError(
            f"the model cannot be trained with per-example privacy: {first:.300}; use layers that treat examples "
            "separately and keep no statistics, such as GroupNorm instead of BatchNorm"
        )


def check_separate(model: torch.nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise PrivacyError if two or more examples (B, *D), targets (B, ...) can be seen to influence one another."""
    if inputs.is_floating_point():
        _check_rows(model, inputs)
    with torch.no_grad():
        _check_mean(loss, inputs, model(inputs), targets)


def _check_rows(model: torch.nn.Module, inputs: torch.Tensor) -> None:
    probe = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        first = model(probe)[0]
    if not first.requires_grad:
        return
    (influence,) = torch.autograd.grad(first.sum(), probe, allow_unused=True)
    # Where a weight is infinite, nothing times it is NaN; that is no influence.
    if influence is not None and bool(influence[1:].nan_to_num(0.0).count_nonzero()):
        raise PrivacyError(
            "the model's output for one example depends on other examples of the batch; such a model cannot be "
            "trained with per-example privacy"
        )


def _check_mean(loss: Loss, inputs: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> None:
    count, head = len(inputs), len(inputs) // 3 or 1
    whole = float(loss(inputs, outputs, targets))
    parts = head * float(loss(inputs[:head], outputs[:head], targets[:head]))
    parts += (count - head) * float(loss(inputs[head:], outputs[head:], targets[head:]))
    if not (math.isfinite(whole) and math.isfinite(parts)):
        return
    if abs(whole * count - parts) > _SAME_LOSS * max(count, abs(parts)):
        raise PrivacyError(
            "the loss of a batch is not the mean of its examples' losses (weighted by class or summed, perhaps); "
            "clipping would not bound what one example can do"
        )
