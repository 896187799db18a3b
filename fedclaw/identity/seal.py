"""Updates sealed to the aggregator: HPKE for a fresh key, then AES-256-GCM in segments under it.

TLS may end at a hospital's proxy; the seal ends in the aggregation process. A sealed message is

    header  = magic (4 bytes) || HPKE one-shot ciphertext of a random 32-byte content key, info = context
    segment = AES-256-GCM(content key, nonce = zeros(7) || index (4) || last (1), aad = SHA-256(context)), tag last

with context = label || suite || binding. HPKE is RFC 9180 (base mode, HKDF-SHA256, AES-256-GCM); the KEM is X25519 or
the hybrid ML-KEM-768 + X25519. The segments follow the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizar 2015,
"Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", section 6): a segment that is
changed, moved, repeated, dropped or cut off does not open. The nonce starts at zero because the key is used once.

What it promises: only the holder of the federation's seal key reads the plaintext, and it opens only under the
`Binding` it was sealed for. What it does not: base-mode HPKE does not prove who sealed. The sender is
known by its TLS certificate, and the server puts that certificate's name into the binding it opens with.
"""

import base64
import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from fedclaw.errors import SealError

SealSuite = Literal["x25519", "mlkem768-x25519"]
SUITES: tuple[SealSuite, ...] = get_args(SealSuite)

Buffer = bytes | bytearray | memoryview

SEGMENT = 1 << 20
"""Plaintext bytes of every segment but the last."""

TAG = 16
_MAGIC = b"FCS1"
_LABEL = b"fedclaw seal v1"
_CONTENT_KEY = 32
_MLKEM_SEED = 64
_MLKEM_PUBLIC = 1184
_MAX_SEGMENTS = 1 << 32
_KEMS = {"x25519": KEM.X25519, "mlkem768-x25519": KEM.MLKEM768_X25519}


@dataclass(frozen=True)
class Binding:
    """What a sealed message belongs to; it opens under exactly these values and no others."""

    federation: str
    run_id: int
    group_id: str
    message_id: str
    site: str

    def to_bytes(self) -> bytes:
        """Each field preceded by its length: two different bindings never give the same bytes."""
        fields = (self.federation, str(self.run_id), self.group_id, self.message_id, self.site)
        return b"".join(_prefixed(value.encode()) for value in fields)


@dataclass(frozen=True)
class SealKeys:
    """A fresh key pair, raw: x25519 as in RFC 7748; the hybrid as ML-KEM (seed or public key) || X25519."""

    public: bytes
    private: bytes = field(repr=False)


@dataclass(frozen=True)
class Sealed:
    """A message under seal. `segments` may be walked once; each item is made when it is asked for.

    `size` counts the header and all segments, `plain_size` the plaintext, both in bytes.
    """

    header: bytes
    segments: Iterator[bytes]
    size: int
    plain_size: int


def generate(suite: SealSuite) -> SealKeys:
    """A fresh key pair of `suite`."""
    _check_suite(suite)
    classical = X25519PrivateKey.generate()
    public, private = classical.public_key().public_bytes_raw(), classical.private_bytes_raw()
    if suite == "x25519":
        return SealKeys(public, private)
    quantum = MLKEM768PrivateKey.generate()
    return SealKeys(quantum.public_key().public_bytes_raw() + public, quantum.private_bytes_raw() + private)


def header_size(suite: SealSuite) -> int:
    """Length in bytes of every header of `suite`."""
    _check_suite(suite)
    return len(_MAGIC) + _KEMS[suite].enc_length() + _CONTENT_KEY + TAG


def segment_count(plain_size: int) -> int:
    """Segments of a message of `plain_size` bytes; an empty message has one, so that it is authenticated too."""
    return max(1, -(-plain_size // SEGMENT))


def sealed_size(suite: SealSuite, plain_size: int) -> int:
    """Bytes of header and segments of a message of `plain_size` bytes."""
    return header_size(suite) + plain_size + TAG * segment_count(plain_size)


class Sealer:
    """Seals to one public key. Holds no secret; may be shared between threads."""

    def __init__(self, suite: SealSuite, public_key: bytes) -> None:
        """Raises SealError if `public_key` is not a raw public key of `suite`."""
        _check_suite(suite)
        self._suite: SealSuite = suite
        self._key = _public_key(suite, public_key)

    def __repr__(self) -> str:
        return f"Sealer({self._suite!r})"

    def seal(self, parts: Sequence[Buffer], binding: Binding) -> Sealed:
        """Seal the concatenation of `parts` without copying them; do not change them while segments are drawn.

        Raises SealError if there is more than STREAM's counter can number (4 PiB).
        """
        views = [view for view in (memoryview(part).cast("B") for part in parts) if len(view)]
        plain_size = sum(map(len, views))
        if segment_count(plain_size) > _MAX_SEGMENTS:
            raise SealError(f"{plain_size} bytes are too many for one sealed message")
        context = _context(self._suite, binding)
        content_key = secrets.token_bytes(_CONTENT_KEY)
        header = _MAGIC + _hpke(self._suite).encrypt(content_key, self._key, info=context)
        return Sealed(
            header=header,
            segments=_segments(views, segment_count(plain_size), AESGCM(content_key), _digest(context)),
            size=sealed_size(self._suite, plain_size),
            plain_size=plain_size,
        )


class Opener:
    """Opens what was sealed to one key pair. May be shared between threads; a stream may not."""

    def __init__(self, suite: SealSuite, private_key: bytes) -> None:
        """Raises SealError if `private_key` is not a raw private key of `suite`."""
        _check_suite(suite)
        self._suite: SealSuite = suite
        self._key = _private_key(suite, private_key)

    def __repr__(self) -> str:
        return f"Opener({self._suite!r})"

    def open(
        self, header: Buffer, binding: Binding, plain_size: int, memory: Callable[[int], memoryview] | None = None
    ) -> "OpenStream":
        """Start opening a message of `plain_size` bytes, as its sender claims; memory for it is taken with the first.

        `memory` gives a writable buffer of so many bytes, of any content (None: a fresh one). The caller bounds
        `plain_size` first. Raises SealError if the header was not sealed to this key under `binding`.
        """
        if plain_size < 0 or segment_count(plain_size) > _MAX_SEGMENTS:
            raise SealError(f"a sealed message cannot hold {plain_size} bytes")
        wrong_size = len(header) != header_size(self._suite)
        if wrong_size or bytes(header[: len(_MAGIC)]) != _MAGIC:
            raise SealError(f"the seal's header is damaged or of another suite than {self._suite}")
        context = _context(self._suite, binding)
        try:
            content_key = _hpke(self._suite).decrypt(bytes(header[len(_MAGIC) :]), self._key, info=context)
        except InvalidTag:
            raise SealError(
                f"the seal does not open for site {binding.site!r}, message {binding.message_id!r}: it was tampered "
                "with, or sealed for another message, run, site or federation"
            ) from None
        return OpenStream(AESGCM(content_key), _digest(context), plain_size, memory or fresh_buffer)


class OpenStream:
    """Decrypts segments, in order, into one buffer; nothing of it is handed out before all have opened."""

    def __init__(self, cipher: AESGCM, aad: bytes, plain_size: int, memory: Callable[[int], memoryview]) -> None:
        self._cipher = cipher
        self._aad = aad
        self._size = plain_size
        self._memory = memory
        self._count = segment_count(plain_size)
        self._index = 0
        self._plain = memoryview(b"")
        self._failed = False

    def feed(self, segment: Buffer) -> None:
        """Open the next segment. Raises SealError, and then the whole message is lost."""
        index = self._index
        if self._failed or index >= self._count:
            self._failed = True
            raise SealError(f"segment {index + 1} of a sealed message of {self._count} is one too many")
        start = index * SEGMENT
        expected = min(SEGMENT, self._size - start)
        if len(segment) != expected + TAG:
            self._failed = True
            raise SealError(
                f"segment {index + 1} of {self._count} has {len(segment)} bytes instead of {expected + TAG}"
            )
        if index == 0:
            # Not before something came.
            self._plain = self._memory(self._size)
        target = self._plain[start : start + expected]
        try:
            self._cipher.decrypt_into(_nonce(index, index + 1 == self._count), segment, self._aad, target)
        except InvalidTag:
            self._failed = True
            raise SealError(
                f"segment {index + 1} of {self._count} does not open: tampered with, out of order or cut off"
            ) from None
        self._index = index + 1

    def finish(self) -> memoryview:
        """The plaintext, as writable bytes. Raises SealError unless every segment has opened."""
        if self._failed:
            raise SealError("a segment of the sealed message did not open")
        if self._index != self._count:
            raise SealError(f"the sealed message is cut off: {self._index} of {self._count} segments arrived")
        return self._plain


def fresh_buffer(size: int) -> memoryview:
    """`size` bytes of any content. Their pages are touched, and so taken, only as they are written."""
    return np.empty(size, dtype=np.uint8).data


def encode_key(raw: bytes) -> str:
    """A raw key as base64 text."""
    return base64.b64encode(raw).decode()


def decode_key(text: str) -> bytes:
    """Back from base64. Raises SealError without repeating the text."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise SealError("a seal key is not valid base64") from None


def _segments(views: list[memoryview], count: int, cipher: AESGCM, aad: bytes) -> Iterator[bytes]:
    chunks = _chunks(views)
    for index in range(count):
        yield cipher.encrypt(_nonce(index, index + 1 == count), next(chunks, b""), aad)


def _chunks(views: list[memoryview]) -> Iterator[Buffer]:
    """The concatenation of `views` in pieces of SEGMENT bytes; copied only where a piece spans two views."""
    pending = bytearray()
    for view in views:
        start = 0
        if pending:
            start = min(SEGMENT - len(pending), len(view))
            pending += view[:start]
            if len(pending) < SEGMENT:
                continue
            yield pending
            pending = bytearray()
        whole = start + (len(view) - start) // SEGMENT * SEGMENT
        for offset in range(start, whole, SEGMENT):
            yield view[offset : offset + SEGMENT]
        pending += view[whole:]
    if pending:
        yield pending


def _nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(11, "big") + (b"\x01" if last else b"\x00")


def _context(suite: SealSuite, binding: Binding) -> bytes:
    return _prefixed(_LABEL) + _prefixed(suite.encode()) + binding.to_bytes()


def _digest(context: bytes) -> bytes:
    return hashlib.sha256(context).digest()


def _prefixed(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _hpke(suite: SealSuite) -> Suite:
    return Suite(_KEMS[suite], KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _check_suite(suite: str) -> None:
    if suite not in SUITES:
        raise SealError(f"no seal suite is called {suite!r}; there are {', '.join(SUITES)}")


def _public_key(suite: SealSuite, raw: bytes) -> X25519PublicKey | MLKEM768X25519PublicKey:
    try:
        if suite == "x25519":
            return X25519PublicKey.from_public_bytes(raw)
        quantum = MLKEM768PublicKey.from_public_bytes(raw[:_MLKEM_PUBLIC])
        return MLKEM768X25519PublicKey(quantum, X25519PublicKey.from_public_bytes(raw[_MLKEM_PUBLIC:]))
    except ValueError:
        raise SealError(f"the federation's public seal key is not one of the suite {suite}") from None


def _private_key(suite: SealSuite, raw: bytes) -> X25519PrivateKey | MLKEM768X25519PrivateKey:
    try:
        if suite == "x25519":
            return X25519PrivateKey.from_private_bytes(raw)
        quantum = MLKEM768PrivateKey.from_seed_bytes(raw[:_MLKEM_SEED])
        return MLKEM768X25519PrivateKey(quantum, X25519PrivateKey.from_private_bytes(raw[_MLKEM_SEED:]))
    except ValueError:
        raise SealError(f"the private seal key is not one of the suite {suite}") from None


def public_of(suite: SealSuite, private_key: bytes) -> bytes:
    """The raw public key that belongs to a raw private key. Raises SealError for a wrong key."""
    _private_key(suite, private_key)
    classical = X25519PrivateKey.from_private_bytes(private_key[-32:]).public_key().public_bytes_raw()
    if suite == "x25519":
        return classical
    return MLKEM768PrivateKey.from_seed_bytes(private_key[:_MLKEM_SEED]).public_key().public_bytes_raw() + classical
