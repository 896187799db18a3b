"""Masks: AES-256-CTR keystreams read as little-endian 32-bit words, added to a vector modulo 2^32.

A key makes one mask and nothing else, so the counter starts at 0. The vector is masked block by block, with all masks
of a block before the next: a block of the vector, of keystream and of zeros fits into the cache, and no memory beside
the vector grows with its length.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from fedclaw.errors import SecureAggregationError

KEY_BYTES = 32
BLOCK = 1 << 16
"""Words in a block: 256 KiB."""

Words = NDArray[np.uint32]


def apply_masks(vector: Words, added: Sequence[bytes], subtracted: Sequence[bytes]) -> None:
    """Add the masks of the keys `added` to `vector` and subtract those of `subtracted`, in place, modulo 2^32.

    `vector`: (d,) uint32, contiguous and writable. Raises SecureAggregationError if it is not.
    """
    check_vector(vector)
    if not vector.flags.writeable:
        raise SecureAggregationError("a vector that is masked in place must be writable")
    streams = [(_keystream(key), np.add) for key in added] + [(_keystream(key), np.subtract) for key in subtracted]
    words = min(BLOCK, len(vector))
    zeros = memoryview(bytes(4 * words))
    mask = np.empty(words, dtype="<u4")
    for start in range(0, len(vector), BLOCK):
        part = vector[start : start + BLOCK]
        block = mask[: len(part)]
        raw = block.view(np.uint8).data
        for stream, combine in streams:
            stream.update_into(zeros[: len(raw)], raw)
            combine(part, block, out=part)


def check_vector(vector: Any, length: int | None = None) -> Words:
    """`vector`, if it is (length,) uint32 and contiguous. Raises SecureAggregationError."""
    if not isinstance(vector, np.ndarray) or vector.dtype != np.uint32 or vector.ndim != 1:
        raise SecureAggregationError("a vector of a secure sum has one dimension and is of type uint32")
    if not vector.flags.c_contiguous:
        raise SecureAggregationError("a vector of a secure sum must lie in one piece")
    if length is not None and len(vector) != length:
        raise SecureAggregationError(f"the vector has {len(vector)} numbers, the sum is over {length}")
    return vector


def _keystream(key: bytes) -> CipherContext:
    if len(key) != KEY_BYTES:
        raise SecureAggregationError(f"the key of a mask has {KEY_BYTES} bytes, not {len(key)}")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
