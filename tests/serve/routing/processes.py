"""Control processes and workers of one state store: `python -m tests.serve.routing.processes ROLE PLACE …`.

control PLACE N SECONDS   N processes that decide at the same time; prints how many plans each changed
workers PLACE N SECONDS VERSION   N workers with traffic to model `m`; VERSION fails always; prints what each saw
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable

from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.routing.controller import Controller
from fedclaw.serve.routing.router import Router
from fedclaw.serve.state.store import StateStore


def control(store: StateStore, number: int, seconds: float) -> int:
    """Decide as fast as it goes."""
    controller, end, changed = Controller(store), time.time() + seconds, 0
    while time.time() < end:
        changed += controller.step(time.time())
    return changed


def work(store: StateStore, number: int, seconds: float, bad: str) -> dict[str, int]:
    """Route two hundred requests a second."""
    router, seen, end = Router(store), Counter[str](), time.time() + seconds
    router.start()
    while time.time() < end:
        key = f"key-{number}-{seen.total()}"
        client = f"client-{seen.total() % 7}"
        try:
            choice = router.choose("m", key, principal=client)
        except ServeRefusal:
            seen["nobody"] += 1
        else:
            assert choice is not None
            code = "internal" if choice.version == bad else None
            router.record(choice, model="m", key=key, principal=client, seconds=0.004, code=code)
            seen[choice.version] += 1
        time.sleep(0.005)
    router.close()
    return dict(seen)


def _forked(processes: int, work: Callable[[int], object]) -> int:
    children = []
    for number in range(processes):
        if (child := os.fork()) == 0:
            os.write(1, json.dumps(work(number)).encode() + b"\n")
            os._exit(0)
        children.append(child)
    return max(os.waitpid(child, 0)[1] for child in children)


def _main(role: str, place: str, processes: str, seconds: str, *more: str) -> int:
    def begin(number: int) -> object:
        with StateStore.open(place) as store:
            done = control if role == "control" else work
            return done(store, number, float(seconds), *more)  # type: ignore[operator]

    return _forked(int(processes), begin)


if __name__ == "__main__":
    sys.exit(min(1, _main(*sys.argv[1:])))
