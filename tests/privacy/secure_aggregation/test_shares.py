"""Shamir's sharing: exact from any threshold of shares, nothing from fewer.

That a wrong share never gets this far is `test_disputes` and `test_secure_sum.TestWrongShares`.
"""

import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation.curve import ORDER
from fedclaw.privacy.secure_aggregation.dealing import evaluate, recover


def split(secret: int, threshold: int, points: list[int]) -> dict[int, int]:
    coefficients = [secret, *(secrets.randbelow(ORDER) for _ in range(threshold - 1))]
    return {x: evaluate(coefficients, x) for x in points}


def number(found: bytes) -> int:
    assert len(found) == 32
    return int.from_bytes(found, "big")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, ORDER - 1), st.integers(1, 12), st.integers(0, 8))
def test_any_threshold_of_shares_recovers(secret: int, threshold: int, spare: int) -> None:
    points = secrets.SystemRandom().sample(range(1, 100), threshold + spare)
    shares = split(secret, threshold, points)
    chosen = secrets.SystemRandom().sample(sorted(shares.items()), threshold)
    assert number(recover(dict(chosen), threshold)) == secret
    assert number(recover(shares, threshold)) == secret


@pytest.mark.parametrize("secret", [0, 1, ORDER - 1])
def test_the_smallest_and_largest_secrets_fit(secret: int) -> None:
    assert number(recover(split(secret, 2, [1, 2]), 2)) == secret


def test_by_hand() -> None:
    # f(x) = 5 + 3 x: f(1) = 8, f(3) = 14.
    assert evaluate([5, 3], 1) == 8
    assert evaluate([5, 3], 3) == 14
    assert number(recover({1: 8, 3: 14}, 2)) == 5


def test_the_modulus_is_a_prime() -> None:
    exponent, twos = ORDER - 1, 0
    while exponent % 2 == 0:
        exponent, twos = exponent // 2, twos + 1
    for _ in range(40):  # Miller and Rabin
        value = pow(secrets.randbelow(ORDER - 3) + 2, exponent, ORDER)
        chain = [value := pow(value, 2, ORDER) if step else value for step in range(twos)]
        assert chain[0] == 1 or ORDER - 1 in chain


def test_fewer_shares_say_nothing() -> None:
    """One share of two: for every secret there is a second share that leads to it."""
    y = split(secrets.randbelow(ORDER), 2, [1])[1]
    for secret in (0, 1, ORDER - 1):
        # The line through (0, secret) and (1, y).
        assert number(recover({1: y, 2: (2 * y - secret) % ORDER}, 2)) == secret


def test_too_few() -> None:
    shares = split(7, 3, [1, 2])
    with pytest.raises(SecureAggregationError, match="2 shares are too few: 3 recover"):
        recover(shares, 3)


def test_a_wrong_share_gives_another_secret() -> None:
    """Nothing here tells: it is why each share is checked before it comes here."""
    shares = split(7, 3, [1, 2, 3])
    assert number(recover({**shares, 2: shares[2] ^ 1}, 3)) != 7
