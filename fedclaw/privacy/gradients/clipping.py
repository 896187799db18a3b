"""From per-example gradients to a clipped sum, in float64.

Why float64, of gradients that are float32. Squares of float32 numbers neither vanish nor overflow in it, so a norm is
right to about 2^-52 a number whatever a model's parameters are, without scaling by the largest entry first; the factor
that a gradient is clipped by, bound / norm / batch, may be as small as 1e-50 and is still an ordinary number, where
float32 would round it up to the next denormal; and a sum of a million clipped gradients is right to 1e-7 of one of
them. So one example moves a sum by at most the bound: what rounding adds is less than what NORM_MARGIN takes off.
"""

from collections.abc import Sequence

import torch

from fedclaw.privacy.gradients.interface import Clip

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
) -> None:
    """Add to `totals`, float64, the sum over the examples of gradients (B, *shape), clipped.

    The last `padding` examples count nothing.
    """
    if not samples:
        return
    rows = [sample.flatten(1).to(torch.float64) for sample in samples]
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows]).norm(2, dim=0)
    overflow = overflows(norms)
    factors = clip_factors(norms, clip, padding, overflow=overflow)
    if overflow:
        rows = [without_overflow(row, norms) for row in rows]
    for total, row in zip(totals, rows, strict=True):
        total.view(-1).addmv_(row.t(), factors, beta=0 if fresh else 1)
