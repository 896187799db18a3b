"""How fast a private step is; never how private it is.

Settings that a guarantee rests on (clip, noise, rate) are in the plan and in `NoiseEvent`; nothing here reaches either.
Whatever stands here, the step leaves the same clipped sum up to rounding, with the same noise on it.
"""

from typing import Literal

from pydantic import Field

from fedclaw.protocol.frozen import Frozen

Mode = Literal["auto", "opacus", "vmap", "compiled", "bookkeeping"]
"""How each example's gradient is clipped; see `fedclaw.privacy.gradients`."""


class StepSpeed(Frozen):
    """How the clipped sum of a private step is worked out."""

    mode: Mode = "auto"
    """`auto` takes what is fastest for the model, the batch and the number of steps ahead. An engine that cannot take
    the model (bookkeeping), or lacks a C++ compiler (compiled), gives way to the next one, with a line in the log; what
    is compiled takes units of one row alone, so where persons are known `compiled` is vmap."""
    chunk_size: int | None = Field(default=None, ge=1)
    """Examples worked on together, at most (2 and 3 are taken for 4), which bounds memory; None: as many as the
    processor's cache takes. A person with more is worked on alone, so many examples at a time."""
