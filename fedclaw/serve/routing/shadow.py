"""Requests that a second version sees too: which ones, at what cost, and whether it answers the same.

A share of the keys is mirrored (`RoutingPlan.mirror`). A mirrored request is asked of the other version by a task of
its own once the answer is there; while `limit` of them are at work, it is not mirrored at all. So a mirror delays no
answer and fails none. Nobody is answered from it.

Two answers agree in a row if both refuse it, or both answer it with the same label (without labels: the same likeliest
class). Values agree where both are numbers, and with a `tolerance` where they differ by no more. One row of a request,
drawn by lot, stands for it in the test, whose rate is that of rows: a request of a thousand rows weighs no more
than another.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.learning.preprocessing import LABEL, REFUSED
from fedclaw.serve.requests import InferenceResponse

log = logging.getLogger(__name__)

PROBABILITIES = "probabilities"
"""Output of a classifier's pipeline (docs/bundle.md)."""


@dataclass(frozen=True, slots=True)
class OutputComparison:
    """How two versions answered the same rows."""

    rows: int
    labels_differ: int
    """Rows that both answer, with different labels."""
    refused_differ: int
    """Rows that one refuses and the other answers."""
    largest_difference: float
    """Of probabilities or values, over rows that both answer."""
    agrees: bool
    """In the row that was drawn."""


def compare(
    answered: InferenceResponse, mirrored: InferenceResponse, draw: float, tolerance: float | None = None
) -> OutputComparison:
    """Compare answers to the same rows. `draw`, uniform in [0, 1), says which row stands for the request.

    Outputs of other names or shapes agree nowhere: the versions are not meant to be exchanged for each other.
    """
    ours, theirs = answered.outputs, mirrored.outputs
    rows = max((len(output) for output in ours.values()), default=0)
    if not rows:
        return OutputComparison(0, 0, 0, 0.0, agrees=True)
    if ours.keys() != theirs.keys() or any(ours[name].shape[:1] != theirs[name].shape[:1] for name in ours):
        return OutputComparison(rows, rows, 0, float("inf"), agrees=False)
    refused = _refused(answered, rows), _refused(mirrored, rows)
    both = ~refused[0] & ~refused[1]
    labels = both & _labels_differ(answered, mirrored, rows)
    numbers = np.where(both, _difference(answered, mirrored, rows), 0.0)
    differs = (refused[0] != refused[1]) | labels
    if LABEL not in ours and PROBABILITIES not in ours:
        differs |= ~np.isfinite(numbers) if tolerance is None else numbers > tolerance
    return OutputComparison(
        rows=rows,
        labels_differ=int(labels.sum()),
        refused_differ=int((refused[0] != refused[1]).sum()),
        largest_difference=float(numbers.max(initial=0.0)),
        agrees=not differs[int(draw * rows)],
    )


class Mirror:
    """Sends requests to a second version beside the answers, of one event loop, never more than `limit` at once."""

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()
        self.dropped = 0
        """Requests that were not mirrored because too many were."""

    @property
    def at_work(self) -> int:
        """Mirrored requests under way."""
        return len(self._tasks)

    def send(self, ask: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Have `ask` done soon, in the background: it infers, compares and records. False: too many are under way."""
        if len(self._tasks) >= self._limit:
            self.dropped += 1
            return False
        task = asyncio.get_running_loop().create_task(_quietly(ask))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def close(self) -> None:
        """End what is under way: nobody waits for it."""
        for task in (tasks := tuple(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _quietly(ask: Callable[[], Awaitable[None]]) -> None:
    try:
        await ask()
    except Exception:
        log.debug("a mirrored request failed", exc_info=True)


def _refused(response: InferenceResponse, rows: int) -> NDArray[np.bool_]:
    if REFUSED not in response.outputs:
        return np.zeros(rows, bool)
    told = np.asarray(response.outputs[REFUSED], bool).reshape(rows, -1)
    return np.asarray(np.logical_or.reduce(told, axis=1), bool)


def _labels_differ(ours: InferenceResponse, theirs: InferenceResponse, rows: int) -> NDArray[np.bool_]:
    name = LABEL if LABEL in ours.outputs else PROBABILITIES
    if name not in ours.outputs:
        return np.zeros(rows, bool)
    left, right = (np.asarray(one.outputs[name]).reshape(rows, -1) for one in (ours, theirs))
    if left.shape != right.shape:
        return np.ones(rows, bool)
    if name == PROBABILITIES:
        return np.asarray(left.argmax(1) != right.argmax(1), bool)
    return np.asarray(np.logical_or.reduce(left != right, axis=1), bool)


def _difference(ours: InferenceResponse, theirs: InferenceResponse, rows: int) -> NDArray[np.float64]:
    """The largest of each row; infinity where shapes differ or one is no number."""
    largest = np.zeros(rows)
    for name, output in ours.outputs.items():
        if not np.issubdtype(np.asarray(output).dtype, np.floating):
            continue
        left, right = (np.asarray(one.outputs[name], np.float64).reshape(rows, -1) for one in (ours, theirs))
        if left.shape != right.shape:
            return np.full(rows, np.inf)
        gap = np.where(np.isnan(left) & np.isnan(right), 0.0, np.abs(left - right))
        largest = np.maximum(largest, np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max(1, initial=0.0))
    return largest
