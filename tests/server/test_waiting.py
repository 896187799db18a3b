"""Waiting for a cohort: long for what a round needs, briefly for the rest of a round that was in flight."""

import pytest

from fedclaw.errors import RoundError
from fedclaw.server.run_directory import PENDING, PendingRound, RunDirectory
from fedclaw.server.waiting import LATECOMERS, CohortWaiting, wait_for_cohort
from tests.samples import run_record


class Door:
    """Sites that come one after the other; notes how long somebody would wait."""

    def __init__(self, names):
        self.names = names
        self.waits = []

    def wait_for_sites(self, count, timeout):
        self.waits.append((count, timeout))
        return tuple(self.names)


@pytest.fixture
def directory(tmp_path):
    return RunDirectory.create(tmp_path / "run", run_record())


def test_the_minimum_is_waited_for(directory):
    door = Door(["north", "south"])
    wait_for_cohort(door, directory, CohortWaiting())
    assert door.waits == [(2, 600)]


def test_more_are_waited_for_on_demand_but_not_needed(directory):
    door = Door(["north", "south"])
    wait_for_cohort(door, directory, CohortWaiting(wait_for=3))
    assert door.waits == [(3, 600)]


def test_the_rest_of_a_round_in_flight_is_waited_for_briefly(directory):
    (directory.root / PENDING).write_text('{"round": 2, "nodes": [1, 2, 3]}')
    door = Door(["north", "south"])
    wait_for_cohort(door, directory, CohortWaiting())
    assert door.waits == [(2, 600), (3, LATECOMERS)]


def test_a_new_cohort_waits_for_nobody_of_the_round_in_flight(directory):
    (directory.root / PENDING).write_text('{"round": 2, "nodes": [1, 2, 3]}')
    with pytest.raises(RoundError):
        wait_for_cohort(Door(["north"]), directory, CohortWaiting(wait=5, new_cohort=True))
    assert PendingRound.read(directory.root).nodes == (1, 2, 3), "too few came, so nothing was given up"
    door = Door(["north", "south"])
    wait_for_cohort(door, directory, CohortWaiting(new_cohort=True))
    assert door.waits == [(2, 600)]
    assert PendingRound.read(directory.root) is None


def test_too_few_are_named(directory):
    with pytest.raises(RoundError, match=r"1 sites came within 5 s and 2 are needed \(north\); continue with resume="):
        wait_for_cohort(Door(["north"]), directory, CohortWaiting(wait=5))
