"""The server's loop over simulated clients: `run_rounds` as it is, with a grid that trains cohorts by itself."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.errors import Setting, UsageError
from fedclaw.learning.registry import strategy_class
from fedclaw.learning.strategy import Buffered
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.arrays import shapes_of
from fedclaw.server import checkpoint
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.round_report import Observer, Outcome, result_of
from fedclaw.server.run_directory import PENDING, RunDirectory, RunRecord, Simulated
from fedclaw.server.session import initial_parameters, make_plan, make_strategy
from fedclaw.simulation.accounts import Accounts
from fedclaw.simulation.choice import Choice, choose
from fedclaw.simulation.executors import Executor, ProcessPoolExecutor, SerialExecutor
from fedclaw.simulation.federation import SimulatedFederation
from fedclaw.simulation.grid import SimulationGrid
from fedclaw.simulation.job import UNIT, units_of
from fedclaw.simulation.settings import SimulationSettings, refuse_secure
from fedclaw.simulation.trainer import Trainer, make_loss

log = logging.getLogger(__name__)


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
    saved = checkpoint.newest(directory.root)
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
    choice = _engine_choice(record, federation, settings, initial, teacher)
    trainer = Trainer(federation, choice, record.seed, repeatable_noise=record.simulated.repeatable_noise)
    executor: Executor = (
        SerialExecutor(trainer) if settings.workers == 1 else ProcessPoolExecutor(trainer, settings.workers, UNIT)
    )
    accounts = Accounts(federation)
    numbers = {federation.name(client): client for client in range(len(federation))}
    for answered in _rounds_before(directory):
        accounts.took_part(numbers[name] for name in answered if name in numbers)
    return SimulationGrid(federation, around(executor), accounts, record.run)


def _rounds_before(directory: RunDirectory) -> Iterator[Sequence[str]]:
    """Who took part in each round that the run goes on from: what was computed after the checkpoint is done again."""
    saved = checkpoint.newest(directory.root)
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
) -> Choice:
    strategy = make_strategy(record)
    plan = make_plan(record, strategy, 1, len(federation), record.central)
    size = max(record.rules.minimum, round(record.rules.fraction * len(federation)))
    cohort = np.linspace(0, len(federation) - 1, min(size, len(federation))).astype(int).tolist()
    sizes = [federation.examples(client) for client in cohort]
    units = units_of(cohort, sizes, record.training, shapes_of(initial).values())
    unit = max(units, key=len)
    return choose(
        settings.mode,
        lambda: federation.workload.build(record.model),
        make_loss(federation, plan, None if teacher is None else dict(teacher)),
        federation.table,
        record.training,
        [federation.share(client) for client in unit],
        elementwise=type(strategy).elementwise,
        private=mechanism_of(plan).is_sampled,
    )
