"""One exchange with a cohort: a question is asked, in the open or in a secure sum, and what comes back is added."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flwr.serverapp import Grid

from fedclaw.server.cohort_question import CohortQuestion
from fedclaw.server.grids import StreamingGrid
from fedclaw.server.secure_exchange import SecureExchange

Q = TypeVar("Q", bound=CohortQuestion[Any, Any])


class CohortGrid(StreamingGrid):
    """A simulation's Grid: it answers for a whole cohort at once, without messages."""

    @abstractmethod
    def answer_cohort(self, nodes: Sequence[int], question: CohortQuestion[Any, Any]) -> None:
        """Add to `question` what the replies of `nodes` would have added."""


def ask(
    grid: Grid,
    nodes: Sequence[int],
    question: Q,
    deadline: float,
    before_unmasking: Callable[[], None] = lambda: None,
) -> Q:
    """Ask `question` of `nodes`, within `deadline` seconds, and return it with their answers added up.

    Where it has a session, nothing but the sum over its sites is seen, and `before_unmasking` is called at the point
    from which it cannot be asked again. A sum that cannot be made is no error: nobody has `answered` then, and
    `failure` says why.
    """
    if isinstance(grid, CohortGrid):
        grid.answer_cohort(nodes, question)
    elif question.asked.secure is not None:
        SecureExchange(grid, nodes, question, deadline).run(before_unmasking)
    else:
        question.collect(grid, question.messages(nodes, deadline), deadline)
    return question
