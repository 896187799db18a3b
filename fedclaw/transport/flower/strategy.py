"""A FedClaw run as a Flower strategy, for a plain Flower ServerApp on any Flower runtime.

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FlowerStrategy(record)
        strategy.start(grid, pack(initial), num_rounds=record.rounds)

The sites are FedClaw sites and refuse, train and pay as always. What Flower's loop does not have is lost: answers are
held until all have arrived, a round with too few sites is not repeated, and a run cannot be resumed. What takes more
than one question and one answer a round is refused: secure aggregation, sites sampled at random, an adaptive clipping
bound, a teacher. For those there is `fedclaw.server.coordinator.run_rounds`.
"""

import logging
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as AbstractFlowerStrategy

from fedclaw.errors import UsageError
from fedclaw.learning import postprocess
from fedclaw.learning.strategy import Participation
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.arrays import Arrays, pack, shapes_of, unpack
from fedclaw.protocol.questions import Outgoing
from fedclaw.server.cohort_question import CohortAnswers
from fedclaw.server.evaluation import EvaluationQuestion
from fedclaw.server.run_directory import RunRecord
from fedclaw.server.run_state import GlobalModel
from fedclaw.server.session import make_plan, make_strategy
from fedclaw.server.training import TrainingQuestion, robust_aggregation

log = logging.getLogger(__name__)


class FlowerStrategy(AbstractFlowerStrategy):
    """Asks all connected nodes as `record` says, and steps with the server half of its strategy.

    Raises UsageError for a record that Flower's loop cannot run as it says.
    """

    def __init__(self, record: RunRecord) -> None:
        if beyond := _beyond_flower(record):
            raise UsageError(f"Flower's own loop has no {beyond}; run it with python -m fedclaw.server")
        self._record = record
        self._strategy = make_strategy(record)
        self._model: GlobalModel | None = None
        self._memory: dict[str, Arrays] = {}
        self._asked = 0
        self._weights: dict[str, float] = {}
        self.trained: TrainingQuestion | None = None
        """The last round's answers, with the sites' receipts."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's question to every node. `config` is not used: the plan has it all."""
        if self._model is None:
            self._model = GlobalModel(unpack(arrays), self._strategy)
            shared = {name: a for name, a in self._model.parameters.items() if name not in self._record.personal}
            self._memory = self._strategy.server_state(shared)
        nodes = sorted(grid.get_node_ids())
        self._asked = len(nodes)
        return self._training(server_round, len(nodes)).messages(nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The stepped parameters and the number of sites; None when fewer sites trained than the record needs."""
        model = self._started()
        self.trained = trained = self._training(server_round, self._asked)
        plan = trained.asked
        _take(trained, replies, server_round)
        if len(trained.answered) < self._record.rules.minimum:
            log.warning("round %d does not count: %d sites trained", server_round, len(trained.answered))
            return None, None
        summed = trained.read()
        self._weights.update({site: plan.weight(item.examples) for site, item in trained.receipts.items()})
        participation = Participation.of(summed.weight, len(trained.answered), self._asked, self._weights.values())
        mean = postprocess.at_server(summed, plan, shapes_of(model.parameters)).arrays
        norm = model.step(self._strategy.aggregate(mean, self._memory, participation))
        return pack(model.parameters), MetricRecord({"sites": len(trained.answered), "update_norm": norm})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The evaluation's question to every node."""
        nodes = sorted(grid.get_node_ids())
        return self._evaluation(server_round, len(nodes)).messages(nodes)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The figures of all test examples that the sites permit; None when nobody evaluated."""
        evaluated = self._evaluation(server_round, self._asked)
        _take(evaluated, replies, server_round)
        return MetricRecord(dict(evaluated.read().metrics)) if evaluated.answered else None

    def summary(self) -> None:
        """One line in the log."""
        log.info("%s over %d rounds: run %s", self._record.strategy.name, self._record.rounds, self._record.run)

    def _training(self, server_round: int, cohort: int) -> TrainingQuestion:
        plan = make_plan(self._record, self._strategy, server_round, cohort)
        outgoing = Outgoing(self._started().parameters, broadcast=self._strategy.broadcast(self._memory))
        return TrainingQuestion(plan, outgoing, robust_aggregation(self._strategy, self._memory), self._record.unit)

    def _evaluation(self, server_round: int, cohort: int) -> EvaluationQuestion:
        plan = make_plan(self._record, self._strategy, server_round, cohort)
        return EvaluationQuestion(plan, self._started().parameters, self._record.make_schema().task)

    def _started(self) -> GlobalModel:
        assert self._model is not None, "Flower configures a round before it aggregates it"
        return self._model


def _beyond_flower(record: RunRecord) -> str | None:
    """What `record` needs of a loop that Flower's does not have."""
    mechanism = mechanism_of(record)
    if make_strategy(record).select_clients(1, [0, 1], record.seed) is not None:
        return f"strategy that chooses whom a round asks ({record.strategy.name})"
    if record.secure is not None:
        return "secure aggregation"
    if mechanism.site_rate < 1:
        return "sites asked at random, which central.sample_rate counts on"
    if mechanism.counts_within_clip:
        return "adaptive clipping bound (central.adaptive)"
    return "teacher for a distillation" if record.distillation is not None else None


def _take(answers: CohortAnswers, replies: Iterable[Message], server_round: int) -> None:
    for reply in replies:
        answers.add_reply(str(reply.metadata.src_node_id), reply)
    for declined in answers.declined:
        log.warning("round %d: node %s declined (%s): %s", server_round, declined.site, declined.code, declined.reason)
