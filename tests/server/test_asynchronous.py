"""Buffered rounds over mutually authenticated gRPC, with a site that is ten times slower than the others."""

import threading

import pytest

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.identity.provisioning import accept, approve, initialise, request_site
from fedclaw.identity.site_home import SiteKeys
from fedclaw.protocol.message_identity import assume_server_identity, number_of
from fedclaw.protocol.terms import LocalTraining, RoundRules, StrategyRecord
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.transport.grpc.grid import GrpcGrid
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.site_connection import SiteConnection
from fedclaw.transport.in_process import open_sites
from tests.samples import run_record

STEPS = 25
SLOWER = 10


class Pace:
    """The slow site's answer to a question comes after the fast ones have trained ten times."""

    def __init__(self):
        self.trained = threading.Condition()
        self.count = 0

    def step(self, steps=1):
        with self.trained:
            self.count += steps
            self.trained.notify_all()

    def wait(self):
        with self.trained:
            goal = self.count + SLOWER
            self.trained.wait_for(lambda: self.count >= goal, timeout=60)


class Paced:
    """A real site that works at one pace or the other."""

    def __init__(self, site, pace, *, slow):
        self.site, self.pace, self.slow = site, pace, slow

    def answer(self, message):
        if message.metadata.message_type == "train" and self.slow:
            self.pace.wait()
        if message.metadata.message_type == "evaluate" and message.metadata.group_id == str(STEPS):
            # Nobody trains any more: the slow site comes to its end.
            self.pace.step(SLOWER)
        reply = self.site.answer(message)
        if message.metadata.message_type == "train" and not self.slow:
            self.pace.step()
        return reply

    def release(self, message, reply, size, digest):
        self.site.release(message, reply, size, digest)


@pytest.fixture
def federation(tmp_path):
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True, strategies=("fedbuff",))
    directories = write_sites(tmp_path / "data", DatasetSettings(name="breast_cancer", sites=3), policy)
    sites = open_sites(directories, "clinic")
    home = initialise(tmp_path / "federation", "clinic", "127.0.0.1:9443")
    pace, stop, threads = Pace(), threading.Event(), []
    assume_server_identity(run_id := number_of("run-1"))
    slow = sorted(sites)[0]
    with GrpcGrid(home, address="127.0.0.1:0", run_id=run_id, limits=Limits()) as grid:
        for name, site in sites.items():
            root = tmp_path / name
            accept(root, approve(home.root, request_site(root, home.root / "federation.json", name)))
            paced = Paced(site, pace, slow=name == slow)
            link = SiteConnection(
                SiteKeys.open(root), paced, root / "state", Limits(), address=f"127.0.0.1:{grid.port}"
            )
            threads.append(threading.Thread(target=link.run, args=(stop,)))
            threads[-1].start()
        grid.wait_for_sites(3, 30)
        yield grid, sites, slow
        pace.step(SLOWER)
        stop.set()
        for thread in threads:
            thread.join(timeout=20)
            assert not thread.is_alive()


def test_a_slow_site_takes_part_without_holding_the_others_up(tmp_path, federation):
    grid, sites, slow = federation
    record = run_record(
        schema_text=next(iter(sites.values())).workload.schema.to_json(),
        strategy=StrategyRecord(name="fedbuff", settings={"buffer": 2}),
        rounds=STEPS,
        training=LocalTraining(epochs=1, batch_size=32, learning_rate=0.1),
        privacy=None,
        rules=RoundRules(minimum=2, deadline=60),
    )
    outcome = run_rounds(grid, RunDirectory.create(tmp_path / "run", record), initial_parameters(record))
    lines = outcome.directory.read_metrics()
    with_slow = [line["round"] for line in lines if slow in line["answered"]]
    assert len(lines) == STEPS
    assert all(len(line["answered"]) == 2 for line in lines)
    # Ten times slower than two sites that make a step together: in every fifth or sixth step.
    assert 2 <= len(with_slow) <= STEPS // 4
    assert with_slow[0] >= SLOWER // 2
    assert outcome.metrics["accuracy"] > 0.85
