"""What a request for statistics asks of a schema: the design of its vector, at the site and the server alike.

Among the questions is how a model of two classes scores the training rows: a histogram of its log-odds by label.
It is a statistic like any other. Each row is in one of 2 B cells, its label's bin, whatever the parameters that a
server sends are; so a row there or not moves the counts by one, the site's noise and charge are those of every release,
and a threshold that is read off them costs nothing more. The bins are fixed here, with open ends.

So is how long rows were followed, for survival curves (`fedclaw.privacy.survival`).

Legend: N examples, B bins.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import DataError
from fedclaw.learning.tasks.class_sums import bin_of
from fedclaw.learning.workload import Schema
from fedclaw.privacy.statistics import Design, Records, StatisticColumn
from fedclaw.privacy.survival import EVERYBODY, SurvivalDesign
from fedclaw.protocol.statistics import MAX_SURVIVAL_GROUPS, StatisticsRequest, SurvivalQuestion

SCORES = "scores"
SPAN = 8.0
"""Log-odds from which on a bin has no end: probabilities under 0.0003 and over 0.9997."""


def design_of(schema: Schema, columns: Sequence[str], labels: bool, bins: int) -> Design:
    """The vector's design, from the schema, which says whose a row is and how many of a person are used, and a
    request's fields.

    Raises DataError for a column that the schema does not have, or for which it declares no bounds.
    """
    known = {column.name: column for column in schema.statistic_columns()}
    if unknown := [name for name in columns if name not in known]:
        listed = ", ".join(known) or "no columns"
        raise DataError(f"the schema has no column {unknown[0]!r} for statistics; it has {listed:.300}")
    return Design([known[name] for name in columns], schema.labels if labels else (), bins, schema.rows_per_person or 1)


def design_for(schema: Schema, request: StatisticsRequest) -> Design | SurvivalDesign:
    """The design of what `request` asks for. Raises DataError for what the schema does not have."""
    if request.survival is not None:
        return survival_design(schema, request.survival)
    if request.scores is not None:
        return score_design(schema.labels, request.scores.bins, schema.rows_per_person or 1)
    return design_of(schema, request.columns, request.labels, request.bins)


def score_design(labels: Sequence[str], bins: int, examples_of_unit: int) -> Design:
    """The vector's design: the number of rows, and the counts of the 2 B cells. Raises DataError unless C = 2."""
    if len(labels) != 2:
        raise DataError(f"scores are of a model of two classes, and the schema has {len(labels)} labels")
    cells = tuple(f"{label}/{number}" for label in labels for number in range(bins))
    return Design([StatisticColumn(SCORES, levels=cells)], (), 0, examples_of_unit)


def survival_design(schema: Schema, asked: SurvivalQuestion) -> SurvivalDesign:
    """The cells of the histogram. Raises DataError for columns and levels that the schema does not have."""
    columns = {column.name: column for column in schema.statistic_columns()}
    if schema.labels:
        columns[schema.target_name] = StatisticColumn(schema.target_name, levels=schema.labels)
    event = _with_levels(columns, asked.event, "the event")
    if asked.event_level not in event.levels:
        raise DataError(
            f"the column {asked.event!r} has no level {asked.event_level!r} for the event; it has "
            f"{', '.join(event.levels):.300}"
        )
    return SurvivalDesign(
        time=asked.time,
        event=asked.event,
        code=event.levels.index(asked.event_level),
        ends=_ends(columns, asked),
        group=asked.group,
        groups=(EVERYBODY,) if asked.group is None else _groups(columns, asked.group),
    )


def _column(columns: Mapping[str, StatisticColumn], name: str, what: str) -> StatisticColumn:
    if name not in columns:
        listed = ", ".join(columns) or "no columns"
        raise DataError(f"the schema has no column {name!r} for {what} of survival curves; it has {listed:.300}")
    return columns[name]


def _with_levels(columns: Mapping[str, StatisticColumn], name: str, what: str) -> StatisticColumn:
    column = _column(columns, name, what)
    if not column.levels:
        raise DataError(f"{what} of survival curves is told by a column of levels, and {name!r} holds numbers")
    return column


def _groups(columns: Mapping[str, StatisticColumn], name: str) -> tuple[str, ...]:
    groups = _with_levels(columns, name, "the group").levels
    if len(groups) > MAX_SURVIVAL_GROUPS:
        raise DataError(
            f"survival curves are told apart by at most {MAX_SURVIVAL_GROUPS} levels, and the column {name!r} has "
            f"{len(groups)}"
        )
    return groups


def _ends(columns: Mapping[str, StatisticColumn], asked: SurvivalQuestion) -> tuple[float, ...]:
    """Where the bins end, (K,)."""
    time = _column(columns, asked.time, "the time")
    if time.levels:
        raise DataError(f"the time of survival curves is a column of numbers, and {asked.time!r} has levels")
    if asked.bins is None:
        return asked.ends
    if time.bounds is None:
        raise DataError(
            f"no bounds are declared of {asked.time!r}, over which equal bins could be made: add range: [smallest, "
            "largest] to it in the schema file, or ask with the ends of bins"
        )
    low, high = time.bounds
    return tuple(np.linspace(low, high, asked.bins + 1)[1:].tolist())


def edges(bins: int) -> NDArray[np.float64]:
    """Where one bin ends and the next begins, (B - 1,), in log-odds of the second class."""
    return np.linspace(-SPAN, SPAN, bins - 1)


def score_records(margins: NDArray[np.float64], targets: NDArray[np.int64], bins: int) -> Records:
    """Which cell each row is in, from its log-odds (N,) and label (N,); what is no number is in the first bin."""
    return Records({SCORES: (targets * bins + bin_of(margins, edges(bins))).astype(np.float64)}, targets)


def parameters_digest(parameters: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 of a model's parameters by name: whose scores they are."""
    digest = hashlib.sha256()
    for name, array in sorted(parameters.items()):
        digest.update(f"{name}/{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array, np.float32).tobytes())
    return digest.hexdigest()
