"""The public keys that tokens are signed with: a JSON Web Key Set (RFC 7517) from a file or an https URL, kept fresh.

A key is used with one algorithm of the allow-list only, and only if its own type, curve, size, `alg`, `use` and
`key_ops` agree (RFC 8725, section 3.1). Symmetric and private keys in a set are never used.
"""

import errno
import json
import logging
import os
import ssl
import stat
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn, Protocol
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from fedclaw.errors import UsageError

log = logging.getLogger(__name__)

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey

MAX_BYTES = 256 * 1024
"""Of a key set; those of the large identity providers have 2 to 10 kB."""
MAX_KEYS = 100
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192
MIN_RSA_EXPONENT = 65537
MAX_KEY_ID = 256
"""Characters of a `kid`."""
ASK_EVERY = 10.0
"""Seconds between two refreshes that unknown keys of tokens ask for: whoever makes up key ids causes no more."""
RETRY_AFTER, MAX_RETRY_AFTER = 5.0, 60.0
"""Seconds until the next attempt after a failed one, and after several."""
_KINDS: dict[str, tuple[str, str | None]] = {
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
    "RS256": ("RSA", None),
    "RS384": ("RSA", None),
    "RS512": ("RSA", None),
    "PS256": ("RSA", None),
    "PS384": ("RSA", None),
    "PS512": ("RSA", None),
}
"""The key type and the curve of each algorithm that may be allowed: none is symmetric, and none is `none`."""
_SECRET_MEMBERS = frozenset({"d", "k", "p", "q", "dp", "dq", "qi", "oth"})


def check_algorithms(algorithms: Iterable[str]) -> None:
    """Raises UsageError if one of them is no public-key signature that is supported here."""
    if odd := sorted(set(algorithms) - _KINDS.keys()):
        raise UsageError(f"tokens cannot be checked with {', '.join(odd)}: choose among {', '.join(sorted(_KINDS))}")


@dataclass(frozen=True, eq=False)
class KeySet:
    """The usable keys of a set. Compared by identity: a new object means that keys changed."""

    keys: Mapping[tuple[str | None, str], PublicKey]
    """By key id (None: the key has none) and algorithm."""
    skipped: tuple[str, ...] = ()
    """Why other keys of the set are not used; no secrets in it."""

    def find(self, identity: str | None, algorithm: str) -> PublicKey | None:
        """The key of that id; for a token that names none, the only key of its algorithm. None: there is no such."""
        if identity is not None:
            return self.keys.get((identity, algorithm))
        suitable = [key for (_, own), key in self.keys.items() if own == algorithm]
        return suitable[0] if len(suitable) == 1 else None


def parse_key_set(document: bytes, algorithms: Iterable[str]) -> KeySet:
    """The keys of `document` that one of `algorithms` can use. Raises ValueError, which says what is wrong.

    A key that is of no use here is passed over (RFC 7517, section 5). An empty set is valid: no token is then.
    """
    listed = _listed(document)
    keys: dict[tuple[str | None, str], PublicKey] = {}
    skipped = []
    for place, item in enumerate(listed):
        try:
            for name, key in _usable(item, algorithms).items():
                if keys.setdefault(name, key) != key:
                    raise ValueError(f"two different keys have the key id {name[0]!r}")
        except _Unusable as reason:
            skipped.append(f"key {place + 1}: {reason}")
    if listed and not keys:
        raise ValueError(f"none of its keys can be used ({'; '.join(skipped[:3])})")
    return KeySet(keys, tuple(skipped))


class _Unusable(Exception):
    """A key that is passed over."""


def _listed(document: bytes) -> list[Any]:
    if len(document) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        content = json.loads(document)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    listed = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(listed, list) or len(listed) > MAX_KEYS:
        raise ValueError(f"it is not a JSON Web Key Set: an object with a list `keys` of at most {MAX_KEYS}")
    return listed


def _usable(item: object, algorithms: Iterable[str]) -> dict[tuple[str | None, str], PublicKey]:
    if not isinstance(item, dict):
        raise _Unusable("not an object")
    if _SECRET_MEMBERS & item.keys():
        raise _Unusable("it is a secret key, which belongs in no key set")
    identity = item.get("kid")
    if identity is not None and (not isinstance(identity, str) or not 0 < len(identity) <= MAX_KEY_ID):
        raise _Unusable("its key id is not a short text")
    _check_use(item)
    suitable = [name for name in algorithms if _suits(item, name)]
    if not suitable:
        raise _Unusable("its type, curve and alg suit no algorithm that is allowed")
    return {(identity, name): _load(item, name) for name in suitable}


def _check_use(item: dict[str, Any]) -> None:
    operations = item.get("key_ops", ["verify"])
    if item.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise _Unusable("it is not for signatures")


def _suits(item: dict[str, Any], algorithm: str) -> bool:
    kind, curve = _KINDS[algorithm]
    return item.get("kty") == kind and item.get("crv") == curve and item.get("alg", algorithm) == algorithm


def _load(item: dict[str, Any], algorithm: str) -> PublicKey:
    try:
        key: object = jwt.PyJWK(item, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError):
        raise _Unusable("its numbers are not those of a key") from None
    if isinstance(key, rsa.RSAPublicKey):
        _check_rsa(key)
    elif not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise _Unusable("it is not a public key")
    return key


def _check_rsa(key: rsa.RSAPublicKey) -> None:
    if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS or key.public_numbers().e < MIN_RSA_EXPONENT:
        raise _Unusable(f"an RSA key needs {MIN_RSA_BITS} to {MAX_RSA_BITS} bits and an exponent of 65537 or more")


@dataclass(frozen=True)
class Fetched:
    """A key set's bytes."""

    document: bytes
    fresh_for: float | None = None
    """Seconds for which the provider says that it need not be fetched again."""


class KeySource(Protocol):
    """Where a key set comes from."""

    place: str
    """For messages: a path or a URL."""

    def fetch(self) -> Fetched:
        """Get it now. Raises OSError or ValueError."""

    def changed(self) -> bool:
        """Whether it is known to differ from what was fetched last."""


class KeyFile:
    """A key set in a file, which may be replaced while the node runs."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self._path = path
        self._seen: tuple[int, ...] | None = None

    def fetch(self) -> Fetched:
        """Read the file. Raises OSError."""
        self._seen = self._stamp()
        # A pipe must not make the node wait for a writer.
        with open(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            return Fetched(file.read(MAX_BYTES + 1))

    def changed(self) -> bool:
        """Whether another file is there than the one that was read."""
        return self._stamp() != self._seen

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


class KeyUrl:
    """A key set at an https URL. No redirect is followed, and the server's certificate is always verified."""

    def __init__(self, url: str, ca: Path | None = None, timeout: float = 5.0, whole: float = 10.0) -> None:
        """`ca` replaces the system's authorities. `timeout` is for each step, `whole` for everything, in seconds.

        Raises UsageError.
        """
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
            raise UsageError("the URL of a key set is https://HOST/PATH, without a name or password in it")
        self.place = url
        self._timeout, self._whole = timeout, whole
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise UsageError(f"{ca} holds no certificate authority in PEM form: {error.strerror}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _NoRedirect())

    def fetch(self) -> Fetched:
        """Get it. Raises OSError or ValueError."""
        deadline = time.monotonic() + self._whole
        request = urllib.request.Request(self.place, headers={"accept": "application/json"})  # noqa: S310
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                document = b""
                while chunk := answer.read1(MAX_BYTES + 1):
                    document += chunk
                    if len(document) > MAX_BYTES:
                        raise ValueError(f"it has more than {MAX_BYTES} bytes")
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"it took more than {self._whole:g} s")
                return Fetched(document, _max_age(answer.headers.get("cache-control", "")))
        except HTTPException as error:
            raise OSError(f"no HTTP answer ({type(error).__name__})") from None

    def changed(self) -> bool:
        """Never known beforehand."""
        return False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key set comes from the URL that the operator named, and from nowhere that an answer points to."""

    def redirect_request(self, *_: object) -> NoReturn:
        raise OSError("it answers with a redirect, which is not followed: set the final URL")


def _max_age(cache_control: str) -> float | None:
    for part in cache_control.lower().split(","):
        name, _, value = part.strip().partition("=")
        if name == "max-age" and value.isascii() and value.isdigit():
            return float(value[:9])
    return None


class KeyKeeper:
    """Holds the current keys and refreshes them in a thread of its own; `close` ends it.

    `current` is replaced as a whole and only when keys differ. After a failed refresh the old keys stay for `keep`
    seconds from the last good one; then there are none, until a refresh succeeds.
    """

    def __init__(
        self,
        source: KeySource,
        algorithms: Iterable[str],
        interval: float = 300.0,
        keep: float = 86_400.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`interval` is the most, in seconds, between two refreshes from a URL; a file is looked at each second."""
        self._source, self._algorithms = source, tuple(algorithms)
        self._interval, self._keep, self._clock = interval, keep, clock
        self.current: KeySet | None = None
        self._good_at = self._due = self._asked_at = float("-inf")
        self._retry = RETRY_AFTER
        self._asked: Future[None] | None = None
        self._lock = threading.Lock()
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedclaw-token-keys", daemon=True)

    def start(self) -> None:
        """Get the keys, then keep them fresh. A provider that cannot be reached is asked again; no token is good until
        then. Raises UsageError if a file has no key set."""
        problem = self.refresh()
        if problem and isinstance(self._source, KeyFile):
            raise UsageError(f"no keys for tokens from {problem}")
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=15)

    def ask(self) -> Future[None] | None:
        """Have the keys refreshed soon, because a token names one that is not there. None: that was done just now.

        The future is done when the refresh is; all who ask meanwhile share it.
        """
        with self._lock:
            if self._asked is not None:
                return self._asked
            if self._clock() < self._asked_at + ASK_EVERY:
                return None
            self._asked_at = self._clock()
            self._asked = Future()
            self._wake.set()
            return self._asked

    def step(self) -> None:
        """What the thread does each second: refresh what is due, and drop keys that are too old."""
        with self._lock:
            asked = self._asked
        if asked or self._source.changed() or self._clock() >= self._due:
            self.refresh()
        if self._clock() > self._good_at + self._keep and self.current is not None:
            log.error("the keys from %s are older than %g s: no token is accepted", self._source.place, self._keep)
            self.current = None
        if asked:
            with self._lock:
                self._asked = None
            with suppress(Exception):
                asked.set_result(None)

    def refresh(self) -> str | None:
        """Get the keys now. What went wrong, with the source's name; None: nothing."""
        try:
            fetched = self._source.fetch()
            found = parse_key_set(fetched.document, self._algorithms)
        except (OSError, ValueError) as error:
            return self._failed(getattr(error, "strerror", None) or str(error))
        self._good_at, self._retry = self._clock(), RETRY_AFTER
        fresh_for = self._interval if fetched.fresh_for is None else min(fetched.fresh_for, self._interval)
        self._due = self._good_at + max(fresh_for, ASK_EVERY)
        if self.current is None or self.current.keys != found.keys:
            self._replace(found)
        return None

    def _replace(self, found: KeySet) -> None:
        for reason in found.skipped:
            log.warning("%s: not used: %s", self._source.place, reason)
        log.info("%s: %d keys for tokens", self._source.place, len(found.keys))
        self.current = found

    def _failed(self, reason: str) -> str:
        problem = f"{self._source.place}: {reason}"
        self._due = self._clock() + self._retry
        self._retry = min(2 * self._retry, MAX_RETRY_AFTER)
        if self.current is not None:
            left = max(0.0, self._good_at + self._keep - self._clock())
            log.warning("keys for tokens not refreshed from %s; the old ones stay for %.0f s", problem, left)
        else:
            log.error("no keys for tokens from %s; no token is accepted", problem)
        return problem

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(1.0)
            self._wake.clear()
            if self._closed.is_set():
                return
            try:
                self.step()
            except Exception:
                # A thread that ended here would leave keys in use for good, withdrawn ones too.
                log.exception("the keys for tokens could not be looked after")
