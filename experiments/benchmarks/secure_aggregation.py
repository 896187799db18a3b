"""What secure aggregation costs over the plain sum of the same vectors.

    python -m experiments.benchmarks.secure_aggregation [SITES] [NUMBERS] [DROPOUTS,...]

SITES sites, each with a vector of NUMBERS 32-bit words, and the server run SecAgg+ in this process, one site after the
other; certificates exist beforehand, as in a federation. The parameters tolerate the largest number of DROPOUTS and a
quarter of the sites in league with the server. Sites that drop out do so after they have shared their keys and
before they send a vector. The plain sum adds the same vectors, as they arrive, to one accumulator. Each figure is
given by the number of drop-outs:

    seconds_ratio      all sites' work and the server's, by the plain sum
    round_ratio        the slowest site's work and the server's, as sites work at the same time, by the plain sum
    server_ratio       the server's work alone, by the plain sum; site_seconds is the median site's work
    bytes_ratio        what a surviving site sends and receives (the messages as the transport encodes them), by
                       its vector
    server_peak_ratio  the most memory in use during any of the server's calls, by the same for the plain sum: all that
                       Python and numpy allocated since the round began (tracemalloc, in a round of its own that is
                       not timed), the vector that has just arrived among it, for the plain sum as well
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.secure_aggregation", __doc__)

import secrets
import statistics
import sys
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from experiments.benchmarks.report import report
from fedclaw.identity.site_home import SiteKeys
from fedclaw.privacy.secure_aggregation import (
    CertificateVerifier,
    Parameters,
    ServerSession,
    SiteSession,
    local_identities,
    neighbours_needed,
)
from fedclaw.privacy.secure_aggregation.messages import Wire
from fedclaw.transport.grpc.message_codec import encode

SITES = 20
NUMBERS = 10_000_000
DROPOUTS = (0, 3)
FEDERATION = "benchmark"
PLAIN_ROUNDS = 5
SERVER = "the server"
MB = 1_000_000

Words = NDArray[np.uint32]
M = TypeVar("M", bound=Wire)


@dataclass
class Meter:
    """Seconds by party, bytes by site, and the peak of memory during the server's calls."""

    traced: bool = False
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    traffic: Counter[str] = field(default_factory=Counter)
    peak: int = 0

    @contextmanager
    def working(self, party: str) -> Iterator[None]:
        """Everything within is work of `party`: a site, or SERVER."""
        if self.traced:
            tracemalloc.reset_peak()
        began = time.perf_counter()
        yield
        self.seconds[party] += time.perf_counter() - began
        if self.traced and party == SERVER:
            self.peak = max(self.peak, tracemalloc.get_traced_memory()[1])

    def carry(self, site: str, message: M) -> M:
        """`message` as it arrives at the other end; not work of anyone, but bytes of `site`."""
        packed = message.pack()
        self.traffic[site] += encode(RecordDict({"secure": ConfigRecord(packed)})).size
        return type(message).unpack(packed)


def vector_of(length: int, number: int) -> Words:
    """(length,) what the site with this number has to add."""
    return np.random.default_rng(number).integers(0, 1 << 32, length, dtype=np.uint32)


def secure_sum(meter: Meter, parameters: Parameters, signers: dict[str, SiteKeys], lost: int) -> Words:
    """One secure sum; the first `lost` sites share their keys and are not heard of again."""
    sites: dict[str, SiteSession] = {}
    for name in parameters.sites:
        verifier = CertificateVerifier(signers[name].descriptor)
        with meter.working(name):
            sites[name] = SiteSession(parameters, name, signers[name], verifier)
    verifier = CertificateVerifier(signers[parameters.sites[0]].descriptor)
    with meter.working(SERVER):
        server = ServerSession(parameters, verifier)
    exchange_keys(meter, sites, server)
    with meter.working(SERVER):
        rosters = server.rosters()
    for number, (name, roster) in list(enumerate(rosters.items()))[lost:]:
        arrived = meter.carry(name, roster)
        vector = vector_of(parameters.length, number)
        with meter.working(name):
            message = sites[name].mask(vector, arrived)
        meter.traffic[name] += vector.nbytes
        returned = meter.carry(name, message)
        with meter.working(SERVER):
            server.add_masked(returned, vector)
        del vector
    unmask(meter, sites, server)
    with meter.working(SERVER):
        return server.result()


def exchange_keys(meter: Meter, sites: dict[str, SiteSession], server: ServerSession) -> None:
    """The stages before the vectors."""
    for name, site in sites.items():
        with meter.working(name):
            advertisement = site.advertise()
        advertisement = meter.carry(name, advertisement)
        with meter.working(SERVER):
            server.add_advertisement(advertisement)
    with meter.working(SERVER):
        lists = server.key_lists()
    for name, keys in lists.items():
        arrived = meter.carry(name, keys)
        with meter.working(name):
            bundle = sites[name].share(arrived)
        bundle = meter.carry(name, bundle)
        with meter.working(SERVER):
            server.add_shares(bundle)
    with meter.working(SERVER):
        deliveries = server.deliveries()
    for name, delivery in deliveries.items():
        brought = meter.carry(name, delivery)
        with meter.working(name):
            confirmation = sites[name].confirm(brought)
        confirmation = meter.carry(name, confirmation)
        with meter.working(SERVER):
            server.add_confirmation(confirmation)
    with meter.working(SERVER):
        if server.accusations():
            raise ValueError("an honest site was accused")


def unmask(meter: Meter, sites: dict[str, SiteSession], server: ServerSession) -> None:
    """The last two stages."""
    with meter.working(SERVER):
        survivors = server.survivor_list()
    for name in survivors.survivors:
        arrived = meter.carry(name, survivors)
        with meter.working(name):
            consent = sites[name].consent(arrived)
        consent = meter.carry(name, consent)
        with meter.working(SERVER):
            server.add_consent(consent)
    with meter.working(SERVER):
        requests = server.unmask_requests()
    for name, request in requests.items():
        asked = meter.carry(name, request)
        with meter.working(name):
            shares = sites[name].unmask(asked)
        shares = meter.carry(name, shares)
        with meter.working(SERVER):
            server.add_unmasking(shares)


def plain_sum(meter: Meter, parameters: Parameters, lost: int) -> Words:
    """The sum that the secure one has to equal."""
    with meter.working(SERVER):
        total = np.zeros(parameters.length, dtype=np.uint32)
    for number in range(lost, len(parameters.sites)):
        vector = vector_of(parameters.length, number)
        with meter.working(SERVER):
            total += vector
        del vector
    return total


def traced(run: Callable[[Meter], Words]) -> int:
    """Bytes at the peak of the server's calls in one `run`."""
    meter = Meter(traced=True)
    tracemalloc.start()
    try:
        run(meter)
    finally:
        tracemalloc.stop()
    return meter.peak


def measure(parameters: Parameters, signers: dict[str, SiteKeys], lost: int) -> dict[str, float]:
    """All figures for `lost` drop-outs. Raises ValueError if the secure sum is not the plain one."""
    meter, plain = Meter(), [Meter() for _ in range(PLAIN_ROUNDS)]
    total = secure_sum(meter, parameters, signers, lost)
    if not all(np.array_equal(total, plain_sum(one, parameters, lost)) for one in plain):
        raise ValueError("the secure sum differs from the plain one")
    plain_seconds, server = statistics.median(one.seconds[SERVER] for one in plain), meter.seconds[SERVER]
    sites = [meter.seconds[name] for name in parameters.sites[lost:]]
    sent = [meter.traffic[name] for name in parameters.sites[lost:]]
    secure_peak = traced(lambda meter: secure_sum(meter, parameters, signers, lost))
    plain_peak = traced(lambda meter: plain_sum(meter, parameters, lost))
    return {
        "seconds_ratio": sum(meter.seconds.values()) / plain_seconds,
        "round_ratio": (max(sites) + server) / plain_seconds,
        "server_ratio": server / plain_seconds,
        "bytes_ratio": statistics.mean(sent) / (4 * parameters.length),
        "server_peak_ratio": secure_peak / plain_peak,
        "site_seconds": statistics.median(sites),
        "server_seconds": server,
        "plain_seconds": plain_seconds,
        "server_peak_mb": secure_peak / MB,
        "site_overhead_kb": statistics.mean(sent) / 1000 - 4 * parameters.length / 1000,
    }


def main(sites: int = SITES, numbers: int = NUMBERS, dropouts: tuple[int, ...] = DROPOUTS) -> None:
    """Measure and report."""
    topology = neighbours_needed(sites, max(dropouts), sites // 4)
    names = tuple(f"site-{number}" for number in range(sites))
    signers, _ = local_identities(FEDERATION, names)
    measured = {}
    for lost in dropouts:
        parameters = Parameters(
            session=secrets.token_hex(16),
            federation=FEDERATION,
            run="speed",
            round=1,
            sites=names,
            threshold=topology.threshold,
            neighbours=topology.neighbours,
            length=numbers,
            minimum=max(2, sites - max(dropouts)),
        )
        measured[str(lost)] = measure(parameters, signers, lost)
    by_name = {
        name: {lost: round(figures[name], 5) for lost, figures in measured.items()}
        for name in measured[str(dropouts[0])]
    }
    rows = [
        (what, " / ".join(f"{value:.{digits}f}" for value in by_name[name].values()), than)
        for what, name, digits, than in ROWS
    ]
    title = (
        f"Secure sum of {numbers} numbers over {sites} sites, {' / '.join(measured)} drop-outs "
        f"({topology.neighbours} neighbours, threshold {topology.threshold})"
    )
    shape = {"sites": sites, "numbers": numbers, "neighbours": topology.neighbours, "threshold": topology.threshold}
    report(title, rows, {**by_name, **shape})


ROWS = (
    ("all sites one after the other, and the server", "seconds_ratio", 1, "x the plain sum's seconds"),
    ("sites at the same time, and the server", "round_ratio", 1, "x the plain sum's seconds"),
    ("server alone", "server_ratio", 1, "x the plain sum's seconds"),
    ("one site, s", "site_seconds", 3, "0: it only sends its vector"),
    ("server, s", "server_seconds", 3, "-"),
    ("plain sum, s", "plain_seconds", 3, "-"),
    ("bytes of a site", "bytes_ratio", 4, "x its vector"),
    ("bytes of a site besides its vector, kB", "site_overhead_kb", 1, "0"),
    ("server's memory at its peak", "server_peak_ratio", 3, "x the plain sum's"),
)
"""What, under which name, with how many digits, compared with what."""


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        int(given[0]) if given else SITES,
        int(given[1]) if len(given) > 1 else NUMBERS,
        tuple(map(int, given[2].split(","))) if len(given) > 2 else DROPOUTS,
    )
