"""What a request for statistics asks of a schema: the design of its vector, at the site and the server alike."""

from collections.abc import Sequence

from fedclaw.errors import DataError
from fedclaw.learning.score_statistics import score_design
from fedclaw.learning.workload import Schema
from fedclaw.privacy.statistics import Design
from fedclaw.protocol.statistics import StatisticsRequest


def design_of(schema: Schema, columns: Sequence[str], labels: bool, bins: int) -> Design:
    """The vector's design, from the schema and a request's fields.

    Raises DataError for a column that the schema does not have, or for which it declares no bounds.
    """
    known = {column.name: column for column in schema.statistic_columns()}
    if unknown := [name for name in columns if name not in known]:
        listed = ", ".join(known) or "no columns"
        raise DataError(f"the schema has no column {unknown[0]!r} for statistics; it has {listed:.300}")
    return Design([known[name] for name in columns], schema.labels if labels else (), bins)


def design_for(schema: Schema, request: StatisticsRequest) -> Design:
    """The design of what `request` asks for. Raises DataError for what the schema does not have."""
    if request.scores is not None:
        return score_design(schema.labels, request.scores.bins)
    return design_of(schema, request.columns, request.labels, request.bins)
