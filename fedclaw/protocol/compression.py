"""What a run may ask for: one frozen type a method. Imports nothing heavy."""

from typing import Annotated, Literal

from pydantic import Field

from fedclaw.protocol.frozen import Frozen


class HalfPrecision(Frozen):
    """Two bytes a number, rounded to the nearest: `fp16`."""

    method: Literal["fp16"]


class Quantisation(Frozen):
    """One byte a number, or half of one, rounded at random without bias: `stochastic`."""

    method: Literal["int8", "int4"]
    block: int | None = Field(default=256, ge=1, lt=1 << 31)
    """Consecutive numbers of a tensor that share a scale; null: one scale for each tensor."""


class TopK(Frozen):
    """The numbers of largest magnitude, with their positions: `topk`."""

    method: Literal["topk"]
    fraction: float = Field(default=0.05, gt=0, le=1)
    """Share of an update's numbers that is sent."""
    feedback: bool = True
    """Whether a site remembers what it did not send, and adds it to its next update."""


class RandomK(Frozen):
    """The numbers at positions drawn at random, the same at every site: `SharedPositions`."""

    method: Literal["randk"]
    fraction: float = Field(default=0.25, gt=0, le=1)
    """Share of each tensor's numbers that is sent."""
    feedback: bool = False
    """As for `topk`; without it, what is sent is scaled by 1 / fraction, so that it is right in the mean."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Which positions: they follow from it, the round and the tensor's name."""


class PowerSgd(Frozen):
    """Two thin factors of each matrix: `powersgd`."""

    method: Literal["powersgd"]
    rank: int = Field(default=2, ge=1, lt=1 << 31)
    feedback: bool = True
    """As for `topk`."""


Compression = Annotated[HalfPrecision | Quantisation | TopK | RandomK | PowerSgd, Field(discriminator="method")]
"""How updates are compressed on their way to the server."""

_UNDER_MASKS = {
    "fp16": "a masked number has four bytes whatever it was before",
    "int8": "a masked number has four bytes whatever it was before, and each site's scales are its own",
    "int4": "a masked number has four bytes whatever it was before, and each site's scales are its own",
    "topk": "each site sends other positions, which tell about its data, and masks cancel position by position",
    "powersgd": "the product of two factors is no sum of theirs",
}


def check_compression(compression: Compression | None, *, central: bool, secure: bool | None) -> None:
    """Raise ValueError, with the reason, for a compression that would break what a run promises.

    `central`: whether there is noise on the sum over the sites. `secure`: whether updates leave under secure
    aggregation; None: not known.
    """
    if compression is None:
        return
    method = compression.method
    if secure and method in _UNDER_MASKS:
        raise ValueError(
            f"compression={method} does not go with secure aggregation: {_UNDER_MASKS[method]}; take "
            "compression=randk, whose answers add up, or none"
        )
    if not central:
        return
    if not isinstance(compression, RandomK):
        raise ValueError(
            f"compression={method} does not go with noise on the sum: it comes after the clipping, and may enlarge "
            "what was clipped beyond the bound that the noise was made for; take compression=randk "
            "compression.feedback=false"
        )
    if compression.feedback:
        raise ValueError(
            "compression.feedback=true does not go with noise on the sum: what a site remembers of earlier rounds is "
            "not within this round's bound; set compression.feedback=false"
        )
