"""Prediction receipts: what a node gives with each answer, and wants to see again with the feedback on it.

A receipt says what was answered, so that no request has to be kept for feedback that may come in weeks. It is a token
in base64url:

    format (1 byte) | key id (4) | content | HMAC-SHA-256 of all before it, its first 16 bytes (RFC 2104, section 5)

The content names the model, the version, when it answered, with which probability this version was chosen, what was
predicted for each row, and, hashed, the request's id, the principal and the routing key. It is not secret from the
client, who knows all of it.

All nodes of a database share the keys. A new key waits for `HANDOVER` seconds before it signs; who checks a receipt has
read the keys since then. An old one checks receipts until the last that it signed is no longer good.
"""

import binascii
import hashlib
import hmac
import math
import secrets
import struct
import time
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pydantic import JsonValue

from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Principal
from fedclaw.serve.state.store import StateStore, StateStoreError, StateUnavailable

HANDOVER = 60.0
"""Seconds."""
_FRESH = 20.0  # Seconds for which the keys that were read are taken for all that there are.
MAX_ROWS = 256
"""A receipt of more rows, or of very long labels, says how many they are, and not what was predicted."""
MAX_LABELS = 255
"""Different labels in one receipt."""
MAX_RECEIPT = 2048
"""Characters of the longest receipt, which is a header."""
_MOST_PREDICTED = 1200  # Bytes, of labels and rows.
_DOCUMENT = "feedback-keys"
_FORMAT = b"\x01"
_KEY_ID, _KEY, _MAC, _HASH = 4, 32, 16, 16
_DAY = 86_400.0
_HEAD = struct.Struct(">IdIB")
_COUNT, _LABELS, _VALUES = range(3)
_NO_LABEL = 255
_LONGEST_LABEL = 255

Predicted = tuple[str | None, ...] | tuple[float | None, ...] | None
"""What was predicted for each row, labels or values, None for a row that was refused; None: the rows were too many."""


@dataclass(frozen=True, slots=True)
class PredictionReceipt:
    """What a receipt says, once it is believed."""

    identity: str
    """The same for all answers to one request id of one principal, for one model: credited once."""
    model: str
    version: str
    issued: int
    """Unix seconds."""
    propensity: float
    rows: int
    predicted: Predicted
    has_values: bool
    """Whether what was predicted are numbers."""
    principal: str
    """The principal's hash, hexadecimal."""
    key: str
    """The routing key's hash, by a secret that stays: the same for the same key, and not to be guessed from a list of
    patients' numbers."""


@dataclass(frozen=True, slots=True)
class _SigningKey:
    identity: bytes
    secret: bytes = field(repr=False)
    since: float
    """When it begins to sign."""
    begun: hmac.HMAC
    """Where each of its codes begins: the key is in it already."""

    def code(self, text: bytes) -> bytes:
        """The first bytes of the text's HMAC-SHA-256."""
        begun = self.begun.copy()
        begun.update(text)
        return begun.digest()[:_MAC]


class ReceiptKeys:
    """The keys of a database, and the receipts that they sign and check. Safe for threads: what is read is replaced as
    a whole."""

    def __init__(self, store: StateStore, *, days: float = 30.0) -> None:
        """Read the keys; make the first one if there is none. Receipts are good for so many `days`. Raises
        StateUnavailable."""
        self._store, self._valid = store, days * _DAY
        if store.read(_DOCUMENT) is None:
            store.swap(_DOCUMENT, None, {"keys": [_new_key(store.now())], "link": secrets.token_hex(_KEY)})
        self.refresh()

    def refresh(self) -> None:
        """Learn of new keys: a process that signs does so a few times a day. Raises StateUnavailable: those known go on
        to serve."""
        self._read_at = time.monotonic()
        _, keys, self._link = self._read()
        self._keys = {key.identity: key for key in keys}

    def rotate(self) -> None:
        """Make a new key, which signs in `HANDOVER` seconds, and drop those whose receipts are all too old.

        Only a control process does this, now and then, as every `days`. Of two that do it together one wins.
        """
        revision, keys, link = self._read()
        now = self._store.now()
        kept = [key for key, after in zip(keys, [*keys[1:], None], strict=True) if self._is_needed(after, now)]
        document: list[JsonValue] = [_as_document(key) for key in kept]
        document.append(_new_key(now + HANDOVER))
        self._store.swap(_DOCUMENT, revision, {"keys": document, "link": link.hex()})
        self.refresh()

    def age(self) -> float:
        """Seconds since the newest key was made to sign; to know when to rotate."""
        return self._store.now() - max(key.since for key in self._keys.values())

    def issue(
        self,
        *,
        model: str,
        version: str,
        request: str,
        principal: str,
        key: str,
        propensity: float,
        rows: int,
        labels: Sequence[str | None] | None = None,
        values: Sequence[float] | None = None,
    ) -> str:
        """The receipt of an answer that leaves now.

        `labels` or `values` (NaN: none) are what was predicted for each row; they are left out where there are more
        than MAX_ROWS, or where the labels are too many or too long for a header.
        """
        now = time.time()
        signing = self._signing(now)
        asked = _hashed_principal(principal)
        kind, predicted = _COUNT, b""
        if labels is not None and len(labels) == rows <= MAX_ROWS:
            kind, predicted = _packed_label(labels[0]) if rows == 1 else _packed_labels(labels)
        elif values is not None and len(values) == rows <= MAX_ROWS:
            kind, predicted = _VALUES, array("f", values).tobytes()
        asking = asked + model.encode() + b"\0" + request.encode("utf-8", "surrogatepass")
        routed = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, key=self._link)
        text = b"".join(
            (
                _FORMAT,
                signing.identity,
                _HEAD.pack(int(now), propensity, rows, kind),
                asked,
                hashlib.sha256(asking).digest()[:_HASH],
                routed.digest(),
                _packed_names(model, version),
                predicted,
            )
        )
        return binascii.b2a_base64(text + signing.code(text), newline=False).translate(_URL, b"=").decode()

    def check(self, receipt: str, principal: Principal) -> PredictionReceipt:
        """What a receipt says that `principal` shows. May ask the database for new keys. Raises ServeRefusal:
        unprocessable if it is none or too old, forbidden if no node of this database gave it to this principal."""
        signed = _decoded(receipt)
        if time.monotonic() - self._read_at > _FRESH:
            with suppress(StateUnavailable):
                self.refresh()
        text, mac = signed[:-_MAC], signed[-_MAC:]
        key = self._keys.get(text[1 : 1 + _KEY_ID])
        if key is None or text[:1] != _FORMAT or not hmac.compare_digest(key.code(text), mac):
            raise _not_yours()
        found = _unpacked(text[1 + _KEY_ID :])
        if found.principal != _hashed_principal(principal.name).hex():
            raise _not_yours()
        if time.time() - found.issued > self._valid:
            raise ServeRefusal("unprocessable", "receipt: it is too old; feedback on that answer is no longer taken")
        return found

    def _read(self) -> tuple[int, list[_SigningKey], bytes]:
        found = self._store.read(_DOCUMENT)
        if found is None:
            raise StateStoreError(
                "the feedback keys were removed from the state store; restart the node to make new ones"
            )
        revision, document = found
        keys, link = _parsed_keys(document)
        return revision, keys, link

    def _signing(self, now: float) -> _SigningKey:
        keys = self._keys
        best: _SigningKey | None = None
        for key in keys.values():
            if best is None or best.since < key.since <= now:
                best = key
        assert best is not None
        return best

    def _is_needed(self, after: _SigningKey | None, now: float) -> bool:
        """Whether a key signs, or what it signed may be shown: until the receipts given when the next took over end."""
        return after is None or now - after.since <= self._valid + HANDOVER


_URL = bytes.maketrans(b"+/", b"-_")


def _not_yours() -> ServeRefusal:
    # One sentence for a forgery and for another's receipt: nobody learns which it is.
    return ServeRefusal("forbidden", "receipt: it was not given to you by this service")


def _malformed() -> ServeRefusal:
    return ServeRefusal("unprocessable", "receipt: it is not whole; send what the answer's fedclaw-prediction said")


@lru_cache(maxsize=4096)
def _hashed_principal(principal: str) -> bytes:
    return hashlib.sha256(b"principal\0" + principal.encode("utf-8", "surrogatepass")).digest()[:_HASH]


@lru_cache(maxsize=1024)
def _packed_names(model: str, version: str) -> bytes:
    names, answered = model.encode(), version.encode()
    return bytes((len(names), len(answered))) + names + answered


@lru_cache(maxsize=1024)
def _packed_label(label: str | None) -> tuple[int, bytes]:
    return _packed_labels([label])


def _packed_labels(labels: Sequence[str | None]) -> tuple[int, bytes]:
    """Different labels, each behind its length, and for each row which of them."""
    known: dict[str, int] = {}
    rows = bytearray()
    for label in labels:
        if label is None:
            rows.append(_NO_LABEL)
        else:
            place = known.setdefault(label, len(known))
            if place >= MAX_LABELS:
                return _COUNT, b""
            rows.append(place)
    texts = [label.encode("utf-8", "surrogatepass") for label in known]
    if any(len(text) > _LONGEST_LABEL for text in texts):
        return _COUNT, b""
    packed = b"".join((bytes((len(known),)), *(bytes((len(text),)) + text for text in texts), rows))
    return (_LABELS, packed) if len(packed) <= _MOST_PREDICTED else (_COUNT, b"")


def _decoded(receipt: str) -> bytes:
    try:
        if not isinstance(receipt, str) or len(receipt) > MAX_RECEIPT or set(receipt) & set("+/=\n\r "):
            raise _malformed()
        plain = receipt.encode("ascii").translate(_FROM_URL)
        signed = binascii.a2b_base64(plain + b"=" * (-len(plain) % 4), strict_mode=True)
    except (ValueError, UnicodeEncodeError):
        raise _malformed() from None
    if len(signed) < 1 + _KEY_ID + _HEAD.size + _MAC:
        raise _malformed()
    return signed


_FROM_URL = bytes.maketrans(b"-_", b"+/")


def _unpacked(content: bytes) -> PredictionReceipt:
    """A content whose signature was right."""
    issued, propensity, rows, kind = _HEAD.unpack_from(content)
    at = _HEAD.size
    principal, request, key = content[at : at + 16], content[at + 16 : at + 32], content[at + 32 : at + 40]
    model_size, version_size = content[at + 40], content[at + 41]
    at += 42
    model = content[at : at + model_size].decode()
    version = content[at + model_size : at + model_size + version_size].decode()
    return PredictionReceipt(
        identity=request.hex(),
        model=model,
        version=version,
        issued=issued,
        propensity=propensity,
        rows=rows,
        predicted=_unpacked_predictions(kind, rows, content[at + model_size + version_size :]),
        has_values=kind == _VALUES,
        principal=principal.hex(),
        key=key.hex(),
    )


def _unpacked_predictions(kind: int, rows: int, text: bytes) -> Predicted:
    if kind == _COUNT:
        return None
    if kind == _VALUES:
        return tuple(value if math.isfinite(value) else None for value in array("f", text))
    labels: dict[int, str] = {}
    at = 1
    for place in range(text[0]):
        size = text[at]
        labels[place] = text[at + 1 : at + 1 + size].decode("utf-8", "surrogatepass")
        at += 1 + size
    return tuple(labels.get(place) for place in text[at : at + rows])


def _new_key(since: float) -> dict[str, JsonValue]:
    return {"id": secrets.token_hex(_KEY_ID), "secret": secrets.token_hex(_KEY), "since": since}


def _as_document(key: _SigningKey) -> dict[str, JsonValue]:
    return {"id": key.identity.hex(), "secret": key.secret.hex(), "since": key.since}


def _parsed_keys(document: Mapping[str, Any]) -> tuple[list[_SigningKey], bytes]:
    return [_from_document(key) for key in document["keys"]], bytes.fromhex(document["link"])


def _from_document(plain: Mapping[str, Any]) -> _SigningKey:
    secret = bytes.fromhex(plain["secret"])
    begun = hmac.new(secret, digestmod=hashlib.sha256)
    return _SigningKey(bytes.fromhex(plain["id"]), secret, float(plain["since"]), begun)
