"""kill -9 at every place, and two processes at once: a ledger opens, verifies, never counts too little, and goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedclaw.privacy.accounting import NoiseEvent, epsilon_of
from fedclaw.site.journal.ledger import Ledger
from tests import warm
from tests.conftest import environment

KILLER = Path(__file__).with_name("ledger_killer.py")


@pytest.mark.parametrize(("how", "least"), [("call", 150), pytest.param("instruction", 300, marks=pytest.mark.slow)])
def test_kill_nine_at_every_place_loses_nothing(tmp_path: Path, how: str, least: int) -> None:
    """Places from before the file exists to after the last charge; each is a process of its own."""
    done = warm.run([KILLER, tmp_path, how], env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    places, _, said = done.stdout.partition(" ")
    assert int(places) > least
    assert json.loads(said) == [0, 1, 2, 3], "some were killed before anything was said, some after each step"


RUN = """
import sys
from fedclaw.errors import BudgetExceeded
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.site.journal.ledger import Budget, Ledger
path, run, epsilon = sys.argv[1:]
ledger = Ledger.open(path, "data")
print("ready", flush=True)
number = 0
try:
    while True:
        if number <= 3:
            sys.stdin.readline()
        key = f"{run}-{number}"
        ledger.reserve(key, federation="f", run=run, round=number, mechanism=NoiseEvent(0.1, 2.0, 10),
                       budget=Budget(float(epsilon), 1e-5))
        print(key, flush=True)
        ledger.settle(key)
        number += 1
except BudgetExceeded:
    print("spent", flush=True)
"""
ROUNDS = 30


def cost(rounds: int) -> float:
    return epsilon_of([NoiseEvent(0.1, 2.0, 10 * rounds)], 1e-5)


def begin(path: Path, run: str) -> "subprocess.Popen[str]":
    limit = (cost(ROUNDS) + cost(ROUNDS + 1)) / 2
    command = [sys.executable, "-c", RUN, str(path), run, str(limit)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())


def tell(child: "subprocess.Popen[str]") -> str:
    """Let a run make one more round; what it says."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


def test_two_runs_at_once_share_the_budget_though_one_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(path, "data"):
        children = [begin(path, run) for run in ("left", "right")]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        said = [tell(child) for _ in range(3) for child in children]
        left = children[0]
        for child in children:
            assert child.stdin is not None
            child.stdin.close()
        # From here on both run freely.
        left.kill()
        for child in children:
            assert child.stdout is not None
            said += child.stdout.read().split()
            child.wait()
    with Ledger.open(path, "data") as ledger:
        charged = {entry.body["key"] for entry in ledger.entries() if entry.body["kind"] == "reserve"}
        assert set(said) - {"spent"} <= charged
        assert len(charged) == ROUNDS, "the run that was left used the budget up, and nobody more"
        assert {key.partition("-")[0] for key in charged} == {"left", "right"}
        assert ledger.spent(1e-5) == pytest.approx(cost(ROUNDS))
