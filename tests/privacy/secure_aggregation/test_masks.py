"""Masks are AES-256-CTR keystreams, added modulo 2^32, whatever the length; nothing large is made on the way."""

import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation.keys import BLOCK, apply_masks

ONE, OTHER = b"1" * 32, b"2" * 32


def keystream(key: bytes, length: int) -> NDArray[np.uint32]:
    """The same in one go, by the book: the encryption of zeros, four bytes a word, the lowest first."""
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    stream = encryptor.update(bytes(4 * length)) + encryptor.finalize()
    words = [int.from_bytes(stream[4 * index : 4 * index + 4], "little") for index in range(length)]
    return np.array(words, dtype=np.uint32)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 5, 1023, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]), st.integers(0, 2**32 - 1))
def test_equal_to_the_plain_keystream(length: int, fill: int) -> None:
    vector = np.full(length, fill, dtype=np.uint32)
    apply_masks(vector, [ONE], [OTHER])
    expected = np.full(length, fill, dtype=np.uint32) + keystream(ONE, length) - keystream(OTHER, length)
    assert np.array_equal(vector, expected)


def test_what_is_added_can_be_subtracted() -> None:
    vector = np.arange(1000, dtype=np.uint32)
    apply_masks(vector, [ONE, OTHER], [])
    assert not np.array_equal(vector, np.arange(1000))
    apply_masks(vector, [], [OTHER, ONE])
    assert np.array_equal(vector, np.arange(1000))


def test_no_temporary_grows_with_the_vector() -> None:
    vector = np.zeros(64 * BLOCK, dtype=np.uint32)
    apply_masks(vector[:1], [ONE], [])
    tracemalloc.start()
    try:
        apply_masks(vector, [ONE] * 3, [OTHER] * 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 4 * BLOCK


@pytest.mark.parametrize(
    "vector",
    [np.zeros(4, np.int32), np.zeros(4, ">u4"), np.zeros((2, 2), np.uint32), np.zeros(8, np.uint32)[::2], [1, 2]],
)
def test_what_is_no_vector(vector: NDArray[np.uint32]) -> None:
    with pytest.raises(SecureAggregationError, match="vector of a secure sum"):
        apply_masks(vector, [ONE], [])


def test_a_vector_that_cannot_be_written() -> None:
    vector = np.zeros(4, np.uint32)
    vector.flags.writeable = False
    with pytest.raises(SecureAggregationError, match="must be writable"):
        apply_masks(vector, [ONE], [])


def test_a_key_of_the_wrong_size() -> None:
    with pytest.raises(SecureAggregationError, match="has 32 bytes, not 16"):
        apply_masks(np.zeros(4, np.uint32), [bytes(16)], [])
