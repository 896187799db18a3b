"""One exchange with a cohort: ask, and add what comes back as it comes.

Questions have deterministic identities (a digest of what is asked of whom), so that a resumed or repeated round
asks the same question and a site answers it from its outbox instead of training, and paying, again.
"""

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from pydantic import ValidationError

from fedclaw.errors import UpdateError
from fedclaw.learning import postprocess
from fedclaw.learning.pooled import (
    COUNTS,
    HITS,
    RATIOS,
    Area,
    Pooled,
    check_counts,
    check_histograms,
    histogram_shape,
    ratio_of,
)
from fedclaw.learning.postprocess import Reader, as_sent
from fedclaw.privacy.mechanisms.receipts import LONGEST_RECEIPT, check_receipt
from fedclaw.protocol.arrays import LARGEST, Form, unpack_wire
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.messages import EXAMPLES, JSON, METRICS, RECEIPT, SCORE_NOISE, SCORES, SUM, WEIGHT
from fedclaw.protocol.plan import MAX_COLUMNS, MOST_EXAMPLES, Plan, Receipt, RefusalCode, Weighting, weight_of
from fedclaw.protocol.questions import Outgoing, question, questions
from fedclaw.server.accumulator import RobustAggregate, UpdateStack, WeightedSum
from fedclaw.server.grids import CohortGrid, StreamingGrid
from fedclaw.server.run_directory import SiteReceipt

R = TypeVar("R")

log = logging.getLogger(__name__)

_ROUNDED = 1 + 1e-6
MOST_LOSS = 1e6
"""Mean loss of an example: a model that is worse is none, and such a figure would be the whole mean."""
MOST_NOISE = 1e9
"""Deviation of the noise in a cell of a histogram: a site with more says nothing."""
LONGEST_REASON = 300
MOST_REASONS = 20
"""Sites named in the line that ends a run."""


@dataclass(frozen=True)
class Declined:
    """A site that did not take part, and why: its own refusal, or an answer that could not be used."""

    site: str
    code: str
    reason: str


@dataclass
class Answers(ABC):
    """What came back from one exchange, added up. `silent` are the sites that did not answer in time."""

    seconds: float = 0.0
    answered: list[str] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    def add_reply(self, site: str, reply: Message) -> None:
        """Add the answer of `site`, or note why it cannot be added."""
        if reply.has_error():
            self.declined.append(Declined(site, _code_name(reply.error.code), _words(reply.error.reason)))
            return
        try:
            self.add(site, reply.content)
        except UpdateError as error:
            self.declined.append(Declined(site, "unusable", _words(str(error))))
        else:
            self.answered.append(site)

    @abstractmethod
    def add(self, site: str, content: RecordDict) -> None:
        """Add a whole answer or nothing. Raises UpdateError."""


@dataclass
class Trained(Answers):
    """The sum of the sites' weighted deltas, and the receipts by site."""

    total: WeightedSum = field(default_factory=lambda: WeightedSum({}))
    weighting: Weighting = "examples"
    weight_cap: int | None = None
    receipts: dict[str, SiteReceipt] = field(default_factory=dict)
    asked: Plan | None = None
    """What the answers' receipts are held against; None: not looked at."""
    discount: float = 1.0
    """What the next delta is multiplied by; its weight stays what it is."""
    read: Reader = as_sent
    bytes_up: int = 0
    """Of the arrays in the answers that were added."""
    bytes_down: int = 0
    """Of the arrays that the sites of those answers trained from."""

    @classmethod
    def for_plan(
        cls, plan: Plan, parameters: Mapping[str, NDArray[np.float32]], robust: RobustAggregate | None = None
    ) -> "Trained":
        """Ready for the answers of sites that are asked with `plan` and `parameters`. Raises PluginError."""
        template = postprocess.sum_of(parameters, plan)
        bounded = plan.weighting == "capped"
        total = (
            WeightedSum(template, largest=LARGEST)
            if robust is None
            else UpdateStack(template, robust, bounded=bounded, largest=LARGEST)
        )
        return cls(
            total=total,
            weighting=plan.weighting,
            weight_cap=plan.weight_cap,
            asked=plan,
            read=postprocess.reader(parameters, plan),
        )

    def add(self, site: str, content: RecordDict) -> None:
        """Add a weighted delta."""
        weight, examples = weights_in(content)
        check_weight(weight, examples, self.weighting, self.weight_cap)
        receipt = receipt_in(content)
        if self.asked is not None:
            check_receipt(receipt, self.asked, examples)
        arrays, size = self.read(part(content.array_records, SUM))
        if self.discount != 1:
            arrays = {name: array * np.float32(self.discount) for name, array in arrays.items()}
        self.total.add(arrays, weight, examples)
        self.bytes_up += size
        self.receipts[site] = SiteReceipt(examples=examples, receipt=receipt)


@dataclass
class Evaluated(Answers):
    """Sums of the sites' metrics times their examples. A metric that no site sent has no mean.

    A site counts by its test examples and by nothing else, and each metric lies in its range, so that no answer moves
    a mean further than so many examples can.
    """

    wanted: tuple[str, ...] = ()
    examples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    by_site: dict[str, int] = field(default_factory=dict)
    """Test examples that each site says it has."""
    labels: tuple[str, ...] = ()
    """Of the classes; without them neither counts nor histograms are read."""
    score_bins: int | None = None
    pooled: Pooled = field(default_factory=Pooled)
    values: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """By metric, each site's own and its examples, where it has cases for it."""

    def add(self, site: str, content: RecordDict) -> None:
        """Add weighted metrics."""
        weight, examples = weights_in(content)
        check_weight(weight, examples, "examples")
        record = part(content.metric_records, METRICS)
        values = {name: _metric(record, name, examples) for name in self.wanted if name in record}
        counts, scores = self._counts(record, examples), self._scores(content, record, examples)
        if HITS in counts and abs(counts[HITS].sum() - values.get("accuracy", counts[HITS].sum())) > 1e-6 * examples:
            raise UpdateError("the answer's accuracy is not that of the hits that it counts")
        self.include(site, examples, values, counts)
        if scores is not None:
            self.pooled.add_histograms(*scores, examples)

    def include(
        self, site: str, examples: int, values: Mapping[str, float], counts: Mapping[str, NDArray[np.float64]]
    ) -> None:
        """Add what a site found on so many test examples: `values` are metric x examples, `counts` as in `Pooled`."""
        self.examples += examples
        self.by_site[site] = examples
        if counts:
            self.pooled.add_counts(counts, examples)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.weights[name] = self.weights.get(name, 0.0) + examples
            if name not in RATIOS or not counts or ratio_of(name, counts) is not None:
                self.values.setdefault(name, []).append((value / examples, examples))

    @property
    def metrics(self) -> dict[str, float]:
        """By name: of all test examples together where every site of a figure sent what adds up to it, else the
        example-weighted means. None of a ratio without cases."""
        found = {}
        ratios, area = self.pooled.ratios(), self.area
        for name in self.wanted:
            if name == "auroc" and area is not None:
                found[name] = area.value
            elif name in RATIOS and self._is_pooled(name):
                if name in ratios:
                    found[name] = ratios[name]
            elif name in self.sums:
                found[name] = self.sums[name] / self.weights[name]
        return found

    @property
    def area(self) -> Area | None:
        """The AUROC of all test examples together with its bound; None where not every site's histograms are in it."""
        return self.pooled.area() if "auroc" in self.wanted and self._is_pooled("auroc") else None

    @property
    def by_class(self) -> dict[str, dict[str, float]]:
        """For more than two classes: the ratios of each."""
        return self.pooled.by_class(self.labels) if len(self.labels) > 2 else {}

    @property
    def majority(self) -> tuple[str, float] | None:
        """The commonest class of the test examples and its share: the accuracy of who always answers with it."""
        return self.pooled.majority(self.labels) if self.labels else None

    def _is_pooled(self, name: str) -> bool:
        covered = self.pooled.scored if name == "auroc" else self.pooled.counted
        return covered > 0 and covered >= self.weights.get(name, 0.0)

    @property
    def over_sites(self) -> dict[str, dict[str, float]]:
        """Second figures, of the metrics that are ratios: the example-weighted mean over the sites that have cases for
        them, its standard deviation over the sites, and how many those are."""
        found = {}
        for name, own in self.values.items():
            if name == "loss":
                continue
            values, examples = np.array([value for value, _ in own]), np.array([count for _, count in own], float)
            mean = float(np.average(values, weights=examples))
            spread = float(np.sqrt(np.average(np.square(values - mean), weights=examples)))
            found[name] = {"mean": mean, "spread": spread, "sites": len(own)}
        return found

    def _counts(self, record: MetricRecord, examples: int) -> dict[str, NDArray[np.float64]]:
        """The counts by class in an answer, all of them or none. Raises UpdateError for such as cannot be."""
        found = {name: _numbers(record, name) for name in COUNTS if name in record} if self.labels else {}
        counts = check_counts(found, len(self.labels), examples)
        return counts if len(counts) == len(COUNTS) else {}

    def _scores(
        self, content: RecordDict, record: MetricRecord, examples: int
    ) -> tuple[NDArray[np.float64], float] | None:
        """The histograms in an answer and the deviation of their noise; None without. Raises UpdateError."""
        shape = histogram_shape(len(self.labels), self.score_bins) if self.score_bins else None
        if shape is None or SCORES not in content.array_records:
            return None
        deviation = _number(record, SCORE_NOISE)
        if not 0 <= deviation <= MOST_NOISE:
            raise UpdateError(f"the answer's {SCORE_NOISE!r} of {deviation:.4g} is not within 0 and {MOST_NOISE:g}")
        form = Form(np.dtype(np.float64), shape)
        arrays = unpack_wire(content.array_records[SCORES], {SCORES: form})
        return check_histograms(arrays[SCORES], examples, deviation), deviation


def train(
    grid: Grid,
    nodes: Sequence[int],
    plan: Plan,
    outgoing: Outgoing,
    deadline: float,
    robust: RobustAggregate | None = None,
) -> Trained:
    """Ask `nodes` to train by `plan` and sum their answers, or have them combined. `deadline` in seconds."""
    trained = Trained.for_plan(plan, outgoing.parameters, robust)
    if isinstance(grid, CohortGrid):
        grid.train_cohort(nodes, plan, outgoing, trained)
    else:
        asked = questions(nodes, plan.round, MessageType.TRAIN, training_question(plan, outgoing), deadline)
        ask(grid, asked, deadline, trained)
    trained.bytes_down = outgoing.nbytes * len(trained.answered)
    return trained


def training_question(plan: Plan, outgoing: Outgoing) -> RecordDict:
    """The question to train by `plan`, with what its answer takes at most. Raises PluginError."""
    return question(plan, outgoing, postprocess.answer_bytes(outgoing.parameters, plan))


def evaluate(
    grid: Grid,
    nodes: Sequence[int],
    plan: Plan,
    parameters: Mapping[str, NDArray[np.float32]],
    deadline: float,
    labels: Sequence[str] = (),
) -> Evaluated:
    """Ask `nodes` to evaluate `parameters` on their own test data. `deadline` in seconds; `labels` are the classes'."""
    evaluated = Evaluated(wanted=plan.metrics, labels=tuple(labels), score_bins=plan.score_bins)
    if isinstance(grid, CohortGrid):
        grid.evaluate_cohort(nodes, plan, parameters, evaluated)
        return evaluated
    content = question(plan, Outgoing(parameters))
    ask(grid, questions(nodes, plan.round, MessageType.EVALUATE, content, deadline), deadline, evaluated)
    return evaluated


def site_name(grid: Grid, node_id: int) -> str:
    """The certified name where the runtime knows one, else the node's number."""
    return grid.site_name(node_id) if isinstance(grid, StreamingGrid) else str(node_id)


def ask(grid: Grid, messages: Sequence[Message], deadline: float, answers: Answers) -> None:
    """Send `messages`, one a site, and hand what comes back within `deadline` seconds to `answers`."""
    began = time.monotonic()
    waiting = {message.metadata.dst_node_id: site_name(grid, message.metadata.dst_node_id) for message in messages}
    for reply in grid.send_and_receive(messages, timeout=deadline):
        site = waiting.pop(reply.metadata.src_node_id, None)
        if site is None:
            log.warning("a second reply of node %d was dropped", reply.metadata.src_node_id)
        else:
            answers.add_reply(site, reply)
    answers.silent = sorted(waiting.values())
    answers.seconds = time.monotonic() - began


def weights_in(content: RecordDict) -> tuple[float, int]:
    """Weight and examples of an answer. Raises UpdateError for absurd ones."""
    record = part(content.metric_records, METRICS)
    weight, examples = _number(record, WEIGHT), _number(record, EXAMPLES)
    if not 1 <= examples <= MOST_EXAMPLES or examples != int(examples) or weight <= 0:
        raise UpdateError(f"the answer claims {examples:g} examples and weight {weight:g}")
    return weight, int(examples)


def check_weight(weight: float, examples: int, weighting: Weighting, cap: int | None = None) -> None:
    """Raise UpdateError for another weight than a site with so many examples has.

    The plan determines it, so nothing is left to the site but how many examples it has, which nobody can check: by one
    that it may choose it would take any share of a mean, and scale the server's noise.
    """
    if weight != weight_of(examples, weighting, cap):
        raise UpdateError(f"weight {weight:g} does not belong to {examples} examples weighted by {weighting}")


def part(records: Mapping[str, R], name: str) -> R:
    """The record of that name. Raises UpdateError when the answer lacks it."""
    if name not in records:
        raise UpdateError(f"the answer lacks its record {name!r}")
    return records[name]


def _number(record: MetricRecord, name: str) -> float:
    value = record.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UpdateError(f"the answer's {name!r} is of type {type(value).__name__}, expected a number")
    if not abs(value) <= sys.float_info.max:
        raise UpdateError(f"the answer's {name!r} is no finite number")
    return float(value)


def _numbers(record: MetricRecord, name: str) -> list[float]:
    values = record.get(name)
    if not isinstance(values, list) or len(values) > MAX_COLUMNS:
        raise UpdateError(f"the answer's {name!r} is no list of numbers")
    if not all(type(value) in (int, float) and abs(value) <= MOST_EXAMPLES for value in values):
        raise UpdateError(f"the answer's {name!r} holds what is no number of examples")
    return [float(value) for value in values]


def _metric(record: MetricRecord, name: str, examples: int) -> float:
    """Metric x examples. Raises UpdateError unless the metric is one: at least 0, and at most 1 or `MOST_LOSS`."""
    value, most = _number(record, name), MOST_LOSS if name == "loss" else 1.0
    if not 0 <= value <= most * examples * _ROUNDED:
        raise UpdateError(f"the answer's {name} of {value / examples:.4g} is not within 0 and {most:g}")
    return value


def receipt_in(content: RecordDict) -> Receipt:
    """The privacy receipt of an answer. Raises UpdateError when it is malformed."""
    try:
        return Receipt.model_validate_json(receipt_text(content))
    except ValidationError as error:
        raise UpdateError(f"the privacy receipt is malformed: {explain(error)}") from error


def receipt_text(content: RecordDict) -> str:
    """The JSON of an answer's receipt. Raises UpdateError when it is none, or longer than any receipt."""
    text = part(content.config_records, RECEIPT).get(JSON)
    if not isinstance(text, str) or len(text) > LONGEST_RECEIPT:
        raise UpdateError(f"the privacy receipt is malformed: it is no text of at most {LONGEST_RECEIPT} characters")
    return text


def reasons_of(answers: Answers, failure: str | None = None) -> str:
    """`failure`, and why each site that gave no usable answer did not; of very many the first."""
    reasons = [failure] if failure else []
    reasons += [f"{declined.site}: {declined.reason}" for declined in answers.declined]
    reasons += [f"{site}: no answer in time" for site in answers.silent]
    more = [f"and {len(reasons) - MOST_REASONS} more"] if len(reasons) > MOST_REASONS else []
    return "; ".join([*reasons[:MOST_REASONS], *more])


def _words(reason: str | None) -> str:
    """A site's words on one line, without control characters, cut to a sane length."""
    text = "".join(letter if letter.isprintable() else " " for letter in reason or "")
    return " ".join(text.split())[:LONGEST_REASON] or "no reason"


def _code_name(code: int) -> str:
    try:
        return RefusalCode(code).name.lower()
    except ValueError:
        return f"error {code}"
