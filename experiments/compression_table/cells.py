"""One run of the table: deal out, train with the real server and the real sites; its accuracy and bytes by round."""

import logging
import tempfile
from pathlib import Path

import torch
from pydantic import Field

from experiments.cell_files import read_result, write_result
from experiments.compression_table.settings import Cell
from experiments.datasets import SitePolicy, write_sites
from fedclaw.learning.tasks.classification import METRICS
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import RoundRules
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import make_record
from fedclaw.transport.in_process import open_sites, simulate

FEDERATION = "experiments"
_POLICY = SitePolicy(epsilon=None, delta=1e-5, allow_training_without_privacy=True, metrics=METRICS)


class CellResult(Frozen):
    """What one run came to, round by round."""

    sites: int = Field(ge=1)
    bytes_up: tuple[int, ...]
    """Of all sites' answers."""
    accuracy: tuple[float, ...]
    """Of the federated evaluation after the round."""


class Store:
    """Finished runs, one file each, found again by their whole configuration."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def result(self, cell: Cell) -> CellResult | None:
        """The cell's result, if it is there and whole."""
        return read_result(self._path(cell), CellResult)

    def write(self, cell: Cell, result: CellResult) -> None:
        """Keep a result beside its configuration."""
        write_result(self._path(cell), cell.configuration(), result)

    def _path(self, cell: Cell) -> Path:
        return self._root / "cells" / f"{cell.name}.json"


def run_cell(cell: Cell) -> CellResult:
    """Raises FedClawError."""
    logging.getLogger("fedclaw").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        directories = write_sites(root, cell.dataset, _POLICY, cell.partition)
        sites = open_sites(directories, FEDERATION)
        # A site whose test set is very small says at every round that it keeps its metrics to itself.
        logging.getLogger("fedclaw.site").setLevel(logging.ERROR)
        choice = cell.run.workload.model_copy(update={"schema_file": root / "schema.yaml"})
        record = make_record(cell.run.model_copy(update={"workload": choice}), FEDERATION, "cell", RoundRules())
        lines = simulate(RunDirectory.create(root / "runs" / "cell", record), sites).directory.read_metrics()
    return CellResult(
        sites=len(directories),
        bytes_up=tuple(line["bytes_up"] for line in lines),
        accuracy=tuple(line["metrics"]["accuracy"] for line in lines),
    )
