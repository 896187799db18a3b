"""The keys under which files are encrypted at rest: data keys, and what they are wrapped by.

A *data key* (32 random bytes) encrypts; each file's own key is derived from one (`fedclaw.identity.at_rest`). It is
stored in the file itself, wrapped by a *key-encryption key*, which the setting `key` names:

    file:PATH       32 bytes as base64, as `openssl rand -base64 32` writes them, in a file that only its owner may read
    env:NAME        the same text in an environment variable
    pkcs11:...      an AES-256 key in a token, as a PKCS#11 URI (RFC 7512); it never leaves the token

A wrapped data key of the first two is

    salt (32) || AES-256-GCM(HKDF-SHA256(key, salt, "fedclaw wrap v1"), nonce = zeros(12), data key, aad = key id)

and in a token, whose one key wraps many, nonce (12, random) || AES-256-GCM(key, nonce, data key, aad = key id). NIST
SP 800-38D, section 8.3, then allows 2^32 of them; a process takes one.
"""

import base64
import os
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedclaw.errors import EncryptionError, ProvisionError, UsageError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.identity import pki
from fedclaw.protocol.frozen import Frozen

KEY = 32
KEY_ID = 16
_SALT = 32
_ZERO_NONCE = bytes(12)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_KEPT = 256
"""Data keys that a keyring remembers, which saves it the token."""

KeySetting = str | tuple[str, ...]
"""One key by its source, or several: the first encrypts, each of them opens."""


class KeyEncryptionKey(Protocol):
    """What wraps data keys."""

    @property
    def id(self) -> bytes:
        """16 bytes that name it in the files that it opens, and tell nothing of it."""

    def wrap(self, data_key: bytes) -> bytes:
        """`data_key`, for whoever has this key. Raises EncryptionError."""

    def unwrap(self, wrapped: bytes) -> bytes:
        """The data key. Raises InvalidTag if it was not wrapped by this key, EncryptionError if the key fails."""


@dataclass(frozen=True)
class SecretKey:
    """A key-encryption key of 32 bytes that this process has."""

    secret: bytes = field(repr=False)

    @property
    def id(self) -> bytes:
        """Derived from the key, so that both ends agree on it."""
        return _derived(self.secret, b"", b"fedclaw key id v1")[:KEY_ID]

    def wrap(self, data_key: bytes) -> bytes:
        """`data_key` under a key of its own."""
        salt = secrets.token_bytes(_SALT)
        return salt + self._cipher(salt).encrypt(_ZERO_NONCE, data_key, self.id)

    def unwrap(self, wrapped: bytes) -> bytes:
        """The data key. Raises InvalidTag."""
        return self._cipher(wrapped[:_SALT]).decrypt(_ZERO_NONCE, wrapped[_SALT:], self.id)

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(_derived(self.secret, salt, b"fedclaw wrap v1"))


def _derived(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), KEY, salt, info).derive(secret)


@dataclass(frozen=True)
class DataKey:
    """A data key, and how files say which it is."""

    secret: bytes = field(repr=False)
    key_id: bytes
    """Of the key-encryption key that wrapped it."""
    wrapped: bytes


class Keyring:
    """Key-encryption keys: the first wraps, each of them unwraps. May be shared between threads."""

    def __init__(self, keys: Sequence[KeyEncryptionKey]) -> None:
        if not keys:
            raise ValueError("a keyring has a key")
        self._ordered = tuple(keys)
        self._keys = {key.id: key for key in reversed(keys)}
        self._first = keys[0]
        self._lock = threading.Lock()
        self._fresh: DataKey | None = None
        self._known: OrderedDict[tuple[bytes, bytes], bytes] = OrderedDict()

    def __repr__(self) -> str:
        return f"Keyring({self.id.hex()!r})"

    def joined(self, other: "Keyring") -> "Keyring":
        """This ring with the keys of another behind its own."""
        return Keyring([*self._ordered, *other._ordered])

    @property
    def id(self) -> bytes:
        """Of the key that wraps."""
        return self._first.id

    def data_key(self) -> DataKey:
        """The data key for what is written now: one for as long as the keyring lives. Raises EncryptionError."""
        with self._lock:
            if self._fresh is None:
                self._fresh = self._wrapped(secrets.token_bytes(KEY))
            return self._fresh

    def rewrapped(self, secret: bytes) -> DataKey:
        """A data key that another key had wrapped, wrapped by this keyring's first. Raises EncryptionError."""
        with self._lock:
            return self._wrapped(secret)

    def opens(self, key_id: bytes) -> bool:
        """Whether the key of that name is on the ring."""
        return key_id in self._keys

    def unwrap(self, key_id: bytes, wrapped: bytes, origin: str) -> bytes:
        """The data key in a file's header. Raises EncryptionError naming `origin`."""
        if (key := self._keys.get(key_id)) is None:
            known = ", ".join(name.hex() for name in self._keys)
            raise EncryptionError(
                f"{origin} is encrypted under the key {key_id.hex()}, and the key given is {known}; give the key that "
                "it was encrypted with (or its header is damaged: restore the file from a backup)"
            )
        with self._lock:
            if (known_key := self._known.get((key_id, wrapped))) is not None:
                return known_key
            try:
                secret = key.unwrap(wrapped)
            except (InvalidTag, ValueError):
                raise EncryptionError(
                    f"{origin} does not open: the wrapped key in its header is damaged or of another key; restore the "
                    "file from a backup"
                ) from None
            if len(secret) != KEY:
                raise EncryptionError(f"{origin} does not open: its data key has {len(secret)} bytes instead of {KEY}")
            self._known[key_id, wrapped] = secret
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
            return secret

    def _wrapped(self, secret: bytes) -> DataKey:
        made = DataKey(secret, self._first.id, self._first.wrap(secret))
        self._known[made.key_id, made.wrapped] = secret
        return made


def load_keyring(setting: KeySetting, base: Path = Path()) -> Keyring:
    """The keys that a setting names; a relative path starts at `base`. Raises UsageError or EncryptionError."""
    sources = (setting,) if isinstance(setting, str) else setting
    if not sources:
        raise UsageError("key=[] names no key: file:PATH, env:NAME or pkcs11:...")
    return Keyring([_load(source, base) for source in sources])


def _load(source: str, base: Path) -> KeyEncryptionKey:
    scheme, _, rest = source.partition(":")
    if scheme == "file" and rest:
        return SecretKey(_from_file(base / Path(rest).expanduser()))
    if scheme == "env" and rest:
        return SecretKey(_from_environment(rest))
    if scheme == "pkcs11":
        from fedclaw.identity.token_keys import TokenUri, WrappingKey

        return WrappingKey.open(TokenUri.parse(source, base))
    # A key that was given in the place of its source is not repeated.
    raise UsageError(
        "a key is named by where it is: key=file:PATH, key=env:NAME (an environment variable) or key='pkcs11:...'; "
        "the key itself never stands on a command line"
    )


def _from_file(path: Path) -> bytes:
    try:
        content = pki.read_private(path, "an encryption key")
    except ProvisionError as error:
        raise EncryptionError(str(error)) from None
    return _decoded(content, str(path))


def _from_environment(name: str) -> bytes:
    if not _VARIABLE.match(name):
        raise UsageError("key=env:NAME takes the name of an environment variable, not the key itself")
    if (text := os.environ.get(name)) is None:
        raise EncryptionError(f"the environment variable {name}, which holds the encryption key, is not set")
    return _decoded(text.encode(errors="replace"), f"the environment variable {name}")


def _decoded(text: bytes, origin: str) -> bytes:
    """32 bytes out of base64; no detail of what is wrong, which could quote the key."""
    try:
        secret = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        secret = b""
    if len(secret) != KEY:
        raise EncryptionError(
            f"{origin} is not an encryption key: {KEY} random bytes as base64, as python -m fedclaw.encryption new-key "
            f"or openssl rand -base64 {KEY} makes them"
        )
    return secret


def new_key_file(path: Path) -> bytes:
    """Write a fresh key that only its owner can read; returns its id. Raises EncryptionError if the file exists."""
    if path.exists() or path.is_symlink():
        raise EncryptionError(f"{path} exists already; what it encrypts would be lost with it, choose another name")
    secret = secrets.token_bytes(KEY)
    write_atomic(path, base64.b64encode(secret) + b"\n", PRIVATE_MODE)
    return SecretKey(secret).id


class EncryptionSettings(Frozen):
    """`encryption` in conf/*.yaml and site.yaml."""

    key: KeySetting | None = None
    """null: files are kept as they are."""

    def keyring(self, base: Path = Path()) -> Keyring | None:
        """The keys, if there are any; a relative path starts at `base`. Raises UsageError or EncryptionError."""
        return None if self.key is None else load_keyring(self.key, base)
