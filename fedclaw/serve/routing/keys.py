"""Where a routing key stands: a keyed hash that spreads keys evenly over [0, 1), and does not move.

A key takes part in a share of s where its `share` is below s. So the keys of 5% are among those of 10%, and those among
all; the same key gets the same version on every worker and node. The salt is new for each experiment and known to the
nodes only: other keys bear the risk each time, and nobody can make up a key that is sure to be in the 5%.
"""

import hashlib
from typing import NamedTuple

_PERSON = b"fedclaw-routing"
_TO_UNIT = 2.0**-53


class Position(NamedTuple):
    """Three independent uniform values of one key."""

    share: float
    """In [0, 1): which version."""
    mirror: float
    """In [0, 1): whether other versions see the request too."""
    unit: int
    """64 bits that stand for the key where it is counted."""


class KeyHash:
    """BLAKE2b in its keyed mode (RFC 7693, section 2.9), for the keys of one experiment."""

    __slots__ = ("_begun",)

    def __init__(self, model: str, salt: str) -> None:
        secret = hashlib.blake2b(model.encode(), digest_size=32, key=bytes.fromhex(salt), person=_PERSON).digest()
        self._begun = hashlib.blake2b(digest_size=24, key=secret, person=_PERSON)

    def share(self, key: str) -> float:
        """`position(key).share`, sooner."""
        hashed = self._begun.copy()
        hashed.update(key.encode("utf-8", "surrogatepass"))
        return (int.from_bytes(hashed.digest()[:8]) >> 11) * _TO_UNIT

    def position(self, key: str) -> Position:
        """Where `key` stands."""
        hashed = self._begun.copy()
        hashed.update(key.encode("utf-8", "surrogatepass"))
        words = hashed.digest()
        share, mirror = int.from_bytes(words[:8]) >> 11, int.from_bytes(words[8:16]) >> 11
        return Position(share * _TO_UNIT, mirror * _TO_UNIT, int.from_bytes(words[16:]))
