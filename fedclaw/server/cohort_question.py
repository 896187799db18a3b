"""One question to a cohort, whatever is asked of its data: the server's half of what `fedclaw.site.pipeline` lets out.

    content      what is asked. Its values go with every message of an exchange, its arrays with the question alone
    beside       what goes beside an answer, masked or not: the number of examples, a receipt. It is checked
    add_open     an answer that left as it is, checked and added when it arrives
    add_sum      instead of these, the sum of a secure session, of which nobody saw a part
    read         what the sum says

A kind of question is a class (`CohortQuestion`): training, evaluation, statistics. `fedclaw.server.exchange.ask` asks
whichever it is handed, in the open or in a secure sum, and is all that there is between such a class and a grid.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import numpy as np
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from fedclaw.errors import SecureAggregationError
from fedclaw.protocol.questions import Asked, questions
from fedclaw.protocol.records import MessageRecords
from fedclaw.server.answers import CohortAnswers

B = TypeVar("B")
S = TypeVar("S")


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
