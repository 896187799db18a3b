"""Who asks: OAuth 2.0 bearer tokens (RFC 6750) that are signed JWTs (RFC 7519), checked as RFC 8725 and RFC 9068 ask.

A token names its key by an id; nothing else in its header leads to a key (`jku`, `x5u`, `jwk` and `x5c` are never
looked at), and a header that demands more (`crit`) is refused. The key set says which algorithm a key is for.
"""

import asyncio
import json
import re
import time
from base64 import urlsafe_b64decode
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NoReturn

import jwt

from fedclaw.errors import UsageError
from fedclaw.identity.names import is_loopback
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Principal
from fedclaw.serve.security.key_sets import MAX_KEY_ID, KeyKeeper, KeySet, PublicKey, check_algorithms
from fedclaw.serve.security.rate_limits import FailureLimiter

REALM = "fedclaw"
MAX_TOKEN_BYTES = 8192
MAX_SUBJECT = 256
MAX_CACHED = 10_000
"""Verified tokens that are remembered; about 700 bytes each."""
TYPES = frozenset({"at+jwt", "application/at+jwt", "jwt"})
"""`typ` of an access token (RFC 9068, section 2.1); JWT as well, which many providers still write."""
ANONYMOUS = Principal("anonymous", frozenset({"predict:*", "feedback:*", "admin:*"}))
_BEARER = re.compile(rb"(?i:bearer) +([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+)")
_SCHEME = re.compile(rb"(?i:bearer)(?: |$)")
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")
_LATEST = 2**53
"""No later time is exact in JSON; it also keeps arithmetic with times finite."""
_WAIT = 12.0


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token has to be."""

    issuer: str
    audience: str
    """This node's name among the audiences of a token."""
    algorithms: tuple[str, ...] = ("ES256", "RS256")
    leeway: float = 30.0
    """Seconds by which clocks may differ."""
    bound: bool = False
    """Whether a token must be bound to the client's certificate (RFC 8705); one that is bound is held to it anyway."""

    def __post_init__(self) -> None:
        check_algorithms(self.algorithms)
        if not self.issuer or not self.audience or not self.algorithms:
            raise UsageError("tokens need an issuer, an audience and at least one algorithm")


class UnknownSigningKey(ServeRefusal):
    """A token's key is not in the key set, as far as is known now."""

    refresh: Future[None] | None = None
    """Done when the key set is fresh; None: it is."""


class Authenticator:
    """Tells from a request's Authorization header who asks.

    A verified token is remembered under its SHA-256 until it expires, so that the signature is checked once. What is
    remembered belongs to one key set and goes with it. Refused tokens are not remembered: no stranger can displace
    anything.
    """

    def __init__(
        self,
        rules: TokenRules,
        keeper: KeyKeeper,
        failures: FailureLimiter | None = None,
        max_cached: int = MAX_CACHED,
        observe: Callable[[bool], None] | None = None,
    ) -> None:
        """`failures` limits how many tokens that are not accepted an address may send; `observe` is told of each token
        whether it was known."""
        self._rules, self._keeper, self._failures, self._max_cached = rules, keeper, failures, max_cached
        self._known = _Known(None)
        self._observe = observe

    @property
    def ready(self) -> bool:
        """Whether there are keys."""
        return self._keeper.current is not None

    def start(self) -> None:
        """Get the keys and keep them fresh. Raises UsageError."""
        self._keeper.start()

    def close(self) -> None:
        """Stop keeping keys fresh."""
        self._keeper.close()

    def authenticate(
        self, header: bytes | None, certificate: str | None = None, address: str | None = None
    ) -> Principal:
        """Who asks, by the value of the Authorization header; never waits.

        `certificate` is the thumbprint of the certificate that the client proved to have (`tls.thumbprint`), `address`
        its IP address. Raises ServeRefusal.
        """
        if header is None:
            raise refused("A bearer token is needed")
        known = self._known
        if known.keys is not self._keeper.current:
            known = self._known = _Known(self._keeper.current)
        if len(header) > MAX_TOKEN_BYTES:
            raise invalid("The token is too long")
        digest = sha256(header).digest()
        verified = known.cache.get(digest)
        hit = verified is not None and verified.until > time.time()
        if self._observe is not None:
            self._observe(hit)
        if verified is None or not hit:
            verified = self._verify_limited(header, known, digest, address)
        known.use(digest)
        if verified.certificate is not None and verified.certificate != certificate:
            raise invalid("The token is bound to another client certificate")
        return verified.principal

    async def admit(
        self, header: bytes | None, certificate: str | None = None, address: str | None = None
    ) -> Principal:
        """As `authenticate`, but a token whose key is unknown waits for one refresh of the key set."""
        try:
            return self.authenticate(header, certificate, address)
        except UnknownSigningKey as refusal:
            if refusal.refresh is None:
                raise
            await asyncio.wait([asyncio.wrap_future(refusal.refresh)], timeout=_WAIT)
        return self.authenticate(header, certificate, address)

    def _verify_limited(self, header: bytes, known: "_Known", digest: bytes, address: str | None) -> "_Verified":
        if self._failures is None or address is None:
            return self._verify(header, known, digest)
        self._failures.check(address)
        try:
            return self._verify(header, known, digest)
        except ServeRefusal as refusal:
            # A key that may be there in a moment is nobody's failure: at a rotation all clients meet it at once.
            rotating = isinstance(refusal, UnknownSigningKey) and refusal.refresh is not None
            if refusal.code == "unauthenticated" and not rotating:
                self._failures.failed(address)
            raise

    def _verify(self, header: bytes, known: "_Known", digest: bytes) -> "_Verified":
        if known.keys is None:
            raise ServeRefusal("unavailable", "The keys of the token issuer are not available yet", retry_after=5)
        token = _token(header)
        jose, claims = (_json(part) for part in token.split(".")[:2])
        key, algorithm = self._key(known.keys, jose)
        _check_times(claims)
        self._check(token, key, algorithm)
        verified = _Verified(
            Principal(_subject(claims), _scopes(claims)),
            _confirmation(claims, self._rules.bound),
            claims["exp"] + self._rules.leeway,
        )
        known.remember(digest, verified, self._max_cached)
        return verified

    def _key(self, keys: KeySet, jose: dict[str, Any]) -> tuple[PublicKey, str]:
        algorithm, kind, identity = jose.get("alg"), jose.get("typ"), jose.get("kid")
        if algorithm not in self._rules.algorithms:
            raise invalid("The token's algorithm is not accepted")
        if not isinstance(kind, str) or kind.lower() not in TYPES:
            raise invalid("The token is not an access token")
        if "crit" in jose or "b64" in jose:
            raise invalid("The token needs an extension that is not supported")
        if identity is not None and (not isinstance(identity, str) or len(identity) > MAX_KEY_ID):
            raise invalid("The token is malformed")
        key = keys.find(identity, algorithm)
        if key is None:
            self._unknown_key()
        return key, algorithm

    def _unknown_key(self) -> NoReturn:
        refusal = UnknownSigningKey(
            "unauthenticated",
            "The token's signing key is not known",
            challenge=challenge("invalid_token", "The token's signing key is not known"),
        )
        refusal.refresh = self._keeper.ask()
        raise refusal

    def _check(self, token: str, key: PublicKey, algorithm: str) -> None:
        try:
            jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._rules.audience,
                issuer=self._rules.issuer,
                leeway=self._rules.leeway,
                options={"require": ["exp", "sub", "aud", "iss"]},
            )
        except jwt.PyJWTError as error:
            raise invalid(_reason(error)) from None


class NoAuthentication:
    """Answers everybody who can reach a loopback address, with every scope. For a demo on one machine."""

    ready = True

    def __init__(self, *hosts: str) -> None:
        """`hosts` are the addresses that the node listens on. Raises UsageError unless all are loopback."""
        if not hosts or not all(map(is_loopback, hosts)):
            raise UsageError(
                "without tokens a node listens on a loopback address only (127.0.0.1): "
                "set an issuer, or leave the address at its default"
            )

    def start(self) -> None:
        """Nothing to get."""

    def close(self) -> None:
        """Nothing to stop."""

    def authenticate(
        self, header: bytes | None, certificate: str | None = None, address: str | None = None
    ) -> Principal:
        """The principal `anonymous`; the header is not looked at."""
        return ANONYMOUS

    async def admit(
        self, header: bytes | None, certificate: str | None = None, address: str | None = None
    ) -> Principal:
        """As `authenticate`."""
        return ANONYMOUS


def is_scope(text: str) -> bool:
    """Whether `text` is one scope token (RFC 6749, section 3.3)."""
    return _SCOPE.fullmatch(text) is not None


def only_header(values: Iterable[bytes]) -> bytes | None:
    """The one Authorization header of a request. Raises ServeRefusal if there are two."""
    found = list(values)
    if len(found) > 1:
        raise ServeRefusal("bad_request", "A request has one Authorization header at most")
    return found[0] if found else None


def challenge(error: str | None = None, description: str | None = None, scope: str | None = None) -> str:
    """The value of WWW-Authenticate (RFC 6750, section 3). Nothing in it comes from the request but model names, which
    are scope tokens."""
    parts = {"realm": REALM, "error": error, "error_description": description, "scope": scope}
    return "Bearer " + ", ".join(f'{name}="{value}"' for name, value in parts.items() if value is not None)


def refused(message: str) -> ServeRefusal:
    """A request that says nothing about who asks: the challenge names no error (RFC 6750, section 3.1)."""
    return ServeRefusal("unauthenticated", message, challenge=challenge())


def invalid(message: str) -> ServeRefusal:
    """A token that is not accepted."""
    return ServeRefusal("unauthenticated", message, challenge=challenge("invalid_token", message))


@dataclass(frozen=True, slots=True)
class _Verified:
    principal: Principal
    certificate: str | None
    until: float


class _Known:
    """The tokens that were verified with `keys`; the ones used last stay."""

    __slots__ = ("cache", "keys")

    def __init__(self, keys: KeySet | None) -> None:
        self.keys = keys
        self.cache: OrderedDict[bytes, _Verified] = OrderedDict()

    def use(self, digest: bytes) -> None:
        # Another thread may have dropped it meanwhile.
        with suppress(KeyError):
            self.cache.move_to_end(digest)

    def remember(self, digest: bytes, verified: _Verified, limit: int) -> None:
        self.cache[digest] = verified
        if len(self.cache) > limit:
            self.cache.popitem(last=False)


def _token(header: bytes) -> str:
    found = _BEARER.fullmatch(header)
    if found is None:
        raise invalid("The token is malformed") if _SCHEME.match(header) else refused("A bearer token is needed")
    return found[1].decode("ascii")


def _json(part: str) -> dict[str, Any]:
    """A part of a token. A name that occurs twice, which parsers read differently, makes it malformed."""
    try:
        found = json.loads(
            urlsafe_b64decode(part + "=" * (-len(part) % 4)), object_pairs_hook=_unique, parse_constant=_no_number
        )
    except (ValueError, RecursionError):
        raise invalid("The token is malformed") from None
    if not isinstance(found, dict):
        raise invalid("The token is malformed")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _reason(error: jwt.PyJWTError) -> str:
    for kind, text in _REASONS.items():
        if isinstance(error, kind):
            return text
    return "The token is malformed"


_REASONS: dict[type[jwt.PyJWTError], str] = {
    jwt.ExpiredSignatureError: "The token has expired",
    jwt.ImmatureSignatureError: "The token is not valid yet",
    jwt.InvalidAudienceError: "The token is for another audience",
    jwt.InvalidIssuerError: "The token is from another issuer",
    jwt.MissingRequiredClaimError: "The token lacks a claim: exp, sub, aud and iss are needed",
    jwt.InvalidSignatureError: "The token's signature is wrong",
}


def _subject(claims: dict[str, Any]) -> str:
    """The subject goes into logs, so it is a line of text."""
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT or not subject.isprintable():
        raise invalid("The token's subject is not a short line of text")
    return subject


def _check_times(claims: dict[str, Any]) -> None:
    """Before anybody computes with them: a text, a list or 1e300 is not a time."""
    for name in {"exp", "nbf", "iat"} & claims.keys():
        value = claims[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LATEST:
            raise invalid("A time in the token is not a number of seconds")


def _scopes(claims: dict[str, Any]) -> frozenset[str]:
    """Scopes from `scope` (RFC 9068, section 2.2.3) and, as some providers write them, from `scp` and `roles`."""
    found: list[object] = []
    for name in ("scope", "scp", "roles"):
        value = claims.get(name, "")
        if isinstance(value, str) and name != "roles":
            found += value.split(" ") if value else []
        elif isinstance(value, list):
            found += value
        elif value != "":
            raise invalid("The token's scopes are malformed")
    if not all(isinstance(scope, str) and is_scope(scope) for scope in found):
        raise invalid("The token's scopes are malformed")
    return frozenset(map(str, found))


def _confirmation(claims: dict[str, Any], needed: bool) -> str | None:
    """The thumbprint of the certificate that the token is bound to (RFC 8705, section 3.1). A binding of another kind
    cannot be checked here, so the token is refused, not taken for an unbound one."""
    bound = claims.get("cnf")
    if bound is None:
        if needed:
            raise invalid("The token is not bound to a client certificate")
        return None
    thumbprint = bound.get("x5t#S256") if isinstance(bound, dict) and len(bound) == 1 else None
    if not isinstance(thumbprint, str):
        raise invalid("The token is bound to something that cannot be checked")
    return thumbprint
