"""The runs of a sweep beside each other: settings that vary against what they came to, seeds put together."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import Field

from experiments.sweeps.results import RunResult
from fedclaw.protocol.frozen import Frozen

_SEED = "seed"
SCORE, LOSS = "accuracy", "loss"


class Spread(Frozen):
    """A figure over the runs of one row."""

    mean: float
    deviation: float | None
    """Standard deviation (n - 1); None for one run."""

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """The spread of those values that are there; None if none is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(mean=statistics.fmean(known), deviation=statistics.stdev(known) if len(known) > 1 else None)


class Row(Frozen):
    """One configuration, over all of its seeds."""

    settings: dict[str, str]
    """Those that vary, but for seeds."""
    runs: tuple[RunResult, ...] = Field(min_length=1)
    best: bool = False

    @property
    def finished(self) -> tuple[RunResult, ...]:
        """The runs that count."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why runs failed, each reason once."""
        return tuple(dict.fromkeys(run.reason or "unknown" for run in self.runs if not run.finished))

    def spread(self, metric: str) -> Spread | None:
        """A metric after the last round."""
        return Spread.of(run.last(metric) for run in self.finished)

    @property
    def epsilon(self) -> float | None:
        """The largest of its runs; None: unbounded, or no run."""
        spent = [run.epsilon for run in self.finished]
        known = [value for value in spent if value is not None]
        return max(known) if known and len(known) == len(spent) else None

    @property
    def bytes_up(self) -> float | None:
        """Mean over its runs."""
        found = Spread.of(float(run.bytes_up) for run in self.finished)
        return found.mean if found else None

    @property
    def seconds(self) -> float | None:
        """Mean over its runs."""
        found = Spread.of(run.seconds for run in self.finished)
        return found.mean if found else None


class Comparison(Frozen):
    """The whole table."""

    varied: tuple[str, ...]
    """Settings that tell rows apart."""
    seeds: tuple[str, ...]
    """Settings that were varied and are averaged over."""
    score: str
    """What the best row is the best in."""
    rows: tuple[Row, ...]

    @property
    def runs(self) -> int:
        """All of them."""
        return sum(len(row.runs) for row in self.rows)

    @property
    def failed(self) -> int:
        """Those that did not come to their end."""
        return self.runs - sum(len(row.finished) for row in self.rows)

    @property
    def best(self) -> Row | None:
        """The row with the best mean; None if no run has finished."""
        return next((row for row in self.rows if row.best), None)


def compare(results: Sequence[RunResult]) -> Comparison:
    """The table of `results`, in their order. The best has the highest accuracy; without any, lowest loss."""
    varied = _varied(results)
    seeds = tuple(key for key in varied if key.rpartition(".")[2] == _SEED)
    columns = tuple(key for key in varied if key not in seeds)
    grouped: dict[tuple[str, ...], list[RunResult]] = {}
    for result in results:
        grouped.setdefault(tuple(result.settings.get(key, "") for key in columns), []).append(result)
    rows = [Row(settings=dict(zip(columns, values, strict=True)), runs=tuple(runs)) for values, runs in grouped.items()]
    score = SCORE if any(row.spread(SCORE) for row in rows) else LOSS
    best = _best(rows, score)
    return Comparison(
        varied=columns,
        seeds=seeds,
        score=score,
        rows=tuple(row.model_copy(update={"best": row is best}) for row in rows),
    )


def _varied(results: Sequence[RunResult]) -> list[str]:
    """Settings with more than one value, in the order of the command; all settings of a lone run."""
    keys = dict.fromkeys(key for result in results for key in result.settings)
    if len(results) == 1:
        return list(keys)
    return [key for key in keys if len({result.settings.get(key) for result in results}) > 1]


def _best(rows: Sequence[Row], score: str) -> Row | None:
    scored = [(spread.mean, row) for row in rows if (spread := row.spread(score)) is not None]
    if not scored:
        return None
    ranked = sorted(scored, key=lambda item: item[0], reverse=score == SCORE)
    return ranked[0][1]


def to_csv(comparison: Comparison) -> str:
    """The table with a line for each row; empty where there is no figure."""
    text = io.StringIO()
    columns = ["runs", "failed", "accuracy", "accuracy_deviation", "loss", "loss_deviation"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*comparison.varied, *columns, "epsilon", "bytes_up", "seconds", "best", "reasons"])
    for row in comparison.rows:
        settings = [row.settings[key] for key in comparison.varied]
        counts = [len(row.runs), len(row.runs) - len(row.finished)]
        figures = [*_pair(row.spread(SCORE)), *_pair(row.spread(LOSS)), row.epsilon, row.bytes_up, row.seconds]
        cells = ["" if value is None else f"{value:.10g}" for value in figures]
        writer.writerow([*settings, *counts, *cells, int(row.best), "; ".join(row.reasons)])
    return text.getvalue()


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The table as plain values, with every run under its row."""
    return {
        "varied": list(comparison.varied),
        "seeds": list(comparison.seeds),
        "best_by": comparison.score,
        "rows": [_row_json(row) for row in comparison.rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    spreads = {name: row.spread(name) for name in (SCORE, LOSS)}
    return {
        "settings": row.settings,
        "best": row.best,
        **{name: spread.model_dump() if spread else None for name, spread in spreads.items()},
        "epsilon": row.epsilon,
        "bytes_up": row.bytes_up,
        "seconds": row.seconds,
        "runs": [_run_json(run) for run in row.runs],
    }


def _run_json(run: RunResult) -> dict[str, Any]:
    kept = run.model_dump(mode="json", exclude={"points"})
    return {**kept, "metrics": run.points[-1].metrics if run.points else {}, "bytes_up": run.bytes_up}


def _pair(spread: Spread | None) -> tuple[float | None, float | None]:
    return (spread.mean, spread.deviation) if spread else (None, None)
