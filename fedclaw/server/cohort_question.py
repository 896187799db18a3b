"""One question to a cohort, whatever is asked of its data: the server's half of what `fedclaw.site.pipeline` lets out.

    content      what is asked. Its values go with every message of an exchange, its arrays with the question alone
    beside       what goes beside an answer, masked or not: the number of examples, a receipt. It is checked
    add_open     an answer that left as it is, checked and added when it arrives
    add_sum      instead of these, the sum of a secure session, of which nobody saw a part
    read         what the sum says

A kind of question is a class (`CohortQuestion`): training, evaluation, statistics. `fedclaw.server.exchange.ask` asks
whichever it is handed, in the open or in a secure sum, and is all that there is between such a class and a grid.

`CohortAnswers` is what comes back from a cohort. Nothing in an answer is believed: functions here read and check it.
"""

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from pydantic import ValidationError

from fedclaw.errors import SecureAggregationError, UpdateError
from fedclaw.privacy.mechanisms.receipts import LONGEST_RECEIPT
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.protocol.limits import MAX_COLUMNS, MOST_EXAMPLES
from fedclaw.protocol.messages import EXAMPLES, JSON, METRICS, RECEIPT, WEIGHT
from fedclaw.protocol.questions import Asked, questions
from fedclaw.protocol.records import MessageRecords
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import Weighting, weight_of
from fedclaw.server.grids import site_name

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Frozen)
R = TypeVar("R")
B = TypeVar("B")
S = TypeVar("S")

LONGEST_REASON = 300
MOST_REASONS = 20
"""Sites named in the line that ends a run."""


@dataclass(frozen=True)
class Declined:
    """A site that did not take part, and why: its own refusal, or an answer that could not be used."""

    site: str
    code: str
    reason: str


@dataclass(kw_only=True)
class CohortAnswers(ABC):
    """The answers of one exchange, added up. `silent` are the sites that did not answer in time."""

    seconds: float = 0.0
    answered: list[str] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    failure: str | None = None
    """Why there is no secure sum, where one was asked for."""

    def collect(self, grid: Grid, messages: Sequence[Message], deadline: float) -> None:
        """Send `messages`, one per site, and add the replies of the next `deadline` seconds."""
        began = time.monotonic()
        waiting = {message.metadata.dst_node_id: site_name(grid, message.metadata.dst_node_id) for message in messages}
        for reply in grid.send_and_receive(messages, timeout=deadline):
            site = waiting.pop(reply.metadata.src_node_id, None)
            if site is None:
                log.warning("a second reply of node %d was dropped", reply.metadata.src_node_id)
            else:
                self.add_reply(site, reply)
        self.silent = sorted(waiting.values())
        self.seconds = time.monotonic() - began

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


def weights_in(content: RecordDict) -> tuple[float, int]:
    """Weight and number of examples of an answer. Raises UpdateError for impossible ones."""
    record = part(content.metric_records, METRICS)
    weight, examples = number_in(record, WEIGHT), number_in(record, EXAMPLES)
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


def number_in(record: MetricRecord, name: str) -> float:
    """A finite number. Raises UpdateError for anything else."""
    value = record.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UpdateError(f"the answer's {name!r} is of type {type(value).__name__}, expected a number")
    if not abs(value) <= sys.float_info.max:
        raise UpdateError(f"the answer's {name!r} is no finite number")
    return float(value)


def numbers_in(record: MetricRecord, name: str) -> list[float]:
    """A list of numbers of examples. Raises UpdateError for anything else."""
    values = record.get(name)
    if not isinstance(values, list) or len(values) > MAX_COLUMNS:
        raise UpdateError(f"the answer's {name!r} is no list of numbers")
    if not all(type(value) in (int, float) and abs(value) <= MOST_EXAMPLES for value in values):
        raise UpdateError(f"the answer's {name!r} holds what is no number of examples")
    return [float(value) for value in values]


def receipt_in(content: RecordDict, kind: type[F]) -> F:
    """The privacy receipt of an answer, of class `kind`. Raises UpdateError when it is malformed."""
    text = part(content.config_records, RECEIPT).get(JSON)
    if not isinstance(text, str) or len(text) > LONGEST_RECEIPT:
        raise UpdateError(f"the privacy receipt is malformed: it is no text of at most {LONGEST_RECEIPT} characters")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise UpdateError(f"the privacy receipt is malformed: {explain(error)}") from error


def reasons_of(answers: CohortAnswers) -> str:
    """Why there is no secure sum, and why each site gave no usable answer; at most the first `MOST_REASONS`."""
    reasons = [answers.failure] if answers.failure else []
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


@dataclass
class CohortQuestion(CohortAnswers, Generic[B, S]):
    """One question, and its answers as they are added up: `B` comes beside each, and `S` is what the sum says."""

    asked: Asked
    besides: dict[str, B] = field(default_factory=dict, init=False)
    """By site, what came beside its answer; in a secure sum also of a site that then dropped out."""
    spent: bool = field(default=False, init=False)
    """Whether sites had been asked for what costs them. Only said of a secure sum."""
    unmasking: bool = field(default=False, init=False)
    """Whether sites had been asked for what takes the masks off a secure sum, which they give once."""
    kind: ClassVar[str]
    """The type of the message."""

    @abstractmethod
    def content(self) -> MessageRecords:
        """What is asked, with the largest size of an answer (`reply_bytes`) where it is known."""

    @abstractmethod
    def beside(self, content: RecordDict) -> B:
        """What goes beside an answer. Raises UpdateError for what no honest site says."""

    @abstractmethod
    def add_open(self, content: RecordDict, beside: B) -> None:
        """Add a whole answer or nothing. Raises UpdateError."""

    def add_sum(self, total: NDArray[np.uint32], besides: Sequence[B]) -> None:
        """Take the secure sum (d,) over sites that said `besides`. Raises SecureAggregationError if there is none."""
        raise SecureAggregationError("a secure sum of this was not asked for")

    @abstractmethod
    def read(self) -> S:
        """What the sum says. Called once, after the last answer."""

    def add(self, site: str, content: RecordDict) -> None:
        """See CohortAnswers."""
        beside = self.beside(content)
        self.add_open(content, beside)
        self.besides[site] = beside

    def messages(self, nodes: Sequence[int], ttl: float | None = None) -> list[Message]:
        """The question to each of `nodes`, with an identity that only the question determines. `ttl` in seconds."""
        return questions(nodes, self.asked.round, self.kind, self.content(), ttl)
