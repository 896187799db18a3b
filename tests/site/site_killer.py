"""Kill a site at every durable step between a question's charge and its answer, and look at what it left.

Started by test_reservations.py as a process of its own: it forks for each place, so that the libraries are loaded once.

    python site_killer.py DIRECTORY

The site goes through a round as its client does (`fedclaw.transport.grpc.worker`): charge, training, the state staged,
the answer sealed and stored, the charge settled, the state committed, a line in the outbound log. It dies before each
commit of the ledger, each flush and each rename, and so after the one before. Then the same question is asked again.
"""

import math
import os
import queue
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fedclaw.identity import seal
from fedclaw.learning.registry import strategy_class
from fedclaw.protocol.message_identity import envelope_of
from fedclaw.protocol.terms import LocalTraining
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.outbox import Outbox, StoredReply
from fedclaw.transport.grpc.worker import Worker
from tests.site.conftest import Asker
from tests.states import newest

KEYS = seal.generate("x25519")
SCHEMA = "columns: [{name: a, kind: numeric}, {name: b, kind: numeric}]\ntarget: {name: y, labels: [n, p]}\n"
SITE = """
name: hospital-north
workload: tabular
schema_file: schema.yaml
data: {train: train.csv}
device: cpu
policy:
  {workloads: [tabular], strategies: [feddyn], epsilon: null, allow_training_without_privacy: true, minimum_cohort: 1}
"""


def make_site(root: Path) -> Path:
    root.mkdir()
    values = np.random.default_rng(3).normal(size=(40, 2)).round(3)
    rows = [f"{a},{b},{'p' if a > b else 'n'}" for a, b in values]
    (root / "train.csv").write_text("\n".join(["a,b,y", *rows]) + "\n")
    (root / "schema.yaml").write_text(SCHEMA)
    (root / "site.yaml").write_text(SITE)
    return root


def ask(root: Path, round: int, ready: Callable[[], None] = lambda: None) -> Asker:
    """The site, after it has gone through `round` or died on the way; `ready` is called when it is open."""
    asker = Asker(root)
    full = LocalTraining(steps=2, batch_size=10_000, learning_rate=0.5)
    strategy = {"strategy": "feddyn", "strategy_fields": {"alpha": 0.1}}
    message = asker.message(identity=f"round-{round}", round=round, privacy=None, training=full, **strategy)
    announced: queue.Queue[StoredReply] = queue.Queue()
    sealer = seal.Sealer("x25519", KEYS.public)
    outbox = Outbox(root / "state" / "outbox", Limits())
    worker = Worker(asker.site, outbox, sealer, "clinic", "hospital-north", Limits(), announced.put)
    ready()
    worker.start()
    if not worker.holds(envelope_of(message), math.inf):
        worker.submit(message, math.inf)
    assert not announced.get(timeout=60).is_refusal
    worker.stop()
    return asker


def memory_of(asker: Asker) -> np.ndarray:
    """What the strategy keeps: the sum of all that the site sent."""
    return np.concatenate([array.ravel() for array in newest(asker.site.states, "clinic", "run-1")["moved"].values()])


def look(root: Path, expected: np.ndarray) -> None:
    """Ask again: one charge, one answer, and the state that it left, from where the round began."""
    asker = ask(root, 2)
    bodies = [entry.body for entry in asker.site.ledger.entries()]
    rounds = [body["round"] for body in bodies if body["kind"] == "reserve"]
    settled = [body["reserve"] for body in bodies if body["kind"] == "settle"]
    assert rounds == [1, 2], f"charged {rounds}"
    assert len(settled) == len(set(settled)) == 2, f"settled {settled}"
    left = {line.digest for line in asker.site.outbound.entries() if line.message_id == "round-2"}
    assert len(left) == 1, f"{len(left)} answers left"
    assert np.allclose(memory_of(asker), expected, rtol=1e-4, atol=1e-6), "another state than one round leaves"
    assert not list(asker.site.states.root.glob("*.staged"))


def in_child(work: Callable[[], None]) -> int:
    """Do `work` in a child; its exit code, or minus the signal that it died of."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(place: int) -> Callable[[], None]:
    """Die before the `place`-th durable step of this process, once what is returned was called."""
    count = -1_000_000

    def ready() -> None:
        nonlocal count
        count = 0

    def moment() -> None:
        nonlocal count
        count += 1
        if count == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(step: Callable) -> Callable:
        def call(*arguments, **options):
            moment()
            return step(*arguments, **options)

        return call

    class Connection(sqlite3.Connection):
        def execute(self, statement, *arguments):
            if statement == "COMMIT":
                return watched(super().execute)(statement, *arguments)
            return super().execute(statement, *arguments)

    connect = sqlite3.connect
    sqlite3.connect = lambda *arguments, **options: connect(*arguments, **options, factory=Connection)
    os.fsync, os.fdatasync, os.replace = watched(os.fsync), watched(os.fdatasync), watched(os.replace)
    return ready


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    # Loads in this process what the children need.
    strategy_class("feddyn")
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    Asker(make_site(directory / "warm"))
    base = make_site(directory / "base")
    assert in_child(lambda: ask(base, 1) and None) == 0
    whole = shutil.copytree(base, directory / "whole")
    assert in_child(lambda: np.save(directory / "expected.npy", memory_of(ask(whole, 2)))) == 0
    expected = np.load(directory / "expected.npy")
    place, stored = 0, 0
    while True:
        place += 1
        root = shutil.copytree(base, directory / str(place))
        answers = len(list((root / "state" / "outbox").glob("*.sealed")))

        def work(place: int = place, root: Path = root) -> None:
            ask(root, 2, die_at(place))

        code = in_child(work)
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"the site ended with {code} at place {place}")
        stored += len(list((root / "state" / "outbox").glob("*.sealed"))) > answers
        if in_child(lambda root=root: look(root, expected)):
            raise SystemExit(f"killed at place {place}: see above")
        if code == 0:
            break
    sys.stdout.write(f"{place} {stored}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
