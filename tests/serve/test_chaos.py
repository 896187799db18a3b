"""Things that go wrong, twice each, with real processes: what `python -m experiments.chaos` counts over more trials."""

import shutil

import pytest
from rich.console import Console

from experiments.chaos import hostile, kills, releases
from experiments.chaos.stage import ChaosSettings, Stage
from experiments.serving.cluster import postgres_binaries

TRIALS = 2
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture
def stage(bundles, tmp_path):
    settings = ChaosSettings(trials=TRIALS, only=None, clients=8, together=4, keys=500, patience=240.0, bundles=bundles)
    return Stage(settings, tmp_path, Console(quiet=True))


def test_a_killed_worker_takes_nothing_with_it_but_what_it_was_at(stage):
    found = kills.worker_killed(stage).figures
    name = "a worker of 2 killed"
    assert found[f"{name}: trials"] == TRIALS
    assert found[f"{name}: acknowledged"] > 100
    assert found[f"{name}: acknowledged and lost"] == 0
    assert found[f"{name}: failed"] <= TRIALS * stage.settings.clients
    assert found[f"{name}: seconds to the next answer, worst"] != "never"


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
@pytest.mark.skipif(postgres_binaries() is None, reason="no PostgreSQL server is installed")
def test_a_killed_node_loses_nothing_that_was_acknowledged(stage):
    found = kills.node_killed(stage).figures
    name = "a node of two killed"
    assert found[f"{name}: acknowledged"] > 100
    assert found[f"{name}: acknowledged and lost"] == 0
    assert found[f"{name}: seconds to the next answer, worst"] != "never"


@pytest.mark.parametrize("kind", ["errs", "slow", "disagrees"])
def test_a_canary_that_goes_wrong_is_rolled_back(kind, stage):
    found = getattr(releases, kind)(stage).figures
    name = {"errs": "that errs", "slow": "that is slow", "disagrees": "that disagrees"}[kind]
    assert found[f"a canary {name}: rolled back"] == TRIALS


def test_the_first_keys_are_one_in_twenty_and_stay_where_they_are(stage):
    found = releases.first_share(stage).figures
    assert found["the first 5%: outside the interval"] == 0
    assert found["the first 5%: keys that changed"] == 0


def test_whatever_is_wrong_is_refused_while_others_are_answered(stage):
    found = hostile.refused(stage).figures
    refused = {name: count for name, count in found.items() if name.startswith("refused: ")}
    assert set(refused.values()) == {TRIALS}, refused
    assert found["meanwhile: failed"] == 0


def test_a_stored_bundle_that_was_swapped_is_never_served(stage):
    found = hostile.swapped(stage).figures
    name = "a bundle swapped after it was verified"
    assert found[f"{name}: files overwritten"] >= TRIALS
    assert found[f"{name}: served"] == 0
