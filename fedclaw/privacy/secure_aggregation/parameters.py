"""What all parties of one secure sum agree on. Every signature and every key is bound to its digest.

It says who shares masks with whom: a Harary graph over a random order of the sites, and how dense it has to be.

Bell, Bonawitz, Gascon, Lepoint, Raykova 2020 ("Secure Single-Server Aggregation with (Poly)Logarithmic Overhead"),
sections 3.2 to 3.4. A Harary graph of even degree k joins each site to the k/2 next on either side of a ring. All
parties compute the order on the ring from the session's 128 random bits, so a server cannot tell two sites different
neighbours.

Three conditions must hold for n sites and a threshold of t shares; E1 is stricter than the paper's:

E1 exclusive  2 t > k + 1 + c, where at most c of any honest site's neighbours collude with the server. To obtain both
              the seed and the key of a site takes two groups of t holders; they then overlap in an honest site, which
              gives only one of the two. (The paper needs c < t, against a server that follows the protocol.)
E2 connected  the honest sites that stay form a connected graph: no run of k/2 sites on the ring is gone.
E3 correct    t holders stay for every secret that has to be recovered.

In the complete graph (k = n - 1) E2 is certain, and E1 makes the list of survivors unique: no two lists can each find
t consents. Even a server that breaks every rule then learns a single sum, over at least `minimum` survivors. In a
sparse graph this holds for drop-outs and collusions that do not depend on the order on the ring. A server that draws
sessions until the order suits it, or picks by it who 'drops out', is covered by E1 alone.
"""

import hashlib
import math
from functools import cached_property, lru_cache
from typing import Annotated, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from fedclaw.errors import SecureAggregationError
from fedclaw.identity.names import check_name
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.questions import Asked

SECURITY_BITS = 40
CORRECTNESS_BITS = 30
COMPLETE_UP_TO = 64
"""Up to so many sites the complete graph is taken: what it promises beyond a sparse one is worth the extra masks."""


class Topology(NamedTuple):
    """Degree of the graph, and how many of the `neighbours + 1` shares recover a secret."""

    neighbours: int
    threshold: int


class Graph:
    """A k-regular Harary graph over the indices 0 .. count-1, in an order drawn from `session`."""

    def __init__(self, session: str, count: int, neighbours: int) -> None:
        """`neighbours` is count - 1 or an even number below it."""
        self._complete = neighbours == count - 1
        self._half = neighbours // 2
        self._ring = [] if self._complete else permutation(session, count)
        self._place = {index: place for place, index in enumerate(self._ring)}
        self._count = count

    def neighbours_of(self, index: int) -> tuple[int, ...]:
        """The neighbours of a site, ascending."""
        if self._complete:
            return tuple(other for other in range(self._count) if other != index)
        place = self._place[index]
        steps = (step for half in range(1, self._half + 1) for step in (half, -half))
        return tuple(sorted(self._ring[(place + step) % self._count] for step in steps))


def permutation(session: str, count: int) -> list[int]:
    """A random order of 0 .. count-1: by the SHA-256 of session and index, in which nobody finds a tie."""
    return sorted(
        range(count), key=lambda index: hashlib.sha256(f"fedclaw ring v1 {session} {index}".encode()).digest()
    )


def least_threshold(neighbours: int, colluding: int) -> int:
    """The smallest t with 2 t > k + 1 + c (E1)."""
    return (neighbours + 1 + colluding) // 2 + 1


def complete_graph(sites: int, corrupt: int) -> Topology:
    """Every site is every other's neighbour."""
    return Topology(sites - 1, least_threshold(sites - 1, corrupt))


def is_enough(topology: Topology, sites: int, dropouts: int, corrupt: int, *, complete: bool) -> bool:
    """Whether a graph that somebody else chose holds against `corrupt` sites that collude with the server.

    `complete`: accept the complete graph only. It is needed where a server that chooses who drops out must not be able
    to cut a few sites off from the rest, and always for few sites.
    """
    neighbours, threshold = topology
    if complete or sites <= COMPLETE_UP_TO:
        return neighbours == sites - 1 and threshold >= least_threshold(neighbours, corrupt)
    colluding = _most_met(sites, corrupt, neighbours, SECURITY_BITS)
    connected = _stays_connected(sites, dropouts + corrupt, neighbours)
    return connected and threshold >= least_threshold(neighbours, colluding)


@lru_cache(maxsize=64)
def neighbours_needed(sites: int, dropouts: int, corrupt: int) -> Topology:
    """The graph and threshold that tolerate `dropouts` lost sites and `corrupt` sites that collude with the server.

    For few sites, the complete graph: all three conditions are certain. For more, the sparsest graph in which E1 and E2
    each fail with a probability of at most 2^-40, and E3 of at most 2^-30, over the random order. Raises
    SecureAggregationError if not even the complete graph is enough.
    """
    if sites < 2 or dropouts < 0 or corrupt < 0:
        raise SecureAggregationError(
            f"a secure sum has at least 2 sites, and drop-outs and corrupt sites are counted from 0; "
            f"not {sites}, {dropouts} and {corrupt}"
        )
    complete = complete_graph(sites, corrupt)
    if complete.threshold > sites - dropouts:
        raise SecureAggregationError(
            f"{sites} sites cannot do with {dropouts} drop-outs while {corrupt} sites are in league with the server; "
            f"tolerate fewer: twice the drop-outs plus the corrupt sites must stay below {sites}"
        )
    if sites <= COMPLETE_UP_TO:
        return complete
    for neighbours in range(2, sites - 1, 2):
        colluding = _most_met(sites, corrupt, neighbours, SECURITY_BITS)
        lost = _most_met(sites, dropouts, neighbours, CORRECTNESS_BITS)
        threshold = least_threshold(neighbours, colluding)
        # A site that dropped out gives no share: its key has to come from its neighbours alone.
        spare = neighbours - lost if dropouts else neighbours + 1
        if threshold <= spare and _stays_connected(sites, dropouts + corrupt, neighbours):
            return Topology(neighbours, threshold)
    return complete


def _most_met(sites: int, marked: int, neighbours: int, bits: int) -> int:
    """The least m such that any site has more than m marked neighbours with a probability of at most 2^-bits.

    The number of marked neighbours of one site is hypergeometric; a union bound covers all sites.
    """
    bound = 2.0**-bits / sites
    tail = 0.0
    most = min(marked, neighbours)
    for met in range(most, -1, -1):
        tail += _hypergeometric(sites - 1, marked, neighbours, met)
        if tail > bound:
            return met
    return 0


def _stays_connected(sites: int, gone: int, neighbours: int) -> bool:
    """Whether a run of k/2 sites on the ring is gone with a probability of at most 2^-40 (union bound)."""
    half = neighbours // 2
    return sites * _hypergeometric(sites, gone, half, half) <= 2.0**-SECURITY_BITS


def _hypergeometric(population: int, marked: int, draws: int, met: int) -> float:
    """Probability that `draws` out of `population` meet exactly `met` of the `marked`."""
    if met > marked or draws - met > population - marked:
        return 0.0
    logarithm = _choose(marked, met) + _choose(population - marked, draws - met) - _choose(population, draws)
    return math.exp(logarithm)


def _choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


MAX_SITES = 4096
MAX_LENGTH = 1 << 31
"""Longest vector; its 8 GiB of keystream stay far from what one AES-CTR key may encrypt."""

Name = Annotated[str, AfterValidator(check_name)]
Session = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Parameters(Frozen):
    """One sum: who takes part, how the graph is drawn, how many sites must be left. Raises ValidationError if unsafe.

    A site's place in `sites` is its index, which also gives the x-coordinate of its shares.
    """

    session: Session
    """128 random bits (`secrets.token_hex(16)`), drawn for this sum alone. The graph is drawn from them too."""
    federation: Name
    run: str = Field(min_length=1, max_length=256)
    round: int = Field(ge=0, lt=1 << 63)
    sites: tuple[Name, ...] = Field(min_length=2, max_length=MAX_SITES)
    threshold: int
    """Shares that recover a secret, of `neighbours + 1`: a site keeps a share of its own seed."""
    neighbours: int
    """Sites that each site shares masks with: all others, or an even number of them."""
    length: int = Field(ge=1, le=MAX_LENGTH)
    """Numbers in a vector."""
    minimum: int
    """Survivors below which no site takes part in unmasking."""
    terms: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """SHA-256 of everything else that all sites must be told alike, such as how much noise each of them adds."""

    @model_validator(mode="after")
    def _safe(self) -> Self:
        count = len(self.sites)
        if len(set(self.sites)) != count:
            raise ValueError("a site is named twice")
        complete = self.neighbours == count - 1
        if not complete and (self.neighbours % 2 or not 2 <= self.neighbours < count):
            raise ValueError(f"neighbours is {count - 1} (all other sites) or an even number from 2 below that")
        least = least_threshold(self.neighbours, 0)
        if not least <= self.threshold <= self.neighbours + 1:
            raise ValueError(
                f"with {self.neighbours} neighbours the threshold is from {least} to {self.neighbours + 1}: "
                "below, the server could get both secrets of a site"
            )
        if not 2 <= self.minimum <= count:
            raise ValueError(f"minimum is from 2 to the number of sites, {count}")
        return self

    @cached_property
    def graph(self) -> Graph:
        """Who shares masks with whom."""
        return Graph(self.session, len(self.sites), self.neighbours)

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {site: index for index, site in enumerate(self.sites)}

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all fields."""
        numbers = (self.round, self.threshold, self.neighbours, self.length, self.minimum, len(self.sites))
        texts = (self.session, self.federation, self.run, self.terms, *map(str, numbers), *self.sites)
        return hashlib.sha256(framed(b"fedclaw secure sum v2", *(text.encode() for text in texts))).digest()

    @property
    def colluding(self) -> int:
        """How many neighbours of a site may collude with the server and still not obtain both of its secrets."""
        return 2 * self.threshold - self.neighbours - 2

    def index(self, site: str) -> int:
        """The place of `site`, from 0. Raises KeyError if it takes no part."""
        return self._indices[site]

    def point(self, site: str) -> int:
        """The x-coordinate of the shares that `site` holds, from 1. Raises KeyError if it takes no part."""
        return self._indices[site] + 1

    def neighbours_of(self, site: str) -> tuple[str, ...]:
        """The sites that `site` shares masks with, in the order of `sites`. Raises KeyError if it takes no part."""
        return tuple(self.sites[index] for index in self.graph.neighbours_of(self._indices[site]))


def framed(*parts: bytes) -> bytes:
    """The parts, each after its length: different parts never give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def parameters_of(asked: Asked) -> Parameters:
    """The parameters of the session in a question. Raises ValidationError if they are not safe.

    The sites sign their digest, which covers the whole question: each site counts on the others' noise, so a server
    must not be able to tell them different things.
    """
    secure = asked.secure
    assert secure is not None
    return Parameters(
        session=secure.session,
        federation=asked.federation,
        run=asked.run,
        round=asked.round,
        sites=secure.sites,
        threshold=secure.threshold,
        neighbours=secure.neighbours,
        length=secure.length,
        minimum=secure.minimum,
        terms=hashlib.sha256(asked.model_dump_json().encode()).hexdigest(),
    )
