"""The loop: plan, exchange, step, evaluate, checkpoint; and the same loop again after a crash."""

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray
from pydantic import ConfigDict

from fedclaw.errors import CheckpointError, PluginError, RoundError, UpdateError
from fedclaw.learning import postprocess
from fedclaw.learning.registry import strategy_class
from fedclaw.learning.strategy import Buffered, Participation, Strategy
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import Classification
from fedclaw.privacy.distributed import Price
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import Arrays, shapes_of
from fedclaw.protocol.frozen import Frozen, check_settings, fields_of
from fedclaw.protocol.plan import CentralPrivacy, Plan, Terms
from fedclaw.protocol.questions import Outgoing
from fedclaw.server import checkpoint, exchange, secure_round
from fedclaw.server.accumulator import WeightedSum, robust_aggregation
from fedclaw.server.answers import Declined, Evaluated, Trained, reasons_of
from fedclaw.server.asynchronous import Buffer
from fedclaw.server.checkpoint import Checkpoint
from fedclaw.server.global_model import GlobalModel
from fedclaw.server.grids import StreamingGrid, site_name
from fedclaw.server.learned import hopeless_noise
from fedclaw.server.pending_round import PendingRound
from fedclaw.server.run_directory import RunDirectory, RunRecord, SiteReceipt
from fedclaw.server.secure_round import SecurelyTrained
from fedclaw.server.waiting import poll

log = logging.getLogger(__name__)

_WAY_OUT = (
    "; if a silent site will not come back, add sites.new_cohort=true to ask the sites that are connected then, at the "
    "price that those who answered may pay for the round again"
)
SILENT = "silent"
MOST_OF_ALL = 0.9
"""Share of all test examples above which a site's word is nearly the whole figure, so that this is said."""
LOOK_AGAIN = 0.2
"""Seconds between two looks at who is connected."""


@dataclass(frozen=True)
class RoundReport:
    """What one round did. Metrics are of the parameters after the round; seconds are wall-clock."""

    round: int
    rounds: int
    answered: tuple[str, ...]
    declined: tuple[Declined, ...]
    silent: tuple[str, ...]
    update_norm: float
    train_seconds: float
    evaluate_seconds: float
    metrics: Mapping[str, float]
    test_examples: int
    receipts: Mapping[str, SiteReceipt]
    price: Price | None = None
    """What the sites' noise on the sum cost beside a trusted server's, where they brought it."""
    bytes_up: int = 0
    """Of the arrays of all answers that were added."""
    bytes_down: int = 0
    """Of the arrays that the sites of those answers trained from."""
    over_sites: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Second figures: of each metric that is a ratio the mean over the sites, its spread, and how many they are."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """What else the task makes of the sums, as plain values: figures by class, bounds, a constant answer's figure."""

    def as_line(self) -> dict[str, Any]:
        """The round's line in the run's metrics, as plain values."""
        price = {} if self.price is None else {"noise_price": asdict(self.price)}
        return {
            **price,
            "over_sites": {name: dict(values) for name, values in self.over_sites.items()},
            **self.beside,
            "metrics": dict(self.metrics),
            "test_examples": self.test_examples,
            "answered": list(self.answered),
            "declined": {declined.site: declined.code for declined in self.declined},
            "silent": list(self.silent),
            "update_norm": self.update_norm,
            "train_seconds": round(self.train_seconds, 4),
            "evaluate_seconds": round(self.evaluate_seconds, 4),
            "epsilon": {site: item.receipt.epsilon_run for site, item in self.receipts.items()},
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }


class Observer(Protocol):
    """Someone who watches a run: the terminal, MLflow."""

    def started(self, record: RunRecord, first_round: int) -> None:
        """The run begins, or goes on, with `first_round`."""

    def finished_round(self, report: RoundReport) -> None:
        """A round counts: its checkpoint is on disk."""

    def finished(self, outcome: "Outcome") -> None:
        """The last round is done."""


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    directory: RunDirectory
    parameters: Arrays
    metrics: dict[str, float] = field(default_factory=dict)
    receipts: dict[str, SiteReceipt] = field(default_factory=dict)


class Came(Frozen):
    """What a round's exchange came to, in the round's checkpoint: its line in the metrics is written after it."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")
    """A model that overflows has an infinite update, and its round counts."""

    answered: tuple[str, ...]
    declined: tuple[tuple[str, str, str], ...] = ()
    """Site, code and reason."""
    silent: tuple[str, ...] = ()
    update_norm: float = 0.0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    price: dict[str, float] | None = None

    @classmethod
    def of(cls, trained: Trained, norm: float) -> "Came":
        """Of a round that has counted."""
        price = trained.price if isinstance(trained, SecurelyTrained) else None
        return cls(
            answered=tuple(trained.answered),
            declined=tuple((item.site, item.code, item.reason) for item in trained.declined),
            silent=tuple(trained.silent),
            update_norm=norm,
            seconds=trained.seconds,
            bytes_up=trained.bytes_up,
            bytes_down=trained.bytes_down,
            price=None if price is None else asdict(price),
        )

    def restored(self, receipts: Mapping[str, SiteReceipt]) -> Trained:
        """The exchange without its sum; of `receipts`, which are the run's, those of the sites that answered."""
        return SecurelyTrained(
            total=WeightedSum({}),
            answered=list(self.answered),
            declined=[Declined(*item) for item in self.declined],
            silent=list(self.silent),
            seconds=self.seconds,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            receipts={site: receipts[site] for site in self.answered if site in receipts},
            price=None if self.price is None else Price(**self.price),
        )


def came_of(saved: Checkpoint | None) -> Came | None:
    """What the round of a checkpoint came to; None where it does not say. Raises CheckpointError when it is damaged."""
    if saved is None or saved.came is None:
        return None
    try:
        return Came.model_validate(saved.came)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint of round {saved.round} is damaged in what the round came to") from error


def make_strategy(record: RunRecord) -> Strategy:
    """The run's strategy with its settings. Raises PluginError, or UsageError for wrong settings."""
    return check_settings(record.strategy.settings, strategy_class(record.strategy.name))


def make_plan(
    record: RunRecord, strategy: Strategy, number: int, cohort: int, central: CentralPrivacy | None = None
) -> Plan:
    """What round `number` asks of each of `cohort` sites; `central` is the record's with what the round knows better.

    A round of secure aggregation adds its session.
    """
    fields = {
        **fields_of(record, Terms),
        "round": number,
        "cohort": cohort,
        "schema_digest": record.schema_digest,
        "strategy": record.strategy.name,
        "strategy_fields": dict(strategy.client_fields()),
        "strategy_settings": strategy.model_dump(mode="json"),
        "central": central or record.central,
        "secure": None,
    }
    return Plan(**fields)


def _task(record: RunRecord) -> Task:
    """What the run predicts; classes without names where its workload is not installed beside the server.

    The rounds themselves need no workload: figures other than means are then left out.
    """
    try:
        return record.make_schema().task
    except PluginError:
        return Classification()


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
    """State of one `run_rounds`."""

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
        self.record = directory.record()
        self.strategy = make_strategy(self.record)
        self.task = _task(self.record)
        self.buffer = Buffer(grid, self.strategy) if isinstance(self.strategy, Buffered) else None
        self.teacher = teacher
        self.observers = observers
        self.receipts = directory.read_receipts()
        saved = checkpoint.newest(directory.root)
        self.model = GlobalModel(saved.parameters if saved else initial, self.strategy)
        if saved:
            self.model.restore_optimizer(saved.optimizer)
        self.completed = saved.round if saved else 0
        self.clip = saved.clip if saved else None
        self.memory = dict(saved.strategy) if saved else self.strategy.server_state(self._shared())
        self.came = came_of(saved)
        self.saved_at = time.monotonic()
        self.outweighing: set[str] = set()
        self.missing: dict[str, str] = {}
        """By site, why it did not answer the last question to it."""
        self.judged_noise = False
        if not saved:
            self._checkpoint()

    def run(self) -> Outcome:
        for observer in self.observers:
            observer.started(self.record, self.completed + 1)
        if self.completed > self._evaluated():
            self._evaluate_again()
        while self.completed < self.record.rounds:
            if report := self._round(self.completed + 1):
                self._tell(report)
        self.directory.write_model(self.model.parameters)
        PendingRound.remove(self.directory.root)
        if (lines := self.directory.read_metrics()) and (warning := self.task.nothing_learned(lines[-1])):
            log.warning("%s", warning)
        outcome = Outcome(self.directory, self.model.parameters, self._last_metrics(), self.receipts)
        for observer in self.observers:
            observer.finished(outcome)
        return outcome

    def _round(self, number: int) -> RoundReport | None:
        pending = self._cohort(number)
        if pending.unmasking:
            log.warning(
                "round %d is passed over: its secure sum was lost when it was being unmasked, which its sites do once; "
                "what they paid for it stays paid",
                number,
            )
            self.completed, self.came = number, None
            self._checkpoint()
            return None
        plan = self._plan(pending)
        trained = self._train(plan, pending)
        norm = self._step(plan, trained, pending)
        self._keep(trained)
        self.completed, self.came = number, Came.of(trained, norm)
        # Before anybody sees the new parameters: a server that is killed later does not draw its noise a second time.
        if self._is_kept(number):
            if self.record.simulated is not None:
                pending.write(self.directory.root)
            if self._is_told(number):
                self.directory.write_receipts(self.receipts)
            self._checkpoint()
        return self._evaluate(plan, self._awake(pending, trained), trained, norm)

    def _keep(self, trained: Trained) -> None:
        """Take up what the sites say of their ledgers; what a site has told of this run before is not taken back."""
        if self.record.simulated is None:
            for site, now in trained.receipts.items():
                before = self.receipts.get(site)
                if before is not None and now.receipt.is_better_than(before.receipt):
                    log.warning(
                        "%s says that less is spent than it said before in this run: the worst that it has told stays, "
                        "and its ledger should be looked at",
                        site,
                    )
                trained.receipts[site] = now.after(before)
        self.receipts.update(trained.receipts)
        if not self.judged_noise and (warning := hopeless_noise(self.record, self.receipts, len(trained.answered))):
            log.warning("%s", warning)
        self.judged_noise = True

    def _awake(self, pending: PendingRound, trained: Trained) -> list[int]:
        """Whom to ask for an evaluation: not who is silent, nor, but after the last round, who is still at work."""
        busy = self.buffer.busy if self.buffer and self.completed < self.record.rounds else frozenset()
        names = {node: site_name(self.grid, node) for node in self._willing(self._judges(pending))}
        return [node for node, name in names.items() if name not in trained.silent and node not in busy]

    def _evaluate_again(self) -> None:
        """The round counts, and the server stopped before it had written so, and how good the parameters are.

        Who took part is in the checkpoint: accounts are made of these lines, and nobody may be left out of them.
        """
        pending = PendingRound.read(self.directory.root)
        known = pending is not None and pending.round == self.completed
        if self.came is None and not known:
            return
        came = self.came or Came(answered=())
        trained = came.restored(self.receipts)
        if pending is not None and known:
            self._tell(self._evaluate(self._plan(pending), self._judges(pending), trained, came.update_norm))
        else:
            self._tell(self._write_line(self.completed, trained, Evaluated(), came.update_norm))

    def _judges(self, pending: PendingRound) -> Sequence[int]:
        """Who evaluates: whom the round asked, but everybody where the strategy's own choice is no sample of them."""
        if self.strategy.select_clients(pending.round, pending.nodes, self.record.seed) is None:
            return pending.nodes
        return sorted({*self.grid.get_node_ids(), *pending.nodes})

    def _evaluate(self, plan: Plan, nodes: Sequence[int], trained: Trained, norm: float) -> RoundReport:
        evaluated = exchange.evaluate(
            self.grid, nodes, plan, self.model.parameters, self.record.rules.deadline, self.task
        )
        self._say_who_outweighs(evaluated)
        return self._write_line(plan.round, trained, evaluated, norm)

    def _write_line(self, number: int, trained: Trained, evaluated: Evaluated, norm: float) -> RoundReport:
        report = self._report(number, trained, evaluated, norm)
        self.directory.append_metrics(number, report.as_line(), durable=self.record.simulated is None)
        return report

    def _say_who_outweighs(self, evaluated: Evaluated) -> None:
        """Name, once, a site whose test examples are nearly all: how many it has is its own word."""
        for site, examples in evaluated.by_site.items():
            if (
                len(evaluated.by_site) > 1
                and examples > MOST_OF_ALL * evaluated.examples
                and site not in self.outweighing
            ):
                self.outweighing.add(site)
                log.warning(
                    "%s says that it has %d of all %d test examples: the federation's metrics are nearly its own",
                    *(site, examples, evaluated.examples),
                )

    def _tell(self, report: RoundReport) -> None:
        for observer in self.observers:
            observer.finished_round(report)

    def _plan(self, pending: PendingRound) -> Plan:
        central = mechanism_of(self.record).in_round(pending.connected, self.clip)
        # Where who is asked is to stay hidden, the number of those who could have been asked is told: it is public.
        cohort = pending.connected if central and central.expected_sites is not None else len(pending.nodes)
        if isinstance(self.strategy, Buffered):
            cohort = self.strategy.size
        return make_plan(self.record, self.strategy, pending.round, cohort, central)

    def _step(self, plan: Plan, trained: Trained, pending: PendingRound) -> float:
        try:
            summed = trained.total.take()
            participation = self._participation(plan, trained, summed.weight, pending)
            mean = postprocess.at_server(summed, plan, shapes_of(self.model.parameters))
            self.clip = mean.clip or self.clip
            return self.model.step(self.strategy.aggregate(mean.arrays, self.memory, participation))
        except UpdateError as error:
            raise RoundError(f"round {plan.round} of run {plan.run}: {error}") from error

    def _participation(self, plan: Plan, trained: Trained, weight: float, pending: PendingRound) -> Participation:
        heard = {**self.receipts, **trained.receipts}.values()
        connected = max(pending.connected, len(pending.nodes))
        return Participation.of(
            weight, len(trained.answered), connected, [plan.weight(item.examples) for item in heard]
        )

    def _train(self, plan: Plan, pending: PendingRound) -> Trained:
        """Ask until enough sites have answered; the same question each time, so nobody pays twice."""
        minimum, attempts = self._minimum(plan, pending), self.record.rules.attempts
        for attempt in range(1, attempts + 1):
            trained = self._exchange(plan, pending)
            self._say_who_is_missing(plan.round, trained)
            if len(trained.answered) >= minimum:
                return trained
            if self._is_final(trained):
                break
            log.warning(
                "round %d: %d of %d sites trained and %d are needed (attempt %d of %d)",
                *(plan.round, len(trained.answered), len(pending.nodes), minimum, attempt, attempts),
            )
        # Those of a secure sum that failed have paid all the same.
        self._keep(trained)
        self.directory.write_receipts(self.receipts)
        raise RoundError(
            f"round {plan.round} of run {plan.run}: {len(trained.answered)} sites trained, {minimum} are needed "
            f"({_reasons(trained)}). {_settled(trained)} continue with resume={self.directory.root}"
            f"{_WAY_OUT if trained.silent else ''}"
        )

    def _say_who_is_missing(self, number: int, trained: Trained) -> None:
        """Each site once for each reason, until it has answered again."""
        for site in trained.answered:
            self.missing.pop(site, None)
        for declined in trained.declined:
            if self.missing.get(declined.site) != declined.code:
                log.warning("round %d: %s declined (%s): %s", number, declined.site, declined.code, declined.reason)
        silent = [site for site in trained.silent if self.missing.get(site) != SILENT]
        if silent:
            log.warning("round %d: no answer from %s", number, ", ".join(silent))
        self.missing |= {item.site: item.code for item in trained.declined} | dict.fromkeys(trained.silent, SILENT)

    def _exchange(self, plan: Plan, pending: PendingRound) -> Trained:
        cohort = self._willing(pending.nodes)
        outgoing = Outgoing(self.model.parameters, self.teacher, self.strategy.broadcast(self.memory))
        deadline = self.record.rules.deadline
        if self.buffer is not None:
            return self.buffer.train(plan, cohort, outgoing, deadline)
        if self.record.secure is None:
            robust = robust_aggregation(self.strategy, self.memory)
            return exchange.train(self.grid, cohort, plan, outgoing, deadline, robust)
        names = [site_name(self.grid, node) for node in cohort]
        minimum = self.record.rules.minimum
        session = secure_round.session_of(plan, names, outgoing, self.record.secure, minimum)
        mark = pending.model_copy(update={"unmasking": True})
        return secure_round.train(
            self.grid, cohort, session, outgoing, deadline, lambda: mark.write(self.directory.root)
        )

    def _is_final(self, trained: Trained) -> bool:
        """Whether asking again is of no use, or would make sites pay a second time for one round."""
        if isinstance(trained, SecurelyTrained):
            return trained.spent
        if self.buffer is not None:
            return not self.buffer.busy
        return not trained.silent

    def _minimum(self, plan: Plan, pending: PendingRound) -> int:
        """Answers that make a round; none where sites are asked at random, for a round must not tell how many were.

        A strategy that asks fewer than the rules would needs all of those.
        """
        if plan.central and plan.central.expected_sites is not None:
            return 0
        if isinstance(self.strategy, Buffered):
            return self.strategy.size
        return min(self.record.rules.minimum, len(pending.nodes))

    def _cohort(self, number: int) -> PendingRound:
        pending = PendingRound.read(self.directory.root)
        if pending and pending.round == number:
            return pending
        connected = self._connected()
        if len(connected) < self.record.rules.minimum:
            raise RoundError(
                f"round {number}: {len(connected)} sites are connected and {self.record.rules.minimum} are needed "
                f"(waited {self.record.rules.deadline:g} s). Continue with resume={self.directory.root}"
            )
        nodes = tuple(sorted(self._choose(number, connected)))
        pending = PendingRound(round=number, nodes=nodes, connected=len(connected))
        if self.record.simulated is None:
            pending.write(self.directory.root)
        return pending

    def _choose(self, number: int, connected: list[int]) -> list[int]:
        """Each site by itself, at random that nobody can foresee, where privacy counts on it; else so many of them."""
        rules, mechanism = self.record.rules, mechanism_of(self.record)
        if (chosen := self.strategy.select_clients(number, connected, self.record.seed)) is not None:
            return list(chosen)
        if mechanism.samples_sites:
            asked = GaussianSource().bernoulli(len(connected), mechanism.site_rate)
            return [node for node, chosen in zip(connected, asked, strict=True) if chosen]
        size = max(rules.minimum, round(rules.fraction * len(connected)))
        return random.Random(f"{self.record.seed}/{number}").sample(connected, min(size, len(connected)))  # noqa: S311

    def _connected(self) -> list[int]:
        """The connected nodes, once there are as many as a round needs or the deadline has passed."""
        rules = self.record.rules
        return poll(lambda: self._willing(sorted(self.grid.get_node_ids())), rules.minimum, rules.deadline, LOOK_AGAIN)

    def _willing(self, nodes: Sequence[int]) -> list[int]:
        """Without those whose answers cost the others too much in this run: what they sent, or how slowly."""
        aside = self.grid.excluded_nodes() if isinstance(self.grid, StreamingGrid) else {}
        return [node for node in nodes if node not in aside]

    def _shared(self) -> Arrays:
        """The parameters that the sites train together."""
        return {name: a for name, a in self.model.parameters.items() if name not in self.record.personal}

    def _is_kept(self, number: int) -> bool:
        """Whether what the round came to is written down: always, but in a simulation, where nobody has paid for it."""
        simulated = self.record.simulated
        if simulated is None or number == self.record.rounds:
            return True
        return time.monotonic() - self.saved_at >= simulated.save_every

    def _checkpoint(self) -> None:
        checkpoint.save(
            self.directory.root,
            Checkpoint(
                self.completed,
                self.model.parameters,
                self.model.optimizer_state(),
                self.clip,
                self.memory,
                None if self.came is None else self.came.model_dump(mode="json"),
            ),
        )
        self.saved_at = time.monotonic()

    def _evaluated(self) -> int:
        lines = self.directory.read_metrics()
        return int(lines[-1]["round"]) if lines else 0

    def _last_metrics(self) -> dict[str, float]:
        lines = self.directory.read_metrics()
        return dict(lines[-1]["metrics"]) if lines else {}

    def _is_told(self, number: int) -> bool:
        """Whether observers get the round's receipts. Those of many simulated clients take long to work out: at the
        end."""
        return self.record.simulated is None or number == self.record.rounds

    def _report(self, number: int, trained: Trained, evaluated: Evaluated, norm: float) -> RoundReport:
        return RoundReport(
            round=number,
            rounds=self.record.rounds,
            answered=tuple(trained.answered),
            declined=tuple(trained.declined),
            silent=tuple(trained.silent),
            update_norm=norm,
            train_seconds=trained.seconds,
            evaluate_seconds=evaluated.seconds,
            metrics=evaluated.metrics,
            test_examples=evaluated.examples,
            receipts=trained.receipts if self._is_told(number) else {},
            price=trained.price if isinstance(trained, SecurelyTrained) else None,
            bytes_up=trained.bytes_up,
            bytes_down=trained.bytes_down,
            over_sites=evaluated.tally.over_sites,
            beside=evaluated.tally.beside,
        )


def _settled(trained: Trained) -> str:
    if isinstance(trained, SecurelyTrained) and trained.unmasking:
        return "Its sites unmask a round once, so it will be passed over, paid as it is; when that is settled,"
    if isinstance(trained, SecurelyTrained) and trained.spent:
        return "Its sites have paid for the round and pay again for another secure sum; when that is settled,"
    return "Nothing is lost: when that is settled,"


def _reasons(trained: Trained) -> str:
    """Why each site that did not train did not."""
    return reasons_of(trained, trained.failure if isinstance(trained, SecurelyTrained) else None)
