"""What a server asks a site for statistics, and what it pays for: a message of type `query.statistics` holds

    {"request": ConfigRecord {"json": StatisticsRequest}}

with scores asked for also {"arrays": ArrayRecord of the model's parameters}, and a site that takes part answers

    {"sum": ArrayRecord {"statistics": its noised vector (d,), float32}, "receipt": ConfigRecord {"json":
     StatisticsReceipt}, "about": ConfigRecord {"run"}}

Under secure aggregation the exchange has further stages (`fedclaw.server.exchange`), and the answer has
{"masked": ArrayRecord (one flat uint32 vector)} in place of the sum.

The vector is that of `fedclaw.privacy.statistics.Design`, or with survival asked for that of
`fedclaw.privacy.survival.SurvivalDesign`; both sides make it from the schema and the request.
"""

import itertools
import math
from collections import Counter
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.limits import MAX_COLUMNS, MAX_CONSTANTS, MAX_SITES, Digest, Name, ParameterName
from fedclaw.protocol.receipt import BudgetSpent
from fedclaw.protocol.terms import DataUnit, ModelSpec, Relation, SecureAggregation

STATISTICS_VERSION = 1

STATISTICS = "query.statistics"
"""The type of the message."""

REQUEST, VECTOR = "request", "statistics"

MAX_BINS = 4096
MAX_SCORE_BINS = 512
MAX_SURVIVAL_BINS = 512
MAX_SURVIVAL_GROUPS = 32

ROUND = 0
"""What stands for the round where one is named: statistics have none."""


class ScoreQuestion(Frozen):
    """How a model of two classes scores the rows (`fedclaw.learning.statistics`), parameters sent along."""

    model: ModelSpec
    bins: int = Field(default=33, ge=3, le=MAX_SCORE_BINS)
    preprocessing: str | None = Field(default=None, max_length=MAX_CONSTANTS)
    """The federation's constants, of a schema that takes them."""


class SurvivalQuestion(Frozen):
    """Who was followed for how long, as a histogram (`fedclaw.privacy.survival`), for Kaplan-Meier and log-rank."""

    time: ParameterName
    """The column that says how long a row was followed, a number."""
    event: ParameterName
    """The column that says whether the event ended that, of levels; or the target."""
    event_level: ParameterName
    """Its level that is the event. Every other one is censored."""
    group: ParameterName | None = None
    """The column by whose levels curves are told apart; or the target."""
    bins: int | None = Field(default=None, ge=1, le=MAX_SURVIVAL_BINS)
    """Number of equal bins over the range that the schema declares of `time`."""
    ends: tuple[float, ...] = Field(default=(), max_length=MAX_SURVIVAL_BINS)
    """In place of `bins`: where each bin ends. What is later than the last was seen without the event up to there."""
    smallest: float = Field(default=10.0, ge=0)
    """A curve ends where fewer than these are at risk, by the noised number: what is shown, not what is asked."""

    @model_validator(mode="after")
    def _binned(self) -> Self:
        if (self.bins is None) == (not self.ends):
            raise ValueError("survival takes either bins or ends")
        if any(later <= earlier for earlier, later in itertools.pairwise(self.ends)):
            raise ValueError("ends: each has to be larger than the one before")
        if self.group == self.event:
            raise ValueError(f"{self.event!r} cannot tell both the event and the groups")
        return self


class StatisticsRequest(Frozen):
    """The frozen question. Its JSON is deterministic: the same question again is answered from a site's outbox."""

    version: int = STATISTICS_VERSION
    federation: Name
    run: Name
    """The name under which sites charge it."""
    cohort: int = Field(ge=1, le=MAX_SITES)
    """Number of sites asked, by the server's own word."""
    workload: Name
    schema_digest: Digest
    columns: tuple[ParameterName, ...] = Field(max_length=MAX_COLUMNS)
    """Columns of the schema, by name, in its order."""
    labels: bool = True
    """Whether to count the labels."""
    bins: int = Field(default=64, ge=0, le=MAX_BINS)
    """Bins of each number's histogram, from which quantiles are read; 0: none, and less noise in means."""
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    """What the release may cost a site, for one unit of its data."""
    secure: SecureAggregation | None = None
    """Secure aggregation, in which each site adds a share of the noise; None: each site adds all that it needs."""

    scores: ScoreQuestion | None = None
    """In place of columns and labels."""
    survival: SurvivalQuestion | None = None
    """In place of columns and labels, in a secure sum too."""

    @property
    def round(self) -> int:
        """Statistics have none."""
        return ROUND

    @property
    def rounds(self) -> int:
        """One question alone."""
        return 1

    @model_serializer(mode="wrap")
    def _as_before(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without scores or survival a request is what it was before: a site that knows of none reads it."""
        fields: dict[str, Any] = plain(self)
        for name in ("scores", "survival"):
            if fields.get(name, ...) is None:
                del fields[name]
        return fields

    @model_validator(mode="after")
    def _alone(self) -> Self:
        if self.scores is not None and (self.columns or self.labels or self.bins or self.secure is not None):
            raise ValueError("scores are asked for alone: without columns, labels, bins and a secure sum")
        if self.survival is not None and (self.columns or self.labels or self.bins or self.scores is not None):
            raise ValueError("survival is asked for alone: without columns, labels, bins and scores")
        return self

    @model_validator(mode="after")
    def _once(self) -> Self:
        if repeated := sorted(name for name, count in Counter(self.columns).items() if count > 1):
            raise ValueError(f"columns: {', '.join(map(repr, repeated))} more than once")
        return self


class StatisticsReceipt(BudgetSpent):
    """What the answer cost a site, as its ledger has it, for one unit of its data."""

    mechanism: Literal["statistics"] = "statistics"
    unit: DataUnit = "example"
    relation: Relation = "zero-out"
    trust: Literal["nobody", "aggregation"] = "nobody"
    """Noise of the site's own, added before anything leaves; or shares of all sites in a secure sum."""
    noise_multiplier: float = Field(gt=0, lt=math.inf)
    """Standard deviation of the noise in each coordinate that the ledger counts, by the vector's sensitivity."""
    delta: float = Field(gt=0, lt=1)
