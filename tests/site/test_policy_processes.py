"""Clauses that have to hold between real processes: over restarts, kill -9 and two sites of different minds."""

import pytest
import yaml

from experiments.datasets import SitePolicy
from fedclaw.errors import LedgerError
from fedclaw.server.run_directory import RunDirectory
from fedclaw.site.journal.reconciliation import open_journal
from tests.conftest import deploy

pytestmark = pytest.mark.slow

LONG_ROUND = ("training.epochs=null", "training.steps=800", "training.batch_size=16", "rounds=1")


def change(root, **clauses):
    path = root / "site.yaml"
    site = yaml.safe_load(path.read_text())
    site["policy"].update(clauses)
    path.write_text(yaml.safe_dump(site))


def charges(root, data_set):
    spent = {item.name: item.charges for item in open_journal(root).spending().data_sets}
    return spent.get(data_set, 0)


def has_begun(root):
    """Whether the site was charged; its ledger may be just being made."""
    try:
        return charges(root, root.name) == 1
    except LedgerError:
        return False


def declined(deployment, run):
    return [line["declined"] for line in RunDirectory.open(deployment.runs / run).read_metrics()]


def test_a_site_keeps_its_own_rules_after_a_restart_too_and_the_round_goes_on(tmp_path):
    with deploy(tmp_path, 2, SitePolicy(epsilon=8.0, delta=1e-3)) as deployment:
        easy, slow = deployment.sites
        noised = {"metrics_epsilon": 1.0, "metrics_budget": {"epsilon": 4.0, "delta": 1e-3}}
        change(slow, rounds_per_day=2, **noised)
        clients = [deployment.client(index) for index in range(2)]
        rules = ("sites.minimum=1", "sites.wait_for=2", "privacy.epsilon=2")
        server = deployment.new_run(*rules)
        assert server.finish() == 0, server.text()
        assert declined(deployment, "test") == [{}, {}, {slow.name: "frequency"}]
        assert "asked too often: this site takes part in 2 round(s) in 24 hours at most" in server.text()
        assert (charges(slow, slow.name), charges(slow, f"{slow.name}/test")) == (2, 2)
        assert clients[1].stop() == 143
        deployment.client(1)
        again = deployment.new_run(*rules, "run=again", "rounds=1")
        assert again.finish() == 0, again.text()
        assert declined(deployment, "again") == [{slow.name: "frequency"}]
        assert charges(easy, easy.name) == 4


def test_a_round_that_kill_9_interrupted_is_not_another_one(tmp_path):
    with deploy(tmp_path, 2, SitePolicy(epsilon=8.0, delta=1e-3)) as deployment:
        victim = deployment.sites[1]
        change(victim, rounds_per_day=1)
        deployment.client(0)
        client = deployment.client(1)
        server = deployment.new_run(*LONG_ROUND)
        server.wait_for(lambda: has_begun(victim), "reached the round at the site")
        client.kill()
        assert not list((victim / "state" / "outbox").glob("*.reply*")), "it was killed while it trained"
        deployment.client(1)
        assert server.finish() == 0, server.text()
        assert declined(deployment, "test") == [{}]
        assert charges(victim, victim.name) == 1, "the interrupted round was counted once"
