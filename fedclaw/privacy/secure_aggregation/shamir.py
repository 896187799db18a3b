"""Secret sharing (Shamir 1979, "How to Share a Secret") of numbers modulo the order of P-256 (`curve`).

A secret is the constant term of a random polynomial of degree threshold - 1. A holder's share is the polynomial's value
at the holder's x, from 1. Any `threshold` shares recover the secret, and fewer are independent of it. This module only
evaluates and interpolates: `dealing` draws the polynomials and proves that a share lies on one.
"""

from collections.abc import Mapping, Sequence
from itertools import islice

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation.curve import ORDER

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

    Every share has to be right; it is checked before it gets here (`dealing.ShareProof`). Raises SecureAggregationError
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
