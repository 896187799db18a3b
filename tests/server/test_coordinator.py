"""The loop over real sites in this process: the same question after a crash, and rounds that do not count."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from flwr.app import Error, Message

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.errors import CheckpointError, PluginError, RoundError, RunInUse, UsageError
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import (
    CentralNoise,
    LocalTraining,
    PrivacyRequest,
    RoundRules,
    SecureRequest,
    StrategyRecord,
)
from fedclaw.server import checkpoint
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.early_checks import check_combination
from fedclaw.server.run_directory import PENDING, PendingRound, RunDirectory
from fedclaw.server.session import initial_parameters, make_strategy
from fedclaw.strategies.fedavg import FedAvg
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.conftest import environment
from tests.crashes import Crash, server_dies
from tests.samples import run_record


class Recording:
    """A site that notes what it is asked, and refuses as long as it is told to."""

    def __init__(self, site):
        self.site = site
        self.asked = []
        self.refusals = 0

    def answer(self, message):
        self.asked.append((message.metadata.message_type, message.metadata.message_id))
        if self.refusals:
            self.refusals -= 1
            return Message(Error(RefusalCode.BUDGET, "the budget is gone"), reply_to=message)
        return self.site.answer(message)

    def release(self, message, reply, size, digest):
        self.site.release(message, reply, size, digest)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("sites")
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    return root, write_sites(root, DatasetSettings(name="breast_cancer", sites=3), policy)


@pytest.fixture
def sites(directories):
    return {name: Recording(service) for name, service in open_sites(directories[1], "clinic").items()}


@pytest.fixture
def record(directories, sites):
    assume_server_identity(5)
    schema = next(iter(sites.values())).site.workload.schema
    return run_record(
        schema_text=schema.to_json(),
        rounds=3,
        training=LocalTraining(steps=4, batch_size=1000, learning_rate=0.2),
        privacy=None,
    )


def run(root, record, sites):
    directory = RunDirectory(root) if (root / "run.json").exists() else RunDirectory.create(root, record)
    return run_rounds(LocalGrid(sites, 5), directory, initial_parameters(directory.record()))


def test_the_mean_is_weighted_by_examples(tmp_path, record, sites):
    """One full-batch step of FedAvg from the same point is one step on the pooled data (McMahan et al. 2017, 2)."""
    one = record.model_copy(
        update={"rounds": 1, "training": LocalTraining(steps=1, batch_size=1000, learning_rate=0.2)}
    )
    outcome = run(tmp_path / "run", one, sites)
    start = initial_parameters(RunDirectory(tmp_path / "run").record())
    services = [recording.site for recording in sites.values()]
    inputs = np.concatenate([service.data.train.inputs for service in services])
    targets = np.concatenate([service.data.train.targets for service in services])
    weight, bias = (next(a for n, a in start.items() if n.endswith(end)) for end in ("weight", "bias"))
    logits = inputs @ weight.T + bias
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = (chance - np.eye(2)[targets]) / len(targets)
    for name, array in outcome.parameters.items():
        expected = weight - 0.2 * error.T @ inputs if name.endswith("weight") else bias - 0.2 * error.sum(axis=0)
        assert np.allclose(array, expected, atol=1e-6)


def test_a_resumed_run_asks_the_same_questions(tmp_path, record, sites):
    """The server dies in round 2, after one site has answered; the question is the same, and so is the answer."""
    with server_dies(list(sites.values())[1].site, in_round=2):
        run(tmp_path / "run", record, sites)
    assert (tmp_path / "run" / PENDING).exists()
    outcome = run(tmp_path / "run", record, sites)
    for recording in sites.values():
        assert len(set(recording.asked)) == 2 * record.rounds, "a question was new"
    assert len(next(iter(sites.values())).asked) == 2 * record.rounds + 1
    assert [line["round"] for line in outcome.directory.read_metrics()] == [1, 2, 3]


def test_a_finished_run_resumed_asks_nothing(tmp_path, record, sites):
    run(tmp_path / "run", record, sites)
    for recording in sites.values():
        recording.asked.clear()
    run(tmp_path / "run", record, sites)
    assert not any(recording.asked for recording in sites.values())


def test_a_refusal_leaves_the_round_to_the_others(tmp_path, record, sites):
    name = next(iter(sites))
    sites[name].refusals = 1
    outcome = run(tmp_path / "run", record, sites)
    lines = outcome.directory.read_metrics()
    assert lines[0]["declined"] == {name: "budget"}
    assert name not in lines[0]["answered"]
    assert name in lines[1]["answered"]


def test_too_few_sites_stop_the_run_with_their_reasons_and_it_can_go_on(tmp_path, record, sites):
    for recording in list(sites.values())[:2]:
        recording.refusals = 1
    with pytest.raises(RoundError, match=r"round 1 .*1 sites trained, 2 are needed .*the budget is gone.*resume="):
        run(tmp_path / "run", record, sites)
    assert len(run(tmp_path / "run", record, sites).directory.read_metrics()) == 3


def test_fewer_connected_than_needed(tmp_path, record, sites):
    alone = dict(list(sites.items())[:1])
    hasty = record.model_copy(update={"rules": RoundRules(minimum=2, deadline=0.3)})
    with pytest.raises(RoundError, match="1 sites are connected and 2 are needed"):
        run(tmp_path / "run", hasty, alone)


def test_a_site_that_is_away_when_a_round_begins_is_waited_for(tmp_path, record, sites):
    class Blinking(LocalGrid):
        looks = 0

        def get_node_ids(self):
            self.looks += 1
            nodes = list(super().get_node_ids())
            return nodes[:1] if self.looks in {2, 3} else nodes

    directory = RunDirectory.create(tmp_path / "run", record)
    outcome = run_rounds(Blinking(sites, 5), directory, initial_parameters(directory.record()))
    assert all(len(line["answered"]) == 3 for line in directory.read_metrics())
    assert outcome.metrics


@pytest.mark.parametrize(("weighting", "weight"), [("examples", 1e30), ("examples", 1.0), ("uniform", 1e30)])
def test_a_weight_that_does_not_belong_to_its_examples_is_declined(tmp_path, record, sites, weighting, weight):
    name, recording = next(iter(sites.items()))
    answer = recording.site.answer

    def lying(message):
        reply = answer(message)
        if reply.has_content() and "sum" in reply.content.array_records:
            reply.content["metrics"]["weight"] = weight
        return reply

    recording.site.answer = lying
    outcome = run(tmp_path / "run", record.model_copy(update={"weighting": weighting}), sites)
    assert {line["declined"].get(name) for line in outcome.directory.read_metrics()} == {"unusable"}


def test_a_reason_from_a_site_cannot_forge_a_log(tmp_path, record, sites, caplog):
    name, recording = next(iter(sites.items()))
    recording.site.answer = lambda message: Message(
        Error(1, "no\n12:00 INFO all is well\x1b[2J" + "x" * 9999), reply_to=message
    )
    run(tmp_path / "run", record, sites)
    (line, *_) = [item.getMessage() for item in caplog.records if name in item.getMessage()]
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 500


def test_silent_sites_are_not_waited_for_again_in_the_evaluation(tmp_path, record, sites):
    class Silent(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return super().send_and_receive([m for m in messages if m.metadata.dst_node_id != gone], timeout=timeout)

    grid = Silent(sites, 5)
    gone = sorted(grid.get_node_ids())[0]
    directory = RunDirectory.create(tmp_path / "run", record)
    run_rounds(grid, directory, initial_parameters(directory.record()))
    name = grid.site_name(gone)
    assert all(line["silent"] == [name] for line in directory.read_metrics())
    assert not sites[name].asked


class Present(LocalGrid):
    """Only the sites of `present` are connected, and answer; `leaving` leaves when round 2 asks it."""

    def __init__(self, sites, present, leaving):
        super().__init__(sites, 5)
        self.present = set(present)
        self.leaving = leaving

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if self.site_name(node) in self.present]

    def send_and_receive(self, messages, *, timeout=None):
        if messages[0].metadata.group_id == "2":
            self.present.discard(self.leaving)
        there = self.get_node_ids()
        return super().send_and_receive([m for m in messages if m.metadata.dst_node_id in there], timeout=timeout)


@pytest.mark.parametrize(("asked", "answering", "distinct"), [((0, 1), (0, 2), 3), ((0, 1, 2), (0, 2), 4)])
def test_a_round_whose_site_never_comes_back_is_asked_of_a_new_cohort(
    tmp_path, record, sites, asked, answering, distinct
):
    """Site 1 leaves for ever. A cohort of the same size gets the same question, one of another size a new one."""
    names = list(sites)
    needed = record.model_copy(update={"rules": RoundRules(minimum=len(asked), attempts=1)})
    directory = RunDirectory.create(tmp_path / "run", needed)
    grid = Present(sites, [names[index] for index in asked], leaving=names[1])
    with pytest.raises(RoundError, match=rf"{names[1]}: no answer in time.*resume=.*sites\.new_cohort=true"):
        run_rounds(grid, directory, initial_parameters(needed))
    fewer = needed.model_copy(update={"rules": RoundRules(minimum=2, attempts=1)})
    (directory.root / "run.json").write_text(fewer.model_dump_json())
    grid.present = {names[index] for index in answering}
    if len(asked) == 2:
        with pytest.raises(RoundError, match="round 2"):
            run_rounds(grid, directory, initial_parameters(needed))
    PendingRound.drop(directory.root)
    outcome = run_rounds(grid, directory, initial_parameters(needed))
    lines = outcome.directory.read_metrics()
    assert [sorted(line["answered"]) for line in lines[1:]] == [sorted(grid.present)] * 2
    assert len({identity for kind, identity in sites[names[0]].asked if kind == "train"}) == distinct


def test_a_fraction_is_drawn_anew_each_round_and_the_same_after_a_crash(tmp_path, record, sites):
    part = record.model_copy(update={"rules": RoundRules(minimum=1, fraction=0.34), "rounds": 8})
    open_policies = {"minimum_cohort": 1}
    for recording in sites.values():
        recording.site.policy = recording.site.policy.model_copy(update=open_policies)
    cohorts = []
    for attempt in ("one", "two"):
        outcome = run(tmp_path / attempt, part, sites)
        cohorts.append([line["answered"] for line in outcome.directory.read_metrics()])
    assert cohorts[0] == cohorts[1]
    assert all(len(cohort) == 1 for cohort in cohorts[0])
    assert len({cohort[0] for cohort in cohorts[0]}) > 1


def test_an_answer_of_the_wrong_shape_is_declined_by_name(tmp_path, record, sites):
    name, recording = next(iter(sites.items()))
    answer = recording.site.answer

    def poisoned(message):
        reply = answer(message)
        if reply.has_content() and "sum" in reply.content.array_records:
            first = next(iter(reply.content["sum"]))
            reply.content["sum"] = type(reply.content["sum"])({first: reply.content["sum"][first]})
        return reply

    recording.site.answer = poisoned
    outcome = run(tmp_path / "run", record, sites)
    assert {line["declined"].get(name) for line in outcome.directory.read_metrics()} == {"unusable"}


def test_privacy_is_in_the_receipts_and_the_metrics(tmp_path, record, sites):
    private = record.model_copy(
        update={
            "privacy": PrivacyRequest(epsilon=3, delta=1e-3, max_grad_norm=1),
            "training": LocalTraining(epochs=1, batch_size=16, learning_rate=0.2),
        }
    )
    outcome = run(tmp_path / "run", private, sites)
    for name, item in outcome.directory.read_receipts().items():
        assert item.examples == len(sites[name].site.data.train)
        assert 2.8 < item.receipt.epsilon_run <= 3
        assert outcome.directory.read_metrics()[-1]["epsilon"][name] == item.receipt.epsilon_run


def test_a_run_directory_is_begun_once(tmp_path, record):
    RunDirectory.create(tmp_path / "run", record)
    with pytest.raises(UsageError, match="already holds a run"):
        RunDirectory.create(tmp_path / "run", record)
    with pytest.raises(CheckpointError, match="has not finished"):
        RunDirectory.open(tmp_path / "run").read_model()
    with pytest.raises(UsageError, match="not a run directory"):
        RunDirectory.open(tmp_path / "other")


def test_a_damaged_record_names_the_field(tmp_path, record):
    directory = RunDirectory.create(tmp_path / "run", record)
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"rounds": 3', '"rounds": -3'))
    with pytest.raises(CheckpointError, match="rounds"):
        directory.record()


def test_a_strategy_that_must_see_single_updates_goes_with_no_sum_that_hides_them(record, monkeypatch):
    monkeypatch.setattr(FedAvg, "needs_single_updates", True)
    model = torch.nn.Linear(2, 2)
    check_combination(record, FedAvg(), model)
    with pytest.raises(UsageError, match="which secure aggregation hides"):
        check_combination(record.model_copy(update={"secure": SecureRequest()}), FedAvg(), model)
    central = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1)
    with pytest.raises(UsageError, match="noise on the sum is made for a mean"):
        check_combination(record.model_copy(update={"central": central}), FedAvg(), model)


def test_unknown_strategies_and_settings_are_refused_at_start(record):
    with pytest.raises(PluginError, match=r"'fedbest'; did you mean fed\w+\? Installed: .*fedadagrad"):
        make_strategy(record.model_copy(update={"strategy": StrategyRecord(name="fedbest")}))
    with pytest.raises(UsageError, match="mu"):
        make_strategy(record.model_copy(update={"strategy": StrategyRecord(name="fedavg", settings={"mu": 1})}))


def test_round_zero_is_the_initial_model(tmp_path, record, sites):
    for recording in sites.values():
        recording.refusals = 1
    with pytest.raises(RoundError):
        run(tmp_path / "run", record, sites)
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None
    start = initial_parameters(RunDirectory(tmp_path / "run").record())
    assert all(np.array_equal(saved.parameters[name], start[name]) for name in start)


class DyingBeforeItEvaluates(LocalGrid):
    """A server that dies when round 2 has counted and nobody has been asked how good it is."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if messages and messages[0].metadata.message_type == "evaluate" and messages[0].metadata.group_id == "2":
            raise Crash
        return super().send_and_receive(messages, timeout=timeout)


@pytest.mark.parametrize("round_file", ["there", "gone"])
def test_a_crash_before_the_evaluation_leaves_nobody_out_of_the_rounds_line(tmp_path, record, sites, round_file):
    whole = run(tmp_path / "whole", record, sites).directory.read_metrics()
    name = sorted(sites)[0]
    sites[name].refusals = 2 if round_file == "there" else 0
    directory = RunDirectory.create(tmp_path / "run", record.model_copy(update={"run": "run-2"}))
    with pytest.raises(Crash):
        run_rounds(DyingBeforeItEvaluates(sites, 5), directory, initial_parameters(record))
    if round_file == "gone":
        (tmp_path / "run" / PENDING).unlink()
    lines = run(tmp_path / "run", record, sites).directory.read_metrics()
    assert [line["round"] for line in lines] == [1, 2, 3]
    second = lines[1]
    assert sorted(second["answered"]) == sorted(sites)
    assert sorted(second["epsilon"]) == sorted(sites)
    assert second["bytes_up"] == whole[1]["bytes_up"]
    assert second["bytes_down"] == whole[1]["bytes_down"]
    assert second["update_norm"] > 0
    if round_file == "there":
        assert second["metrics"]
        assert second["test_examples"] == whole[1]["test_examples"]


def test_a_run_has_one_server_at_a_time(tmp_path, record, sites):
    """The second is told at once, asks nobody and changes nothing; the lock goes with whoever was killed."""
    directory = RunDirectory.create(tmp_path / "run", record)
    hold = (
        "import sys, time; from pathlib import Path; from fedclaw.server.run_directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(directory.root)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert holder.stdout.readline() == "held\n"
        before = {path.name: path.read_bytes() for path in directory.root.iterdir()}
        with pytest.raises(RunInUse, match=rf"being run by process {holder.pid} on ") as told:
            run(tmp_path / "run", record, sites)
        assert "\n" not in str(told.value)
        assert told.value.exit_code in {1, 2}
        assert not any(recording.asked for recording in sites.values())
        assert {path.name: path.read_bytes() for path in directory.root.iterdir()} == before
        with pytest.raises(RunInUse):
            RunDirectory.create(directory.root, record)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert len(run(tmp_path / "run", record, sites).directory.read_metrics()) == 3


def test_so_it_has_within_one_process(tmp_path, record, sites):
    directory = RunDirectory.create(tmp_path / "run", record)
    with directory.held():
        with directory.held(), pytest.raises(RunInUse, match="in this process"):
            run(tmp_path / "run", record, sites)
        assert run_rounds(LocalGrid(sites, 5), directory, initial_parameters(record)).metrics
    run(tmp_path / "run", record, sites)


def test_a_site_that_declines_is_told_of_once_until_it_answers(tmp_path, record, sites, caplog):
    first, second, _ = sorted(sites)
    sites[first].refusals = 8
    outcome = run(tmp_path / "run", record.model_copy(update={"rounds": 6}), sites)
    # A round asks twice, to train and to evaluate; in the fifth it takes part again.
    assert [first in line["answered"] for line in outcome.directory.read_metrics()] == [False] * 4 + [True] * 2
    sites[first].refusals, sites[second].refusals = 2, 0
    run(tmp_path / "other", record.model_copy(update={"run": "run-2"}), sites)
    said = [item.getMessage() for item in caplog.records if f"{first} declined" in item.getMessage()]
    assert said == [f"round 1: {first} declined (budget): the budget is gone"] * 2, "once in each run"


def test_a_silent_site_is_told_of_once(tmp_path, record, sites, caplog):
    class Silent(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return super().send_and_receive([m for m in messages if m.metadata.dst_node_id != gone], timeout=timeout)

    grid = Silent(sites, 5)
    gone = sorted(grid.get_node_ids())[0]
    directory = RunDirectory.create(tmp_path / "run", record)
    run_rounds(grid, directory, initial_parameters(directory.record()))
    assert sum("no answer from" in item.getMessage() for item in caplog.records) == 1
