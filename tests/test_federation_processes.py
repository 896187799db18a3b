"""The server and its sites as real processes: a run, crashes with kill -9 on either side, and refusals."""

import json
import sqlite3
import time

import pytest
import yaml

from experiments.datasets import SitePolicy
from fedclaw.server.run_directory import RunDirectory
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.outbound import OutboundLog
from tests.conftest import deploy

SLOW_ROUNDS = ("training.epochs=null", "training.steps=800", "training.batch_size=16")
"""Rounds long enough to be killed in the middle of."""


def ledger_of(site):
    return Ledger.open(site / "state" / "ledger.sqlite", site.name)


def reservations(site):
    """How many entries the site's ledger holds, read beside the running client."""
    path = site / "state" / "ledger.sqlite"
    if not path.exists():
        return 0
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        try:
            rows = connection.execute("SELECT body FROM entries").fetchall()
        except sqlite3.OperationalError:
            return 0
    return sum(json.loads(body)["kind"] == "reserve" for (body,) in rows)


def test_a_run_from_connection_to_model(deployment):
    """Started as people start them."""
    deployment.fresh = True
    clients = [deployment.client(index) for index in range(2)]
    server = deployment.new_run()
    assert server.finish() == 0, server.text()
    directory = RunDirectory.open(deployment.runs / "test")
    metrics = directory.read_metrics()
    assert [line["round"] for line in metrics] == [1, 2, 3]
    assert set(metrics[-1]["metrics"]) == {"accuracy", "precision", "recall", "f1", "auroc"}, "loss is not permitted"
    assert directory.read_model()
    for site in deployment.sites:
        receipt = directory.read_receipts()[site.name].receipt
        ledger = ledger_of(site)
        assert receipt.rounds == 3
        assert receipt.epsilon_run == pytest.approx(ledger.spent(1e-3, run="test"))
        assert 0 < receipt.epsilon_run <= 4
        assert receipt.ledger_head in ledger.index().heads
        OutboundLog(site / "state" / "outbound.jsonl").verify()
        lines = [json.loads(line) for line in (site / "state" / "outbound.jsonl").read_text().splitlines()]
        kinds = [line["entry"]["kind"] for line in lines]
        assert kinds == ["train", "evaluate"] * 3
    assert "Privacy spent" in server.text()
    for client in clients:
        assert client.process.poll() is None, "a site stays warm for the next run"
        assert client.stop() == 143


def test_kill_9_of_a_site_in_mid_round(deployment):
    steady, victim = deployment.client(0), deployment.client(1)
    server = deployment.new_run(*SLOW_ROUNDS, "rounds=2")
    site = deployment.sites[1]
    server.wait_for(lambda: reservations(site) == 1, "reached round 1 at the site")
    victim.kill()
    assert not list((site / "state" / "outbox").glob("*.reply*")), "it was killed while it trained"
    deployment.client(1)
    assert server.finish() == 0, server.text()
    metrics = RunDirectory.open(deployment.runs / "test").read_metrics()
    assert all(len(line["answered"]) == 2 for line in metrics), "the site took part again, in the same round"
    assert ledger_of(site).rounds("test") == 2, "the interrupted round was counted once"
    assert steady.process.poll() is None


def test_kill_9_of_the_server_in_mid_round_then_resume(deployment):
    for index in range(2):
        deployment.client(index)
    server = deployment.new_run(*SLOW_ROUNDS, "rounds=3")
    checkpoint = deployment.runs / "test" / "checkpoint-0001.ckpt"
    server.wait_for(checkpoint.exists, "finished round 1")
    server.wait_for(lambda: any(reservations(site) == 2 for site in deployment.sites), "began round 2")
    server.kill()
    resumed = deployment.server(f"resume={deployment.runs / 'test'}")
    assert resumed.finish() == 0, resumed.text()
    directory = RunDirectory.open(deployment.runs / "test")
    assert [line["round"] for line in directory.read_metrics()] == [1, 2, 3]
    for site in deployment.sites:
        assert ledger_of(site).rounds("test") == 3, "no site has paid for a round twice"
        assert directory.read_receipts()[site.name].receipt.epsilon_run <= 4


def test_kill_9_of_the_server_after_the_sites_have_answered(deployment):
    """Both replies are in, or in the outboxes; the resumed server gets the very same ones, unpaid."""
    for index in range(2):
        deployment.client(index)
    server = deployment.new_run("rounds=40")
    server.wait_for(lambda: all(reservations(site) >= 3 for site in deployment.sites), "was at round 3")
    server.kill()
    time.sleep(0.5)
    resumed = deployment.server(f"resume={deployment.runs / 'test'}")
    assert resumed.finish() == 0, resumed.text()
    assert {ledger_of(site).rounds("test") for site in deployment.sites} == {40}


def test_a_site_that_never_comes_back_is_replaced_on_demand(tmp_path):
    """Another site takes its place: the cohort is as large as it was, so who had answered pays nothing again."""
    with deploy(tmp_path, 3, SitePolicy(epsilon=8.0, delta=1e-3)) as deployment:
        stays, leaves, comes = deployment.sites
        deployment.client(0)
        victim = deployment.client(1)
        server = deployment.new_run(*SLOW_ROUNDS, "rounds=2", "sites.minimum=2")
        server.wait_for(lambda: reservations(leaves) == 1, "began round 1")
        server.kill()
        victim.kill()
        deployment.client(2)
        resume = f"resume={deployment.runs / 'test'}"
        resumed = deployment.server(resume, "sites.new_cohort=true")
        assert resumed.finish() == 0, resumed.text()
        metrics = RunDirectory.open(deployment.runs / "test").read_metrics()
        assert [set(line["answered"]) for line in metrics] == [{stays.name, comes.name}] * 2
        assert ledger_of(stays).rounds("test") == ledger_of(comes).rounds("test") == 2


def test_a_damaged_checkpoint_is_refused_on_resume(deployment):
    for index in range(2):
        deployment.client(index)
    server = deployment.new_run("rounds=2")
    assert server.finish() == 0, server.text()
    (deployment.runs / "test" / "model.npz").unlink()
    path = deployment.runs / "test" / "checkpoint-0002.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    resumed = deployment.server(f"resume={deployment.runs / 'test'}")
    assert resumed.finish() == 1
    assert "checkpoint-0002.ckpt is damaged" in resumed.text()
    assert "Traceback" not in resumed.text()


def test_a_site_refuses_and_the_round_goes_on_without_it(tmp_path):
    """Another strategy than the policy allows, at one site of three."""
    with deploy(tmp_path, 3, SitePolicy(epsilon=8.0, delta=1e-3)) as deployment:
        path = deployment.sites[2] / "site.yaml"
        site = yaml.safe_load(path.read_text())
        site["policy"]["strategies"] = ["fedprox"]
        path.write_text(yaml.safe_dump(site))
        for index in range(3):
            deployment.client(index)
        server = deployment.new_run("sites.minimum=2", "sites.wait_for=3", "rounds=2")
        assert server.finish() == 0, server.text()
        metrics = RunDirectory.open(deployment.runs / "test").read_metrics()
        name = deployment.sites[2].name
        assert all(line["declined"] == {name: "strategy"} for line in metrics)
        assert reservations(deployment.sites[2]) == 0
        assert "strategy 'fedavg' was asked for; this site allows fedprox" in server.text()


def test_an_epsilon_above_the_policy_stops_the_run_with_the_sites_reason(deployment):
    for index in range(2):
        deployment.client(index)
    server = deployment.new_run("privacy.epsilon=20")
    assert server.finish() == 1
    assert "epsilon 20 was asked for; this site allows at most 8" in server.text()
    assert "resume=" in server.text()
    assert [reservations(site) for site in deployment.sites] == [0, 0]


def test_a_refusal_is_not_for_ever(deployment):
    """The operators raise their limits and start their clients again; the same run goes on."""
    clients = [deployment.client(index) for index in range(2)]
    assert deployment.new_run("privacy.epsilon=20").finish() == 1
    for client, site in zip(clients, deployment.sites, strict=True):
        assert client.stop() == 143
        path = site / "site.yaml"
        settings = yaml.safe_load(path.read_text())
        settings["policy"]["epsilon"] = 30
        path.write_text(yaml.safe_dump(settings))
    for index in range(2):
        deployment.client(index)
    resumed = deployment.server(f"resume={deployment.runs / 'test'}")
    assert resumed.finish() == 0, resumed.text()


def test_the_budget_outlives_the_run(deployment):
    """Each run alone fits the budget of 8; the second one would exceed it together with the first."""
    for index in range(2):
        deployment.client(index)
    first = deployment.new_run("run=first", "privacy.epsilon=7", "rounds=1")
    assert first.finish() == 0, first.text()
    second = deployment.new_run("run=second", "privacy.epsilon=7", "rounds=1")
    assert second.finish() == 1
    assert "privacy budget" in second.text()
    for site in deployment.sites:
        ledger = ledger_of(site)
        assert 6 < ledger.spent(1e-3) <= 7
        assert ledger.rounds("second") == 0


@pytest.mark.slow
def test_a_number_is_predicted_over_grpc(tmp_path):
    """The same commands: only the schema says that it is a number. The site's noise is in every round."""
    policy = SitePolicy(epsilon=8.0, delta=1e-3)
    with deploy(tmp_path, 2, policy, "diabetes") as deployment:
        for index in range(2):
            deployment.client(index)
        server = deployment.new_run("workload.model.name=linear", "rounds=2")
        assert server.finish() == 0, server.text()
        directory = RunDirectory.open(deployment.runs / "test")
        assert directory.record().task == "regression"
        line = directory.read_metrics()[-1]
        assert set(line["metrics"]) == {"rmse", "mae", "r2"}, "loss is not permitted"
        assert 0 < line["metrics"]["mae"] <= line["metrics"]["rmse"] <= 346 - 25
        assert all(0 < item.receipt.epsilon_run <= 4 for item in directory.read_receipts().values())
        for site in deployment.sites:
            OutboundLog(site / "state" / "outbound.jsonl").verify()
