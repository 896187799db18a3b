"""What comes back from a cohort, added up as it comes, and how an answer is read: nothing in it is believed."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from pydantic import ValidationError

from fedclaw.errors import UpdateError
from fedclaw.learning import postprocess
from fedclaw.learning.postprocess import Reader, as_sent
from fedclaw.learning.tasks.base import Sums, Tally, Task
from fedclaw.learning.tasks.classification import Classification
from fedclaw.privacy.mechanisms.receipts import LONGEST_RECEIPT, check_receipt
from fedclaw.protocol.arrays import LARGEST, unpack_wire
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.limits import MAX_COLUMNS, MOST_EXAMPLES
from fedclaw.protocol.messages import EXAMPLES, JSON, METRICS, RECEIPT, SCORE_NOISE, SCORES, SUM, WEIGHT
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import Weighting, weight_of
from fedclaw.server.accumulator import RobustAggregate, UpdateStack, WeightedSum
from fedclaw.server.run_directory import SiteReceipt

R = TypeVar("R")

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
class CohortAnswers(ABC):
    """The answers of one exchange, added up. `silent` are the sites that did not answer in time."""

    seconds: float = 0.0
    answered: list[str] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    def add_reply(self, site: str, reply: Message) -> None:
        """Add the answer of `site`, or record why it cannot be added."""
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
class Trained(CohortAnswers):
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
        """An empty sum for the answers of sites that are asked with `plan` and `parameters`. Raises PluginError."""
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
class Evaluated(CohortAnswers):
    """The sums of the sites' test examples, and the figures that the task makes of them.

    A site counts by its test examples and by nothing else, and what it says that they add up to is held against how
    many they are, so that no answer moves a figure further than so many examples can.
    """

    wanted: tuple[str, ...] = ()
    task: Task = field(default_factory=Classification)
    score_bins: int | None = None
    examples: int = 0
    by_site: dict[str, int] = field(default_factory=dict)
    """Test examples that each site says it has."""
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tally = self.task.tally(self.wanted, self.score_bins)

    def add(self, site: str, content: RecordDict) -> None:
        """Add sums over a site's test examples."""
        weight, examples = weights_in(content)
        check_weight(weight, examples, "examples")
        self.include(site, examples, self._sums(content, part(content.metric_records, METRICS)))

    def include(self, site: str, examples: int, sums: Sums) -> None:
        """Add what a site found on so many test examples. Raises UpdateError for what cannot be."""
        self.tally.add(sums, examples)
        self.examples += examples
        self.by_site[site] = examples

    @property
    def metrics(self) -> dict[str, float]:
        """The figures by name; one without a value is left out."""
        return self.tally.metrics

    def _sums(self, content: RecordDict, record: MetricRecord) -> Sums:
        """The numbers in an answer that the tally knows, and its arrays. Raises UpdateError for malformed ones."""
        numbers = {name: _number(record, name) for name in self.tally.numbers if name in record}
        lists = {name: _numbers(record, name) for name in self.tally.lists if name in record}
        noised = RECEIPT in content.config_records
        if not self.tally.arrays or SCORES not in content.array_records:
            return Sums(numbers, lists, noised=noised)
        deviation = _number(record, SCORE_NOISE)
        if not 0 <= deviation <= MOST_NOISE:
            raise UpdateError(f"the answer's {SCORE_NOISE!r} of {deviation:.4g} is not within 0 and {MOST_NOISE:g}")
        arrays = unpack_wire(content.array_records[SCORES], dict(self.tally.arrays))
        return Sums(numbers, lists, arrays, deviation, noised)


def weights_in(content: RecordDict) -> tuple[float, int]:
    """Weight and number of examples of an answer. Raises UpdateError for impossible ones."""
    record = part(content.metric_records, METRICS)
    weight, examples = _number(record, WEIGHT), _number(record, EXAMPLES)
    if not 1 <= examples <= MOST_EXAMPLES or examples != int(examples) or weight <= 0:
        raise UpdateError(f"the answer claims {examples:g} examples and weight {weight:g}")
    return weight, int(examples)


def check_weight(weight: float, examples: int, weighting: Weighting, cap: int | None = None) -> None:
    """Raise UpdateError unless `weight` is that of a site with `examples` examples.

    The plan determines the weight: a site that chose its own could take any share of the mean, and would scale the
    server's noise. Only the number of examples, which nobody can check, is the site's own word.
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


def receipt_in(content: RecordDict) -> Receipt:
    """The privacy receipt of an answer. Raises UpdateError when it is malformed."""
    try:
        return Receipt.model_validate_json(receipt_text(content))
    except ValidationError as error:
        raise UpdateError(f"the privacy receipt is malformed: {explain(error)}") from error


def receipt_text(content: RecordDict) -> str:
    """The JSON of an answer's receipt. Raises UpdateError if it is missing, no text, or longer than any receipt."""
    text = part(content.config_records, RECEIPT).get(JSON)
    if not isinstance(text, str) or len(text) > LONGEST_RECEIPT:
        raise UpdateError(f"the privacy receipt is malformed: it is no text of at most {LONGEST_RECEIPT} characters")
    return text


def reasons_of(answers: CohortAnswers, failure: str | None = None) -> str:
    """Why each site gave no usable answer, after `failure`; at most the first `MOST_REASONS`."""
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
