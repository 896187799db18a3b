"""How long several ways of computing the same thing take, timed in turns so that all of them see the same machine."""

import time
from collections.abc import Callable, Sequence
from statistics import median

WARM_UP = 10
LATENCY_BATCHES = (1, 32)
"""Examples at once: one that somebody waits for, and a small batch."""


def median_milliseconds(calls: Sequence[Callable[[], object]], repeats: int, limit: float | None = None) -> list[float]:
    """The median milliseconds of each call, after a warm-up.

    Args:
        calls: what is timed, one after the other in each round.
        repeats: rounds, at most.
        limit: seconds after which no further round begins; the first one is always whole.
    """
    began = time.perf_counter()

    def late() -> bool:
        return limit is not None and time.perf_counter() - began > limit

    for _ in range(WARM_UP):
        for call in calls:
            call()
        if late():
            break
    began = time.perf_counter()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        if late():
            break
    return [1e3 * median(times) for times in seconds]
