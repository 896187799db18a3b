"""How a stack of clients lies in memory: their parameters, and the rows of the table that each step sees.

Parameters of many clients are rows of one matrix: a step, a delta or a weighted sum is one call, whatever the layers.

The clients are in the order of their steps, the most first, so that those that have finished drop off the end of the
stack: nothing is computed for them. A step's rows lie one after another by client. Clients that follow one another and
have equally large batches are a segment, which one batched product serves. A batch that is a little smaller than its
neighbours' is filled up with rows that count nothing where another segment would cost more than they do.

Legend: K clients, P parameters (tensors) of the model, D numbers in all of them.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.terms import LocalTraining


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

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        orders: Mapping[str, Sequence[int]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`shapes` by name, in the model's order; `orders`: the axes as they lie in memory, where not as they are;
        `device`: where rows are made, None: on the CPU."""
        places, offset = [], 0
        for name, shape in shapes.items():
            order = tuple((orders or {}).get(name, range(len(shape))))
            places.append(Place(name, tuple(shape), order, offset))
            offset += places[-1].numbers
        self.places = tuple(places)
        self.size = offset
        self.device = device or torch.device("cpu")

    @classmethod
    def of(cls, model: nn.Module, orders: Mapping[str, Sequence[int]] | None = None) -> Self:
        """That of a model's parameters, on the device on which they all are."""
        parameters = dict(model.named_parameters())
        device = next((parameter.device for parameter in parameters.values()), None)
        return cls({name: value.shape for name, value in parameters.items()}, orders, device)

    def row(self, arrays: Mapping[str, NDArray[np.float32]], into: torch.Tensor | None = None) -> torch.Tensor:
        """Arrays by name as one row (D,); written to `into` where that is given."""
        row = torch.empty(self.size, device=self.device) if into is None else into
        for place, view in zip(self.places, self.views(row[None]), strict=True):
            array = arrays[place.name]
            view[0].copy_(torch.from_numpy(array if array.flags.writeable else np.array(array)))
        return row

    def arrays(self, row: torch.Tensor) -> Arrays:
        """Copies of what lies in a row (D,), by name."""
        return {
            place.name: np.array(view[0].cpu().numpy(), order="C")
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


Rows = NDArray[np.int64]


class Segment(NamedTuple):
    """Clients `first` to `last` (exclusive) of a stack with `size` rows each, the first of them row `row`."""

    first: int
    last: int
    row: int
    size: int

    @property
    def clients(self) -> int:
        """How many clients."""
        return self.last - self.first

    @property
    def rows(self) -> int:
        """How many rows."""
        return (self.last - self.first) * self.size

    @property
    def own(self) -> slice:
        """Its clients among those of a stack."""
        return slice(self.first, self.last)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """(clients, size, n) of all rows (N, n): a view."""
        return values[self.row : self.row + self.rows].view(self.clients, self.size, -1)


@dataclass(frozen=True)
class Packing:
    """One step of the first `clients` of a stack: rows (N,) of the table, in the order of the segments.

    A client that is in no segment has an empty batch.
    """

    clients: int
    segments: tuple[Segment, ...]
    rows: torch.Tensor
    sizes: tuple[int, ...]
    """By client, the rows that count."""

    @cached_property
    def even(self) -> int | None:
        """The number of rows of every client, if it is the same and all of them count."""
        return self.sizes[0] if self.sizes[0] and len(set(self.sizes)) == 1 else None

    @cached_property
    def weights(self) -> torch.Tensor:
        """(N,) float32: one over the size of the client's batch; 0 for a row that only fills up."""
        weights = np.zeros(len(self.rows), np.float32)
        for segment in self.segments:
            for client in range(segment.first, segment.last):
                start, size = segment.row + (client - segment.first) * segment.size, self.sizes[client]
                weights[start : start + size] = 1 / size
        return torch.from_numpy(weights).to(self.rows.device)

    @cached_property
    def client_of_row(self) -> torch.Tensor:
        """(N,) int64: whose each row is."""
        parts = [torch.arange(segment.first, segment.last).repeat_interleave(segment.size) for segment in self.segments]
        return (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)).to(self.rows.device)


def pack(batches: Sequence[Sequence[Rows]], spare: int = 0, device: torch.device | None = None) -> list[Packing]:
    """The steps of clients with these batches, by client; the one with the most steps first.

    `spare`: rows that may be added to a segment's batches, all in all, to save another segment. `device`: where the
    table is; None: on the CPU.
    """
    counts = [len(own) for own in batches]
    if any(later > earlier for earlier, later in pairwise(counts)):
        raise ValueError("the clients of a stack are in the order of their steps, the most first")
    steps, active = [], len(batches)
    for step in range(counts[0] if counts else 0):
        while counts[active - 1] <= step:
            active -= 1
        steps.append(_packing([own[step] for own in batches[:active]], spare, device))
    return steps


def _packing(now: Sequence[Rows], spare: int, device: torch.device | None) -> Packing:
    sizes = tuple(len(part) for part in now)
    segments = _segments(sizes, spare)
    parts: list[Rows] = []
    for segment in segments:
        for part in now[segment.first : segment.last]:
            parts.append(part)
            if len(part) < segment.size:
                parts.append(np.broadcast_to(part[:1], segment.size - len(part)))
    rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return Packing(len(now), segments, torch.from_numpy(rows).to(device or "cpu"), sizes)


def _segments(sizes: Sequence[int], spare: int) -> tuple[Segment, ...]:
    """Runs of equal sizes; with those that follow filled up, or themselves, for as long as `spare` rows are enough."""
    segments, row, first = [], 0, 0
    while first < len(sizes):
        size, last, total = sizes[first], first + 1, sizes[first]
        while last < len(sizes) and size and sizes[last]:
            larger = max(size, sizes[last])
            if larger * (last + 1 - first) - total - sizes[last] > spare:
                break
            size, total, last = larger, total + sizes[last], last + 1
        if size:
            segments.append(Segment(first, last, row, size))
            row += size * (last - first)
        first = last
    return tuple(segments)


def shuffled(share: Rows, training: LocalTraining, generator: np.random.Generator) -> list[Rows]:
    """The batches of a round without privacy: shuffled epochs over `share`, the last batch of each may be smaller.

    The same as `fedclaw.privacy.steps.shuffled_batches`, from a seeded generator.
    """
    steps, size, count = training.local_steps(len(share)), training.batch_size, len(share)
    if count <= size:
        # One batch an epoch: its order is of no matter.
        return [share] * steps
    batches: list[Rows] = []
    while len(batches) < steps:
        order = share[generator.permutation(count)]
        batches += [order[start : start + size] for start in range(0, count, size)]
    return batches[:steps]
