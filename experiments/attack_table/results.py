"""The table as data: robust.json, which the page and the plot are made from."""

import statistics
from collections.abc import Sequence

from pydantic import Field

from experiments.attack_table.cells import CellResult, Store
from experiments.attack_table.settings import TableSettings, attacks, make_cell
from experiments.results_file import ResultsFile
from fedclaw.errors import UsageError
from fedclaw.protocol.frozen import Frozen


class Entry(Frozen):
    """One strategy under one attack, over all seeds."""

    strategy: str
    attack: str
    """What the table calls it; none: nobody attacks."""
    hostile: int
    cells: tuple[CellResult, ...] = Field(min_length=1)

    @property
    def accuracy(self) -> tuple[float, float]:
        """Mean and deviation (n - 1) over the seeds."""
        return spread([cell.accuracy for cell in self.cells])

    @property
    def backdoor(self) -> tuple[float, float] | None:
        """The same of the backdoor's success; None: no backdoor."""
        known = [cell.backdoor for cell in self.cells if cell.backdoor is not None]
        return spread(known) if known else None


class Results(ResultsFile):
    """The whole table, and what it was made with."""

    settings: TableSettings
    seeds: tuple[int, ...]
    """Those for which every cell is done."""
    entries: tuple[Entry, ...]

    def find(self, strategy: str, attack: str, hostile: int) -> Entry:
        """The entry of that configuration. Raises KeyError."""
        wanted = (strategy, attack, hostile)
        for entry in self.entries:
            if (entry.strategy, entry.attack, entry.hostile) == wanted:
                return entry
        raise KeyError(wanted)

    @property
    def columns(self) -> tuple[tuple[str, int], ...]:
        """The attacks with how many sites are hostile, left to right."""
        return tuple(dict.fromkeys((entry.attack, entry.hostile) for entry in self.entries))

    @property
    def seconds(self) -> float:
        """What all cells took, one after the other."""
        return sum(cell.seconds for entry in self.entries for cell in entry.cells)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and deviation (n - 1; 0 of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def collect(settings: TableSettings, store: Store) -> Results:
    """The table of the seeds for which every cell is done. Raises UsageError when there is none."""
    columns = list(attacks(settings))
    done: dict[int, dict[tuple[str, str, int], CellResult]] = {}
    for seed in range(1, settings.seeds + 1):
        found = {
            (strategy, name, attack.sites): store.result(make_cell(settings, strategy, attack, seed))
            for strategy in settings.strategies
            for name, attack in columns
        }
        whole = {key: result for key, result in found.items() if result is not None}
        if len(whole) == len(found):
            done[seed] = whole
    if not done:
        raise UsageError("no seed is done yet: run python -m experiments.attack_table to its end")
    entries = [
        Entry(
            strategy=strategy,
            attack=name,
            hostile=attack.sites,
            cells=tuple(results[strategy, name, attack.sites] for results in done.values()),
        )
        for strategy in settings.strategies
        for name, attack in columns
    ]
    return Results(settings=settings, seeds=tuple(done), entries=tuple(entries))
