"""What the transport's benchmarks share: a real federation on loopback, its sites in processes of their own.

    python -m experiments.benchmarks.loopback PORT UPDATE_BYTES SITE_DIRECTORY...

is such a process; the benchmarks start it. Each of its sites answers a task at once, with an update of
UPDATE_BYTES bytes, or with the arrays that it was sent if that is 0.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.loopback", __doc__)

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedclaw.identity import provisioning
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.site_home import SiteKeys
from fedclaw.protocol.arrays import pack
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.site_connection import SiteConnection

RUN_ID = 1
LIMITS = Limits(backoff_first=0.1, backoff_longest=1.0)
_PATIENCE = 10


def provision(root: Path, sites: int) -> tuple[FederationHome, list[Path]]:
    """A federation directory and the directories of its sites, with real keys and certificates."""
    coordinator = root / "federation"
    home = provisioning.initialise(coordinator, "benchmark", "127.0.0.1:9443")
    directories = [root / f"site-{number:02d}" for number in range(sites)]
    for directory in directories:
        request = provisioning.request_site(directory, coordinator / "federation.json", directory.name)
        provisioning.accept(directory, provisioning.approve(coordinator, request))
    return home, directories


@contextmanager
def process(module: str, arguments: Sequence[str]) -> Iterator[None]:
    """Another Python process with one thread for arithmetic; ended with the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        started.terminate()
        try:
            started.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


class InstantSite:
    """A site whose training takes no time. A reply says when its sealing began (`answered`, monotonic seconds)."""

    def __init__(self, update_bytes: int) -> None:
        self._update = np.ones(update_bytes // 4, dtype=np.float32)

    def answer(self, message: Message) -> Message:
        """An update, or the arrays that came."""
        arrays: ArrayRecord = (
            pack({"w": self._update}) if self._update.size else message.content.array_records["arrays"]
        )
        metrics = MetricRecord({"answered": time.monotonic()})
        return Message(RecordDict({"sum": arrays, "metrics": metrics}), reply_to=message)

    def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
        """Nothing to record."""


def main(arguments: Sequence[str]) -> None:
    """Serve all given sites until the process is ended."""
    port, update_bytes, *directories = arguments
    stop = threading.Event()
    threads = []
    for directory in directories:
        keys = SiteKeys.open(Path(directory))
        handler = InstantSite(int(update_bytes))
        link = SiteConnection(keys, handler, Path(directory) / "state", LIMITS, f"127.0.0.1:{port}")
        threads.append(threading.Thread(target=link.run, args=(stop,), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])
