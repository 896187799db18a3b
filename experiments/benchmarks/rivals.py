"""Other libraries' simulations of the job "digits-100", where they are installed: Flower on Ray, and Apple's pfl.

Each runs in a process of its own, so that what a library does to its process (Ray's threads, pfl's way of starting
processes, both their loggers) stays there: FedClaw's workers are forked. The process imports, runs one round to warm
up, then takes the time of a whole run.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.rivals", __doc__)

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from experiments.benchmarks.digits import Job
from fedclaw.errors import FedClawError

NEEDS = {"flower": ("flwr", "ray"), "pfl": ("pfl", "multiprocess", "prv_accountant", "dill")}
"""By rival, the packages that its run imports."""

HINTS = {
    "flower": "pip install 'fedclaw[ray]'",
    "pfl": "pip install --no-deps pfl multiprocess prv-accountant dill",
}
"""How to have it."""


class RivalError(FedClawError):
    """A rival's process has failed."""


def installed(rival: str) -> bool:
    """Whether a rival can run here."""
    return all(find_spec(package) is not None for package in NEEDS[rival])


def run_flower(job: Job, rounds: int, seed: int = 0) -> float:
    """The last accuracy of the job on Flower's engine: `experiments.benchmarks.rival_flower`."""
    from experiments.benchmarks import rival_flower

    return rival_flower.run_flower(job, rounds, seed)


def run_pfl(job: Job, rounds: int, seed: int = 0) -> float:
    """The last accuracy of the job with pfl: `experiments.benchmarks.rival_pfl`."""
    from experiments.benchmarks import rival_pfl

    return rival_pfl.run_pfl(job, rounds, seed)


RUNS = {"flower": run_flower, "pfl": run_pfl}


def timed(rival: str, kind: str, rounds: int, seed: int) -> tuple[float, float]:
    """Seconds and last accuracy of one run of a rival, in a process of its own. Raises RivalError if that fails."""
    arguments = [sys.executable, "-m", "experiments.benchmarks.rivals", rival, kind, str(rounds), str(seed)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RivalError(f"{lines[-1]}; leave the rivals out with rivals=0")
    figures = json.loads(done.stdout.splitlines()[-1])
    return figures["seconds"], figures["accuracy"]


def main(arguments: Sequence[str]) -> None:
    """The process: RIVAL KIND ROUNDS SEED; prints one line of JSON."""
    torch.set_num_threads(1)
    rival, kind, rounds, seed = arguments
    job = Job.make(kind)
    RUNS[rival](job, 1, 0)
    began = time.perf_counter()
    accuracy = RUNS[rival](job, int(rounds), int(seed))
    print(json.dumps({"seconds": time.perf_counter() - began, "accuracy": accuracy}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
