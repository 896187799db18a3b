"""Runs FedClaw's rounds over a stock Flower Grid, with plans, checkpoints, resumption, evaluation and receipts."""

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedclaw.server.coordinator import Observer, Outcome, run_rounds
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters, wait_for_cohort
from fedclaw.server.sites_settings import SitesSettings
from fedclaw.transport.flower.grid import LOOK_AGAIN, NamedGrid
from fedclaw.transport.flower.settings import check


@dataclass(frozen=True)
class Waiting:
    """How many sites to wait for before the first round (None: as many as a round needs), and for how many seconds."""

    sites: int | None = None
    seconds: float = 600
    new_cohort: bool = False
    """Repeat a round in flight with the sites that are connected; see `fedclaw.server.coordinator.drop_pending`."""

    @classmethod
    def of(cls, sites: SitesSettings) -> "Waiting":
        """The values in the settings."""
        return cls(sites.wait_for, sites.wait, sites.new_cohort)


def run_over(
    grid: Grid,
    directory: RunDirectory,
    waiting: Waiting,
    observers: Sequence[Observer] = (),
    look_again: float = LOOK_AGAIN,
) -> Outcome:
    """Run or resume the run in `directory` over Flower's `grid`, polling for replies every `look_again` seconds.

    Raises UsageError for a run that Flower's runtimes do not support, and RoundError as `run_rounds` does.
    """
    record = directory.record()
    check(record)
    named = NamedGrid(grid, look_again)
    wait_for_cohort(named, directory, waiting.sites, waiting.seconds, new_cohort=waiting.new_cohort)
    return run_rounds(named, directory, initial_parameters(record), observers=observers)
