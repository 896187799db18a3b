"""Who was followed for how long, as one histogram that a single noise addition makes differentially private.

    H[g, k, 1]   rows of group g whose event falls into time bin k
    H[g, k, 0]   rows of group g that were last seen in bin k without the event (censored)

Everything about the cells is public: the groups are a column's levels, and bin k holds the times in (ends[k - 1],
ends[k]]. The first bin has no beginning. What is later than the last end was seen without the event up to there,
whatever came afterwards: it is censored in the last bin.

Formal guarantee. A row is in one cell or, where its time, its event or its group is missing, in none. So adding it,
removing it, or replacing it by nothing moves the histogram by at most 1 in the L2 norm: Gaussian noise of standard
deviation z in every cell makes it one Gaussian mechanism with the noise multiplier z. Where the data say whose a row
is, a person's first row alone is used, so that the same holds for a person. The counts are integers up to
where the noise is added, so no rounding makes that larger. What is read off the noised cells
(`fedclaw.privacy.survival_estimates`) is post-processing.

Legend: N rows, G groups, K bins, d = 2 G K cells.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedclaw.privacy.statistics import Doubles, Records

EVERYBODY = "all"
"""The name of the group where nobody is told apart."""


@dataclass(frozen=True)
class SurvivalDesign:
    """Which cell a row is in: made from the schema and the request alone, equal at all sites and at the server."""

    time: str
    """A column of numbers."""
    event: str
    """A column of levels, or the target."""
    code: int
    """Number of the level of `event` that is the event; every other one is censored."""
    ends: tuple[float, ...]
    """(K,), where the bins end."""
    group: str | None = None
    """A column of levels, or the target; None: one group."""
    groups: tuple[str, ...] = (EVERYBODY,)
    """(G,) names."""
    rows_per_person: ClassVar[int] = 1
    """Where the unit is a person, the first row of each is used, however many other statistics use."""
    sensitivity: ClassVar[float] = 1.0
    """How far one unit, there or not, moves the vector in the L2 norm."""

    @property
    def dimension(self) -> int:
        """d."""
        return 2 * len(self.groups) * len(self.ends)

    def vector(self, records: Iterable[Records]) -> Doubles:
        """The histogram, (d,), without noise."""
        total = np.zeros(self.dimension, np.int64)
        for part in records:
            total += np.bincount(self._cells(part), minlength=self.dimension)
        return total.astype(np.float64)

    def cells(self, vector: Doubles) -> Doubles:
        """H, (G, K, 2), of a vector (d,)."""
        return vector.reshape(len(self.groups), len(self.ends), 2)

    def _cells(self, records: Records) -> NDArray[np.int64]:
        """The place in the vector of each row that has one, in [0, d)."""
        time, event = records.columns[self.time], _levels(records, self.event)
        group = np.zeros(len(time)) if self.group is None else _levels(records, self.group)
        known = ~(np.isnan(time) | np.isnan(event) | np.isnan(group))
        time, event, group = time[known], event[known], group[known].astype(np.int64)
        bins = np.minimum(np.searchsorted(self.ends, time, side="left"), len(self.ends) - 1)
        happened = (event == self.code) & (time <= self.ends[-1])
        places: NDArray[np.int64] = (group * len(self.ends) + bins) * 2 + happened
        return places


def _levels(records: Records, name: str) -> Doubles:
    """Numbers of levels, (N,), NaN where missing; of the target, which is never missing, those of the labels."""
    return records.columns[name] if name in records.columns else records.labels.astype(np.float64)
