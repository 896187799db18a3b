"""The server's half of a release of statistics: ask, add up what arrives, read it.

The question is the same whenever it is asked again under the same run name, so a server that was killed, or that found
too few sites, begins again: a site that has answered answers from its outbox and pays nothing more.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from pydantic import ValidationError

from fedclaw.errors import PrivacyError, RoundError, SecureAggregationError, UpdateError, UsageError
from fedclaw.learning.score_statistics import parameters_digest
from fedclaw.learning.statistics import design_for
from fedclaw.learning.workload import Schema
from fedclaw.privacy.distributed import WRAP, Shares
from fedclaw.privacy.estimates import estimate
from fedclaw.privacy.mechanisms.statistics import mechanism_of_request, shared_of
from fedclaw.privacy.statistics import Doubles
from fedclaw.protocol.arrays import Arrays, pack, unpack
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.limits import MOST_EXAMPLES
from fedclaw.protocol.messages import ARRAYS, HEADER_BYTES, JSON, SUM
from fedclaw.protocol.questions import questions
from fedclaw.protocol.records import MessageRecords
from fedclaw.protocol.statistics import REQUEST, ROUND, STATISTICS, VECTOR, StatisticsReceipt, StatisticsRequest
from fedclaw.protocol.terms import SecureRequest
from fedclaw.server.answers import CohortAnswers, part, reasons_of, receipt_text
from fedclaw.server.exchange import ask
from fedclaw.server.secure_exchange import Seats, SecureExchange
from fedclaw.server.statistics_release import Release, ScoresOf, make_release

log = logging.getLogger(__name__)

FINEST, COARSEST = 2.0**-14, 2.0**-6
"""Steps of a secure sum; an example's part has a norm of 1. The coarsest costs a tenth more noise with 200 numbers."""

_CALIBRATED = 0.02
"""Calibration ends within a hundredth of the least noise; a site's accountant may be of another version."""

_OPENLY = "Those that did pay nothing again when the same command is given with the same run="
_SECURELY = "Each attempt at a secure sum is a new question: those that were asked for their part in this one have paid"


@dataclass
class Collected(CohortAnswers):
    """The sum of the sites' noised vectors, (d,), and their receipts."""

    noise: float = 0.0
    """The noise multiplier that the request determines: every site's, and no other is believed."""
    total: Doubles = field(default_factory=lambda: np.zeros(0))
    asked: StatisticsRequest | None = None
    receipts: dict[str, StatisticsReceipt] = field(default_factory=dict)
    shares: Shares | None = None
    """Of a secure sum."""
    failure: str | None = None
    """Why there is no secure sum."""

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise in each coordinate of the sum."""
        if self.shares is not None:
            return self.shares.sigma * self.shares.step * math.sqrt(len(self.answered))
        return math.hypot(*(receipt.noise_multiplier for receipt in self.receipts.values()))

    def receipt(self, content: RecordDict) -> StatisticsReceipt:
        """The answer's receipt. Raises UpdateError when it is malformed, or of something else than was asked."""
        receipt = _receipt(content)
        if self.asked is not None:
            _check_receipt(receipt, self.asked, self.noise)
        return receipt

    def add(self, site: str, content: RecordDict) -> None:
        """Add a noised vector."""
        receipt = self.receipt(content)
        vector = unpack(part(content.array_records, SUM)).get(VECTOR)
        if vector is None or vector.shape != self.total.shape:
            raise UpdateError(f"the answer holds no vector of {len(self.total)} numbers")
        values = vector.astype(np.float64)
        if not np.all(np.abs(values) <= MOST_EXAMPLES):
            raise UpdateError("the answer holds numbers that no data set has")
        self.total += values
        self.receipts[site] = receipt


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
) -> Release:
    """Ask `nodes` for the statistics that `request` names, within `deadline` seconds, and read their sum.

    `parameters` are those of the model whose scores are asked for.

    Raises DataError for a request that the schema does not allow, before anybody is asked, and RoundError if fewer than
    `minimum` sites answer.
    """
    design = design_for(schema, request)
    collected = Collected(total=np.zeros(design.dimension), asked=request, noise=_noise_of(request))
    if request.secure is None:
        messages = statistics_questions(nodes, request, deadline, design.dimension, parameters)
        ask(grid, messages, deadline, collected)
    else:
        _ask_securely(grid, nodes, request, deadline, collected)
    for declined in collected.declined:
        log.warning("%s declined (%s): %s", declined.site, declined.code, declined.reason)
    if collected.silent:
        log.warning("no answer from %s", ", ".join(collected.silent))
    if len(collected.answered) < minimum:
        raise RoundError(
            f"{len(collected.answered)} sites sent statistics, {minimum} are needed ({_reasons(collected)}). "
            f"{_OPENLY if request.secure is None else _SECURELY}"
        )
    wanted, scored = probabilities if request.bins else (), request.scores is not None
    statistics = estimate(design, collected.total, collected.deviation, wanted, additive=scored)
    scores = None
    if request.scores is not None:
        scores = ScoresOf(
            model=parameters_digest(parameters or {}),
            bins=request.scores.bins,
            labels=(schema.labels[0], schema.labels[1]),
        )
    return make_release(request, collected.receipts, collected.shares, statistics, scores)


def with_session(
    request: StatisticsRequest, names: Sequence[str], asked: SecureRequest, dimension: int, minimum: int
) -> StatisticsRequest:
    """`request` with a fresh session over the sites `names`. Raises UsageError if there is no safe one."""
    if asked.largest_weight is None:
        raise UsageError("secure.largest_weight is not set: say how many training examples no site exceeds")
    seats = Seats.of(names, asked, minimum)
    try:
        step = _step(asked.largest_weight, len(names))
        secure = seats.session(dimension, step, largest_weight=asked.largest_weight)
        request = request.model_copy(update={"secure": secure})
        _check_room(shared_of(request).shares)
    except (SecureAggregationError, PrivacyError) as error:
        raise UsageError(f"secure: {error}") from error
    return request


def _check_room(shares: Shares) -> None:
    """Raise PrivacyError for noise that would carry a number of the sum out of its range, now and then."""
    if shares.price.wrap_probability >= WRAP:
        raise PrivacyError(
            f"32 bits hold no sum over {shares.sites} sites with so much noise; ask for a larger epsilon or delta"
        )


def _step(largest: float, sites: int) -> float:
    """The step with which a sum over `sites` sites of at most `largest` examples stays in its range.

    No coordinate of an example's part is over 1. A power of two; finer than FINEST has no use.
    """
    room = (1 << 30) // sites - 1
    step = max(FINEST, 2.0 ** math.ceil(math.log2(largest / room)))
    if step > COARSEST:
        raise PrivacyError(
            f"32 bits hold no sum over {sites} sites of up to {largest:g} examples each; ask fewer at a time"
        )
    return step


def _ask_securely(
    grid: Grid, nodes: Sequence[int], request: StatisticsRequest, deadline: float, collected: Collected
) -> None:
    """Add the sum of the survivors' vectors, which nobody saw, to `collected`."""
    shares = shared_of(request).shares
    receipts: dict[str, StatisticsReceipt] = {}

    def accept(site: str, content: RecordDict) -> None:
        receipts[site] = collected.receipt(content)

    attempt = SecureExchange(grid, nodes, request, deadline, collected)
    try:
        total, survivors = attempt.sum(STATISTICS, _question(request), {}, accept)
    except SecureAggregationError as error:
        collected.failure = str(error)
        return
    collected.total += shares.decode(total)
    collected.shares = shares
    collected.answered = list(survivors)
    collected.receipts = {site: receipts[site] for site in survivors}


def statistics_questions(
    nodes: Sequence[int],
    request: StatisticsRequest,
    ttl: float,
    numbers: int | None = None,
    parameters: Arrays | None = None,
) -> list[Message]:
    """The same question to each of `nodes`, each with an identity of its own that only the question determines.

    An answer holds so many `numbers`; None: not known. `parameters` are those of the model whose scores are asked for.
    """
    content = _question(request)
    if parameters is not None:
        content[ARRAYS] = pack(parameters)
    if numbers is not None:
        content.reply_bytes = HEADER_BYTES + 4 * numbers
    return questions(nodes, ROUND, STATISTICS, content, ttl)


def _question(request: StatisticsRequest) -> MessageRecords:
    return MessageRecords({REQUEST: ConfigRecord({JSON: request.model_dump_json()})})


def _noise_of(request: StatisticsRequest) -> float:
    """What every site's ledger is charged. Raises UsageError when no noise keeps what is asked for."""
    try:
        return mechanism_of_request(request).event.noise_multiplier
    except PrivacyError as error:
        raise UsageError(f"epsilon={request.epsilon:g}: {error}") from error


def _check_receipt(receipt: StatisticsReceipt, request: StatisticsRequest, noise: float) -> None:
    """Raise UpdateError for a receipt that no site has of `request`."""
    trust = "nobody" if request.secure is None else "aggregation"
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


def _receipt(content: RecordDict) -> StatisticsReceipt:
    try:
        return StatisticsReceipt.model_validate_json(receipt_text(content))
    except ValidationError as error:
        raise UpdateError(f"the privacy receipt is malformed: {explain(error)}") from error


def _reasons(collected: Collected) -> str:
    return reasons_of(collected, collected.failure) or "nobody was asked"
