"""Waiting for sites before anything is asked of them: how many, and for how long."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from pydantic import Field

from fedclaw.errors import RoundError, UsageError
from fedclaw.protocol.frozen import Frozen, fields_of
from fedclaw.protocol.terms import RoundRules
from fedclaw.server.run_directory import PendingRound, RunDirectory

log = logging.getLogger(__name__)

LATECOMERS = 20.0
"""Seconds that a resumed server waits for the rest of the cohort that it had asked."""


class Waiting(Frozen):
    """Which sites a command waits for, as conf/ says it."""

    wait_for: int | None = Field(default=None, ge=1)
    """Sites to wait for; by default as many as are needed."""
    wait: float = Field(default=600, gt=0)
    """Seconds to wait for them."""

    def expected(self, minimum: int) -> int:
        """Sites to wait for where `minimum` are needed."""
        return max(minimum, self.wait_for or 0)


class CohortWaiting(Waiting):
    """The same for a run, whose last round may have been interrupted."""

    new_cohort: bool = False
    """Going on: ask the round in flight of whoever is connected, for a site of it will not come back. Asked of another
    number of sites it is a new question, and a site that has answered the old one pays for it again."""


class SitesSettings(RoundRules, CohortWaiting):
    """conf/server.yaml, conf/flower_app.yaml and conf/ray.yaml: sites."""

    def rules(self) -> RoundRules:
        """Those of a new run. Raises UsageError for a setting that only an interrupted run can have."""
        if self.new_cohort:
            raise UsageError("sites.new_cohort=true goes with resume=: a new run has no round in flight")
        return RoundRules(**fields_of(self, RoundRules))


class Gathering(Protocol):
    """A grid whose sites come by themselves."""

    def wait_for_sites(self, count: int, timeout: float) -> tuple[str, ...]:
        """Names of the connected sites, once there are `count` or `timeout` seconds have passed."""


def wait_for_sites(grid: Gathering, waiting: Waiting, minimum: int, otherwise: str) -> tuple[str, ...]:
    """Names of the connected sites. Raises RoundError, which ends with `otherwise`, when fewer than `minimum` came."""
    expected = waiting.expected(minimum)
    log.info("waiting for %d sites", expected)
    names = grid.wait_for_sites(expected, waiting.wait)
    _require(names, minimum, waiting.wait, otherwise)
    return names


def wait_for_cohort(grid: Gathering, directory: RunDirectory, waiting: CohortWaiting) -> None:
    """Wait for the sites that the run in `directory` needs to begin or go on.

    A round that was in flight when the run stopped is asked of the same sites again, so those are waited for too,
    but not for long: a site that does not come back is silent in that round. `new_cohort` gives that round up and asks
    it of whoever has come; see `PendingRound.drop` for the price. Raises RoundError when too few came; nothing has been
    given up then.
    """
    rules = directory.record().rules
    otherwise = f"continue with resume={directory.root} when they are back"
    names = wait_for_sites(grid, waiting, rules.minimum, otherwise)
    pending = None if waiting.new_cohort else PendingRound.read(directory.root)
    if pending and len(pending.nodes) > len(names) >= waiting.expected(rules.minimum):
        names = grid.wait_for_sites(len(pending.nodes), min(waiting.wait, LATECOMERS))
        _require(names, rules.minimum, waiting.wait, otherwise)
    log.info("connected: %s", ", ".join(names))
    if waiting.new_cohort:
        PendingRound.drop(directory.root)


def _require(names: Sequence[str], minimum: int, seconds: float, otherwise: str) -> None:
    if len(names) < minimum:
        raise RoundError(
            f"{len(names)} sites came within {seconds:g} s and {minimum} are needed ({', '.join(names) or 'none'}); "
            f"{otherwise}"
        )


def poll(look: Callable[[], Sequence[int]], count: int, timeout: float, pause: float) -> list[int]:
    """What `look` sees, once that is `count` nodes or `timeout` seconds have passed; `pause` seconds between looks."""
    end = time.monotonic() + timeout
    while len(seen := look()) < count and time.monotonic() < end:
        time.sleep(pause)
    return list(seen)
