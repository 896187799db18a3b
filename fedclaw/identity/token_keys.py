"""Keys that stay in a token (an HSM, a smart card, SoftHSM), reached through PKCS#11.

A key is named by a PKCS#11 URI (RFC 7512):

    pkcs11:token=fedclaw;object=release?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/fedclaw/pin

`module-path` may be left to the environment variable FEDCLAW_PKCS11_MODULE. The PIN comes from a file that only its
owner may read (pin-source=file:PATH), or from an environment variable (pin-source=env:NAME; FEDCLAW_PKCS11_PIN if the
URI names none). A PIN in the URI (pin-value) is refused: a command line is no secret.

`WrappingKey` is an AES-256 key that wraps data keys (`fedclaw.identity.data_keys`); `SigningKey` is an ECDSA P-384 key
that signs bundles. Each operation opens a session of its own: a process needs few, and a token that was taken out and
put back works on.
"""

import hashlib
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_der_public_key

from fedclaw.errors import EncryptionError, ProvisionError, UsageError
from fedclaw.identity import pki

MODULE_VARIABLE = "FEDCLAW_PKCS11_MODULE"
PIN_VARIABLE = "FEDCLAW_PKCS11_PIN"
SCHEME = "pkcs11:"
_NONCE = 12
_TAG_BITS = 128
_KEY_ID = 16
_CURVE = "secp384r1"
_PATH = frozenset({"token", "serial", "object", "id", "type", "manufacturer", "model"})
_QUERY = frozenset({"module-path", "pin-source"})
_TYPES = frozenset({"secret-key", "private", "public"})
_SEARCHED = frozenset({"token", "serial", "object", "id"})

_lock = threading.Lock()
"""A process logs in to a token once; so one operation at a time."""


@dataclass(frozen=True)
class TokenUri:
    """Where a key is. `text` is the URI without a secret: there is none in it."""

    text: str
    token: str | None
    serial: bytes | None
    label: str | None
    id: bytes | None
    module: str
    pin_source: str
    base: Path = field(default=Path(), compare=False)
    """Where relative paths in it start."""

    @classmethod
    def parse(cls, text: str, base: Path = Path()) -> "TokenUri":
        """Read a PKCS#11 URI. Raises UsageError."""
        path, _, query = text.removeprefix(SCHEME).partition("?")
        found, asked = _attributes(path, ";"), _attributes(query, "&")
        if "pin-value" in found or "pin-value" in asked:
            # The URI is not repeated: it holds the PIN.
            raise UsageError(
                "a PKCS#11 URI holds no PIN here: put it into a file of mode 0600 (pin-source=file:PATH) or an "
                f"environment variable (pin-source=env:NAME, or {PIN_VARIABLE})"
            )
        if not text.startswith(SCHEME) or found.keys() - _PATH or asked.keys() - _QUERY:
            odd = ", ".join(sorted((found.keys() - _PATH) | (asked.keys() - _QUERY)))
            raise UsageError(
                f"{text} is not a PKCS#11 URI that is understood here{f' ({odd})' if odd else ''}; it is written "
                "pkcs11:token=LABEL;object=LABEL?module-path=FILE&pin-source=file:PATH"
            )
        if not _SEARCHED & {"object", "id"} & found.keys() or not {"token", "serial"} & found.keys():
            raise UsageError(f"{text} names no key: a PKCS#11 URI here has token= (or serial=) and object= (or id=)")
        if found.get("type", "secret-key") not in _TYPES:
            raise UsageError(f"{text}: type= is one of {', '.join(sorted(_TYPES))}")
        return cls(
            text,
            _text(found.get("token")),
            None if "serial" not in found else unquote_to_bytes(found["serial"]),
            _text(found.get("object")),
            None if "id" not in found else unquote_to_bytes(found["id"]),
            unquote(asked.get("module-path", "")),
            unquote(asked.get("pin-source", "")),
            base,
        )

    @contextmanager
    def session(self, *, writing: bool = False) -> Iterator[tuple[ModuleType, Any]]:
        """The module `pkcs11` and a session that is logged in to the token.

        Raises EncryptionError, which says what is missing; what the token fails at inside the block as well.
        """
        pkcs11 = _library()
        module, pin = self._module(), self._pin()
        with _lock:
            try:
                chosen = {"token_label": self.token, "token_serial": self.serial}
                token = pkcs11.lib(module).get_token(**{name: value for name, value in chosen.items() if value})
                with token.open(rw=writing, user_pin=pin) as session:
                    yield pkcs11, session
            except pkcs11.exceptions.PKCS11Error as error:
                raise EncryptionError(f"{self.text}: {_in_words(pkcs11, error, module)}") from None

    @property
    def search(self) -> dict[str, Any]:
        """What the key is searched by."""
        return {name: value for name, value in (("label", self.label), ("id", self.id)) if value is not None}

    def _module(self) -> str:
        module = self.module or os.environ.get(MODULE_VARIABLE, "")
        if not module:
            raise EncryptionError(
                f"{self.text}: no PKCS#11 module is named; add ?module-path=FILE to the URI, or set {MODULE_VARIABLE} "
                "(SoftHSM's is libsofthsm2.so)"
            )
        return str(self.base / module)

    def _pin(self) -> str:
        kind, _, rest = (self.pin_source or f"env:{PIN_VARIABLE}").partition(":")
        if kind == "env":
            if (pin := os.environ.get(rest)) is None:
                raise EncryptionError(f"{self.text}: the environment variable {rest}, which holds the PIN, is not set")
            return pin
        if kind != "file":
            raise UsageError(f"{self.text}: pin-source= is file:PATH or env:NAME")
        try:
            return pki.read_private(self.base / rest, "the PIN of a token").decode().strip("\r\n")
        except (ProvisionError, UnicodeDecodeError) as error:
            reason = str(error) if isinstance(error, ProvisionError) else f"{rest} does not hold a PIN as text"
            raise EncryptionError(reason) from None


def _attributes(text: str, separator: str) -> Mapping[str, str]:
    pairs = (part.partition("=") for part in text.split(separator) if part)
    return {name: value for name, _, value in pairs}


def _text(value: str | None) -> str | None:
    return None if value is None else unquote(value)


def _library() -> ModuleType:
    try:
        import pkcs11
        import pkcs11.exceptions
        import pkcs11.util.ec
    except ImportError as error:
        raise UsageError("python-pkcs11 is not installed; install it with: pip install 'fedclaw[hsm]'") from error
    return pkcs11


def _in_words(pkcs11: ModuleType, error: Exception, module: str) -> str:
    """What the token could not do. Its own words may be empty; never a PIN."""
    kinds = pkcs11.exceptions
    if isinstance(error, kinds.NoSuchToken):
        return "there is no such token"
    if isinstance(error, kinds.NoSuchKey):
        return "the token holds no such key"
    if isinstance(error, kinds.MultipleObjectsReturned):
        return "the token holds several such keys; name one by id="
    if isinstance(error, kinds.PinIncorrect | kinds.PinLenRange | kinds.PinInvalid):
        return "the token refuses the PIN"
    if isinstance(error, kinds.PinLocked):
        return "the token is locked after too many wrong PINs; its security officer unlocks it"
    if "loading" in str(error):
        return f"{module} cannot be loaded as a PKCS#11 module"
    return f"the token failed ({type(error).__name__})"


@dataclass(frozen=True)
class WrappingKey:
    """A key-encryption key in a token: `fedclaw.identity.data_keys.KeyEncryptionKey`."""

    uri: TokenUri
    id: bytes
    """Of the key's label and CKA_ID, which are the same in each token of a cluster."""

    @classmethod
    def open(cls, uri: TokenUri) -> "WrappingKey":
        """Find the key. Raises EncryptionError."""
        with uri.session() as (pkcs11, session):
            key = _secret_key(pkcs11, session, uri)
            return cls(uri, _key_id(key.label, key.id))

    @classmethod
    def create(cls, uri: TokenUri) -> "WrappingKey":
        """Make the key in the token: AES-256, never to be read. Raises EncryptionError if it is there already."""
        with uri.session(writing=True) as (pkcs11, session):
            _require_absent(session, uri)
            attribute = pkcs11.Attribute
            key = session.generate_key(
                pkcs11.KeyType.AES,
                256,
                store=True,
                **uri.search,
                template={
                    attribute.SENSITIVE: True,
                    attribute.EXTRACTABLE: False,
                    attribute.ENCRYPT: True,
                    attribute.DECRYPT: True,
                },
            )
            return cls(uri, _key_id(key.label, key.id))

    def wrap(self, data_key: bytes) -> bytes:
        """`data_key`, encrypted in the token."""
        nonce = secrets.token_bytes(_NONCE)
        with self.uri.session() as (pkcs11, session):
            how = {
                "mechanism": pkcs11.Mechanism.AES_GCM,
                "mechanism_param": pkcs11.GCMParams(nonce, self.id, _TAG_BITS),
            }
            return nonce + bytes(_secret_key(pkcs11, session, self.uri).encrypt(data_key, **how))

    def unwrap(self, wrapped: bytes) -> bytes:
        """The data key, decrypted in the token. Raises InvalidTag, EncryptionError."""
        nonce, body = wrapped[:_NONCE], wrapped[_NONCE:]
        if len(body) * 8 <= _TAG_BITS:
            raise InvalidTag
        with self.uri.session() as (pkcs11, session):
            key = _secret_key(pkcs11, session, self.uri)
            kinds = pkcs11.exceptions
            how = {
                "mechanism": pkcs11.Mechanism.AES_GCM,
                "mechanism_param": pkcs11.GCMParams(nonce, self.id, _TAG_BITS),
            }
            try:
                return bytes(key.decrypt(body, **how))
            except (kinds.EncryptedDataInvalid, kinds.EncryptedDataLenRange, kinds.GeneralError, kinds.FunctionFailed):
                # What a wrong tag is called differs; SoftHSM says that something general is wrong.
                raise InvalidTag from None


def _secret_key(pkcs11: ModuleType, session: Any, uri: TokenUri) -> Any:
    return session.get_key(object_class=pkcs11.ObjectClass.SECRET_KEY, key_type=pkcs11.KeyType.AES, **uri.search)


def _key_id(label: str, id: bytes) -> bytes:
    return hashlib.sha256(b"fedclaw token key v1\0" + label.encode() + b"\0" + bytes(id)).digest()[:_KEY_ID]


def _require_absent(session: Any, uri: TokenUri) -> None:
    attributes = {"label": "LABEL", "id": "ID"}
    pkcs11 = _library()
    wanted = {getattr(pkcs11.Attribute, attributes[name]): value for name, value in uri.search.items()}
    if any(True for _ in session.get_objects(wanted)):
        raise EncryptionError(f"{uri.text}: the token holds an object of that name already; choose another")


@dataclass(frozen=True)
class SigningKey:
    """An ECDSA P-384 key in a token."""

    uri: TokenUri
    public: pki.PublicKey

    @classmethod
    def open(cls, uri: TokenUri) -> "SigningKey":
        """Find the key. Raises EncryptionError if the token has none of that name on P-384."""
        with uri.session() as (pkcs11, session):
            _private_key(pkcs11, session, uri)
            public = session.get_key(
                object_class=pkcs11.ObjectClass.PUBLIC_KEY, key_type=pkcs11.KeyType.EC, **uri.search
            )
            return cls(uri, _p384(pkcs11.util.ec.encode_ec_public_key(public), uri))

    @classmethod
    def create(cls, uri: TokenUri) -> "SigningKey":
        """Make a key pair in the token, whose private half is never to be read. Raises EncryptionError."""
        with uri.session(writing=True) as (pkcs11, session):
            _require_absent(session, uri)
            attribute, curve = pkcs11.Attribute, pkcs11.util.ec.encode_named_curve_parameters(_CURVE)
            domain = session.create_domain_parameters(pkcs11.KeyType.EC, {attribute.EC_PARAMS: curve}, local=True)
            # Both halves by one name: without an id, one is made, so that they are found together.
            names = {"id": secrets.token_bytes(_KEY_ID), **uri.search}
            public, _ = domain.generate_keypair(
                store=True,
                **names,
                private_template={attribute.SENSITIVE: True, attribute.EXTRACTABLE: False, attribute.SIGN: True},
            )
            return cls(uri, _p384(pkcs11.util.ec.encode_ec_public_key(public), uri))

    @classmethod
    def open_or_create(cls, uri: TokenUri) -> tuple["SigningKey", bool]:
        """The key of that name, and whether it was made now, for there was none. Raises EncryptionError."""
        with uri.session() as (pkcs11, session):
            label = {"label": pkcs11.Attribute.LABEL, "id": pkcs11.Attribute.ID}
            there = any(True for _ in session.get_objects({label[name]: value for name, value in uri.search.items()}))
        return (cls.open(uri), False) if there else (cls.create(uri), True)

    def public_key(self) -> pki.PublicKey:
        """The public half."""
        return self.public

    def sign(self, data: bytes, signature_algorithm: ec.ECDSA = pki.ECDSA) -> bytes:
        """ECDSA with SHA-384 over `data`, DER. Raises EncryptionError if the token fails."""
        digest = hashlib.sha384(data).digest()
        with self.uri.session() as (pkcs11, session):
            raw = bytes(_private_key(pkcs11, session, self.uri).sign(digest, mechanism=pkcs11.Mechanism.ECDSA))
        half = len(raw) // 2
        return encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))


def _private_key(pkcs11: ModuleType, session: Any, uri: TokenUri) -> Any:
    return session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, key_type=pkcs11.KeyType.EC, **uri.search)


def _p384(der: bytes, uri: TokenUri) -> pki.PublicKey:
    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, pki.PublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EncryptionError(f"{uri.text} is not an ECDSA P-384 key")
    return key
