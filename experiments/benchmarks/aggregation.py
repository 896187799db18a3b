"""How fast and in how little memory large updates become a sum.

    python -m experiments.benchmarks.aggregation [SITES] [UPDATE_MB] [ROUNDS]

SITES real sites (certificates, streams, seals and outboxes of their own), four to a process, answer one round with
UPDATE_MB each; the server adds each update to the round's sum as it comes. `peak_ratio` is the server's peak resident
memory over what it held before the round (imports and the model itself), divided by one update; the task's body,
the sum and all buffers count. Then one of the sites answers alone, ROUNDS times: `mb_per_s` is the median of update
size by the time from the begin of its sealing at the site until it is in the sum. In that time the site seals, hashes,
stores and sends the update; the server receives, opens, decodes, checks and adds it. The reference is a bare mutually
authenticated stream between two processes, measured in the same run. MB are 10^6 bytes. A 400 MB model: `1 400 3`.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.aggregation", __doc__)

import resource
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict

from experiments.benchmarks.bare import CHUNK, FLOOD_CHUNKS, bare_stream
from experiments.benchmarks.loopback import LIMITS, RUN_ID, process, provision
from experiments.benchmarks.report import report
from fedclaw.errors import TransportError
from fedclaw.identity.federation_home import FederationHome
from fedclaw.protocol.arrays import Arrays, pack, unpack
from fedclaw.server.training import WeightedSum
from fedclaw.transport.grpc.grid import GrpcGrid

SITES = 16
UPDATE_MB = 40
ROUNDS = 9
SITES_PER_PROCESS = 4
MB = 1_000_000
FLOODS = 9


def reference_mb_per_s(home: FederationHome, site: Path) -> float:
    """Median of a few floods over the bare stream."""
    with bare_stream(home, site) as stream:
        seconds = [stream.flood() for _ in range(FLOODS)]
    return CHUNK * FLOOD_CHUNKS / MB / statistics.median(seconds)


def one_round(grid: GrpcGrid, nodes: list[int], model: Arrays, number: int) -> list[float]:
    """Ask `nodes` and sum their updates; returns seconds from sealing to sum for each update."""
    total = WeightedSum(model)
    content = RecordDict({"arrays": pack(model)})
    messages = [Message(content, node, "train", group_id=str(number)) for node in nodes]
    seconds = []
    for reply in grid.send_and_receive(messages, timeout=300):
        if reply.has_error():
            raise TransportError(f"a site answered with an error: {reply.error.reason}")
        total.add(unpack(reply.content.array_records["sum"]), 1.0)
        seconds.append(time.monotonic() - float(reply.content.metric_records["metrics"]["answered"]))  # type: ignore[arg-type]
    if total.count != len(nodes):
        raise TransportError(f"{total.count} of {len(nodes)} sites answered")
    return seconds


def measure(home: FederationHome, sites: list[Path], update_bytes: int, rounds: int) -> tuple[float, float, float]:
    """Peak memory over the baseline in bytes, seconds of the full round, median seconds of one update alone."""
    model = {"w": np.ones(update_bytes // 4, dtype=np.float32)}
    groups = [sites[first : first + SITES_PER_PROCESS] for first in range(0, len(sites), SITES_PER_PROCESS)]
    with ExitStack() as stack:
        grid = stack.enter_context(GrpcGrid(home, address="127.0.0.1:0", run_id=RUN_ID, limits=LIMITS))
        for group in groups:
            arguments = [str(grid.port), str(update_bytes), *map(str, group)]
            stack.enter_context(process("experiments.benchmarks.loopback", arguments))
        if len(grid.wait_for_sites(len(sites), 120)) < len(sites):
            raise TransportError("not all sites connected")
        nodes = list(grid.get_node_ids())
        before = _resident_bytes()
        began = time.monotonic()
        one_round(grid, nodes, model, 0)
        round_seconds = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        alone = [one_round(grid, nodes[:1], model, number)[0] for number in range(1, rounds + 1)]
    return peak, round_seconds, statistics.median(alone)


def main(sites: int = SITES, update_mb: int = UPDATE_MB, rounds: int = ROUNDS) -> None:
    """Measure and report."""
    update_bytes = update_mb * MB
    with tempfile.TemporaryDirectory() as directory:
        home, directories = provision(Path(directory), sites)
        peak, round_seconds, alone = measure(home, directories, update_bytes, rounds)
        reference = reference_mb_per_s(home, directories[0])
    ratio, speed = peak / update_bytes, update_mb / alone
    rows = [
        (f"one update of {update_mb} MB, sealing to sum", f"{speed:.0f} MB/s", "target: at least 400 MB/s"),
        ("bare stream", f"{reference:.0f} MB/s", f"{reference / speed:.1f} times faster"),
        (
            f"{sites} sites at once, task out to last sum",
            f"{round_seconds:.2f} s",
            f"{sites * update_mb} MB of updates",
        ),
        ("server's peak memory over its baseline", f"{ratio:.2f} updates", "target: under 6"),
    ]
    figures = {
        "sites": sites,
        "update_mb": update_mb,
        "peak_ratio": round(ratio, 2),
        "mb_per_s": round(speed, 1),
        "reference_mb_per_s": round(reference, 1),
        "ratio": round(reference / speed, 2),
        "round_seconds": round(round_seconds, 3),
        "site_processes": -(-sites // SITES_PER_PROCESS),
    }
    report("Large updates over mutual TLS and seal into a sum", rows, figures)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
