"""A simulated run as a whole: refusals, lost processes, going on, and thousands of clients."""

import os
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from flwr.app import MessageType

from fedclaw.errors import RoundError, TransportError, UsageError
from fedclaw.learning.workload import Table
from fedclaw.protocol.terms import LocalTraining, PrivacyRequest, RoundRules, SecureRequest, StrategyRecord
from fedclaw.server import checkpoint
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation import SimulatedFederation, SimulationSettings, simulate_cohorts, simulated
from fedclaw.simulation.run import SimulationGrid
from tests.crashes import Crash
from tests.simulation.conftest import deal, make_federation, make_record
from tests.simulation.test_modes import identical


class Watcher:
    """An observer that does something after a round."""

    def __init__(self, after, action):
        self.after, self.action, self.reports = after, action, []

    def started(self, record, first_round):
        self.first = first_round

    def finished_round(self, report):
        self.reports.append(report)
        if report.round == self.after:
            self.action()

    def finished(self, outcome):
        pass


def test_secure_aggregation_is_refused():
    federation = make_federation("mlp")
    with pytest.raises(UsageError, match="runtime=sites"):
        simulated(make_record(federation, "mlp", secure=SecureRequest()), SimulationSettings(), len(federation))


def test_a_session_is_never_answered_without_one(tmp_path: Path) -> None:
    federation = make_federation("mlp")
    record = simulated(make_record(federation, "mlp"), SimulationSettings(), len(federation))
    masked = record.model_copy(update={"secure": SecureRequest(largest_weight=1000, corrupt=0.0)})
    with pytest.raises(TransportError, match="answer no messages"):
        simulate_cohorts(RunDirectory.create(tmp_path / "run", masked), federation)
    assert not RunDirectory(tmp_path / "run").read_metrics()


def test_a_run_with_sites_is_not_taken_up(tmp_path):
    federation = make_federation("mlp")
    directory = RunDirectory.create(tmp_path / "run", make_record(federation, "mlp"))
    with pytest.raises(UsageError, match="not a simulation"):
        simulate_cohorts(directory, federation)


def test_other_clients_are_not_taken(tmp_path):
    federation = make_federation("mlp")
    record = simulated(make_record(federation, "mlp"), SimulationSettings(), len(federation) + 1)
    with pytest.raises(UsageError, match="11 clients"):
        simulate_cohorts(RunDirectory.create(tmp_path / "run", record), federation)


@pytest.mark.parametrize("shares", [[], [np.arange(0)], [np.arange(0, 99)]])
def test_wrong_shares_are_refused(shares):
    federation = make_federation("mlp")
    small = Table(federation.table.inputs[:10], federation.table.targets[:10])
    with pytest.raises(UsageError):
        SimulatedFederation(federation.workload, small, shares)


def workers_of(process):
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_killed_worker_is_one_clear_error(run):
    before = set(workers_of(os.getpid()))

    def kill():
        victim = next(child for child in workers_of(os.getpid()) if child not in before)
        os.kill(victim, signal.SIGKILL)

    with pytest.raises(RoundError, match=r"worker process . of 2 of the simulation was killed by signal 9"):
        run("mlp", SimulationSettings(workers=2), [Watcher(2, kill)], rounds=50)
    deadline = time.monotonic() + 20
    while set(workers_of(os.getpid())) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(workers_of(os.getpid())) - before


@pytest.mark.parametrize("strategy", ["fedadam", "scaffold"])
def test_a_stopped_run_goes_on_to_the_same_end(run, tmp_path, strategy):
    """Rounds after the last checkpoint are computed again; so are those of clients that had a memory."""
    changes = {"rounds": 6, "strategy": StrategyRecord(name=strategy), "rules": RoundRules(minimum=1, fraction=0.5)}
    whole = run("mlp", **changes)
    federation = make_federation("mlp")
    record = simulated(make_record(federation, "mlp", **changes), SimulationSettings(save_every=0), len(federation))
    directory = RunDirectory.create(tmp_path / "stopped", record)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_cohorts(directory, federation, observers=[Watcher(3, stop)])
    again = RunDirectory.open(directory.root)
    watcher = Watcher(0, stop)
    outcome = simulate_cohorts(again, federation, observers=[watcher])
    assert identical(whole, outcome)
    assert watcher.first == (1 if strategy == "scaffold" else 4)
    assert [line["round"] for line in again.read_metrics()] == [1, 2, 3, 4, 5, 6]
    assert outcome.receipts.keys() == whole.receipts.keys()
    for name, item in whole.receipts.items():
        assert outcome.receipts[name].receipt == item.receipt


@pytest.mark.parametrize("save_every", [0, 3600])
def test_no_account_is_less_after_a_crash_before_an_evaluation(run, tmp_path, monkeypatch, save_every):
    """The accounts are made of who took part in each round before: also in the one that was not evaluated any more.

    Rounds after the checkpoint, which are computed again, count once.
    """
    changes = {
        "rounds": 5,
        "rules": RoundRules(minimum=1, fraction=0.5),
        "privacy": PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1),
        "training": LocalTraining(epochs=1, batch_size=8, learning_rate=0.1),
    }
    federation = make_federation("mlp", sizes=(16,) * 6)
    settings = SimulationSettings(save_every=save_every)
    whole = run("mlp", settings, federation=federation, **changes)
    record = simulated(make_record(federation, "mlp", **changes), settings, len(federation))
    directory = RunDirectory.create(tmp_path / "stopped", record)
    answer = SimulationGrid.answer_cohort

    def dying(self, nodes, question):
        if question.kind == MessageType.EVALUATE and question.asked.round == 3:
            raise Crash
        answer(self, nodes, question)

    with monkeypatch.context() as patch:
        patch.setattr(SimulationGrid, "answer_cohort", dying)
        with pytest.raises(Crash):
            simulate_cohorts(directory, federation, settings)
    outcome = simulate_cohorts(RunDirectory.open(directory.root), federation, settings)
    lines = outcome.directory.read_metrics()
    assert [sorted(line["answered"]) for line in lines] == [
        sorted(line["answered"]) for line in whole.directory.read_metrics()
    ]
    assert {name: item.receipt for name, item in outcome.receipts.items()} == {
        name: item.receipt for name, item in whole.receipts.items()
    }


def test_checkpoints_are_by_time_and_at_the_end(run):
    outcome = run("mlp", SimulationSettings(save_every=3600), rounds=5)
    saved = sorted(path.name for path in outcome.directory.root.glob("checkpoint-*"))
    assert saved == ["checkpoint-0000.ckpt", "checkpoint-0005.ckpt"]
    assert checkpoint.newest(outcome.directory.root).round == 5
    assert len(outcome.directory.read_metrics()) == 5


def test_observers_are_told_of_epsilon_at_the_end(run):
    watcher = Watcher(0, None)
    privacy = PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1)
    training = LocalTraining(epochs=1, batch_size=8, learning_rate=0.1)
    federation = make_federation("mlp", sizes=(16, 16, 16))
    run("mlp", observers=[watcher], federation=federation, privacy=privacy, training=training)
    assert [len(report.receipts) for report in watcher.reports] == [0, 0, 3]
    assert all(0 < item.receipt.epsilon_run <= 4 for item in watcher.reports[-1].receipts.values())


def test_clients_with_test_data_of_their_own(run):
    federation = make_federation("mlp", test=None, tests=deal((31, 4, 17, 9, 8, 22, 5, 13, 16, 7)))
    watcher = Watcher(0, None)
    outcome = run("mlp", federation=federation, observers=[watcher], rules=RoundRules(minimum=1, fraction=0.5))
    assert 0.3 < outcome.metrics["accuracy"] <= 1
    numbers = [int(name.removeprefix("client-")) for name in watcher.reports[-1].answered]
    assert watcher.reports[-1].test_examples == sum(federation.examples(number) for number in numbers)


def test_ten_thousand_clients_are_no_copies():
    """Index arrays into one table: a few bytes an example and a client, however they are looked at."""
    rows = 100_000
    table = Table(np.zeros((rows, 64), np.float32), np.zeros(rows, np.int64))
    federation = make_federation("mlp")
    shares = np.array_split(np.random.default_rng(0).permutation(rows), 10_000)
    tracemalloc.start()
    many = SimulatedFederation(federation.workload, table, shares)
    looked_at = sum(len(many.share(client)) for client in range(len(many)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert looked_at == rows
    assert peak < 0.25 * table.inputs.nbytes
    assert many.share(17).base is not None
