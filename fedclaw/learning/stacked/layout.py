"""Parameters of many clients as rows of one matrix: a step, a delta or a weighted sum is one call, whatever the layers.

Legend: K clients, P parameters (tensors) of the model, D numbers in all of them.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.protocol.arrays import Arrays


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a row, and the order in which its axes lie in memory there."""

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    offset: int

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def stored(self) -> tuple[int, ...]:
        """Its shape in memory."""
        return tuple(self.shape[axis] for axis in self.order)


class Layout:
    """Where each parameter lies in a row of D numbers."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], orders: Mapping[str, Sequence[int]] | None = None) -> None:
        """`shapes` by name, in the model's order; `orders`: the axes as they lie in memory, where not as they are."""
        places, offset = [], 0
        for name, shape in shapes.items():
            order = tuple((orders or {}).get(name, range(len(shape))))
            places.append(Place(name, tuple(shape), order, offset))
            offset += places[-1].numbers
        self.places = tuple(places)
        self.size = offset

    def row(self, arrays: Mapping[str, NDArray[np.float32]], into: torch.Tensor | None = None) -> torch.Tensor:
        """Arrays by name as one row (D,); written to `into` where that is given."""
        row = torch.empty(self.size) if into is None else into
        for place, view in zip(self.places, self.views(row[None]), strict=True):
            array = arrays[place.name]
            view[0].copy_(torch.from_numpy(array if array.flags.writeable else np.array(array)))
        return row

    def arrays(self, row: torch.Tensor) -> Arrays:
        """Copies of what lies in a row (D,), by name."""
        return {
            place.name: np.array(view[0].numpy(), order="C")
            for place, view in zip(self.places, self.views(row[None]), strict=True)
        }

    def views(self, stack: torch.Tensor) -> list[torch.Tensor]:
        """Views (K, *shape), one a parameter, of rows (K, D)."""
        count = len(stack)
        views = []
        for place in self.places:
            part = stack[:, place.offset : place.offset + place.numbers].view(count, *place.stored)
            back = sorted(range(len(place.order)), key=place.order.__getitem__)
            views.append(part.permute(0, *(axis + 1 for axis in back)))
        return views

    def runs(self, without: Container[int]) -> list[slice]:
        """All numbers of a row but those of the parameters at these places, as few slices as there can be."""
        runs: list[slice] = []
        for number, place in enumerate(self.places):
            if number in without:
                continue
            joins = bool(runs) and runs[-1].stop == place.offset
            first = runs.pop().start if joins else place.offset
            runs.append(slice(first, place.offset + place.numbers))
        return runs
