"""STREAM: authenticated encryption of a long message in segments (Hoang, Reyhanitabar, Rogaway, Vizar 2015).

"Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", section 6, with AES-256-GCM. The nonce of a
segment is its number and whether it is the last: a segment that is changed, moved, repeated, dropped or cut off does
not open. The nonce has no random part, because a key serves one message: `fedclaw.identity.seal` and
`fedclaw.identity.at_rest` derive a fresh one for each.
"""

TAG = 16
"""Bytes that a segment is longer than its plaintext."""
MAX_SEGMENTS = 1 << 32


def nonce(index: int, last: bool) -> bytes:
    """The nonce of segment `index`, from 0: 7 zero bytes, the index (4), and 1 for the last segment."""
    return index.to_bytes(11, "big") + (b"\x01" if last else b"\x00")


def segments_of(plain_size: int, segment: int) -> int:
    """How many segments hold `plain_size` bytes. An empty message has one, so that it is authenticated too."""
    return max(1, -(-plain_size // segment))
