"""Updates as the integers that secure aggregation adds: rounded to the nearest step, or with a share of the noise."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedclaw.privacy.distributed import Shares
from fedclaw.privacy.fixed_point import Encoding, Vector

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource

log = logging.getLogger(__name__)

_told: set[str] = set()
"""Runs in which it was said that numbers were cut off."""


@dataclass(frozen=True)
class Nearest:
    """No noise: numbers cut off beyond `value_range` and rounded to the nearest step."""

    step: float
    value_range: float

    def encode(self, vector: Vector, source: "GaussianSource") -> NDArray[np.uint32]:
        """(d,) integers modulo 2^32; `source` is not used."""
        return Encoding(self.step).encode_nearest(vector, self.value_range)

    def hides_others(self, vector: Vector) -> bool:
        """Whether what this site adds to a sum could not be known beforehand: a known part hides nobody else's.

        False if all of it is 0 or cut off, or any of it is not finite.
        A server can choose parameters, or have a site keep something, that lead to such an update.
        """
        size = np.abs(vector)
        return bool(np.isfinite(size).all() and ((size > 0) & (size <= self.value_range)).any())


@dataclass(frozen=True)
class WithShare:
    """A site's whole vector, clipped, with its share of the noise."""

    shares: Shares

    def encode(self, vector: Vector, source: "GaussianSource") -> NDArray[np.uint32]:
        """(d,) integers modulo 2^32."""
        return self.shares.encode(vector, source)

    def hides_others(self, vector: Vector) -> bool:
        """Always: the noise does."""
        return True


@dataclass(frozen=True)
class SumWithShare(WithShare):
    """A sum of which one example is a bounded part, with this site's share of the noise; `examples` are all there are
    (None: not known)."""

    examples: int | None = None
    run: str = ""

    def encode(self, vector: Vector, source: "GaussianSource") -> NDArray[np.uint32]:
        """(d,) integers modulo 2^32."""
        encoded, beyond = self.shares.encode_sum(vector, source, self.examples)
        if beyond and self.run not in _told:
            _told.add(self.run)
            log.warning(
                "%d of %d numbers of the update were too large for the secure sum and cut off; in further rounds of "
                "this run that is not said again",
                *(beyond, len(vector)),
            )
        return encoded


Integers = Nearest | WithShare
"""How one site's vector (d,) becomes integers modulo 2^32, with its share of the noise if it brings one."""
