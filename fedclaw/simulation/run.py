"""The server's loop over simulated clients: `run_rounds` as it is, with a grid that trains cohorts by itself.

The grid is the server's view of the clients: it answers for a whole cohort at once, without a message. They are
evaluated on a table that the federation has as a whole, or each on its own rows.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.supercore.run import Run
from numpy.typing import NDArray
from torch import nn

from fedclaw.errors import RoundError, Setting, TransportError, UpdateError, UsageError
from fedclaw.learning import postprocess
from fedclaw.learning.registry import strategy_class
from fedclaw.learning.strategy import PERSONAL, Buffered
from fedclaw.learning.workload import load_parameters
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.arrays import Update, shaped, shapes_of
from fedclaw.protocol.message_identity import empty_run, number_of
from fedclaw.protocol.refusal import Refusal
from fedclaw.protocol.terms import ModelSpec, Plan
from fedclaw.server import checkpoint
from fedclaw.server.cohort_question import CohortQuestion, Declined
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.evaluation import EvaluationQuestion
from fedclaw.server.exchange import CohortGrid
from fedclaw.server.round_report import Observer, Outcome, result_of
from fedclaw.server.run_directory import PENDING, RunDirectory, RunRecord, Simulated
from fedclaw.server.session import initial_parameters, make_plan, make_strategy
from fedclaw.server.training import TrainingQuestion, UpdateStack
from fedclaw.simulation.accounts import Accounts
from fedclaw.simulation.choice import CPU, Choice, Trial, choose
from fedclaw.simulation.executors import Executor, ProcessPoolExecutor, SerialExecutor
from fedclaw.simulation.federation import SimulatedFederation
from fedclaw.simulation.job import UNIT, Answer, Round, State, units_of
from fedclaw.simulation.settings import SimulationSettings, refuse_secure
from fedclaw.simulation.trainer import Trainer, loaded_model, make_loss
from fedclaw.site.device import choose_device
from fedclaw.site.evaluation import EVALUATION_BATCH, exact_sums, permitted

log = logging.getLogger(__name__)

WHOLE = "federation"
"""Who answers with the metrics of a test table that belongs to no client."""


class Evaluator:
    """Keeps its model warm."""

    def __init__(self, federation: SimulatedFederation, device: torch.device = CPU) -> None:
        self._federation = federation
        self._device = device
        self._inputs = torch.from_numpy(federation.table.inputs)
        self._models: dict[str, nn.Module] = {}

    def evaluate(self, clients: Sequence[int], memory: Mapping[int, State], evaluated: EvaluationQuestion) -> None:
        """Add what the clients find; those with parameters of their own evaluate these."""
        federation, plan, parameters = self._federation, evaluated.asked, evaluated.parameters
        if not federation.has_tests:
            if federation.test is not None:
                inputs = torch.from_numpy(federation.test.inputs)
                outputs = self._outputs(self._model(plan.model, parameters), inputs)
                _add(federation, outputs, federation.test.targets, evaluated, WHOLE)
            return
        own_models = bool(plan.personal) or strategy_class(plan.strategy).personal_model
        model = self._model(plan.model, parameters)
        for client in clients:
            rows = federation.tests(client)
            if not len(rows):
                continue
            if own_models:
                mine = memory.get(client, {}).get(PERSONAL, {})
                model = self._model(plan.model, {**parameters, **mine})
            outputs = self._outputs(model, self._inputs[torch.from_numpy(rows)])
            _add(federation, outputs, federation.table.targets[rows], evaluated, federation.name(client))

    def _model(self, spec: ModelSpec, parameters: Mapping[str, NDArray[np.float32]]) -> nn.Module:
        key = spec.model_dump_json()
        if key not in self._models:
            model = loaded_model(self._federation, spec, parameters, self._device).eval()
            # Pooling is several times faster with channels last.
            self._models[key] = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        load_parameters(self._models[key], parameters)
        return self._models[key]

    def _outputs(self, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(part.to(self._device)) for part in torch.split(inputs, EVALUATION_BATCH)])


def _add(
    federation: SimulatedFederation,
    outputs: torch.Tensor,
    targets: NDArray[Any],
    evaluated: EvaluationQuestion,
    name: str,
) -> None:
    count, workload, plan = len(targets), federation.workload, evaluated.asked
    try:
        wanted, bins = permitted(federation.policy(plan), workload.task, plan, count)
    except Refusal as refusal:
        evaluated.declined.append(Declined(name, refusal.code.name.lower(), refusal.reason))
        return
    sums = exact_sums(workload, wanted, bins, outputs, torch.from_numpy(targets))
    evaluated.include(name, count, sums)


class SimulationGrid(CohortGrid):
    """Client k is node k + 1."""

    def __init__(
        self,
        federation: SimulatedFederation,
        executor: Executor,
        accounts: Accounts,
        run: str,
        device: torch.device = CPU,
    ) -> None:
        self._federation = federation
        self._executor = executor
        self._accounts = accounts
        self._evaluator = Evaluator(federation, device)
        self._run = empty_run(number_of(run))
        self._memory: dict[int, State] = {}
        self._first = True

    def answer_cohort(self, nodes: Sequence[int], question: CohortQuestion[Any, Any]) -> None:
        """See CohortGrid. A test table that the federation has as a whole is evaluated once, whoever is asked.

        Raises TransportError for a question with a session: nobody here could mask an answer.
        """
        began = time.monotonic()
        if question.asked.secure is not None:
            self._refuse()
        elif isinstance(question, TrainingQuestion):
            self._train(nodes, question)
        elif isinstance(question, EvaluationQuestion):
            self._evaluator.evaluate([node - 1 for node in nodes], self._memory, question)
        else:
            self._refuse()
        question.seconds = time.monotonic() - began

    def _train(self, nodes: Sequence[int], trained: TrainingQuestion) -> None:
        plan, outgoing = trained.asked, trained.outgoing
        template = shapes_of(postprocess.template(outgoing.parameters, plan))
        single, parameters = isinstance(trained.total, UpdateStack), sum(a.size for a in outgoing.parameters.values())
        clients, mechanisms = [], {}
        for client in (node - 1 for node in nodes):
            examples = self._federation.examples(client)
            charge = self._accounts.charge(plan, examples, parameters)
            if isinstance(charge, Refusal):
                trained.declined.append(
                    Declined(self._federation.name(client), charge.code.name.lower(), charge.reason)
                )
            else:
                clients.append(client)
                mechanisms[examples] = charge.mechanism
        round = Round(plan, outgoing.parameters, outgoing.teacher, outgoing.broadcast, template, single, mechanisms)
        sizes = [self._federation.examples(client) for client in clients]
        units = units_of(clients, sizes, plan.training, shapes_of(outgoing.parameters).values())
        for answer in self._executor.train(round, units, self._memory):
            self._take(round, answer, trained)
        trained.answered.sort()
        self._give_receipts(plan, parameters, trained)

    def close(self) -> None:
        """End the worker processes."""
        self._executor.close()

    def _take(self, round: Round, answer: Answer, trained: TrainingQuestion) -> None:
        if answer.clients and not round.single:
            sizes = [self._federation.examples(client) for client in answer.clients]
            arrays = shaped(answer.numbers[0], round.template)
            part = Update(arrays, sum(answer.weights), sum(sizes), max(answer.weights))
            try:
                trained.total.include(part, len(sizes))
            except UpdateError as error:
                raise RoundError(
                    f"round {round.plan.round}: the updates of clients {', '.join(map(str, answer.clients))} cannot be "
                    f"added: {error}; the learning rate may be too large"
                ) from error
        for row, (client, weight) in enumerate(zip(answer.clients, answer.weights, strict=True)):
            name = self._federation.name(client)
            if round.single:
                arrays = shaped(answer.numbers[row], round.template)
                try:
                    trained.total.add(arrays, weight, self._federation.examples(client))
                except UpdateError as error:
                    trained.declined.append(Declined(name, "unusable", str(error)))
                    continue
            trained.answered.append(name)
        trained.bytes_up += sum(answer.payloads)
        self._accounts.took_part(answer.clients)
        for client, state in answer.memory.items():
            self._memory.setdefault(client, {}).update(state)

    def _give_receipts(self, plan: Plan, parameters: int, trained: TrainingQuestion) -> None:
        """Of those that trained; in the first round of this process, and in the last one, of all that ever did."""
        if self._first or plan.round == plan.rounds:
            clients = self._accounts.clients
        else:
            answered = set(trained.answered)
            clients = [client for client in self._accounts.clients if self._federation.name(client) in answered]
        self._first = False
        for client in clients:
            trained.receipts[self._federation.name(client)] = self._accounts.receipt(plan, client, parameters)

    # What a Grid has besides

    def site_name(self, node_id: int) -> str:
        """The client's name."""
        return self._federation.name(node_id - 1)

    def get_node_ids(self) -> Iterable[int]:
        """All clients are always there."""
        return range(1, len(self._federation) + 1)

    def set_run(self, run: Run) -> None:
        """Take over Flower's run record."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's run record."""
        return self._run

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        """Raises TransportError: a simulated client answers no messages."""
        raise TransportError("simulated clients train and evaluate; they answer no messages: use runtime=sites")

    create_message = push_messages = pull_messages = send_and_receive = _refuse


def simulated(record: RunRecord, settings: SimulationSettings, clients: int) -> RunRecord:
    """The record of a run whose clients are simulated. Raises UsageError for what a simulation cannot do."""
    refuse_secure(record.secure is not None)
    if issubclass(strategy_class(record.strategy.name), Buffered):
        raise UsageError(
            f"strategy {record.strategy.name!r} steps on whoever answers first, and simulated clients answer all "
            "at once: take another one, or sites, which differ in their speed (",
            Setting("runtime", "sites"),
            ")",
        )
    about = Simulated(clients=clients, save_every=settings.save_every, repeatable_noise=settings.repeatable_noise)
    return record.model_copy(update={"simulated": about})


def simulate_cohorts(
    directory: RunDirectory,
    federation: SimulatedFederation,
    settings: SimulationSettings | None = None,
    observers: Sequence[Observer] = (),
    *,
    teacher: Mapping[str, NDArray[np.float32]] | None = None,
    around: Callable[[Executor], Executor] = lambda executor: executor,
) -> Outcome:
    """Run, or go on with, the run in `directory`, whose record `simulated` made, over simulated clients.

    What `around` makes of those who train takes their place: clients that do not do as they are asked.

    The result is the same for the same record and data, however many worker processes there are; with privacy only if
    the record says `repeatable_noise`. Sets torch to one thread while it lasts. Raises RoundError, UsageError,
    RunInUse.
    """
    settings = settings or SimulationSettings()
    record = directory.record()
    _check(record, federation)
    threads = torch.get_num_threads()
    grid = None
    with directory.held():
        try:
            _begin_again(directory, record)
            torch.set_num_threads(1)
            initial = initial_parameters(record)
            grid = _grid(record, federation, settings, directory, initial, teacher, around)
            return run_rounds(grid, directory, initial, teacher=teacher, observers=observers)
        finally:
            if grid is not None:
                grid.close()
            torch.set_num_threads(threads)


def _check(record: RunRecord, federation: SimulatedFederation) -> None:
    if record.simulated is None:
        raise UsageError("this run is one with sites, not a simulation; continue it where it was begun")
    if record.simulated.clients != len(federation):
        raise UsageError(f"the run has {record.simulated.clients} clients, and there are {len(federation)} here")
    if record.workload != federation.workload.name:
        raise UsageError(f"the run's workload is {record.workload!r}, the data's {federation.workload.name!r}")


def _begin_again(directory: RunDirectory, record: RunRecord) -> None:
    """Have a run whose clients remember something, and that was stopped, begin with its first round.

    What they remembered is gone with the process, and nobody has paid for the rounds: the same ones are computed again.
    """
    saved = checkpoint.newest(directory.root, directory.store)
    strategy = strategy_class(record.strategy.name)
    remembers = strategy.client_state or strategy.personal_model or record.personal or record.compression is not None
    if saved is None or not 0 < saved.round < record.rounds or not remembers:
        return
    log.warning("run %s begins again with round 1: what its clients remembered is not kept", record.run)
    for path in (directory.metrics_path, *directory.root.glob("checkpoint-*.ckpt"), directory.root / PENDING):
        path.unlink(missing_ok=True)


def _grid(
    record: RunRecord,
    federation: SimulatedFederation,
    settings: SimulationSettings,
    directory: RunDirectory,
    initial: Mapping[str, NDArray[np.float32]],
    teacher: Mapping[str, NDArray[np.float32]] | None,
    around: Callable[[Executor], Executor],
) -> SimulationGrid:
    assert record.simulated is not None
    device = _device(settings)
    choice = _engine_choice(record, federation, settings, initial, teacher, device)
    repeatable = record.simulated.repeatable_noise
    trainer = Trainer(federation, choice, record.seed, repeatable_noise=repeatable, device=device)
    executor: Executor = (
        SerialExecutor(trainer) if settings.workers == 1 else ProcessPoolExecutor(trainer, settings.workers, UNIT)
    )
    accounts = Accounts(federation)
    numbers = {federation.name(client): client for client in range(len(federation))}
    for answered in _rounds_before(directory):
        accounts.took_part(numbers[name] for name in answered if name in numbers)
    return SimulationGrid(federation, around(executor), accounts, record.run, device)


def _device(settings: SimulationSettings) -> torch.device:
    """Where clients are trained. Raises UsageError when that is not here, or is a card for more than one process: a
    process forked from one that has used CUDA cannot."""
    device = choose_device(settings.device)
    if device.type != "cpu" and settings.workers > 1:
        raise UsageError(
            f"runtime.workers={settings.workers}: a simulation on a card is one process, for its workers are forked: "
            "take runtime.workers=1, or ",
            Setting("runtime.device", "cpu"),
        )
    return device


def _rounds_before(directory: RunDirectory) -> Iterator[Sequence[str]]:
    """Who took part in each round that the run goes on from: what was computed after the checkpoint is done again."""
    saved = checkpoint.newest(directory.root, directory.store)
    if saved is None:
        return
    written = 0
    for line in directory.read_metrics():
        if line["round"] <= saved.round:
            written = line["round"]
            yield line.get("answered", ())
    if written < saved.round and (came := result_of(saved)) is not None:
        yield came.answered


def _engine_choice(
    record: RunRecord,
    federation: SimulatedFederation,
    settings: SimulationSettings,
    initial: Mapping[str, NDArray[np.float32]],
    teacher: Mapping[str, NDArray[np.float32]] | None,
    device: torch.device,
) -> Choice:
    strategy = make_strategy(record)
    plan = make_plan(record, strategy, 1, len(federation), record.central)
    size = max(record.rules.minimum, round(record.rules.fraction * len(federation)))
    cohort = np.linspace(0, len(federation) - 1, min(size, len(federation))).astype(int).tolist()
    sizes = [federation.examples(client) for client in cohort]
    units = units_of(cohort, sizes, record.training, shapes_of(initial).values())
    unit = max(units, key=len)
    trial = Trial(
        lambda: federation.workload.build(record.model),
        make_loss(federation, plan, None if teacher is None else dict(teacher), device),
        federation.table,
        record.training,
        [federation.share(client) for client in unit],
        device,
    )
    private = mechanism_of(plan).is_sampled
    return choose(settings.mode, trial, elementwise=type(strategy).elementwise, private=private)
