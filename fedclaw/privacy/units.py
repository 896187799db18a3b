"""Whose rows they are: the unit that a guarantee protects is an example (a row) or a person, who may have many rows.

Sampling is over units: `fedclaw.privacy.steps.poisson_batches` chooses among so many, and a batch has all rows of each.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedclaw.errors import PrivacyError

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Units:
    """The rows of a table by unit, wherever they stand in it. Units are counted from 0, by ascending number."""

    order: Indices
    """(N,): the rows, those of the first unit first; a unit's own as they stand in the table."""
    starts: Indices
    """(U + 1,): where the rows of each unit begin in `order`; N at the end."""

    @classmethod
    def of(cls, numbers: ArrayLike) -> "Units":
        """Of `numbers` (N,): whose each row is, as whole numbers that need not be dense. Raises PrivacyError."""
        owners = np.asarray(numbers)
        if owners.ndim != 1 or owners.dtype.kind not in "iu":
            raise PrivacyError("whose rows they are is said by one whole number a row")
        order = np.argsort(owners, kind="stable").astype(np.int64)
        return cls(order, starts_of(owners[order]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> Indices:
        """(U,): how many rows each unit has, at least one."""
        return np.diff(self.starts)

    @property
    def firsts(self) -> Indices:
        """(U,): the first row of each."""
        return self.order[self.starts[:-1]]

    def rows_of(self, units: Indices) -> Indices:
        """All rows of these `units` (K,), one unit after another."""
        sizes = self.sizes[units]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows: Indices = self.order[np.repeat(self.starts[units], sizes) + within]
        return rows


def starts_of(units: ArrayLike) -> Indices:
    """(U + 1,): where each unit begins among rows (B,) that say whose they are, and B. Raises PrivacyError unless a
    unit's rows lie together, with ascending units: one that came twice would be clipped twice."""
    numbers = np.asarray(units)
    if numbers.ndim != 1:
        raise PrivacyError("whose rows they are is said by one number a row")
    if bool((numbers[1:] < numbers[:-1]).any()):
        raise PrivacyError("the rows of a unit have to lie together, with units in ascending order")
    inner = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
    return np.concatenate([np.zeros(1, np.int64), inner, np.full(min(len(numbers), 1), len(numbers))]).astype(np.int64)
