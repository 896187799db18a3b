"""What work tells the log: long work, every few seconds, how far it is; and less where nobody wants to hear it."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TELL_EVERY = 10.0
"""Seconds between two lines."""


@contextmanager
def quieter(level: int, *names: str) -> Iterator[None]:
    """Inside, the loggers of these names tell nothing under `level`."""
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, usual in before.items():
            logging.getLogger(name).setLevel(usual)


class Progress:
    """Tells how far `total` steps of `what` are, and about how long the rest takes if all of them are needed."""

    def __init__(self, log: logging.Logger, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._what, self._total, self._clock = log, what, total, clock
        self._began = self._told = clock()

    def done(self, steps: int) -> None:
        """`steps` of them are done."""
        now = self._clock()
        if now - self._told < TELL_EVERY or not 0 < steps < self._total:
            return
        self._told = now
        left = (now - self._began) / steps * (self._total - steps)
        self._log.info("%s: %d of %d, at most about %s left", self._what, steps, self._total, duration(left))


def duration(seconds: float) -> str:
    """For a person: 20 s, 7 min, 3.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
