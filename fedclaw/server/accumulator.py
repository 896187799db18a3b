"""The streaming sum: every answer is added when it arrives and then forgotten."""

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.protocol.arrays import Arrays, all_within
from fedclaw.protocol.update import Update

if TYPE_CHECKING:
    from fedclaw.learning.strategy import Strategy

RobustAggregate = Callable[[NDArray[np.float32], NDArray[np.float64]], NDArray[np.float32]]
"""(updates (n, d), weights (n,)) -> (d,); see `robust_aggregation`."""


def robust_aggregation(strategy: "Strategy", state: Mapping[str, Arrays]) -> RobustAggregate | None:
    """`strategy.robust_aggregate` with the server's `state`; None for a strategy that takes the sum of the updates."""
    if not strategy.needs_single_updates:
        return None
    return lambda updates, weights: strategy.robust_aggregate(updates, weights, state)


class WeightedSum:
    """Sum of `weight x delta` over sites, and of the weights; itself an update of that form.

    Memory: one model, however many sites answer. `add` either adds everything or nothing: an update is checked
    whole before the first element of it is added.
    """

    def __init__(self, template: Mapping[str, NDArray[np.float32]], *, largest: float = np.inf) -> None:
        """`largest`: numbers beyond it are refused; `arrays.LARGEST` for what comes from others."""
        self.largest = largest
        self.arrays: Arrays = {name: np.zeros_like(array) for name, array in template.items()}
        self.weight = 0.0
        self.examples = 0
        self.heaviest = 0.0
        self.count = 0

    def add(self, arrays: Arrays, weight: float, examples: int = 0) -> None:
        """Add one weighted update. Raises UpdateError for wrong names, shapes or weight, NaN or absurd sizes."""
        self.include(Update(arrays, weight, examples, heaviest=weight), 1)

    def include(self, part: Update, count: int) -> None:
        """Add a sum over `count` sites that was made elsewhere. Raises UpdateError as `add` does."""
        self._check(part.arrays, part.weight)
        self._put(part, count)
        self.weight += part.weight
        self.examples += part.examples
        self.heaviest = max(self.heaviest, part.heaviest)
        self.count += count

    def take(self) -> Update:
        """Hand over the sum. Nothing can be added afterwards."""
        arrays, self.arrays = self.arrays, {}
        return Update(arrays, self.weight, self.examples, self.heaviest)

    def _put(self, part: Update, count: int) -> None:
        for name, total in self.arrays.items():
            with np.errstate(over="ignore"):
                np.add(total, part.arrays[name], out=total)

    def _check(self, arrays: Mapping[str, NDArray[np.float32]], weight: float) -> None:
        if not (np.isfinite(weight) and weight > 0):
            raise UpdateError(f"the update's weight is {weight}, expected a positive finite number")
        if arrays.keys() != self.arrays.keys():
            odd = sorted(arrays.keys() ^ self.arrays.keys())
            raise UpdateError(f"the update's parameters are not the model's; missing or unknown: {', '.join(odd)}")
        for name, total in self.arrays.items():
            array = arrays[name]
            if array.shape != total.shape:
                raise UpdateError(f"parameter {name!r} has shape {array.shape}, expected {total.shape}")
            if not all_within(array, self.largest):
                beyond = "" if np.isinf(self.largest) else f", or numbers beyond {self.largest:.3g}"
                raise UpdateError(f"parameter {name!r} holds NaN or infinite values{beyond}")


class UpdateStack(WeightedSum):
    """The same for an algorithm that has to see every update: they are kept, n models in memory, until they are taken.

    What is taken is what `robust_aggregate` makes of the updates (n, d) and their weights (n,), times the sum of the
    weights: a sum, like any other, whose mean is the combination. The updates are ordered by their content, so that
    the result does not depend on who answered first.

    The weights that `robust_aggregate` is given are 1 unless the sites' are `bounded`: nobody can check how many
    examples a site has, and a number that it may choose must not decide.
    """

    def __init__(
        self,
        template: Mapping[str, NDArray[np.float32]],
        robust: RobustAggregate,
        *,
        bounded: bool = False,
        largest: float = np.inf,
    ) -> None:
        """`bounded`: by a cap that the run declares."""
        super().__init__(template, largest=largest)
        self._robust = robust
        self._bounded = bounded
        self._updates: list[NDArray[np.float32]] = []
        self._weights: list[float] = []

    def take(self) -> Update:
        """Hand over the robust aggregate. Raises UpdateError when there are too few updates for it."""
        if self._updates:
            combined = self._robust(*self._in_order()) * np.float32(self.weight)
            start = 0
            for name, array in self.arrays.items():
                self.arrays[name] = combined[start : start + array.size].reshape(array.shape)
                start += array.size
        self._updates, self._weights = [], []
        return super().take()

    def _put(self, part: Update, count: int) -> None:
        """Keep one weighted update."""
        if count != 1:
            raise UpdateError("single updates are wanted here, not a sum of them")
        flat = np.concatenate([part.arrays[name].reshape(-1) for name in self.arrays])
        self._updates.append(np.divide(flat, np.float32(part.weight), dtype=np.float32))
        self._weights.append(part.weight)

    def _in_order(self) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Updates (n, d) and weights (n,). Each update is released as it is copied: at most n + 1 are held."""
        digests = [hashlib.sha256(update.data).digest() for update in self._updates]
        order = sorted(range(self.count), key=lambda position: (digests[position], self._weights[position]))
        stack = np.empty((self.count, self._updates[0].size), np.float32)
        waiting = dict(enumerate(self._updates))
        self._updates = []
        for row, position in enumerate(order):
            stack[row] = waiting.pop(position)
        weights = np.array(self._weights)[order]
        return stack, weights if self._bounded else np.ones_like(weights)
