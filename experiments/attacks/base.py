"""What a hostile site may do: train on other data than it has, and send another update than it made.

Legend: d numbers in an update, k updates that the hostile sites know, n sites of a round, m of them hostile.
"""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.learning.workload import Table
from fedclaw.protocol.frozen import Frozen

Vector = NDArray[np.float64]
Knowledge = Literal["hostile", "all"]
"""Whose honest updates of the round the hostile sites know: their own, or everybody's."""


@dataclass(frozen=True)
class Round:
    """What the hostile sites know of one round when they answer."""

    updates: Vector
    """(k, d), honest ones: what those sites' data says of the model."""
    sites: int
    """n."""
    hostile: int
    """m."""


class Attack(Frozen, ABC):
    """Settings of one attack. Either half does nothing unless a kind of attack says otherwise.

    What leaves is well-formed in every case: the site's own weight, examples and receipt, finite float32 arrays of the
    model's shapes. A server cannot tell a hostile answer by its form.
    """

    sites: int = Field(default=1, ge=0)
    """m: how many of the sites are hostile. Which ones, the run's seed decides."""
    poisons: ClassVar[bool] = False
    """Whether it changes a site's training data."""
    forges: ClassVar[bool] = False
    """Whether it changes what a site sends."""

    @property
    def knowledge(self) -> Knowledge:
        """Whose updates `forge` is told; more than the hostile sites' own is what no real attacker has."""
        return "hostile"

    def poison(self, table: Table, labels: int, generator: np.random.Generator) -> Table:
        """What a hostile site trains on in the place of `table`, whose classes are 0 .. labels - 1."""
        return table

    def forge(self, own: Vector, known: Round, generator: np.random.Generator) -> Vector:
        """The delta (d,) that a hostile site sends in the place of its `own`."""
        return own
