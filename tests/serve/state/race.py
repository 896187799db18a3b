"""Many processes that do the same thing to one store at the same moment: `python -m tests.serve.state.race`.

Each is forked before it opens a connection, waits until all are there, and opens the store, which none did before; all
begin each action together. What they returned is printed as JSON.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from typing import Any

from fedclaw.serve.state.store import StateStore

NAMES = [f"latency {bucket}" for bucket in range(500)]


def increment(store: StateStore, number: int, times: int) -> int:
    """Raise a number in a document by compare-and-swap. Returns how often another was faster."""
    lost = 0
    for _ in range(times):
        while True:
            found = store.read("number")
            revision, document = (None, {"value": 0}) if found is None else found
            if store.swap("number", revision, {"value": document["value"] + 1}):  # type: ignore[operator]
                break
            lost += 1
    return lost


def add(store: StateStore, number: int, times: int) -> int:
    """Count the same things in the same second; the names in another order in each process."""
    for turn in range(times):
        store.add_counts("m", "v", 100 + turn % 2, dict.fromkeys(NAMES[:: 1 if number % 2 else -1], number))
    return number


def assigned(store: StateStore, model: str, key: str, version: str) -> str:
    """The version that one key has from now on."""
    return store.assign_all(model, {key: version})[key]


def assign(store: StateStore, number: int, times: int) -> list[str]:
    """Ask for the version of the same keys, each process for its own."""
    return [assigned(store, "m", f"key {turn}", f"version {number}") for turn in range(times)]


def credit(store: StateStore, number: int, times: int) -> int:
    """Credit the same receipts. Returns how many this process was the first for."""
    return sum(store.credit(f"receipt {turn}", "m", "v", {"process": number}) for turn in range(times))


def append(store: StateStore, number: int, times: int) -> list[int]:
    """Note events."""
    return [store.append_event("decision", "m", {"process": number}) for _ in range(times)]


_PATIENCE = 100.0
ACTIONS = {"increment": increment, "add": add, "assign": assign, "credit": credit, "append": append}
Results = dict[str, list[Any]]


def race(where: str, processes: int = 8, times: int = 5) -> Results:
    """What each of the processes returned, by action."""
    words = [sys.executable, "-m", "tests.serve.state.race", where, str(processes), str(times)]
    done = subprocess.run(words, capture_output=True, timeout=200, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == processes
    return {name: [result[name] for result in results] for name in ACTIONS}


def _main(where: str, processes: str, times: str) -> int:
    together = multiprocessing.get_context("fork").Barrier(int(processes))
    children = []
    for number in range(1, int(processes) + 1):
        if (child := os.fork()) == 0:
            together.wait(_PATIENCE)
            result = {}
            with StateStore.open(where) as store:
                for name, action in ACTIONS.items():
                    together.wait(_PATIENCE)
                    result[name] = action(store, number, int(times))
            os.write(1, json.dumps(result).encode() + b"\n")
            os._exit(0)
        children.append(child)
    return max(os.waitpid(child, 0)[1] for child in children)


if __name__ == "__main__":
    sys.exit(min(1, _main(*sys.argv[1:])))
