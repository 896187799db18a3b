"""Training in one round: the cohort is asked the same question until enough sites have answered.

`Cohorts` selects the sites. They are sampled once and written down first, so a resumed round asks the same ones.
`Buffer` does not wait for all of them: a step is made as soon as enough have answered.
"""

import logging
import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedclaw.errors import RoundError
from fedclaw.learning.strategy import Buffered, Strategy
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.questions import Outgoing
from fedclaw.protocol.terms import DataUnit, Plan
from fedclaw.server.cohort_question import reasons_of
from fedclaw.server.exchange import ask
from fedclaw.server.grids import StreamingGrid, site_name
from fedclaw.server.run_directory import PendingRound, RunDirectory, RunRecord
from fedclaw.server.run_state import RunState
from fedclaw.server.training import TrainingQuestion, robust_aggregation, session_of
from fedclaw.server.waiting import poll

log = logging.getLogger(__name__)

_LOOK_WHO_IS_HERE = 0.2
"""Seconds between two looks at who is connected."""


class Cohorts:
    """Selects the sites of each round of a run from those connected to `grid`. `root` is the run's directory."""

    def __init__(self, grid: Grid, root: Path, record: RunRecord, strategy: Strategy) -> None:
        self._grid = grid
        self._root = root
        self._record = record
        self._strategy = strategy

    def for_round(self, number: int) -> PendingRound:
        """The round in flight if that is round `number`; otherwise a newly sampled one, on disk on return.

        Raises RoundError when too few sites are connected until the rules' deadline.
        """
        pending = PendingRound.read(self._root)
        if pending and pending.round == number:
            return pending
        rules, connected = self._record.rules, self._connected()
        if len(connected) < rules.minimum:
            raise RoundError(
                f"round {number}: {len(connected)} sites are connected and {rules.minimum} are needed "
                f"(waited {rules.deadline:g} s). Continue with resume={self._root}"
            )
        nodes = tuple(sorted(self._select(number, connected)))
        pending = PendingRound(round=number, nodes=nodes, connected=len(connected))
        if self._record.simulated is None:
            pending.write(self._root)
        return pending

    def willing(self, nodes: Sequence[int]) -> list[int]:
        """`nodes` without those that the grid excludes from this run because of what they sent, or how slowly."""
        excluded = self._grid.excluded_nodes() if isinstance(self._grid, StreamingGrid) else {}
        return [node for node in nodes if node not in excluded]

    def names(self, nodes: Sequence[int]) -> dict[int, str]:
        """The sites' names, by node."""
        return {node: site_name(self._grid, node) for node in nodes}

    def evaluators(self, pending: PendingRound) -> Sequence[int]:
        """Nodes to evaluate: those that the round asked. If the strategy selects its clients itself: all nodes."""
        if self._strategy.select_clients(pending.round, pending.nodes, self._record.seed) is None:
            return pending.nodes
        return sorted({*self._grid.get_node_ids(), *pending.nodes})

    def answering(self, pending: PendingRound, silent: Collection[str], busy: Collection[int]) -> list[int]:
        """Nodes to evaluate, without sites that were `silent` in the round and nodes that are still `busy`."""
        names = self.names(self.willing(self.evaluators(pending)))
        return [node for node, name in names.items() if name not in silent and node not in busy]

    def _select(self, number: int, connected: list[int]) -> list[int]:
        """Nodes to ask: the strategy's choice; each node at random, if privacy relies on that; else a sample."""
        rules, seed, mechanism = self._record.rules, self._record.seed, mechanism_of(self._record)
        if (chosen := self._strategy.select_clients(number, connected, seed)) is not None:
            return list(chosen)
        if mechanism.site_rate < 1:
            asked = GaussianSource().bernoulli(len(connected), mechanism.site_rate)
            return [node for node, chosen in zip(connected, asked, strict=True) if chosen]
        size = max(rules.minimum, round(rules.fraction * len(connected)))
        return random.Random(f"{seed}/{number}").sample(connected, min(size, len(connected)))  # noqa: S311

    def _connected(self) -> list[int]:
        """The connected nodes, once there are as many as a round needs or the deadline has passed."""
        rules = self._record.rules
        return poll(
            lambda: self.willing(sorted(self._grid.get_node_ids())), rules.minimum, rules.deadline, _LOOK_WHO_IS_HERE
        )


_LOOK_FOR_ANSWERS = 0.02
"""Seconds between two looks for answers: Flower's Grid has no way to wait for one."""


@dataclass(frozen=True)
class _Asked:
    """A question that a site is working on, and the step for which it was asked."""

    message_id: str
    step: int


class Buffer:
    """Buffered asynchronous rounds: a step as soon as enough sites have answered, whichever model they began with.

    Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba 2022, "Federated Learning with Buffered Asynchronous
    Aggregation", Algorithm 1 (https://arxiv.org/abs/2106.06639). All connected sites are at work all the time; a site
    that answers waits for the step that its answer goes into and begins again with the new parameters, so that each is
    in a step once at most. A site that is slow misses steps and holds nobody up; what it sends then counts by its
    staleness.

    What is in flight when a server stops is lost to the run, and stays on its site's ledger: the step that was being
    gathered is asked for anew, and a site that has answered its question already answers from its outbox.
    """

    def __init__(self, grid: Grid, strategy: Buffered, unit: DataUnit) -> None:
        self._grid = grid
        self._unit = unit
        self._strategy = strategy
        self._in_flight: dict[int, _Asked] = {}
        self._gathered: TrainingQuestion | None = None
        self._asked: set[int] = set()

    @property
    def busy(self) -> frozenset[int]:
        """Nodes that are working; they answer further questions later."""
        return frozenset(self._in_flight)

    def train(self, plan: Plan, nodes: Sequence[int], outgoing: Outgoing, deadline: float) -> TrainingQuestion:
        """Have the idle ones of `nodes` train by `plan`, and gather answers of whoever is at work for its step.

        Returns when `Buffered.size` sites have answered, when nobody is left at work, or after `deadline` seconds;
        called again for the same step it goes on gathering. Nobody is `silent`: who is at work may answer later.
        """
        began = time.monotonic()
        gathered = self._gathered = self._gathered or TrainingQuestion(plan, outgoing, unit=self._unit)
        self._ask(gathered, nodes)
        while len(gathered.answered) < self._strategy.size and self._in_flight:
            if not self._take_arrived(gathered, plan.round):
                if time.monotonic() - began > deadline:
                    break
                time.sleep(_LOOK_FOR_ANSWERS)
        gathered.seconds += time.monotonic() - began
        if len(gathered.answered) >= self._strategy.size:
            self._gathered, self._asked = None, set()
        return gathered

    def _ask(self, question: TrainingQuestion, nodes: Sequence[int]) -> None:
        idle = [node for node in nodes if node not in self._in_flight and node not in self._asked]
        messages = question.messages(idle)
        for message, identity in zip(messages, self._grid.push_messages(messages), strict=True):
            self._in_flight[message.metadata.dst_node_id] = _Asked(identity, question.asked.round)
        self._asked.update(idle)

    def _take_arrived(self, gathered: TrainingQuestion, step: int) -> bool:
        """Add the answers that have arrived, as many as the step still needs. Whether any had arrived."""
        arrived = False
        for node, asked in list(self._in_flight.items()):
            if len(gathered.answered) >= self._strategy.size:
                break
            for reply in self._grid.pull_messages([asked.message_id]):
                arrived = True
                del self._in_flight[node]
                self._take(gathered, site_name(self._grid, node), reply, step - asked.step)
        return arrived

    def _take(self, gathered: TrainingQuestion, site: str, reply: Message, staleness: int) -> None:
        if staleness > self._strategy.oldest:
            log.info("%s answered %d steps late, which is dropped", site, staleness)
            return
        gathered.discount = self._strategy.discount(staleness)
        gathered.add_reply(site, reply)
        if staleness:
            log.info("%s answered %d steps late and counts by %.3g", site, staleness, gathered.discount)


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
        self._unit = record.unit
        self._buffer = Buffer(grid, strategy, self._unit) if isinstance(strategy, Buffered) else None
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
        question = TrainingQuestion(plan, outgoing, robust_aggregation(self._strategy, state.memory), self._unit)
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
