"""Secret sharing (Shamir 1979, "How to Share a Secret") of 32-byte secrets over the integers modulo a prime.

`threshold` shares of a secret recover it; fewer are independent of it. The modulus is the first prime above
2^256, under which every 32 bytes are a secret, unless another is given.
"""

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice

from fedclaw.errors import SecureAggregationError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

_MAX_ATTEMPTS = 1024
# Subsets that are tried around wrong shares. With 3 wrong ones among 20, of which 13 are needed, every 33rd is right.

Point = tuple[int, int]


@dataclass(frozen=True)
class Share:
    """A point of the polynomial: `x` from 1, and its value, 33 bytes big-endian."""

    x: int
    value: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Raises SecureAggregationError for a value that is no element of the field."""
        if not 1 <= self.x < PRIME or len(self.value) != SHARE_BYTES or int.from_bytes(self.value, "big") >= PRIME:
            raise SecureAggregationError(f"the share at x = {self.x} is malformed")


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[Share]:
    """Shares of `secret` (32 bytes) at the distinct x-coordinates `points`, of which `threshold` recover it.

    Raises SecureAggregationError if there are fewer points than that.
    """
    if len(secret) != SECRET_BYTES:
        raise SecureAggregationError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if not 1 <= threshold <= len(points) or len(set(points)) != len(points):
        raise SecureAggregationError(f"{len(points)} points cannot hold a secret that {threshold} of them recover")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [Share(x, evaluate(coefficients, x).to_bytes(SHARE_BYTES, "big")) for x in points]


def recover(
    shares: Iterable[Share], threshold: int, is_right: Callable[[bytes], bool], prime: int = PRIME
) -> tuple[bytes, tuple[int, ...]]:
    """The secret that `is_right` accepts, and the x-coordinates of the shares that do not lie on its polynomial.

    Raises SecureAggregationError for too few shares, two with one x, or when no subset that was tried is right.
    """
    held = list(shares)
    if len({share.x for share in held}) != len(held):
        raise SecureAggregationError("two shares of one secret come from the same site")
    if len(held) < threshold:
        raise SecureAggregationError(f"{len(held)} shares are too few: {threshold} recover a secret")
    points = [(share.x, int.from_bytes(share.value, "big")) for share in held]
    for subset in islice(_subsets(points, threshold), _MAX_ATTEMPTS):
        weights = _weights(subset, prime)
        value = _interpolate(subset, weights, 0, prime)
        if value >> (8 * SECRET_BYTES) == 0 and is_right(secret := value.to_bytes(SECRET_BYTES, "big")):
            others = (point for point in points if point not in subset)
            return secret, tuple(x for x, y in others if _interpolate(subset, weights, x, prime) != y)
    raise SecureAggregationError(f"no {threshold} of {len(held)} shares fit together")


def _subsets(points: Sequence[Point], size: int) -> Iterator[Sequence[Point]]:
    """The first `size` points, then all subsets of that size if they are few, random ones for ever if not."""
    if math.comb(len(points), size) <= _MAX_ATTEMPTS:
        yield from combinations(points, size)
        return
    yield points[:size]
    draw = secrets.SystemRandom()
    while True:
        yield draw.sample(points, size)


def evaluate(coefficients: Sequence[int], x: int, prime: int = PRIME) -> int:
    """The value at `x` of the polynomial with these coefficients, from the constant term on."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % prime
    return value


def _weights(points: Sequence[Point], prime: int) -> list[int]:
    """y_j / prod_{i != j} (x_j - x_i) for each point j."""
    weights = []
    for x, y in points:
        under = 1
        for other, _ in points:
            if other != x:
                under = under * (x - other) % prime
        weights.append(y * pow(under, -1, prime) % prime)
    return weights


def _interpolate(points: Sequence[Point], weights: Sequence[int], at: int, prime: int) -> int:
    """The value at `at` of the polynomial through `points` (Lagrange): sum_j w_j prod_{i != j} (at - x_i)."""
    total, left = 0, 1
    # total and left are the sum and the product over the points so far; one more factor goes into either.
    for (x, _), weight in zip(points, weights, strict=True):
        total = (total * (at - x) + weight * left) % prime
        left = left * (at - x) % prime
    return total
