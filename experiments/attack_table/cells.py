"""One cell of the table: deal out, train over honest and hostile sites, test."""

import logging
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import nn

from experiments.attack_table.settings import Cell
from experiments.attacks.data import Backdoor
from experiments.attacks.simulated import simulate_attacked_cohorts
from experiments.cell_files import read_result, write_result
from experiments.partitions.in_memory import InMemory, in_memory
from experiments.simulated import federation_of
from experiments.sources import DatasetSettings
from fedclaw.errors import RoundError
from fedclaw.learning.registry import workload_class
from fedclaw.learning.workload import Floats, Table, Workload
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import ModelSpec, RoundRules, StrategyRecord
from fedclaw.server import checkpoint
from fedclaw.server.early_checks import check_combination
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.session import make_strategy
from fedclaw.simulation import SimulatedFederation, SimulationSettings, simulated
from fedclaw.simulation.partitions.settings import PartitionSettings

FEDERATION = "attack-table"
_SPEED = SimulationSettings(mode="many", save_every=0)
"""The same way on every machine; each round is kept, so that a model which overflows is found as it was before."""


class CellResult(Frozen):
    """What one run came to, on the public test images."""

    accuracy: float = Field(ge=0, le=1)
    backdoor: float | None = Field(ge=0, le=1)
    """Of the marked images of other classes, the share that is taken for the backdoor's target; None: no backdoor."""
    rounds: int
    """Rounds that counted: fewer than asked for where the honest sites' models overflowed."""
    seconds: float


class Store:
    """Finished cells, one file each, found again by their whole configuration."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, cell: Cell) -> Path:
        """The file of a cell's result."""
        return self._root / "cells" / f"{cell.label}-{cell.digest}.json"

    def result(self, cell: Cell) -> CellResult | None:
        """The cell's result, if it is there and whole."""
        return read_result(self.path(cell), CellResult)

    def write(self, cell: Cell, result: CellResult) -> None:
        """Keep a result beside its configuration."""
        write_result(self.path(cell), cell.configuration(), result)


def run_cell(cell: Cell) -> CellResult:
    """Train and test. Raises FedClawError."""
    logging.getLogger("fedclaw").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    began = time.monotonic()
    made = _dealt(cell.dataset, cell.partition)
    workload = workload_class(made.workload)(made.schema)
    record = _record(cell, made, workload)
    check_combination(record, make_strategy(record), workload.build(record.model))
    with tempfile.TemporaryDirectory() as temporary:
        directory = RunDirectory.create(Path(temporary) / record.run, record)
        parameters, rounds = _train(cell, directory, federation_of(made))
    model = workload.build(record.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(parameters[name]))
    return CellResult(
        accuracy=_share(model, made.public.inputs, made.public.targets),
        backdoor=_backdoor(model, made.public, cell.attack) if isinstance(cell.attack, Backdoor) else None,
        rounds=rounds,
        seconds=round(time.monotonic() - began, 2),
    )


@lru_cache(maxsize=1)
def _dealt(dataset: DatasetSettings, partition: PartitionSettings) -> InMemory:
    """The deal of the seed's cells: kept from one cell to the next, which changes nothing in it."""
    return in_memory(dataset, partition, dataset.sites)


def _train(cell: Cell, directory: RunDirectory, federation: SimulatedFederation) -> tuple[Arrays, int]:
    """Final parameters, and how many rounds they are the work of."""
    try:
        return simulate_attacked_cohorts(directory, federation, cell.attack, _SPEED).parameters, cell.rounds
    except RoundError:
        # What is left of the model when its numbers are too large to train on: the attack has won.
        last = checkpoint.newest(directory.root)
        assert last is not None
        return last.parameters, last.round


def _record(cell: Cell, made: InMemory, workload: Workload) -> RunRecord:
    chosen = cell.workload.model
    named = chosen.name is not None
    record = RunRecord(
        run="cell",
        federation=FEDERATION,
        workload=made.workload,
        schema_text=made.schema.to_json(),
        model=ModelSpec(name=str(chosen.name), args=chosen.args or {}) if named else workload.default_model(),
        strategy=StrategyRecord(name=cell.strategy, settings=cell.strategy_settings),
        rounds=cell.rounds,
        training=cell.training,
        privacy=None,
        metrics=(),
        rules=RoundRules(minimum=cell.dataset.sites, attempts=1),
        seed=cell.seed,
    )
    return simulated(record, _SPEED, cell.dataset.sites)


def _backdoor(model: nn.Module, test: Table, attack: Backdoor) -> float:
    others = test.targets != attack.target
    targets = np.full(int(others.sum()), attack.target)
    return _share(model, attack.marked(test.inputs[others]), targets)


def _share(model: nn.Module, inputs: Floats, targets: np.ndarray) -> float:
    """Of the inputs, the share that `model` takes for `targets`; what it finds no numbers for, it takes for nothing."""
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs)).numpy()
    return float(((logits.argmax(axis=1) == targets) & np.isfinite(logits).all(axis=1)).mean())
