"""How long one exchange takes: a task out, an empty training, the sealed reply back, over mutual TLS on loopback.

    python -m experiments.benchmarks.exchange [EXCHANGES]

Server here, site in a process of its own; a model of 6,000 float32 parameters (24 kB) in six arrays goes out and comes
back. Everything that a real exchange does is in the figure: encoding, the offer and its acceptance, sealing (an HPKE
session serves a minute's messages, 64 at most), the reply stored in the site's outbox and flushed to the disk before it
leaves, opening, decoding. So the figure depends on the disk of the temporary directory: the flush took 0.2 ms of it on
a virtual machine's disk.
The reference is a bare echo of 24 kB on a mutually authenticated stream between the same two kinds of process, measured
in the same run.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.exchange", __doc__)

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict

from experiments.benchmarks.bare import bare_stream
from experiments.benchmarks.loopback import LIMITS, RUN_ID, process, provision
from experiments.benchmarks.report import report
from fedclaw.errors import TransportError
from fedclaw.identity.federation_home import FederationHome
from fedclaw.protocol.arrays import pack
from fedclaw.transport.grpc.grid import GrpcGrid

PARAMETERS = 6000
ARRAYS = 6
WARM_UP = 50
EXCHANGES = 500


def exchanges(home: FederationHome, site: Path, count: int) -> list[float]:
    """Seconds of each of `count` exchanges after a warm-up."""
    model = {f"layer{n}": np.ones(PARAMETERS // ARRAYS, dtype=np.float32) for n in range(ARRAYS)}
    content = RecordDict({"arrays": pack(model)})
    seconds = []
    with (
        GrpcGrid(home, address="127.0.0.1:0", run_id=RUN_ID, limits=LIMITS) as grid,
        process("experiments.benchmarks.loopback", [str(grid.port), "0", str(site)]),
    ):
        if not grid.wait_for_sites(1, 60):
            raise TransportError("the site's process did not connect")
        (node,) = grid.get_node_ids()
        for number in range(WARM_UP + count):
            began = time.perf_counter()
            message = Message(content, node, "train", group_id=str(number))
            (reply,) = grid.send_and_receive([message], timeout=30)
            seconds.append(time.perf_counter() - began)
            if reply.has_error():
                raise TransportError(f"the site answered with an error: {reply.error.reason}")
    return seconds[WARM_UP:]


def echoes(home: FederationHome, site: Path, count: int) -> list[float]:
    """The same number of bare echoes."""
    payload = bytes(4 * PARAMETERS)
    with bare_stream(home, site) as stream:
        return [stream.echo(payload) for _ in range(WARM_UP + count)][WARM_UP:]


def main(count: int = EXCHANGES) -> None:
    """Measure and report."""
    with tempfile.TemporaryDirectory() as directory:
        home, (site,) = provision(Path(directory), 1)
        reference = echoes(home, site, count)
        measured = exchanges(home, site, count)
    median, p99 = (1000 * value for value in _median_and_p99(measured))
    reference_median, reference_p99 = (1000 * value for value in _median_and_p99(reference))
    rows = [
        ("one exchange, median", f"{median:.2f} ms", "target: under 5 ms"),
        ("one exchange, 99th percentile", f"{p99:.2f} ms", ""),
        ("bare stream, median", f"{reference_median:.2f} ms", f"{median / reference_median:.1f} times less"),
        ("bare stream, 99th percentile", f"{reference_p99:.2f} ms", ""),
    ]
    figures = {
        "median_ms": round(median, 3),
        "p99_ms": round(p99, 3),
        "reference_median_ms": round(reference_median, 3),
        "ratio": round(median / reference_median, 2),
        "exchanges": count,
        "parameters": PARAMETERS,
    }
    report("One exchange over mutual TLS and seal", rows, figures)


def _median_and_p99(values: list[float]) -> tuple[float, float]:
    return statistics.median(values), statistics.quantiles(values, n=100)[98]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
