"""Runs FedClaw's rounds over a stock Flower Grid, with plans, checkpoints, resumption, evaluation and receipts."""

from collections.abc import Sequence

from flwr.serverapp import Grid

from fedclaw.server.coordinator import run_rounds
from fedclaw.server.round_report import Observer, Outcome
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.server.waiting import CohortWaiting, wait_for_cohort
from fedclaw.transport.flower.grid import LOOK_AGAIN, NamedGrid
from fedclaw.transport.flower.settings import check


def run_over(
    grid: Grid,
    directory: RunDirectory,
    waiting: CohortWaiting,
    observers: Sequence[Observer] = (),
    look_again: float = LOOK_AGAIN,
) -> Outcome:
    """Run or resume the run in `directory` over Flower's `grid`, polling for replies every `look_again` seconds.

    Raises UsageError for a run that Flower's runtimes do not support, and RoundError as `run_rounds` does.
    """
    record = directory.record()
    check(record)
    named = NamedGrid(grid, look_again)
    wait_for_cohort(named, directory, waiting)
    return run_rounds(named, directory, initial_parameters(record), observers=observers)
