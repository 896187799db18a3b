"""An update on its way, and what may happen to it: the two halves of a postprocessor."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from fedclaw.protocol.arrays import Arrays, Shapes, payload
from fedclaw.protocol.plan import Plan

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource


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


@dataclass(frozen=True)
class SiteContext:
    """What a site hands to its postprocessors beside the update and the plan: none of its data."""

    source: "GaussianSource"
    """Randomness that nobody else knows."""
    state: Mapping[str, Arrays] = field(default_factory=dict)
    """By kind, what the site kept from its last update in this run."""


class Postprocessor(ABC):
    """One kind of processing. Either half may change the update's arrays in place and return them."""

    @abstractmethod
    def at_site(self, update: Update, plan: Plan, context: SiteContext) -> Update:
        """Before the update leaves. What the site is to keep goes into `Update.state`."""

    @abstractmethod
    def at_server(self, total: Update, plan: Plan, shapes: Shapes) -> Update:
        """After all updates were added. Raises UpdateError when the sum cannot be used.

        `shapes` are those of the global parameters.
        """


def is_extra(name: str) -> bool:
    """Whether an update's array is none of a parameter's, but what a strategy adds (`Strategy.extras`)."""
    return name.startswith("~")
