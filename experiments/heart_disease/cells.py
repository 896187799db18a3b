"""One run of a table, from the hospitals' rows to accuracies on their test rows."""

import logging
import math
import tempfile
from pathlib import Path

import torch
from pydantic import Field

from experiments.heart_disease.prepare import Hospitals
from experiments.heart_disease.settings import Cell
from experiments.heart_disease.training import (
    FEDERATION,
    STATISTICS_RUN,
    TRAINING_RUN,
    Federation,
    open_federation,
    train,
)
from fedclaw.learning.workload import Table
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.receipt import Trust
from fedclaw.server.round_report import Outcome


class Spending(Frozen):
    """What a run cost the hospital that it cost most, by its ledger, at the budget's delta."""

    statistics: float = Field(gt=0)
    training: float = Field(gt=0)
    together: float = Field(gt=0)
    """As the ledger composes them: at most the budget."""
    trust: Trust
    """Whom the guarantee needs to be honest."""


class CellResult(Frozen):
    """What one run came to."""

    centres: dict[str, float] = Field(min_length=1)
    """By hospital, the accuracy on its test rows."""
    pooled: float | None
    """The accuracy on all test rows together; None where each hospital has a model of its own."""
    spending: Spending | None = None
    """None: trained without privacy."""

    @property
    def mean(self) -> float:
        """Mean of the hospitals' accuracies, each hospital counting once."""
        return math.fsum(self.centres.values()) / len(self.centres)


def run_cell(cell: Cell, hospitals: Hospitals) -> CellResult:
    """Train and test. Raises FedClawError."""
    logging.getLogger("fedclaw").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        made = open_federation(cell, hospitals, Path(temporary))
        # A hospital with few test rows says at every round that it keeps its metrics to itself.
        logging.getLogger("fedclaw.site").setLevel(logging.ERROR)
        return _each(cell, made) if cell.method.who == "each" else _one_model(cell, made, hospitals)


def _each(cell: Cell, made: Federation) -> CellResult:
    outcomes = {name: train(cell, made, {name: site}) for name, site in made.sites.items()}
    tested = {name: accuracy(outcome, test_of(made, name)) for name, outcome in outcomes.items()}
    return CellResult(centres=tested, pooled=None)


def _one_model(cell: Cell, made: Federation, hospitals: Hospitals) -> CellResult:
    first = next(iter(made.sites))
    trainers = {
        "federation": made.sites,
        "first": {first: made.sites[first]},
        "pooled": {"pooled": made.pooled},
    }[cell.method.who]
    outcome = train(cell, made, trainers)
    everybody = made.pooled.data.test
    assert everybody is not None
    tables = {name: test_of(made, name) for name in made.sites}
    if cell.standardise == "federated":
        # What a shared standardisation makes of each hospital's rows it makes of all rows together.
        tables = _parts(everybody, hospitals) if cell.method.who == "pooled" else tables
        everybody = Table(
            torch.cat([torch.from_numpy(table.inputs) for table in tables.values()]).numpy(),
            torch.cat([torch.from_numpy(table.targets) for table in tables.values()]).numpy(),
        )
    return CellResult(
        centres={name: accuracy(outcome, table) for name, table in tables.items()},
        pooled=accuracy(outcome, everybody),
        spending=_spending(cell, made, outcome),
    )


def test_of(made: Federation, name: str) -> Table:
    """A hospital's test rows, as its site has them."""
    table = made.sites[name].data.test
    assert table is not None
    return table


def accuracy(outcome: Outcome, table: Table) -> float:
    """The final model's share of right answers on `table`."""
    record = outcome.directory.record()
    model = record.make_workload().build(record.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(outcome.parameters[name]))
        predicted = model(torch.from_numpy(table.inputs)).argmax(dim=1)
    return float((predicted == torch.from_numpy(table.targets)).double().mean())


def _parts(everybody: Table, hospitals: Hospitals) -> dict[str, Table]:
    """Everybody's test rows, hospital by hospital, in the order in which they were put together."""
    parts, start = {}, 0
    for name, split in hospitals.splits.items():
        where = slice(start, start + len(split.test))
        parts[name] = everybody.take(where)
        start = where.stop
    return parts


def _spending(cell: Cell, made: Federation, outcome: Outcome) -> Spending | None:
    if cell.budget is None:
        return None
    delta = cell.budget.delta
    ledgers = [site.ledger for site in made.sites.values()]
    (trust,) = {item.receipt.trust for item in outcome.receipts.values()}
    return Spending(
        statistics=max(ledger.spent(delta, run=STATISTICS_RUN, federation=FEDERATION) for ledger in ledgers),
        training=max(ledger.spent(delta, run=TRAINING_RUN, federation=FEDERATION) for ledger in ledgers),
        together=max(ledger.spent(delta) for ledger in ledgers),
        trust=trust,
    )
