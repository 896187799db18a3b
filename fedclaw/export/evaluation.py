"""The evaluation of the very model that a bundle holds: its figures, the data that they are of, and their intervals.

A compressed model is not the one that the sites evaluated as they trained. Its figures are those of its own evaluation,
and where there was none it has no figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedclaw.compress.intervals import CONFIDENCE, Interval, of_proportion
from fedclaw.export.source import Source

_WHOLE = 1e-6
"""How far a count may be from a whole number by rounding alone."""


@dataclass(frozen=True)
class Figure:
    """One metric, by the task's name for it."""

    metric: str
    value: float
    interval: tuple[float, float] | None = None
    """(low, high)."""
    confidence: float | None = None
    """Of the interval; None: the value is certain to lie in it."""

    @property
    def interval_is(self) -> str:
        """What kind of interval it is, for people."""
        if self.confidence is None:
            return "bounds: the metric is made of histograms"
        return f"{self.confidence:.0%} confidence, of which examples were drawn alone"


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what."""

    data: str
    """A noun phrase for people."""
    origin: str
    """The same as an identifier."""
    examples: int
    figures: tuple[Figure, ...]


def evaluation_of(source: Source) -> Evaluation | None:
    """The evaluation of the model that is exported; None: there was none, or it measured something else."""
    if source.compression is not None:
        measure, examples = source.compression.accuracy_measure, source.compression.accuracy_examples
        if measure == "agreement with the teacher":
            return None
        data = "a labelled public file" if measure == "evaluation file" else "the sites' own test data"
        after, score = source.compression.after, source.compression.score
        measured = {} if after.interval is None else {score: after.interval}
        return _made(data, measure.replace(" ", "-"), examples, after.metrics, {}, measured)
    line = source.metrics[-1] if source.metrics else {}
    dealt = source.record.simulated is not None
    data = "the simulated clients' test data" if dealt else "the sites' own test data"
    return _made(data, "federated-evaluation", line.get("test_examples") or 0, line.get("metrics") or {}, line)


def _made(
    data: str,
    origin: str,
    examples: int,
    values: Mapping[str, float],
    line: Mapping[str, Any],
    measured: Mapping[str, Interval] | None = None,
) -> Evaluation | None:
    """`measured` are intervals that came with the values."""
    if not values:
        return None
    figures = tuple(_figure(name, value, examples, line, measured or {}) for name, value in sorted(values.items()))
    return Evaluation(data, origin, examples, figures)


def _figure(
    name: str, value: float, examples: int, line: Mapping[str, Any], measured: Mapping[str, Interval]
) -> Figure:
    if name == "auroc" and (area := line.get("auroc")):
        low, high = area["interval"]
        return Figure(name, value, (low, high))
    interval = measured.get(name) or (accuracy_interval(value, examples) if name == "accuracy" else None)
    return Figure(name, value) if interval is None else Figure(name, value, (interval.low, interval.high), CONFIDENCE)


def accuracy_interval(accuracy: float, examples: int) -> Interval | None:
    """The 95% interval of a share of `examples`.

    None for one that is no count of right answers by `examples`: it has noise in it, which the interval does not know.
    """
    right = accuracy * examples
    if examples < 1 or not 0 <= accuracy <= 1 or abs(right - round(right)) > _WHOLE * examples:
        return None
    return of_proportion(round(right), examples)
