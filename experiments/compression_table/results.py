"""The table's rows: what the seeds of one method come to on one task."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.compression_table.cells import CellResult
from experiments.compression_table.settings import Cell, TableSettings

LAST = 3
"""The final accuracy is the mean of so many last rounds: one round of a noisy method is a matter of luck."""


@dataclass(frozen=True)
class Row:
    """One method on one task, over the seeds."""

    task: str
    method: str
    update: float
    """Bytes of one site's answer."""
    share: float
    """Of what an answer has as it is."""
    final: tuple[float, ...]
    """Accuracy at the end, by seed."""
    curve: tuple[tuple[float, float], ...]
    """(megabytes that a site has sent, mean accuracy), round by round."""
    reached: tuple[float | None, ...]
    """Megabytes that a site had sent when it first had the task's target accuracy, by seed; None: never."""

    @property
    def mean(self) -> float:
        """Accuracy at the end."""
        return statistics.mean(self.final)

    @property
    def deviation(self) -> float:
        """Of the accuracy at the end, over the seeds."""
        return statistics.stdev(self.final) if len(self.final) > 1 else 0.0

    @property
    def to_target(self) -> float | None:
        """Mean megabytes to the target; None if a seed never had it."""
        known = [value for value in self.reached if value is not None]
        return statistics.mean(known) if len(known) == len(self.reached) else None


def rows(settings: TableSettings, results: Sequence[tuple[Cell, CellResult]]) -> list[Row]:
    """One row for each task and method, in the settings' order."""
    found: list[Row] = []
    for task, described in settings.tasks.items():
        plain: float | None = None
        for method in settings.methods:
            mine = [result for cell, result in results if (cell.task, cell.method) == (task, method)]
            update = statistics.mean(sent / result.sites for result in mine for sent in result.bytes_up)
            plain = plain or update
            found.append(
                Row(
                    task=task,
                    method=method,
                    update=update,
                    share=update / plain,
                    final=tuple(statistics.mean(result.accuracy[-LAST:]) for result in mine),
                    curve=_curve(mine),
                    reached=tuple(_reached(result, described.target) for result in mine),
                )
            )
    return found


def _sent(result: CellResult) -> list[float]:
    """Megabytes of one site after each round."""
    total, sent = 0.0, []
    for size in result.bytes_up:
        total += size / result.sites / 1e6
        sent.append(total)
    return sent


def _curve(results: Sequence[CellResult]) -> tuple[tuple[float, float], ...]:
    sent = [statistics.mean(values) for values in zip(*(_sent(result) for result in results), strict=True)]
    accuracy = [statistics.mean(values) for values in zip(*(result.accuracy for result in results), strict=True)]
    return tuple(zip(sent, accuracy, strict=True))


def _reached(result: CellResult, target: float) -> float | None:
    pairs = zip(_sent(result), result.accuracy, strict=True)
    return next((sent for sent, accuracy in pairs if accuracy >= target), None)
