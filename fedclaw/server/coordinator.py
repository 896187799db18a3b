"""The loop: plan, exchange, step, checkpoint, evaluate; and the same loop again after a crash."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedclaw.errors import RoundError, UpdateError
from fedclaw.learning.strategy import Buffered, Participation
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.terms import Plan
from fedclaw.server.evaluation import EvaluationQuestion
from fedclaw.server.exchange import ask
from fedclaw.server.round_report import Observer, Outcome, RoundReport, RoundResult
from fedclaw.server.round_training import Cohorts, RoundTraining
from fedclaw.server.run_directory import PendingRound, RunDirectory, SiteReceipt
from fedclaw.server.run_state import RunReceipts, RunState
from fedclaw.server.session import make_plan, make_strategy, task_of
from fedclaw.server.training import TrainingQuestion

log = logging.getLogger(__name__)

MOST_OF_ALL = 0.9
"""Share of all test examples above which a site's word is nearly the whole figure, so that this is said."""


def run_rounds(
    grid: Grid,
    directory: RunDirectory,
    initial: Mapping[str, NDArray[np.float32]],
    *,
    teacher: Mapping[str, NDArray[np.float32]] | None = None,
    observers: Sequence[Observer] = (),
) -> Outcome:
    """Run, or go on with, the run in `directory` until its last round; leaves model.npz there.

    `initial` is used when there is no checkpoint yet; `teacher` when the record distils. Raises RoundError when
    a round finds too few sites as often as the rules allow; the run can then be resumed. Raises RunInUse when another
    process is at work on the run.
    """
    with directory.held():
        return _Loop(grid, directory, initial, teacher, observers).run()


class _Loop:
    """The loop of one `run_rounds`. Cohorts, training, state and receipts are classes of their own."""

    def __init__(
        self,
        grid: Grid,
        directory: RunDirectory,
        initial: Mapping[str, NDArray[np.float32]],
        teacher: Mapping[str, NDArray[np.float32]] | None,
        observers: Sequence[Observer],
    ) -> None:
        self.grid = grid
        self.directory = directory
        self.observers = observers
        self.record = record = directory.record()
        self.strategy = strategy = make_strategy(record)
        self.task = task_of(record)
        self.receipts = RunReceipts(directory, record)
        self.state = RunState(directory, record, strategy, initial)
        self.cohorts = Cohorts(grid, directory.root, record, strategy)
        self.training = RoundTraining(grid, self.cohorts, directory, record, strategy, teacher)
        self.outweighing: set[str] = set()

    def run(self) -> Outcome:
        for observer in self.observers:
            observer.started(self.record, self.state.completed + 1)
        lines = self.directory.read_metrics()
        if self.state.completed > (lines[-1]["round"] if lines else 0):
            self._evaluate_again()
        while self.state.completed < self.record.rounds:
            if report := self._round(self.state.completed + 1):
                self._tell(report)
        return self._finish()

    def _finish(self) -> Outcome:
        self.directory.write_model(self.state.model.parameters)
        PendingRound.remove(self.directory.root)
        lines = self.directory.read_metrics()
        if lines and (warning := self.task.nothing_learned(lines[-1])):
            log.warning("%s", warning)
        metrics = dict(lines[-1]["metrics"]) if lines else {}
        outcome = Outcome(self.directory, self.state.model.parameters, metrics, self.receipts.by_site)
        for observer in self.observers:
            observer.finished(outcome)
        return outcome

    def _round(self, number: int) -> RoundReport | None:
        """Round `number`; None if it is passed over."""
        pending = self.cohorts.for_round(number)
        if pending.unmasking:
            log.warning(
                "round %d is passed over: its secure sum was lost when it was being unmasked, which its sites do once; "
                "what they paid for it stays paid",
                number,
            )
            self.state.complete(number, None)
            self.state.save()
            return None
        plan = self._plan(pending)
        trained = self._train(plan, pending)
        norm = self._step(plan, trained, pending)
        self.receipts.add(trained)
        result = RoundResult.of(trained, norm)
        self.state.complete(number, result)
        # Before anybody sees the new parameters: a server that is killed later does not draw its noise a second time.
        if self._is_saved(number):
            self._save(number, pending)
        busy = self.training.busy if number < self.record.rounds else frozenset()
        nodes = self.cohorts.answering(pending, trained.silent, busy)
        return self._report(number, result, self._evaluated(plan, nodes), trained.receipts)

    def _plan(self, pending: PendingRound) -> Plan:
        central, rate, cohort = self.record.central, mechanism_of(self.record).site_rate, len(pending.nodes)
        if central and self.state.clip:
            central = central.model_copy(update={"clip": self.state.clip})
        if central and rate < 1:
            # Where who is asked is to stay hidden, the number of those who could have been asked is told: it is public.
            cohort = pending.connected
            central = central.model_copy(update={"expected_sites": rate * cohort})
        if isinstance(self.strategy, Buffered):
            cohort = self.strategy.size
        return make_plan(self.record, self.strategy, pending.round, cohort, central)

    def _train(self, plan: Plan, pending: PendingRound) -> TrainingQuestion:
        trained, enough = self.training.attempt(plan, pending, self.state)
        if enough:
            return trained
        # Those of a secure sum that failed have paid all the same.
        self.receipts.add(trained)
        self.receipts.write()
        raise self.training.failure(plan, pending, trained)

    def _step(self, plan: Plan, trained: TrainingQuestion, pending: PendingRound) -> float:
        try:
            summed = trained.read()
            heard = {**self.receipts.by_site, **trained.receipts}.values()
            known = [plan.weight(item.examples) for item in heard]
            connected = max(pending.connected, len(pending.nodes))
            participation = Participation.of(summed.weight, len(trained.answered), connected, known)
            return self.state.step(summed, plan, participation)
        except UpdateError as error:
            raise RoundError(f"round {plan.round} of run {plan.run}: {error}") from error

    def _is_saved(self, number: int) -> bool:
        """Whether the round is saved: always, except in a simulation, where a lost round costs no privacy."""
        simulated = self.record.simulated
        if simulated is None or number == self.record.rounds:
            return True
        return self.state.unsaved_seconds >= simulated.save_every

    def _save(self, number: int, pending: PendingRound) -> None:
        if self.record.simulated is not None:
            pending.write(self.directory.root)
        if self._has_receipts(number):
            self.receipts.write()
        self.state.save()

    def _has_receipts(self, number: int) -> bool:
        """Whether the round's receipts are read. In a simulation only at the end: they are slow to compute."""
        return self.record.simulated is None or number == self.record.rounds

    def _evaluate_again(self) -> None:
        """Evaluate and report the last round, if the server stopped after its checkpoint and before its report.

        The checkpoint says who took part: accounts are made from the reports, and no site may be missing there.
        """
        pending, result = PendingRound.read(self.directory.root), self.state.result
        if pending is not None and pending.round != self.state.completed:
            pending = None
        if result is None and pending is None:
            return
        result, known = result or RoundResult(answered=()), self.receipts.by_site
        evaluated = self._evaluated(self._plan(pending), self.cohorts.evaluators(pending)) if pending else None
        receipts = {site: known[site] for site in result.answered if site in known}
        self._tell(self._report(self.state.completed, result, evaluated, receipts))

    def _evaluated(self, plan: Plan, nodes: Sequence[int]) -> EvaluationQuestion:
        question = EvaluationQuestion(plan, self.state.model.parameters, self.task)
        evaluated = ask(self.grid, nodes, question, self.record.rules.deadline)
        self._say_who_outweighs(evaluated)
        return evaluated

    def _report(
        self,
        number: int,
        result: RoundResult,
        evaluated: EvaluationQuestion | None,
        receipts: Mapping[str, SiteReceipt],
    ) -> RoundReport:
        """The round's report, whose line is in the metrics on return."""
        told = receipts if self._has_receipts(number) else {}
        report = RoundReport.of(number, self.record.rounds, result, evaluated, told)
        self.directory.append_metrics(number, report.as_line(), durable=self.record.simulated is None)
        return report

    def _say_who_outweighs(self, evaluated: EvaluationQuestion) -> None:
        """Warn once about a site with nearly all test examples, for their number is only its own word."""
        if len(evaluated.besides) < 2:
            return
        for site, examples in evaluated.besides.items():
            if examples > MOST_OF_ALL * evaluated.examples and site not in self.outweighing:
                self.outweighing.add(site)
                log.warning(
                    "%s says that it has %d of all %d test examples: the federation's metrics are nearly its own",
                    *(site, examples, evaluated.examples),
                )

    def _tell(self, report: RoundReport) -> None:
        for observer in self.observers:
            observer.finished_round(report)
