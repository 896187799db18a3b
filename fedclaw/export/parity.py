"""The parity check: does an exported model compute what the torch model does, for batches of several sizes?

Legend: N examples, C classes, D input shape without the batch.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedclaw.errors import BundleError
from fedclaw.export.layout import ParityFigures
from fedclaw.learning.workload import Floats

Forward = Callable[[Floats], Sequence[Floats]]
"""A batch (n, *D) to its outputs, each (n, C)."""

BATCH_SIZES = (1, 2, 7, 64)
"""1 and an odd size catch a batch size fixed in the graph; the largest, a kernel that depends on the size."""
ORDINARY = 10.0
"""Up to outputs of this size only the absolute tolerance counts."""
RELATIVE = 1e-5
"""Relative to the largest output: how much float32 results may differ when terms are added in another order (its
machine epsilon is 6e-8). Outputs of 20,000 may differ by 0.004; 1e-4 asks for digits that float32 does not have."""
MAX_EXAMPLES = 4096
"""More inputs take time and add no certainty."""


def compare(reference: Forward, exported: Forward, inputs: Floats) -> ParityFigures:
    """The largest absolute difference over all outputs, for `inputs` (N >= 1, *D) cut into each of `BATCH_SIZES`.

    Inputs are repeated where there are fewer than a batch. Raises BundleError when the number or the shapes of the
    outputs differ, or a value is not finite: a NaN on both sides is no agreement.
    """
    if len(inputs) == 0:
        raise BundleError("the parity check was given no inputs")
    inputs = inputs[:MAX_EXAMPLES]
    largest, scale = 0.0, 0.0
    for batch in _batches(inputs):
        expected, given = reference(batch), exported(batch)
        if len(expected) != len(given):
            raise BundleError(f"the exported model has {len(given)} outputs, the torch model {len(expected)}")
        for left, right in zip(expected, given, strict=True):
            largest = max(largest, _difference(left, right))
            scale = max(scale, float(np.abs(left).max()))
    own = scale if scale > ORDINARY else None
    return ParityFigures(max_abs_diff=largest, examples=len(inputs), batch_sizes=BATCH_SIZES, scale=own)


def allowed(figures: ParityFigures, tolerance: float) -> float:
    """The largest difference allowed: `tolerance`, or `RELATIVE` times the largest output if that is more."""
    return max(tolerance, RELATIVE * (figures.scale or 0.0))


def require(figures: ParityFigures, tolerance: float, form: str) -> None:
    """Raise BundleError when `form` differs from the torch model by more than is `allowed`."""
    bound = allowed(figures, tolerance)
    if figures.max_abs_diff > bound:
        raise BundleError(
            f"{form} differs from the torch model by {figures.max_abs_diff:.3g} on {figures.examples} inputs, "
            f"allowed is {bound:g}; nothing was written (tolerance=… sets another bound)"
        )


def _batches(inputs: Floats) -> Iterator[Floats]:
    for size in BATCH_SIZES[:-1]:
        yield inputs[np.arange(size) % len(inputs)]
    largest = BATCH_SIZES[-1]
    if len(inputs) < largest:
        yield inputs[np.arange(largest) % len(inputs)]
    for start in range(0, len(inputs), largest):
        yield inputs[start : start + largest]


def _difference(left: Floats, right: Floats) -> float:
    if left.shape != right.shape:
        raise BundleError(f"the exported model's output has shape {right.shape}, the torch model's {left.shape}")
    difference = np.abs(left.astype(np.float64) - right.astype(np.float64)).max()
    if not np.isfinite(difference):
        raise BundleError("the outputs of the torch model or of the exported model hold NaN or infinite values")
    return float(difference)
