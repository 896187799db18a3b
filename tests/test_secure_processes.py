"""Secure aggregation between real processes: certificates, gRPC, ledgers; a site that is killed in mid-round."""

import json

import pytest

from experiments.datasets import SitePolicy
from fedclaw.server.run_directory import RunDirectory
from fedclaw.site.journal.ledger import Ledger
from tests.conftest import deploy

DISTRIBUTED = (
    "privacy=none",
    "privacy.epsilon=null",
    "privacy.delta=null",
    "central=example",
    "central.noise_by=sites",
    "central.epsilon=4",
    "central.delta=1e-3",
    "central.sample_rate=0.2",
    "training=one_step",
    "secure=secagg",
    "secure.corrupt=0",
)


@pytest.fixture
def deployment(tmp_path):
    """Three sites that take part in nothing but secure aggregation."""
    policy = SitePolicy(epsilon=8.0, delta=1e-3, require_secure_aggregation=True)
    with deploy(tmp_path, 3, policy) as made:
        yield made


def kinds(site):
    """What left the site, by its own log."""
    lines = (site / "state" / "outbound.jsonl").read_text().splitlines()
    return [json.loads(line)["entry"]["kind"] for line in lines]


def test_a_private_run_whose_updates_nobody_sees(deployment):
    for index in range(3):
        deployment.client(index)
    server = deployment.new_run(*DISTRIBUTED)
    assert server.finish() == 0, server.text()
    receipts = RunDirectory.open(deployment.runs / "test").read_receipts()
    for site in deployment.sites:
        receipt = receipts[site.name].receipt
        assert (receipt.mechanism, receipt.trust, receipt.rounds) == ("distributed", "aggregation", 3)
        spent = Ledger.open(site / "state" / "ledger.sqlite", site.name).spent(1e-3, run="test")
        assert receipt.epsilon_run == pytest.approx(spent)
        assert 0 < spent <= 4
        stages = ["query.keys", "query.shares", "query.confirm", "train", "query.consent", "query.unmask", "evaluate"]
        assert kinds(site) == stages * 3
        journal = site / "state" / "unmasked.jsonl"
        assert len(journal.read_text().splitlines()) == 3
        assert journal.stat().st_mode & 0o077 == 0


def test_a_site_that_requires_secure_aggregation_gives_nothing_without(deployment):
    for index in range(3):
        deployment.client(index)
    server = deployment.new_run("rounds=1")
    assert server.finish() == 1
    assert "secure aggregation" in server.text()
    assert all("train" not in kinds(site) or ledger_is_empty(site) for site in deployment.sites)


def ledger_is_empty(site):
    return Ledger.open(site / "state" / "ledger.sqlite", site.name).spent(1e-3) == 0


def test_a_site_that_is_killed_drops_out_and_is_back_in_a_later_round(deployment):
    for index in range(2):
        deployment.client(index)
    victim = deployment.client(2)
    server = deployment.new_run(*DISTRIBUTED, "sites.minimum=2", "sites.wait_for=3", "rounds=5000", "sites.deadline=10")
    site = deployment.sites[2]
    journal = site / "state" / "unmasked.jsonl"
    victim.wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) >= 3, "took part")
    victim.kill()
    directory = RunDirectory.open(deployment.runs / "test")

    def sizes():
        return [len(line["answered"]) for line in directory.read_metrics()]

    # Killed in a round or between two: either way there are rounds without it, and then with it.
    server.wait_for(lambda: 2 in sizes(), "went on without the site")
    deployment.client(2)
    # How many rounds there are until it is back, nobody knows: the run is long enough, and stopped then.
    server.wait_for(lambda: sizes()[-1] == 3, "took the site in again when it was back")
    server.kill()
