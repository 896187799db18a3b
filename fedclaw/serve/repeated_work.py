"""Work that a process does again and again, and that must go on whatever goes wrong in it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fedclaw.errors import FedClawError


class RepeatedWork:
    """Says a failure once, until the work goes well again or fails otherwise."""

    def __init__(self, log: logging.Logger, while_it_fails: str) -> None:
        """`while_it_fails` is what the log says of that time, before the reason."""
        self._log, self._words = log, while_it_fails
        self._said = ""

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """One more time; no Exception leaves the block."""
        try:
            yield
        except Exception as error:
            if str(error) != self._said:
                self._said = str(error)
                known = isinstance(error, FedClawError)
                self._log.warning("%s: %s", self._words, self._said, exc_info=None if known else error)
        else:
            self._said = ""
