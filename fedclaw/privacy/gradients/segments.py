"""Rows that lie together and belong to one unit: the sum of a unit's gradients, and that sum's norm from its factors.

The gradients of a unit's rows may cancel, and parameters can be such that rounding is all that is left of the sum. So
`Segments.sums` adds a unit's rows one after another, from the first on, whatever other units there are: the same rows
give the same sum to the last bit.

Legend: B rows, U units.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

_BLOCK_ROWS = 32
"""Rows whose products with one another are worked out together: those of several small units, or of one."""


@dataclass(frozen=True)
class _Block:
    """Rows of whole units, by turn, and which pairs of them belong to one unit; None: all do."""

    rows: slice
    same: torch.Tensor | None


class Segments:
    """The units of a chunk of rows.

    Whatever is said by unit is in descending order of their sizes, in the chunk's order among units of one size.
    """

    def __init__(self, sizes: NDArray[np.int64], padding: int = 0, device: torch.device | None = None) -> None:
        """`sizes` (U,) in the order of the rows, then `padding` units of one row that count nothing."""
        self.sizes = np.concatenate([sizes, np.ones(padding, np.int64)])
        self._device = device
        starts = np.cumsum(self.sizes) - self.sizes
        by_size = np.argsort(-self.sizes, kind="stable")
        self._starts, self._lengths = starts[by_size], self.sizes[by_size]
        places = np.empty(len(by_size), np.int64)
        places[by_size] = np.arange(len(by_size))
        self._place_of_row = self._tensor(np.repeat(places, self.sizes))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def first_rows(self) -> torch.Tensor:
        """(U,): the first row of each unit."""
        return self._tensor(self._starts)

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        """(U, n), float64: the sum of each unit's rows (B, n), added in their order."""
        totals = rows.new_zeros(len(self), rows.shape[1], dtype=torch.float64)
        if rows.device.type == "cpu":
            return totals.index_add_(0, self._place_of_row, rows.to(torch.float64))
        # Elsewhere that adds in any order.
        return self._added_by_turn(totals, rows)

    def _added_by_turn(self, totals: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`totals`, to which the first row of each unit is added, then the second of each that has one, and so on."""
        for turn in self._rows_by_turn:
            totals[: len(turn)].add_(rows.index_select(0, turn))
        return totals

    @cached_property
    def _rows_by_turn(self) -> list[torch.Tensor]:
        longer = np.searchsorted(-self._lengths, -np.arange(self._lengths[0]))
        return [self._tensor(self._starts[:count] + turn) for turn, count in enumerate(longer)]

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """(B,): each row's unit's, of values (U,)."""
        return values[self._place_of_row]

    def rows_of(self, place: int) -> slice:
        """The rows of the unit in that place."""
        start = int(self._starts[place])
        return slice(start, start + int(self._lengths[place]))

    def squared_norms(self, left: torch.Tensor, right: torch.Tensor, constant: float) -> torch.Tensor:
        """(U,): the squared norm of each unit's sum of outer products of rows (B, m) and (B, n), all float64.

        It is the sum of <left_i, left_j> (<right_i, right_j> + constant) over the pairs of rows of a unit, or is worked
        out from the sum itself where a unit has so many rows that this costs less. `constant`: 1 where the rows on the
        left are added too, as the gradient of a bias; 0 where they are not. Off by about 2^-53 of the square of the sum
        of the products' norms, so where products cancel by more than that, without meaning. All numbers are finite.
        """
        by_row = left.new_empty(len(left))
        few = _few(left.shape[1], right.shape[1])
        for block in self._blocks:
            ours, theirs = left[block.rows], right[block.rows]
            if block.same is None and len(ours) > few:
                parts = summed_product(ours, theirs, bias=constant > 0)
                by_row[block.rows] = torch.stack([part.square().sum() for part in parts]).sum() / len(ours)
                continue
            pairs = torch.mm(theirs, theirs.t())
            if constant:
                pairs.add_(constant)
            pairs.mul_(torch.mm(ours, ours.t()))
            if block.same is not None:
                pairs.mul_(block.same)
            torch.sum(pairs, 1, out=by_row[block.rows])
        return self.sums(by_row[:, None])[:, 0].clamp_(min=0.0)

    @cached_property
    def _blocks(self) -> list[_Block]:
        blocks, ends = [], np.cumsum(self.sizes)
        start = unit = 0
        while unit < len(ends):
            after = max(int(np.searchsorted(ends, start + _BLOCK_ROWS, side="right")), unit + 1)
            same = None
            if after > unit + 1:
                owners = np.repeat(np.arange(unit, after), self.sizes[unit:after])
                same = self._tensor((owners[:, None] == owners).astype(np.float64))
            blocks.append(_Block(slice(start, int(ends[after - 1])), same))
            start, unit = int(ends[after - 1]), after
        return blocks

    def _tensor(self, values: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def summed_product(left: torch.Tensor, right: torch.Tensor, *, bias: bool) -> list[torch.Tensor]:
    """The sum (m, n) of outer products of one unit's rows (B, m) and (B, n), then that of the rows on the left if
    `bias`. The same rows give the same sum to the last bit: they are copied, so that they lie in memory alike."""
    ours = left.clone()
    return [torch.mm(ours.t(), right.clone()), *([ours.sum(0)] if bias else [])]


def _few(rows: int, columns: int) -> float:
    """From how many outer products on their sum has fewer numbers to work out than their pairs have."""
    return rows * columns / (rows + columns)
