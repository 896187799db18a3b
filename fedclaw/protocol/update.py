"""An update on its way: what a site makes of its training, or a sum of such."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from fedclaw.protocol.arrays import Arrays, payload


@dataclass(frozen=True)
class Update:
    """Parameter deltas by name (float32; float64 while noise on the sum waits to be added), or a sum of them; `weight`
    and `examples` add up as they do.

    `heaviest` is the largest weight of any one site in it, on the scale that the arrays are on.
    """

    arrays: Arrays
    weight: float
    examples: int
    heaviest: float = 1.0
    divisor: float = 1.0
    """At the server: what the arrays have been divided by."""
    clip: float | None = None
    """Where the clipping bound of the next round is to be, if it follows the updates."""
    encoded: Mapping[str, NDArray[Any]] | None = None
    """At a site: the form that travels, where it is another; `arrays` is then what the server will read in it."""
    state: Mapping[str, Arrays] = field(default_factory=dict)
    """At a site: by kind, what it keeps for its next update."""

    @property
    def leaving(self) -> Mapping[str, NDArray[Any]]:
        """What leaves the site."""
        return self.arrays if self.encoded is None else self.encoded

    @property
    def payload(self) -> int:
        """Bytes of the arrays that leave the site."""
        return payload(self.leaving)


def is_extra(name: str) -> bool:
    """Whether an update's array is none of a parameter's, but what a strategy adds (`Strategy.extras`)."""
    return name.startswith("~")
