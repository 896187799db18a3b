"""FedClaw's rounds over Flower's own Grid: names that last, one charge a question, what is refused."""

import logging

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedclaw.errors import RoundError, UsageError
from fedclaw.protocol.message_identity import number_of
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import PrivacyRequest, RoundRules, SecureRequest
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.server.waiting import CohortWaiting
from fedclaw.site.directory import read_schema
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.journal.reconciliation import ledger_file
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.flower import FLOWER_RECORD, SITE
from fedclaw.transport.flower import rounds as flower_rounds
from fedclaw.transport.flower.rounds import NamedGrid, run_over
from tests.samples import run_record

PRIVACY = PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(flower_rounds, "NamedGrid", lambda grid, _: NamedGrid(grid, look_again=0.01, introduction=60))


@pytest.fixture
def begin(tmp_path, sites):
    def made(**changes):
        schema = read_schema(load_site_settings(sites[0])).to_json()
        changes = {"privacy": PRIVACY, "rules": RoundRules(minimum=2, deadline=100, attempts=2), **changes}
        return RunDirectory.create(tmp_path / "run", run_record(schema_text=schema, **changes))

    return made


def charges(site):
    with Ledger.open(ledger_file(site), load_site_settings(site).data_set) as ledger:
        return ledger.rounds("run-1")


def test_a_private_run_is_named_paid_and_logged(fleet, sites, begin):
    for site in sites:
        fleet.join(site)
    directory = begin(rounds=2)
    outcome = run_over(fleet.grid, directory, CohortWaiting())
    assert set(outcome.receipts) == {site.name for site in sites}
    for site in sites:
        assert charges(site) == outcome.receipts[site.name].receipt.rounds == 2
        log = OutboundLog(site / "state" / "outbound.jsonl", read_only=True)
        assert [entry.kind for entry in log.entries()] == ["train", "evaluate"] * 2
    start = initial_parameters(directory.record())
    assert all(not np.array_equal(outcome.parameters[name], start[name]) for name in start)


def test_a_reply_that_is_lost_is_sent_again_and_paid_once(fleet, sites, begin):
    first, second = (fleet.join(site) for site in sites)
    losses = []

    def lost(message):
        if message.metadata.message_type != "train" or losses:
            return False
        losses.append(message)
        return True

    first.lost = lost
    outcome = run_over(fleet.grid, begin(rounds=1), CohortWaiting())
    assert losses
    assert set(outcome.receipts) == {site.name for site in sites}
    assert [charges(site) for site in sites] == [1, 1]
    entries = OutboundLog(sites[0] / "state" / "outbound.jsonl", read_only=True).entries()
    trained = [entry for entry in entries if entry.kind == "train"]
    assert [entry.resent for entry in trained] == [False, True]
    assert trained[0].digest == trained[1].digest, "the very same answer"
    assert second.client is first.client


def test_an_interrupted_run_goes_on_with_nodes_that_flower_numbers_anew(fleet, sites, begin):
    nodes = [fleet.join(site) for site in sites]
    nodes[1].lost = lambda message: message.metadata.message_type == "train"
    directory = begin(rounds=1, rules=RoundRules(minimum=2, deadline=100, attempts=1))
    with pytest.raises(RoundError, match="no answer in time"):
        run_over(fleet.grid, directory, CohortWaiting())
    for node in nodes:
        node.leave()
    for site in sites:
        fleet.join(site)
    outcome = run_over(fleet.grid, directory, CohortWaiting())
    assert set(outcome.receipts) == {site.name for site in sites}
    assert [charges(site) for site in sites] == [1, 1], "the round was asked twice and paid once"


def test_a_site_that_comes_back_under_another_number_is_the_same_site(fleet, sites):
    grid = NamedGrid(fleet.grid, look_again=0.01)
    node = fleet.join(sites[0])
    assert list(grid.get_node_ids()) == [number_of(sites[0].name)]
    node.leave()
    assert list(grid.get_node_ids()) == []
    fleet.join(sites[0])
    assert grid.wait_for_sites(1, 100) == (sites[0].name,)
    assert list(grid.get_node_ids()) == [number_of(sites[0].name)]


def test_a_node_that_says_no_name_takes_no_part(fleet, sites, caplog):
    nameless = ClientApp()

    @nameless.query("name")
    def answer(message, context):
        return Message(RecordDict({FLOWER_RECORD: ConfigRecord({SITE: 5})}), reply_to=message)

    fleet.join(sites[0], nameless)
    fleet.join(sites[1])
    with caplog.at_level(logging.WARNING, "fedclaw"):
        assert NamedGrid(fleet.grid, look_again=0.01).wait_for_sites(1, 100) == (sites[1].name,)
    assert "does not say which site it is" in caplog.text


def test_a_node_whose_name_was_lost_on_the_way_is_asked_again(fleet, sites):
    asked = []

    def lost(message):
        asked.append(message)
        return len(asked) == 1

    node = fleet.join(sites[0])
    node.lost = lost
    grid = NamedGrid(fleet.grid, look_again=0.01)
    assert grid.wait_for_sites(1, 100) == (sites[0].name,)
    assert len(asked) > 1


def test_of_two_nodes_with_one_name_the_newer_is_asked(fleet, sites, caplog):
    fleet.join(sites[0])
    grid = NamedGrid(fleet.grid, look_again=0.01)
    assert grid.wait_for_sites(1, 100) == (sites[0].name,)
    newer = fleet.join(sites[0])
    with caplog.at_level(logging.WARNING, "fedclaw"):
        assert grid.wait_for_sites(1, 100) == (sites[0].name,)
    assert f"node {newer.node_id} says it is {sites[0].name}" in caplog.text


def test_a_site_that_has_not_been_met_is_silent(fleet, sites):
    fleet.join(sites[0])
    grid = NamedGrid(fleet.grid, look_again=0.01)
    assert grid.wait_for_sites(1, 100) == (sites[0].name,)
    stranger = Message(RecordDict(), number_of("nobody"), "train", ttl=100)
    (identity,) = grid.push_messages([stranger])
    assert list(grid.pull_messages([identity])) == []
    known = Message(RecordDict(), number_of(sites[0].name), "train", ttl=100)
    (reply,) = grid.send_and_receive([stranger, known], timeout=100)
    assert reply.metadata.src_node_id == number_of(sites[0].name)
    assert reply.metadata.reply_to_message_id == known.metadata.message_id
    assert reply.error.code == RefusalCode.MALFORMED


def test_a_site_that_does_not_answer_in_time_is_silent(fleet, sites):
    node = fleet.join(sites[0])
    grid = NamedGrid(fleet.grid, look_again=0.01)
    assert grid.wait_for_sites(1, 100) == (sites[0].name,)
    node.close()
    message = Message(RecordDict(), number_of(sites[0].name), "train", ttl=100)
    assert list(grid.send_and_receive([message], timeout=0.2)) == []


def test_a_site_that_fails_says_no_more_than_that(fleet, sites, caplog):
    (sites[0] / "site.yaml").write_text("name: [\n")
    node = fleet.join(sites[0])
    grid = NamedGrid(fleet.grid, look_again=0.01, introduction=60)
    with caplog.at_level(logging.ERROR, "fedclaw"):
        assert list(grid.get_node_ids()) == []
    assert "is not YAML" in caplog.text
    assert node.node_id in fleet.grid.get_node_ids()


def test_secure_aggregation_is_refused_at_start(fleet, begin):
    with pytest.raises(UsageError, match="secure aggregation"):
        run_over(fleet.grid, begin(weighting="uniform", secure=SecureRequest()), CohortWaiting())
