"""One cell of the table: deal out, train with the real server and the real sites, test; and the audit of a row."""

import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field

from experiments.cell_files import read_result, write_result
from experiments.datasets import write_sites
from experiments.privacy_table.settings import Cell
from experiments.sweeps.identity import digest_of
from fedclaw.audit.findings import AuditOptions
from fedclaw.audit.run import audit_run
from fedclaw.privacy.accounting import epsilon_of_sum, largest
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import RoundRules
from fedclaw.server.round_report import Outcome
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.session import make_record
from fedclaw.server.settings import RunSettings
from fedclaw.site.service import SiteService
from fedclaw.transport.in_process import open_sites, simulate

FEDERATION = "experiments"


class CellResult(Frozen):
    """What one run came to."""

    accuracy: float = Field(ge=0, le=1)
    """On the test examples of all sites together, each counting once."""
    test_examples: int
    train_examples: int
    train_units: int | None = None
    """Of what the guarantee protects, over all sites; None: in results of before there were persons, the examples."""
    epsilon: float | None
    """The largest that a site's ledger holds for the run; of the noise on the sum where the unit is a site. None:
    unbounded."""
    seconds: float


class AuditResult(Frozen):
    """What the audit of a row's first seed came to: bounds that hold together with `confidence`."""

    epsilon_lower: float
    """The best attack's lower bound on the run's epsilon at the row's delta."""
    confidence: float
    flagged: tuple[str, ...]
    """Checks that refute the claim."""
    notes: tuple[str, ...]
    seconds: float


class Store:
    """Finished cells, one file each, found again by their whole configuration."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, cell: Cell, audit: AuditOptions | None = None) -> Path:
        """The file of a cell's result, or of its audit's."""
        name = f"{cell.label}-{digest_of(_key(cell, audit))}.json"
        return self._root / ("audits" if audit else "cells") / name

    def result(self, cell: Cell) -> CellResult | None:
        """The cell's result, if it is there and whole."""
        return read_result(self.path(cell), CellResult)

    def audit(self, cell: Cell, options: AuditOptions) -> AuditResult | None:
        """The result of the cell's audit, if it is there and whole."""
        return read_result(self.path(cell, options), AuditResult)

    def write(self, cell: Cell, result: CellResult | AuditResult, audit: AuditOptions | None = None) -> None:
        """Keep a result beside its configuration."""
        write_result(self.path(cell, audit), _key(cell, audit), result)


def run_cell(cell: Cell) -> CellResult:
    """Deal out, train, test. Raises FedClawError."""
    _quiet()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        sites, run = _open(cell, root)
        record = make_record(run, FEDERATION, "cell", RoundRules())
        outcome = simulate(RunDirectory.create(root / "runs" / "cell", record), sites)
        accuracy, tested = _accuracy(outcome, sites)
    return CellResult(
        accuracy=accuracy,
        test_examples=tested,
        train_examples=sum(len(site.data.train) for site in sites.values()),
        train_units=sum(site.data.train.units for site in sites.values()),
        epsilon=_spent(record, outcome),
        seconds=round(time.monotonic() - began, 2),
    )


def audit_cell(attack: tuple[Cell, AuditOptions]) -> AuditResult:
    """Attack the cell's configuration at its own sites, in that way. Raises FedClawError."""
    cell, options = attack
    _quiet()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        sites, run = _open(cell, Path(temporary))
        report = audit_run(run, sites, options)
    return AuditResult(
        epsilon_lower=report.epsilon_lower,
        confidence=report.confidence,
        flagged=tuple(f"{check.name}, {check.subject}" for check in report.flagged),
        notes=report.notes,
        seconds=round(time.monotonic() - began, 2),
    )


def _open(cell: Cell, root: Path) -> tuple[dict[str, SiteService], RunSettings]:
    """The sites, and the run's settings with the schema that they agreed on."""
    directories = write_sites(root, cell.dataset, cell.policy, cell.partition)
    choice = cell.run.workload.model_copy(update={"schema_file": root / "schema.yaml"})
    sites = open_sites(directories, FEDERATION)
    # A site whose test set is very small says at every round that it keeps its metrics to itself.
    logging.getLogger("fedclaw.site").setLevel(logging.ERROR)
    return sites, cell.run.model_copy(update={"workload": choice})


def _spent(record: RunRecord, outcome: Outcome) -> float | None:
    central = record.central
    if central is not None and central.unit == "site":
        # Receipts are about examples, or persons.
        return epsilon_of_sum(central, record.rounds)
    return largest(item.receipt.epsilon_run for item in outcome.receipts.values())


def _accuracy(outcome: Outcome, sites: Mapping[str, SiteService]) -> tuple[float, int]:
    """The final model's accuracy on all sites' test examples, and how many they are.

    Worked out here, not by federated evaluation: a site keeps its metrics to itself when its test set is very small.
    """
    record = outcome.directory.record()
    workload = record.make_workload()
    model = workload.build(record.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(outcome.parameters[name]))
        right = total = 0
        for site in sites.values():
            assert site.data.test is not None
            logits = model(torch.from_numpy(site.data.test.inputs))
            right += int((logits.argmax(dim=1) == torch.from_numpy(site.data.test.targets)).sum())
            total += len(site.data.test)
    return right / total, total


def _quiet() -> None:
    """A line a round, of hundreds of runs, is no news."""
    logging.getLogger("fedclaw").setLevel(logging.WARNING)
    torch.set_num_threads(1)


def _key(cell: Cell, audit: AuditOptions | None) -> dict[str, object]:
    options = {"audit": audit.model_dump(mode="json")} if audit else {}
    return {**cell.configuration(), **options}
