"""What it costs to wait for a slow site: FedAvg against FedBuff, by a clock that only training moves.

    python -m experiments.benchmarks.asynchronous [SLOWER]

Four sites with the digits of scikit-learn, one of which takes SLOWER (10) times as long to answer as the others, which
take one unit of time. Server and sites are the real ones, in one process; the clock is made, so that the figure is the
same on every machine: training takes a site its units, everything else takes none. Shown is the time at which the model
first reached each accuracy on all sites' test data, and the share of the answers in it that were the slow site's.
FedAvg, in the same run, is the reference.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.asynchronous", __doc__)

import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message, MessageType

from experiments.benchmarks.report import report
from experiments.datasets import SitePolicy, write_sites
from experiments.sources import DatasetSettings
from fedclaw.learning.workload import Table, Workload
from fedclaw.protocol.message_identity import assume_server_identity, number_of
from fedclaw.protocol.terms import LocalTraining, RoundRules, StrategyRecord
from fedclaw.server import checkpoint
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.round_report import RoundReport
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.session import initial_parameters
from fedclaw.transport.base import SiteHandler
from fedclaw.transport.in_process import LocalGrid, open_sites

FEDERATION = "benchmark"
SITES = 4
SLOWER = 10
ROUNDS = {"fedavg": 30, "fedbuff": 100}
"""A round of FedAvg takes as long as ten steps of FedBuff with two sites at a time."""
GOALS = (0.8, 0.9, 0.93)


class ClockedGrid(LocalGrid):
    """Sites that take `durations` (units of time, by name) to train; a reply is there when the clock has come to it."""

    def __init__(self, sites: Mapping[str, SiteHandler], run_id: int, durations: Mapping[str, float]) -> None:
        super().__init__(sites, run_id)
        self.now = 0.0
        self._durations = {number_of(name): duration for name, duration in durations.items()}
        self._done: dict[str, float] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Begin work on `messages`."""
        asked = list(messages)
        identities = list(super().push_messages(asked))
        for identity, message in zip(identities, asked, strict=True):
            about = message.metadata
            trains = about.message_type == MessageType.TRAIN
            self._done[identity] = self.now + (self._durations[about.dst_node_id] if trains else 0.0)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there; when there is none, the clock moves to the next of all that are at work."""
        wanted = [identity for identity in message_ids if identity in self._done]
        if self._done and not any(self._done[identity] <= self.now for identity in wanted):
            self.now = max(self.now, min(self._done.values()))
        ready = [identity for identity in wanted if self._done[identity] <= self.now]
        for identity in ready:
            del self._done[identity]
        return super().pull_messages(ready)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """All replies, when the last of them is there."""
        identities = list(self.push_messages(messages))
        self.now = max([self.now, *(self._done.pop(identity) for identity in identities)])
        return iter(list(super().pull_messages(identities)))


@dataclass
class Watch:
    """Observer: when each accuracy was first reached, and whose answers were in the model."""

    grid: ClockedGrid
    slow: str
    run: Path
    workload: Workload
    tests: Sequence[Table]
    reached: dict[float, float] = field(default_factory=dict)
    answers: int = 0
    slow_answers: int = 0

    def started(self, record: RunRecord, first_round: int) -> None:
        """Nothing."""

    def finished(self, outcome: object) -> None:
        """Nothing."""

    def finished_round(self, report: RoundReport) -> None:
        """Look at the clock."""
        self.answers += len(report.answered)
        self.slow_answers += self.slow in report.answered
        accuracy = self._accuracy()
        for goal in GOALS:
            if accuracy >= goal:
                self.reached.setdefault(goal, self.grid.now)

    def _accuracy(self) -> float:
        """Of the newest checkpoint on all sites' test data: the round's own metrics lack the sites at work."""
        newest = checkpoint.newest(self.run)
        assert newest is not None
        model = self.workload.build(self.workload.default_model()).eval()
        model.load_state_dict({name: torch.from_numpy(array) for name, array in newest.parameters.items()})
        inputs = torch.from_numpy(np.concatenate([test.inputs for test in self.tests]))
        targets = torch.from_numpy(np.concatenate([test.targets for test in self.tests]))
        with torch.no_grad():
            return self.workload.evaluate(model(inputs), targets)["accuracy"]


def run(root: Path, directories: Iterable[Path], strategy: str, slower: float) -> Watch:
    """One run of `strategy` over freshly opened sites."""
    sites = open_sites(directories, FEDERATION)
    slow = sorted(sites)[0]
    assume_server_identity(run_id := number_of(strategy))
    grid = ClockedGrid(sites, run_id, {name: slower if name == slow else 1.0 for name in sites})
    workload = next(iter(sites.values())).workload
    record = RunRecord(
        run=strategy,
        federation=FEDERATION,
        workload=workload.name,
        schema_text=workload.schema.to_json(),
        model=workload.default_model(),
        strategy=StrategyRecord(name=strategy),
        rounds=ROUNDS[strategy],
        training=LocalTraining(epochs=1, batch_size=16, learning_rate=0.02),
        privacy=None,
        rules=RoundRules(minimum=2),
    )
    tests = [site.data.test for site in sites.values() if site.data.test is not None]
    directory = RunDirectory.create(root / strategy, record)
    watch = Watch(grid, slow, directory.root, workload, tests)
    run_rounds(grid, directory, initial_parameters(record), observers=[watch])
    return watch


def main() -> None:
    """Run both and report."""
    slower = float(sys.argv[1]) if len(sys.argv) > 1 else SLOWER
    policy = SitePolicy(epsilon=None, delta=1e-5, allow_training_without_privacy=True, strategies=tuple(ROUNDS))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        directories = write_sites(root / "data", DatasetSettings(name="digits", sites=SITES), policy)
        watches = {strategy: run(root, directories, strategy, slower) for strategy in ROUNDS}
    rows = []
    ratio = {}
    for goal in GOALS:
        times = {strategy: watch.reached.get(goal) for strategy, watch in watches.items()}
        words = {strategy: "not reached" if time is None else f"{time:g}" for strategy, time in times.items()}
        rows.append((f"accuracy {goal}: units of time", words["fedbuff"], f"FedAvg: {words['fedavg']}"))
        if times["fedavg"] and times["fedbuff"]:
            ratio[str(goal)] = round(times["fedbuff"] / times["fedavg"], 3)
    share = {strategy: round(watch.slow_answers / watch.answers, 3) for strategy, watch in watches.items()}
    rows.append(("the slow site's share of the answers", f"{share['fedbuff']:.2f}", f"FedAvg: {share['fedavg']:.2f}"))
    title = f"FedBuff, with one of {SITES} sites {slower:g} times slower"
    report(title, rows, {"ratio": ratio, "slow_share": share, "slower": slower, "sites": SITES})


if __name__ == "__main__":
    main()
