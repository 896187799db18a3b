"""Verifiable secret sharing: a holder checks its shares when it receives them, and the server when they are revealed.

A dealer shares its seed and its mask key, each by a polynomial f of degree t - 1 over Z_q (Shamir 1979, "How to Share a
Secret"; q is the order of P-256, `curve`). The secret is f(0); a holder's share is f at the holder's x, from 1. Any t
shares recover the secret, and fewer are independent of it. The dealer
proves, without interaction, that all its shares of one secret lie on one such polynomial:

    draw a polynomial r of the same degree and commit to both values at each holder:  c_i = H(r(x_i), f(x_i))
    compute the challenge d = H(all c_i, ...) and publish  z = r + d f  (t coefficients)
    holder i, who has f(x_i), checks  c_i = H(z(x_i) - d f(x_i), f(x_i))

This is the scheme from hash commitments of Atapoor, Baghery, Cozzo, Pedersen 2023, "VSS from Distributed ZK Proofs and
Applications" (ASIACRYPT 2023), made non-interactive by Fiat and Shamir. z reveals nothing about f, and c_i hides
f(x_i), as long as fewer than t shares are known (random oracle). The share is part of c_i and so of the challenge. With
r(x_i) alone in it, a dealer that knows d could choose any z, and then a share for each holder that fits it. As it is,
shares that do not lie on one polynomial pass for only one d in q. Afterwards c_i binds holder i to f(x_i): if it gives
the server another value, the holder has lied, and nobody else can be to blame.

Schnorr's proof with the same challenge (Schnorr 1991, "Efficient Signature Generation by Smart Cards") shows that f(0)
is the private key of the dealer's public mask key Y: the dealer publishes R = r(0) G, and z(0) G - R = d Y is checked,
up to the sign of d Y. No mask depends on the sign, since ECDH uses the x-coordinate only. The seed is whatever f(0) is.

The cost grows with the number of neighbours, not with the length of the vector.
"""

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple, Self

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation.curve import ORDER, proves, public_of
from fedclaw.privacy.secure_aggregation.parameters import Parameters, framed

SECRET_BYTES = 32
SHARE_BYTES = 33
"""Length of a share on the wire, big-endian."""


def evaluate(coefficients: Sequence[int], x: int) -> int:
    """The value at `x` of the polynomial with these coefficients, the constant term first."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % ORDER
    return value


def recover(shares: Mapping[int, int], threshold: int) -> bytes:
    """The secret (32 bytes, big-endian) behind `shares`, values by x: Lagrange interpolation of the first `threshold`.

    Every share has to be right; it is checked before it gets here (`ShareProof`). Raises SecureAggregationError
    for fewer than `threshold`.
    """
    if len(shares) < threshold:
        raise SecureAggregationError(f"{len(shares)} shares are too few: {threshold} recover a secret")
    points = dict(islice(shares.items(), threshold))
    secret = 0
    for x, share in points.items():
        above = below = 1
        for other in points:
            if other != x:
                above, below = above * other % ORDER, below * (other - x) % ORDER
        secret += share * above * pow(below, -1, ORDER)
    return (secret % ORDER).to_bytes(SECRET_BYTES, "big")


NUMBER_BYTES = 32
"""An element of Z_q on the wire, big-endian."""
COMMITMENT_BYTES = 64
PROOF_BYTES = 3 * NUMBER_BYTES + COMMITMENT_BYTES

Secret = Literal["seed", "key"]
_KEY: Secret = "key"


class SecretShares(NamedTuple):
    """One holder's shares of one dealer's secrets."""

    seed: int
    key: int

    def pack(self) -> bytes:
        """The bytes that are sealed."""
        return self.seed.to_bytes(SHARE_BYTES, "big") + self.key.to_bytes(SHARE_BYTES, "big")

    @classmethod
    def unpack(cls, plain: bytes) -> "SecretShares":
        """The inverse of `pack`. Raises SecureAggregationError for values outside the field."""
        made = cls(int.from_bytes(plain[:SHARE_BYTES], "big"), int.from_bytes(plain[SHARE_BYTES:], "big"))
        if len(plain) != 2 * SHARE_BYTES or max(made) >= ORDER:
            raise SecureAggregationError("a share is malformed")
        return made


@dataclass(frozen=True)
class ShareProof:
    """What one holder checks its shares of one dealer with. The dealer signs it."""

    challenge: int
    seed_point: int
    """z(x) at the holder's x, for the seed's polynomial."""
    key_point: int
    commitment: bytes
    """H(r(x), f(x)) for the seed, then for the key."""

    def pack(self) -> bytes:
        """(PROOF_BYTES,)"""
        return packed((self.challenge, self.seed_point, self.key_point)) + self.commitment

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """Back from `pack`."""
        challenge, seed_point, key_point = _numbers(packed[: 3 * NUMBER_BYTES])
        return cls(challenge, seed_point, key_point, packed[3 * NUMBER_BYTES :])

    def fits(self, parameters: Parameters, dealer: str, holder: str, secret: Secret, share: int) -> bool:
        """Whether `share` is the one that `dealer` committed to for `holder`."""
        of_key = secret == _KEY
        point = self.key_point if of_key else self.seed_point
        half = self.commitment[32:] if of_key else self.commitment[:32]
        blind = (point - self.challenge * share) % ORDER
        return share < ORDER and hmac.compare_digest(_commit(parameters, dealer, holder, secret, blind, share), half)

    def holds(self, parameters: Parameters, dealer: str, holder: str, shares: SecretShares) -> bool:
        """Whether both of `shares` are the ones that `dealer` committed to for `holder`."""
        pairs: tuple[tuple[Secret, int], ...] = (("seed", shares.seed), ("key", shares.key))
        return all(self.fits(parameters, dealer, holder, secret, share) for secret, share in pairs)


@dataclass(frozen=True)
class Dealing:
    """What a dealer publishes: commitments by holder, the two polynomials z (coefficients from 0), and R."""

    dealer: str
    commitments: dict[str, bytes]
    seed_proof: tuple[int, ...] = field(repr=False)
    key_proof: tuple[int, ...] = field(repr=False)
    nonce_public: bytes
    challenge: int
    _proofs: dict[str, ShareProof] = field(default_factory=dict, init=False, repr=False, compare=False)

    def proof_for(self, parameters: Parameters, holder: str) -> ShareProof:
        """The proof for `holder`. Raises KeyError for a site that was dealt no shares."""
        if holder not in self._proofs:
            x = parameters.point(holder)
            points = evaluate(self.seed_proof, x), evaluate(self.key_proof, x)
            self._proofs[holder] = ShareProof(self.challenge, *points, self.commitments[holder])
        return self._proofs[holder]


def deal(
    parameters: Parameters, dealer: str, holders: Sequence[str], keys: "DealerKeys"
) -> tuple[dict[str, SecretShares], Dealing]:
    """Shares of both secrets by holder, and the published proof of them."""
    seed, blind_seed = _polynomial(keys.seed, parameters), _polynomial(None, parameters)
    key, blind_key = _polynomial(keys.mask_secret, parameters), _polynomial(None, parameters)
    points = {holder: parameters.point(holder) for holder in holders}
    shares = {holder: SecretShares(evaluate(seed, x), evaluate(key, x)) for holder, x in points.items()}
    commitments = {
        holder: _commit(parameters, dealer, holder, "seed", evaluate(blind_seed, x), shares[holder].seed)
        + _commit(parameters, dealer, holder, "key", evaluate(blind_key, x), shares[holder].key)
        for holder, x in points.items()
    }
    nonce_public = public_of(blind_key[0])
    challenge = _challenge(parameters, dealer, keys.mask_public, nonce_public, commitments)
    return shares, Dealing(
        dealer,
        commitments,
        _blinded(blind_seed, challenge, seed),
        _blinded(blind_key, challenge, key),
        nonce_public,
        challenge,
    )


class DealerKeys(NamedTuple):
    """The two secrets to deal, and the public key of the second."""

    seed: int
    mask_secret: int
    mask_public: bytes


def checked(
    parameters: Parameters,
    dealer: str,
    mask_public: bytes,
    commitments: dict[str, bytes],
    seed_proof: bytes,
    key_proof: bytes,
    nonce_public: bytes,
) -> Dealing:
    """A published dealing, verified. Raises SecureAggregationError, naming the dealer, if it proves nothing."""
    seed, key = _numbers(seed_proof), _numbers(key_proof)
    if len(seed) != parameters.threshold or len(key) != parameters.threshold or max(*seed, *key) >= ORDER:
        raise SecureAggregationError(f"{dealer} proves shares of another threshold than {parameters.threshold}")
    challenge = _challenge(parameters, dealer, mask_public, nonce_public, commitments)
    if not proves(key[0], nonce_public, challenge, mask_public):
        raise SecureAggregationError(f"{dealer} has not shared the key that it advertised")
    return Dealing(dealer, commitments, seed, key, nonce_public, challenge)


def packed(coefficients: Sequence[int]) -> bytes:
    """Coefficients as they go over the wire."""
    return b"".join(number.to_bytes(NUMBER_BYTES, "big") for number in coefficients)


def _numbers(data: bytes) -> tuple[int, ...]:
    return tuple(
        int.from_bytes(data[start : start + NUMBER_BYTES], "big") for start in range(0, len(data), NUMBER_BYTES)
    )


def _polynomial(secret: int | None, parameters: Parameters) -> list[int]:
    """Random coefficients; `secret` is the constant term, which is never 0 when it is drawn."""
    first = 1 + secrets.randbelow(ORDER - 1) if secret is None else secret
    return [first, *(secrets.randbelow(ORDER) for _ in range(parameters.threshold - 1))]


def _blinded(blind: Sequence[int], challenge: int, secret: Sequence[int]) -> tuple[int, ...]:
    return tuple((r + challenge * f) % ORDER for r, f in zip(blind, secret, strict=True))


def _commit(parameters: Parameters, dealer: str, holder: str, secret: Secret, blind: int, share: int) -> bytes:
    names = (dealer, holder, secret)
    values = (number.to_bytes(NUMBER_BYTES, "big") for number in (blind, share))
    parts = (b"fedclaw share commitment v2", parameters.digest, *(name.encode() for name in names), *values)
    return hashlib.sha256(framed(*parts)).digest()


def _challenge(
    parameters: Parameters, dealer: str, mask_public: bytes, nonce_public: bytes, commitments: dict[str, bytes]
) -> int:
    """A number in [1, ORDER), made from 512 bits and so within 2^-128 of uniform."""
    held = (part for holder in sorted(commitments) for part in (holder.encode(), commitments[holder]))
    parts = (b"fedclaw dealing v1", parameters.digest, dealer.encode(), mask_public, nonce_public, *held)
    return 1 + int.from_bytes(hashlib.sha512(framed(*parts)).digest(), "big") % (ORDER - 1)
