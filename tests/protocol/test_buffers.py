"""Joined buffers read like the bytes that they would be."""

from hypothesis import given
from hypothesis import strategies as st

from fedclaw.protocol.buffers import JoinedBuffers


@given(st.lists(st.binary(max_size=9), max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_reading_them_is_reading_their_concatenation(parts: list[bytes], offset: int, length: int) -> None:
    joined, whole = JoinedBuffers(parts), b"".join(parts)
    assert joined.size == len(whole)
    assert b"".join(joined.read(offset, length)) == whole[offset : offset + length]
