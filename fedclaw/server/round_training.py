"""Training in one round: the cohort is asked the same question until enough sites have answered."""

import logging
from collections.abc import Mapping

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedclaw.errors import RoundError
from fedclaw.learning.strategy import Buffered, Strategy
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.questions import Outgoing
from fedclaw.server.asynchronous import Buffer
from fedclaw.server.cohort_question import reasons_of
from fedclaw.server.cohorts import Cohorts
from fedclaw.server.exchange import ask
from fedclaw.server.run_directory import PendingRound, RunDirectory, RunRecord
from fedclaw.server.run_state import RunState
from fedclaw.server.training import TrainingQuestion, robust_aggregation, session_of

log = logging.getLogger(__name__)

SILENT = "silent"
_WAY_OUT = (
    "; if a silent site will not come back, add sites.new_cohort=true to ask the sites that are connected then, at the "
    "price that those who answered may pay for the round again"
)


class RoundTraining:
    """Asks the cohorts of a run to train."""

    def __init__(
        self,
        grid: Grid,
        cohorts: Cohorts,
        directory: RunDirectory,
        record: RunRecord,
        strategy: Strategy,
        teacher: Mapping[str, NDArray[np.float32]] | None,
    ) -> None:
        self._grid = grid
        self._cohorts = cohorts
        self._root = directory.root
        self._record = record
        self._strategy = strategy
        self._teacher = teacher
        self._buffer = Buffer(grid, strategy) if isinstance(strategy, Buffered) else None
        self._missing: dict[str, str] = {}
        """By site, why it did not answer the last question to it."""

    @property
    def busy(self) -> frozenset[int]:
        """Nodes that are still working on an earlier question, if the strategy does not wait for all."""
        return self._buffer.busy if self._buffer else frozenset()

    def attempt(self, plan: Plan, pending: PendingRound, state: RunState) -> tuple[TrainingQuestion, bool]:
        """Ask until enough sites have answered, or as often as the rules allow. The answers, and whether they suffice.

        The question is the same each time, so no site pays twice.
        """
        minimum, attempts = self.minimum(plan, pending), self._record.rules.attempts
        for attempt in range(1, attempts + 1):
            trained = self._exchange(plan, pending, state)
            self._say_who_is_missing(plan.round, trained)
            if len(trained.answered) >= minimum:
                return trained, True
            if self._is_final(trained):
                break
            log.warning(
                "round %d: %d of %d sites trained and %d are needed (attempt %d of %d)",
                *(plan.round, len(trained.answered), len(pending.nodes), minimum, attempt, attempts),
            )
        return trained, False

    def failure(self, plan: Plan, pending: PendingRound, trained: TrainingQuestion) -> RoundError:
        """The error for a round with too few answers: the reasons, and how to continue."""
        return RoundError(
            f"round {plan.round} of run {plan.run}: {len(trained.answered)} sites trained, "
            f"{self.minimum(plan, pending)} are needed ({reasons_of(trained)}). {_settled(trained)} "
            f"continue with resume={self._root}{_WAY_OUT if trained.silent else ''}"
        )

    def minimum(self, plan: Plan, pending: PendingRound) -> int:
        """Answers that make a round.

        Zero if sites are sampled secretly: a round must not reveal how many were asked. All that were asked, if a
        strategy asks fewer than the rules would.
        """
        if plan.central and plan.central.expected_sites is not None:
            return 0
        if isinstance(self._strategy, Buffered):
            return self._strategy.size
        return min(self._record.rules.minimum, len(pending.nodes))

    def _exchange(self, plan: Plan, pending: PendingRound, state: RunState) -> TrainingQuestion:
        cohort, deadline = self._cohorts.willing(pending.nodes), self._record.rules.deadline
        outgoing = Outgoing(state.model.parameters, self._teacher, self._strategy.broadcast(state.memory))
        if self._buffer is not None:
            return self._buffer.train(plan, cohort, outgoing, deadline)
        rules, secure = self._record.rules, self._record.secure
        if secure is not None:
            plan = session_of(plan, list(self._cohorts.names(cohort).values()), outgoing, secure, rules.minimum)
        question = TrainingQuestion(plan, outgoing, robust_aggregation(self._strategy, state.memory))
        mark = pending.model_copy(update={"unmasking": True})
        return ask(self._grid, cohort, question, deadline, lambda: mark.write(self._root))

    def _is_final(self, trained: TrainingQuestion) -> bool:
        """Whether asking again is useless, or would make sites pay a second time for one round."""
        if self._record.secure is not None:
            return trained.spent
        if self._buffer is not None:
            return not self._buffer.busy
        return not trained.silent

    def _say_who_is_missing(self, number: int, trained: TrainingQuestion) -> None:
        """Log why there is no secure sum, and each missing site once for each reason, until it has answered again."""
        if trained.failure:
            log.warning("round %d: %s", number, trained.failure)
        for site in trained.answered:
            self._missing.pop(site, None)
        for declined in trained.declined:
            if self._missing.get(declined.site) != declined.code:
                log.warning("round %d: %s declined (%s): %s", number, declined.site, declined.code, declined.reason)
        silent = [site for site in trained.silent if self._missing.get(site) != SILENT]
        if silent:
            log.warning("round %d: no answer from %s", number, ", ".join(silent))
        self._missing |= {item.site: item.code for item in trained.declined} | dict.fromkeys(trained.silent, SILENT)


def _settled(trained: TrainingQuestion) -> str:
    if trained.unmasking:
        return "Its sites unmask a round once, so it will be passed over, paid as it is; when that is settled,"
    if trained.spent:
        return "Its sites have paid for the round and pay again for another secure sum; when that is settled,"
    return "Nothing is lost: when that is settled,"
