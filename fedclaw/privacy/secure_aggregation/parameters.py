"""What all parties of one secure sum agree on. Every signature and every key is bound to its digest."""

import hashlib
from functools import cached_property
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from fedclaw.identity.names import check_name
from fedclaw.privacy.secure_aggregation.graph import Graph, least_threshold
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.questions import Asked

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
