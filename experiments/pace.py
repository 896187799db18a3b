"""How long many runs take: said before they begin, and after each of them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rich.console import Console

from fedclaw.progress import duration


@dataclass
class Pace:
    """Tells how far `left` runs of `total` are, and about how long the rest takes."""

    console: Console
    total: int
    left: int
    workers: int = 1
    known: Sequence[float] = ()
    """Seconds that each finished run took; none: `usual` is taken."""
    usual: float = 1.0
    """About how many seconds one run takes on one core of a small machine: a guess until some are done."""
    done: int = field(default=0, init=False)
    began: float = field(default_factory=time.monotonic, init=False)

    def announce(self) -> None:
        """Before the first run: how many, and about how long."""
        text = f"{self.total} runs, of which {self.total - self.left} are done"
        if self.left:
            seconds = self.left * (fmean(self.known) if self.known else self.usual) / min(self.workers, self.left)
            source = "by those that are done" if self.known else "at a first guess"
            processes = "1 process" if self.workers == 1 else f"{self.workers} processes"
            text += f"; the other {self.left} take about {duration(seconds)} in {processes}, {source}"
        self.console.print(text, markup=False)

    def step(self, text: str) -> None:
        """One run is done; `text` is what it came to."""
        self.done += 1
        line = f"{self.done}/{self.left} {text}"
        if rest := self.left - self.done:
            line += f"; about {duration((time.monotonic() - self.began) / self.done * rest)} left"
        self.console.print(line, markup=False)
