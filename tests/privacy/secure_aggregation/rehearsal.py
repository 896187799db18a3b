"""A whole secure sum in one process, stage by stage, each message through the bytes that go over the wire."""

import secrets
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedclaw.identity.site_home import SiteKeys
from fedclaw.privacy.secure_aggregation import (
    CertificateVerifier,
    KeyList,
    Parameters,
    Roster,
    ServerSession,
    ShareDelivery,
    SiteSession,
    SurvivorList,
    Unmasking,
    UnmaskRequest,
    local_identities,
)
from fedclaw.privacy.secure_aggregation.messages import Wire
from fedclaw.privacy.secure_aggregation.parameters import least_threshold
from fedclaw.transport.grpc.message_codec import decode, encode

FEDERATION = "heart"
STAGES = ("keys", "shares", "confirm", "masked", "consent", "unmask")
"""What a site can be the first not to answer."""

M = TypeVar("M", bound=Wire)


@lru_cache
def identities() -> tuple[dict[str, SiteKeys], CertificateVerifier]:
    """Thirteen sites with real certificates of one CA."""
    return local_identities(FEDERATION, [f"site-{letter}" for letter in "abcdefghijklm"])


def names(count: int) -> tuple[str, ...]:
    return tuple(identities()[0])[:count]


def parameters(count: int, **changes: object) -> Parameters:
    """The complete graph over the first `count` sites and its least threshold, unless said otherwise."""
    neighbours = changes.get("neighbours", count - 1)
    assert isinstance(neighbours, int)
    plain: dict[str, object] = {
        "session": secrets.token_hex(16),
        "federation": FEDERATION,
        "run": "spring",
        "round": 3,
        "sites": names(count),
        "threshold": least_threshold(neighbours, 0),
        "neighbours": neighbours,
        "length": 5,
        "minimum": 2,
    }
    return Parameters.model_validate(plain | changes)


def site_session(parameters: Parameters, name: str, **more: object) -> SiteSession:
    signers, verifier = identities()
    return SiteSession(parameters, name, signers[name], verifier, **more)  # type: ignore[arg-type]


def wired(message: M) -> M:
    """The message as it arrives: through a Flower record and the bytes of the gRPC transport."""
    content = decode(b"".join(encode(RecordDict({"secure": ConfigRecord(message.pack())})).parts))
    assert isinstance(content, RecordDict)
    return type(message).unpack(content.config_records["secure"])


class Exchange:
    """The sites and the server of one sum; `absent` says at which stage a site stops to answer."""

    def __init__(self, parameters: Parameters, absent: Mapping[str, str] | None = None) -> None:
        self.parameters = parameters
        self.absent = {site: STAGES.index(stage) for site, stage in (absent or {}).items()}
        self.server = ServerSession(parameters, identities()[1])
        self.sites = {name: site_session(parameters, name) for name in parameters.sites}
        draw = np.random.default_rng(1)
        self.vectors = {
            name: draw.integers(0, 1 << 32, parameters.length, dtype=np.uint32) for name in parameters.sites
        }
        self.sent: dict[str, NDArray[np.uint32]] = {}
        self.unmaskings: list[Unmasking] = []

    def answers(self, site: str, stage: str) -> bool:
        return self.absent.get(site, len(STAGES)) > STAGES.index(stage)

    def keys(self) -> dict[str, KeyList]:
        for name, site in self.sites.items():
            if self.answers(name, "keys"):
                self.server.add_advertisement(wired(site.advertise()))
        return {name: wired(item) for name, item in self.server.key_lists().items()}

    def shares(self) -> dict[str, ShareDelivery]:
        for name, item in self.keys().items():
            if self.answers(name, "shares"):
                self.server.add_shares(wired(self.sites[name].share(item)))
        return {name: wired(item) for name, item in self.server.deliveries().items()}

    def rosters(self) -> dict[str, Roster]:
        for name, delivery in self.shares().items():
            if self.answers(name, "confirm"):
                self.server.add_confirmation(wired(self.sites[name].confirm(delivery)))
        for name, accusations in self.server.accusations().items():
            self.server.add_opening(wired(self.sites[name].open_for(wired(accusations))))
        return {name: wired(item) for name, item in self.server.rosters().items()}

    def masked(self) -> SurvivorList:
        for name, item in self.rosters().items():
            if self.answers(name, "masked"):
                vector = self.vectors[name].copy()
                message = self.sites[name].mask(vector, item)
                self.sent[name] = vector.copy()
                self.server.add_masked(wired(message), vector)
        return wired(self.server.survivor_list())

    def consents(self) -> dict[str, UnmaskRequest]:
        survivors = self.masked()
        for name in survivors.survivors:
            if self.answers(name, "consent"):
                self.server.add_consent(wired(self.sites[name].consent(survivors)))
        return {name: wired(item) for name, item in self.server.unmask_requests().items()}

    def unmask(self) -> None:
        for name, item in self.consents().items():
            if self.answers(name, "unmask"):
                self.unmaskings.append(self.sites[name].unmask(item))
                self.server.add_unmasking(wired(self.unmaskings[-1]))

    def run(self) -> NDArray[np.uint32]:
        self.unmask()
        return self.server.result()

    def plain_sum(self) -> NDArray[np.uint32]:
        """The sum that the server should find, computed without masks."""
        total = np.zeros(self.parameters.length, dtype=np.uint32)
        for name in self.server.survivors:
            total += self.vectors[name]
        return total
