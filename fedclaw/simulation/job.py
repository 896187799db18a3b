"""What is asked of whoever trains, and what comes back: a round, units of work, and their sums.

A cohort is cut into units by who is in it and by nothing else. A unit's sum is always made in the same order by one
process, and the units' sums are added in the order of the units: so the result does not depend on the number of
processes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.terms import LocalTraining, Plan

State = dict[str, Arrays]
"""What a client remembers of a run, by kind."""

UNIT = 16
"""Clients of a unit, at most."""
FEWEST_UNITS = 2
"""Of a cohort that has as many clients: so that two processes both have something to do."""
STEP_ROWS, CLIENT_ROWS = 32, 8
"""What a step costs besides its rows, in rows: all of it, and each client's matrices, which are read for a few rows.

Measured with small models. They decide how evenly units are cut, nothing else.
"""


@dataclass(frozen=True)
class Round:
    """What a round asks, whoever trains."""

    plan: Plan
    parameters: Mapping[str, NDArray[np.float32]]
    teacher: Mapping[str, NDArray[np.float32]] | None
    broadcast: Mapping[str, Mapping[str, NDArray[np.float32]]]
    template: Mapping[str, tuple[int, ...]]
    """Names and shapes of what an update has, in the order in which they lie in an answer."""
    single: bool
    """Whether every update is wanted by itself."""
    mechanisms: Mapping[int, NoiseEvent | None]
    """By number of examples, what a client that has so many is charged."""


@dataclass
class Answer:
    """A unit's updates: `numbers` (rows, d), one row by client or their sum as the only one, and what belongs to them.

    `clients` are those in it, in the order of the rows.
    """

    numbers: NDArray[np.float32]
    clients: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    payloads: list[int] = field(default_factory=list)
    """Bytes that would leave each of them."""
    memory: dict[int, State] = field(default_factory=dict)
    """By client, what it has begun to remember: the kinds that have changed."""


def units_of(
    clients: Sequence[int], sizes: Sequence[int], training: LocalTraining, shapes: Iterable[Sequence[int]]
) -> list[list[int]]:
    """`clients`, whose numbers of examples are `sizes`, cut into units: the most steps first, of about equal cost.

    `shapes`: those of the model's parameters.
    """
    steps = {client: training.local_steps(size) for client, size in zip(clients, sizes, strict=True)}
    rows = dict(zip(clients, sizes, strict=True))
    order = sorted(clients, key=lambda client: (-steps[client], -rows[client], client))
    count = min(len(order), max(FEWEST_UNITS, -(-len(order) // UNIT)))
    own = CLIENT_ROWS * _in_matrices(shapes)
    costs = {client: steps[client] * (min(training.batch_size, rows[client]) + own) for client in order}
    # A unit takes as many steps as its first client, which has the most.
    units: list[list[int]] = []
    left = sum(costs.values()) + STEP_ROWS * sum(steps[order[i * len(order) // count]] for i in range(count))
    for number in range(count, 1, -1):
        fair, cost = left / number, 0.0
        unit: list[int] = []
        while len(order) >= number:
            more = costs[order[0]] + (0 if unit else STEP_ROWS * steps[order[0]])
            if unit and (cost + more / 2 > fair or len(unit) == UNIT):
                break
            unit.append(order.pop(0))
            cost += more
        left -= cost
        units.append(unit)
    # Usually one more; several when the others have become small for what their clients cost.
    units += [order[start : start + UNIT] for start in range(0, len(order), UNIT)]
    return [unit for unit in units if unit]


def _in_matrices(shapes: Iterable[Sequence[int]]) -> float:
    """The share of a model's numbers that are used once a row, not at many places as those of a convolution."""
    sizes = [(math.prod(shape), len(shape) == 2) for shape in shapes]
    return sum(size for size, is_matrix in sizes if is_matrix) / max(1, sum(size for size, _ in sizes))


def size_of(template: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers arrays of these shapes have."""
    return sum(math.prod(shape) for shape in template.values())
