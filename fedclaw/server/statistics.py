"""The server's half of a release of statistics: ask, add up what arrives, read it.

The question is the same whenever it is asked again under the same run name, so a server that was killed, or that found
too few sites, begins again: a site that has answered answers from its outbox and pays nothing more.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError, RoundError, SecureAggregationError, UpdateError, UsageError
from fedclaw.learning.statistics import design_for, parameters_digest
from fedclaw.learning.workload import Schema
from fedclaw.privacy.distributed import WRAP
from fedclaw.privacy.mechanisms.choice import mechanism_of_request, shared_of
from fedclaw.privacy.statistics import Design, Doubles, Estimate, Statistics, VectorDesign, estimate
from fedclaw.privacy.survival import SurvivalDesign
from fedclaw.privacy.survival_estimates import NoisedHistogram, curves, log_rank
from fedclaw.protocol.arrays import Arrays, pack, unpack
from fedclaw.protocol.limits import MOST_EXAMPLES
from fedclaw.protocol.messages import ARRAYS, HEADER_BYTES, JSON, SUM
from fedclaw.protocol.records import MessageRecords
from fedclaw.protocol.statistics import (
    REQUEST,
    STATISTICS,
    VECTOR,
    StatisticsReceipt,
    StatisticsRequest,
    SurvivalQuestion,
)
from fedclaw.protocol.terms import DataUnit, SecureRequest
from fedclaw.server.cohort_question import CohortQuestion, part, reasons_of, receipt_in
from fedclaw.server.exchange import Seats, ask
from fedclaw.server.statistics_release import (
    Release,
    ReleaseMechanism,
    ScoresOf,
    SurvivalCurves,
    make_release,
    release_mechanism,
)

log = logging.getLogger(__name__)

FINEST, COARSEST = 2.0**-14, 2.0**-6
"""Steps of a secure sum; an example's part has a norm of 1. The coarsest costs a tenth more noise with 200 numbers."""

LEVEL = 0.95
"""Of bands, unless another is asked for."""

_CALIBRATED = 0.02
"""Calibration ends within a hundredth of the least noise; a site's accountant may be of another version."""

_OPENLY = "Those that did pay nothing again when the same command is given with the same run="
_SECURELY = "Each attempt at a secure sum is a new question: those that were asked for their part in this one have paid"


@dataclass
class StatisticsQuestion(CohortQuestion[StatisticsReceipt, Release]):
    """One vector of statistics. Read is the release that the sum (d,) of the sites' noised vectors makes.

    Raises DataError for a request that the schema does not allow, and UsageError when no noise keeps what is asked for.
    """

    asked: StatisticsRequest
    schema: Schema
    probabilities: tuple[float, ...] = ()
    """Quantiles to read from the histograms, if any are asked for."""
    parameters: Arrays | None = None
    """Those of the model whose scores are asked for."""
    level: float = LEVEL
    """Of the bands of survival curves."""
    total: Doubles = field(init=False)
    kind: ClassVar[str] = STATISTICS

    def __post_init__(self) -> None:
        self._design = design_for(self.schema, self.asked)
        self.total = np.zeros(self._design.dimension)
        try:
            self._noise = mechanism_of_request(self.asked, self._design.sensitivity).event.noise_multiplier
        except PrivacyError as error:
            raise UsageError(f"epsilon={self.asked.epsilon:g}: {error}") from error

    def content(self) -> MessageRecords:
        """See CohortQuestion."""
        content = MessageRecords({REQUEST: ConfigRecord({JSON: self.asked.model_dump_json()})})
        if self.parameters is not None:
            content[ARRAYS] = pack(self.parameters)
        content.reply_bytes = HEADER_BYTES + 4 * self._design.dimension
        return content

    def beside(self, content: RecordDict) -> StatisticsReceipt:
        """See CohortQuestion."""
        receipt = receipt_in(content, StatisticsReceipt)
        _check_receipt(receipt, self.asked, self._noise, self.schema.unit)
        return receipt

    def add_open(self, content: RecordDict, beside: StatisticsReceipt) -> None:
        """See CohortQuestion."""
        vector = unpack(part(content.array_records, SUM)).get(VECTOR)
        if vector is None or vector.shape != self.total.shape:
            raise UpdateError(f"the answer holds no vector of {len(self.total)} numbers")
        values = vector.astype(np.float64)
        if not np.all(np.abs(values) <= MOST_EXAMPLES):
            raise UpdateError("the answer holds numbers that no data set has")
        self.total += values

    def add_sum(self, total: NDArray[np.uint32], besides: Sequence[StatisticsReceipt]) -> None:
        """See CohortQuestion."""
        self.total += shared_of(self.asked, self._design.sensitivity).shares.decode(total)

    def read(self) -> Release:
        """See CohortQuestion."""
        asked = self.asked
        shares = None if asked.secure is None else shared_of(asked, self._design.sensitivity).shares
        receipts = {site: self.besides[site] for site in self.answered}
        mechanism = release_mechanism(asked, receipts, shares, self._design.sensitivity)
        if isinstance(self._design, SurvivalDesign):
            assert asked.survival is not None
            told, survived = survival_of(self._design, asked.survival, self.total, mechanism, self.level)
            return make_release(asked, self.schema, receipts, mechanism, told, survival=survived)
        statistics = self._statistics(self._design, mechanism)
        return make_release(asked, self.schema, receipts, mechanism, statistics, self._scored())

    def _statistics(self, design: Design, mechanism: ReleaseMechanism) -> Statistics:
        wanted = self.probabilities if self.asked.bins else ()
        additive = self.asked.scores is not None
        return estimate(design, self.total, mechanism.deviation, wanted, additive=additive)

    def _scored(self) -> ScoresOf | None:
        """Whose scores were asked for."""
        if self.asked.scores is None:
            return None
        labels = (self.schema.labels[0], self.schema.labels[1])
        return ScoresOf(model=parameters_digest(self.parameters or {}), bins=self.asked.scores.bins, labels=labels)


def survival_of(
    design: SurvivalDesign, asked: SurvivalQuestion, total: Doubles, mechanism: ReleaseMechanism, level: float
) -> tuple[Statistics, SurvivalCurves]:
    """What the noised sum (d,) tells: the number of rows that were followed, and curves with bands of that level."""
    histogram = NoisedHistogram(design.cells(total), mechanism.deviation, asked.smallest)
    followed = Estimate(value=max(float(total.sum()), 0.0), error=mechanism.deviation * math.sqrt(len(total)))
    found = SurvivalCurves(
        question=asked,
        ends=design.ends,
        level=level,
        groups=dict(zip(design.groups, curves(histogram, level=level), strict=True)),
        log_rank=log_rank(histogram),
    )
    return Statistics(count=followed, labels={}, columns={}), found


def release_statistics(
    grid: Grid,
    nodes: Sequence[int],
    schema: Schema,
    request: StatisticsRequest,
    probabilities: tuple[float, ...],
    *,
    minimum: int,
    deadline: float,
    parameters: Arrays | None = None,
    level: float = LEVEL,
) -> Release:
    """Ask `nodes` for the statistics that `request` names, within `deadline` seconds, and read their sum.

    Raises what StatisticsQuestion does, before anybody is asked, and RoundError if fewer than `minimum` sites answer.
    """
    question = ask(grid, nodes, StatisticsQuestion(request, schema, probabilities, parameters, level), deadline)
    for declined in question.declined:
        log.warning("%s declined (%s): %s", declined.site, declined.code, declined.reason)
    if question.silent:
        log.warning("no answer from %s", ", ".join(question.silent))
    if len(question.answered) < minimum:
        raise RoundError(
            f"{len(question.answered)} sites sent statistics, {minimum} are needed "
            f"({reasons_of(question) or 'nobody was asked'}). "
            f"{_OPENLY if request.secure is None else _SECURELY}"
        )
    return question.read()


def with_session(
    request: StatisticsRequest, names: Sequence[str], asked: SecureRequest, design: VectorDesign, minimum: int
) -> StatisticsRequest:
    """`request` with a fresh session over the sites `names`. Raises UsageError if there is no safe one.

    No site has more than `asked.largest_weight` examples, or persons where there are such.
    """
    if asked.largest_weight is None:
        raise UsageError("secure.largest_weight is not set: say how many training examples no site exceeds")
    seats = Seats.of(names, asked, minimum)
    try:
        step = _step(asked.largest_weight * design.sensitivity, len(names))
        secure = seats.session(design.dimension, step, largest_weight=asked.largest_weight)
        request = request.model_copy(update={"secure": secure})
        shares = shared_of(request, design.sensitivity).shares
        # A number of the sum that noise carried out of its range, now and then, would come back as another.
        if shares.price.wrap_probability >= WRAP:
            raise PrivacyError(
                f"32 bits hold no sum over {shares.sites} sites with so much noise; ask for a larger epsilon or delta"
            )
    except (SecureAggregationError, PrivacyError) as error:
        raise UsageError(f"secure: {error}") from error
    return request


def _step(largest: float, sites: int) -> float:
    """The step with which a sum over `sites` sites of at most `largest` rows stays in its range.

    No coordinate of an example's part is over 1. A power of two; finer than FINEST has no use.
    """
    room = (1 << 30) // sites - 1
    step = max(FINEST, 2.0 ** math.ceil(math.log2(largest / room)))
    if step > COARSEST:
        raise PrivacyError(
            f"32 bits hold no sum over {sites} sites of up to {largest:g} examples each; ask fewer at a time"
        )
    return step


def _check_receipt(receipt: StatisticsReceipt, request: StatisticsRequest, noise: float, unit: DataUnit) -> None:
    """Raise UpdateError for a receipt that no site has of `request`."""
    trust = "nobody" if request.secure is None else "aggregation"
    if receipt.unit != unit:
        raise UpdateError(f"the privacy receipt is for the unit {receipt.unit}, and the schema makes it {unit}")
    if receipt.trust != trust or receipt.delta != request.delta:
        raise UpdateError(
            f"the privacy receipt contradicts what was asked: trust {receipt.trust}, delta {receipt.delta:g} where the "
            f"request makes it {trust}, {request.delta:g}"
        )
    if not math.isclose(receipt.noise_multiplier, noise, rel_tol=_CALIBRATED):
        raise UpdateError(
            f"the privacy receipt contradicts what was asked: a noise multiplier of {receipt.noise_multiplier:.4g} "
            f"where the request makes it {noise:.4g}"
        )
    if receipt.epsilon_lifetime is None and receipt.epsilon_left is not None:
        raise UpdateError("the privacy receipt cannot be true: after an unbounded amount something is left")
