"""The server's half of an evaluation: sums over test examples, and the figures that the task makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from flwr.app import MessageType, RecordDict
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.learning.tasks.base import Sums, Tally, Task
from fedclaw.protocol.arrays import unpack_wire
from fedclaw.protocol.messages import METRICS, RECEIPT, SCORE_NOISE, SCORES
from fedclaw.protocol.questions import Outgoing, question
from fedclaw.protocol.records import MessageRecords
from fedclaw.protocol.terms import Plan
from fedclaw.server.cohort_question import CohortQuestion, check_weight, number_in, numbers_in, part, weights_in

MOST_NOISE = 1e9
"""Deviation of the noise in a cell of a histogram: a site with more says nothing."""


@dataclass
class EvaluationQuestion(CohortQuestion[int, Tally]):
    """Evaluate `parameters`, a model of `task`, on test data. Beside an answer is the number of its test examples.

    A site counts by its test examples and by nothing else, and what it says that they add up to is held against how
    many they are, so that no answer moves a figure further than so many examples can.
    """

    asked: Plan
    parameters: Mapping[str, NDArray[np.float32]]
    task: Task
    tally: Tally = field(init=False)
    noised: bool = field(default=False, init=False)
    """Whether a site's answer has noise in it."""
    kind: ClassVar[str] = MessageType.EVALUATE

    def __post_init__(self) -> None:
        self.tally = self.task.tally(self.asked.metrics, self.asked.score_bins)

    @property
    def examples(self) -> int:
        """Test examples of all that answered."""
        return sum(self.besides.values())

    def content(self) -> MessageRecords:
        """See CohortQuestion."""
        return question(self.asked, Outgoing(self.parameters))

    def beside(self, content: RecordDict) -> int:
        """See CohortQuestion."""
        weight, examples = weights_in(content)
        check_weight(weight, examples, "examples")
        return examples

    def add_open(self, content: RecordDict, beside: int) -> None:
        """See CohortQuestion."""
        sums = self._sums(content)
        self.tally.add(sums, beside)
        self.noised |= sums.noised

    def include(self, site: str, examples: int, sums: Sums) -> None:
        """Add what a site, which sent no message, found on so many test examples. Raises UpdateError."""
        self.tally.add(sums, examples)
        self.besides[site] = examples
        self.answered.append(site)

    def read(self) -> Tally:
        """See CohortQuestion."""
        return self.tally

    def _sums(self, content: RecordDict) -> Sums:
        """The numbers in an answer that the tally knows, and its arrays. Raises UpdateError for malformed ones."""
        record = part(content.metric_records, METRICS)
        numbers = {name: number_in(record, name) for name in self.tally.numbers if name in record}
        lists = {name: numbers_in(record, name) for name in self.tally.lists if name in record}
        noised = RECEIPT in content.config_records
        if not self.tally.arrays or SCORES not in content.array_records:
            return Sums(numbers, lists, noised=noised)
        deviation = number_in(record, SCORE_NOISE)
        if not 0 <= deviation <= MOST_NOISE:
            raise UpdateError(f"the answer's {SCORE_NOISE!r} of {deviation:.4g} is not within 0 and {MOST_NOISE:g}")
        arrays = unpack_wire(content.array_records[SCORES], dict(self.tally.arrays))
        return Sums(numbers, lists, arrays, deviation, noised)
