"""Updates sealed to the aggregator: HPKE for a session's secret, then AES-256-GCM in segments under a message's key.

TLS may end at a hospital's proxy; the seal ends in the aggregation process. A sealed message is

    session = HPKE one-shot ciphertext of a random 32-byte secret(0), info = label || suite
    header  = magic (4 bytes) || session || index (4) || salt (16) || check (16)
    segment = AES-256-GCM(key, nonce = zeros(7) || segment's index (4) || last (1), aad = SHA-256(context)), tag last

    secret(i + 1) = HKDF-Expand(secret(i), "next"), 32 bytes
    key || check  = HKDF-Expand(secret(index), "message" || salt || context), 32 and 16 bytes

with context = label || suite || binding. HPKE is RFC 9180 (base mode, HKDF-SHA256, AES-256-GCM); the KEM is X25519 or
the hybrid ML-KEM-768 + X25519. The segments are those of `fedclaw.identity.stream`. The nonce starts at zero because
the key is used once: the salt is fresh for each message. `check` commits to the key, so the header alone shows a wrong
binding.

A session serves SESSION_MESSAGES messages of SESSION_SECONDS at most, because the KEM costs more than all the rest of a
small message. Its sealer keeps the secret of the next message only: whoever reads the site's memory learns
nothing of what was sealed before. A header opens by itself, after a restart of either end too.

What it promises: only the holder of the federation's seal key reads the plaintext, and it opens only under the
`Binding` it was sealed for. What it does not: base-mode HPKE does not prove who sealed. The sender is
known by its TLS certificate, and the server puts that certificate's name into the binding it opens with.
"""

import base64
import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fedclaw.errors import SealError
from fedclaw.identity.stream import MAX_SEGMENTS, TAG, nonce, segments_of
from fedclaw.protocol.buffers import Buffer, JoinedBuffers

SealSuite = Literal["x25519", "mlkem768-x25519"]
SUITES: tuple[SealSuite, ...] = get_args(SealSuite)

SEGMENT = 1 << 20
"""Plaintext bytes of every segment but the last."""

SESSION_MESSAGES = 64
SESSION_SECONDS = 60.0
_MAGIC = b"FCS2"
_LABEL = b"fedclaw seal v2"
_EARLIER_MAGIC, _EARLIER_LABEL = b"FCS1", b"fedclaw seal v1"
"""Of the format in which each message had an HPKE ciphertext of its own: magic || HPKE of the key, info = context."""
_KEY = 32
_INDEX = 4
_SALT = 16
_CHECK = 16
_OPEN_SESSIONS = 512
"""Sessions whose secrets an opener keeps, which saves it the KEM."""
_MLKEM_SEED = 64
_MLKEM_PUBLIC = 1184
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


class Sealed:
    """A message under seal. Its segments are made when they are asked for, in any order and by any thread."""

    def __init__(self, header: bytes, plain: JoinedBuffers, cipher: AESGCM, aad: bytes) -> None:
        self.header = header
        self.plain_size = plain.size
        """Bytes of the plaintext."""
        self.count = segment_count(plain.size)
        """How many segments there are."""
        self._plain = plain
        self._cipher = cipher
        self._aad = aad

    @property
    def size(self) -> int:
        """Bytes of the header and all segments."""
        return len(self.header) + self.plain_size + TAG * self.count

    def segment(self, index: int) -> bytes:
        """The sealed segment at `index`, from 0. Its plaintext is copied only where it spans two of the parts."""
        pieces = self._plain.read(index * SEGMENT, SEGMENT)
        plain = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self._cipher.encrypt(nonce(index, index + 1 == self.count), plain, self._aad)

    @property
    def segments(self) -> Iterator[bytes]:
        """All segments, in order."""
        return map(self.segment, range(self.count))


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
    return len(_MAGIC) + _session_size(suite) + _INDEX + _SALT + _CHECK


def segment_count(plain_size: int) -> int:
    """Segments of a message of `plain_size` bytes; an empty message has one, so that it is authenticated too."""
    return segments_of(plain_size, SEGMENT)


class Sealer:
    """Seals to one public key. May be shared between threads."""

    def __init__(self, suite: SealSuite, public_key: bytes) -> None:
        """Raises SealError if `public_key` is not a raw public key of `suite`."""
        _check_suite(suite)
        self._suite: SealSuite = suite
        self._key = _public_key(suite, public_key)
        self._lock = threading.Lock()
        self._session, self._secret, self._index, self._ends = b"", b"", SESSION_MESSAGES, 0.0

    def __repr__(self) -> str:
        return f"Sealer({self._suite!r})"

    def seal(self, parts: Sequence[Buffer], binding: Binding) -> Sealed:
        """Seal the concatenation of `parts` without copying them; do not change them while segments are drawn.

        Raises SealError if there is more than STREAM's counter can number (4 PiB).
        """
        plain = JoinedBuffers(parts)
        if segment_count(plain.size) > MAX_SEGMENTS:
            raise SealError(f"{plain.size} bytes are too many for one sealed message")
        context, salt = _context(self._suite, binding), secrets.token_bytes(_SALT)
        session, index, secret = self._take_secret()
        key, check = _message_key(secret, salt, context)
        header = _MAGIC + session + index.to_bytes(_INDEX, "big") + salt + check
        return Sealed(header, plain, AESGCM(key), _digest(context))

    def _take_secret(self) -> tuple[bytes, int, bytes]:
        """The session, the index and the secret of one message; the secret is kept no longer."""
        with self._lock:
            if self._index >= SESSION_MESSAGES or time.monotonic() >= self._ends:
                self._secret, self._index = secrets.token_bytes(_KEY), 0
                self._session = _hpke(self._suite).encrypt(self._secret, self._key, info=_label(self._suite))
                self._ends = time.monotonic() + SESSION_SECONDS
            taken = self._session, self._index, self._secret
            self._secret, self._index = _next_secret(self._secret), self._index + 1
            return taken


class Opener:
    """Opens what was sealed to one key pair. May be shared between threads; a stream may not."""

    def __init__(self, suite: SealSuite, private_key: bytes) -> None:
        """Raises SealError if `private_key` is not a raw private key of `suite`."""
        _check_suite(suite)
        self._suite: SealSuite = suite
        self._key = _private_key(suite, private_key)
        self._lock = threading.Lock()
        self._sessions: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()
        """By session: the index and the secret of the last message of it that has opened."""

    def __repr__(self) -> str:
        return f"Opener({self._suite!r})"

    def open(
        self, header: Buffer, binding: Binding, plain_size: int, memory: Callable[[int], memoryview] | None = None
    ) -> "OpenStream":
        """Start opening a message of `plain_size` bytes, as its sender claims; memory for it is taken with the first.

        `memory` gives a writable buffer of so many bytes, of any content (None: a fresh one). The caller bounds
        `plain_size` first. Raises SealError if the header was not sealed to this key under `binding`.
        """
        if plain_size < 0 or segment_count(plain_size) > MAX_SEGMENTS:
            raise SealError(f"a sealed message cannot hold {plain_size} bytes")
        raw = bytes(header)
        sizes = {_MAGIC: header_size(self._suite), _EARLIER_MAGIC: len(_EARLIER_MAGIC) + _session_size(self._suite)}
        if len(raw) != sizes.get(raw[: len(_MAGIC)]):
            raise SealError(f"the seal's header is damaged or of another suite than {self._suite}")
        earlier = raw.startswith(_EARLIER_MAGIC)
        context = _context(self._suite, binding, _EARLIER_LABEL if earlier else _LABEL)
        try:
            key = self._decrypt(raw[len(_MAGIC) :], context) if earlier else self._key_of(raw[len(_MAGIC) :], context)
        except InvalidTag:
            raise SealError(
                f"the seal does not open for site {binding.site!r}, message {binding.message_id!r}: it was tampered "
                "with, or sealed for another message, run, site or federation"
            ) from None
        return OpenStream(AESGCM(key), _digest(context), plain_size, memory or fresh_buffer)

    def _decrypt(self, session: bytes, info: bytes) -> bytes:
        return _hpke(self._suite).decrypt(session, self._key, info=info)

    def _key_of(self, header: bytes, context: bytes) -> bytes:
        """The message's key, from its header without the magic. Raises InvalidTag."""
        size = _session_size(self._suite)
        session, salt = header[:size], header[size + _INDEX : -_CHECK]
        index = int.from_bytes(header[size : size + _INDEX], "big")
        if index >= SESSION_MESSAGES:
            # No sealer of ours goes on for so long, and each step costs.
            raise InvalidTag
        with self._lock:
            at, secret = self._sessions.get(session, (SESSION_MESSAGES, b""))
        if at > index:
            at, secret = 0, self._decrypt(session, _label(self._suite))
        for _ in range(at, index):
            secret = _next_secret(secret)
        key, check = _message_key(secret, salt, context)
        if not hmac.compare_digest(check, header[-_CHECK:]):
            raise InvalidTag
        with self._lock:
            self._sessions[session] = index, secret
            self._sessions.move_to_end(session)
            if len(self._sessions) > _OPEN_SESSIONS:
                self._sessions.popitem(last=False)
        return key


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
            self._cipher.decrypt_into(nonce(index, index + 1 == self._count), segment, self._aad, target)
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


def _label(suite: SealSuite, label: bytes = _LABEL) -> bytes:
    return _prefixed(label) + _prefixed(suite.encode())


def _context(suite: SealSuite, binding: Binding, label: bytes = _LABEL) -> bytes:
    return _label(suite, label) + binding.to_bytes()


def _session_size(suite: SealSuite) -> int:
    return _KEMS[suite].enc_length() + _KEY + TAG


def _next_secret(secret: bytes) -> bytes:
    return HKDFExpand(SHA256(), _KEY, b"next").derive(secret)


def _message_key(secret: bytes, salt: bytes, context: bytes) -> tuple[bytes, bytes]:
    """The key of one message, and what shows that it is the one."""
    both = HKDFExpand(SHA256(), _KEY + _CHECK, b"message" + salt + context).derive(secret)
    return both[:_KEY], both[_KEY:]


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
