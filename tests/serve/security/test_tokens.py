"""Tokens as an attacker would write them, against real keys."""

import asyncio
import hashlib
import hmac
import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from fedclaw.errors import UsageError
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Principal
from fedclaw.serve.security.key_sets import KeyFile, KeyKeeper, parse_key_set
from fedclaw.serve.security.rate_limits import FailureLimiter, Rate, RateTable
from fedclaw.serve.security.tokens import Authenticator, NoAuthentication, TokenRules, only_header
from tests.serve.security.issuer import (
    AUDIENCE,
    ISSUER,
    b64,
    bearer,
    claims,
    ec_key,
    jwk,
    key_set,
    rsa_key,
    signed,
    token,
)

HEADER = {"alg": "ES256", "typ": "at+jwt", "kid": "a"}


class Node:
    """An authenticator over a key file, without its thread: a test says when the file is looked at."""

    def __init__(self, path: Path, rules: TokenRules | None = None, max_cached: int = 100) -> None:
        self.path, self.now = path, 1000.0
        self.keys(jwk(ec_key()), jwk(rsa_key(), "r"))
        self.keeper = KeyKeeper(KeyFile(path), ("ES256", "RS256"), clock=lambda: self.now)
        self.keeper.refresh()
        self.authenticator = Authenticator(rules or TokenRules(ISSUER, AUDIENCE), self.keeper, max_cached=max_cached)

    def keys(self, *keys: dict[str, object]) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_bytes(key_set(*keys))
        fresh.rename(self.path)

    def ask(self, text: str | bytes | None, certificate: str | None = None) -> Principal:
        header = bearer(text) if isinstance(text, str) else text
        return self.authenticator.authenticate(header, certificate)

    def refusal(self, text: str | bytes | None, certificate: str | None = None) -> ServeRefusal:
        with pytest.raises(ServeRefusal) as caught:
            self.ask(text, certificate)
        assert caught.value.code == "unauthenticated"
        assert caught.value.challenge is not None
        assert caught.value.challenge.startswith('Bearer realm="fedclaw"')
        return caught.value


class Fixed:
    """Keys that are there."""

    current = parse_key_set(key_set(jwk(ec_key()), jwk(rsa_key(), "r")), ("ES256", "RS256"))

    def ask(self) -> None:
        return None


HARDENED = Authenticator(TokenRules(ISSUER, AUDIENCE), Fixed())  # type: ignore[arg-type]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "keys.json")


def test_a_good_token_names_who_asks_and_what_for(node: Node) -> None:
    principal = node.ask(token())
    assert principal == Principal("scanner-7", frozenset({"predict:heart", "feedback:heart"}))
    assert principal.may("predict", "heart")
    assert not principal.may("predict", "lung")
    assert node.ask(token(rsa_key(), "r")).name == "scanner-7"
    assert node.ask(token(jose={"typ": "JWT"})).name == "scanner-7"
    assert node.ask(token(jose={"typ": "application/at+jwt"})).name == "scanner-7"
    assert node.ask(b"bEARER  " + token().encode()).name == "scanner-7"


def test_scopes_of_other_providers(node: Node) -> None:
    assert node.ask(token(scope=None, scp=["predict:a", "predict:b"])).scopes == {"predict:a", "predict:b"}
    assert node.ask(token(scope=None, scp="predict:a predict:b")).scopes == {"predict:a", "predict:b"}
    assert node.ask(token(scope="predict:a", roles=["admin:read"])).scopes == {"predict:a", "admin:read"}
    assert node.ask(token(scope=None)).scopes == frozenset()
    for odd in (7, {"predict:a": 1}, True, ["predict:a", 7], ["predict:a predict:b"], "predict:a\npredict:*", [""]):
        assert "malformed" in str(node.refusal(token(scope=odd)))
    assert "malformed" in str(node.refusal(token(roles="admin:read")))


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (None, "needed"),
        (b"", "needed"),
        (b"Basic dXNlcjpwYXNz", "needed"),
        (b"Bearerx a.b.c", "needed"),
        (b"Bearer", "malformed"),
        (b"Bearer ", "malformed"),
        (b"Bearer a.b", "malformed"),
        (b"Bearer a.b.c.d.e", "malformed"),
        (b"Bearer ..", "malformed"),
        (b"Bearer \xff.\xff.\xff", "malformed"),
        (b"Bearer a.b.c, Bearer d.e.f", "malformed"),
        (b"Bearer a.b.c d.e.f", "malformed"),
    ],
)
def test_headers_that_are_no_single_bearer_token(node: Node, header: bytes | None, says: str) -> None:
    refusal = node.refusal(header)
    assert says in str(refusal)
    assert ("error=" in str(refusal.challenge)) == (says == "malformed")


def test_a_good_token_with_anything_about_it_is_refused(node: Node) -> None:
    good = token()
    for odd in (f" {good}x y", f"{good},", f"{good} ", f"{good}\n", f"{good}=", f"{good},{good}", f'"{good}"'):
        node.refusal(odd)
    node.refusal(f"Bearer\t{good}".encode())


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", "", None, 7, ["ES256"], "HS256", "ES384", "PS256"])
def test_algorithms_that_are_not_allowed(node: Node, name: object) -> None:
    text = signed({**HEADER, "alg": name}, claims())
    assert "algorithm" in str(node.refusal(text))
    unsigned = text.rpartition(".")[0]
    for signature in ("", "AAAA"):
        node.refusal(f"{unsigned}.{signature}")
    node.refusal(f"{b64({**HEADER, 'alg': name})}.{b64(claims())}")


def test_an_unsigned_token_is_refused_under_an_allowed_name_too(node: Node) -> None:
    text = f"{b64(HEADER)}.{b64(claims())}"
    for signature in ("AAAA", b64(bytes(64)), b64(bytes(1))):
        assert "signature" in str(node.refusal(f"{text}.{signature}"))
    node.refusal(f"{text}.")


def test_the_public_key_is_no_hmac_secret(node: Node) -> None:
    public = rsa_key().public_key()
    encodings = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(jwk(rsa_key(), "r")).encode(),
    ]
    for secret in encodings:
        for name in ("HS256", "RS256"):
            text = f"{b64({'alg': name, 'typ': 'JWT', 'kid': 'r'})}.{b64(claims())}"
            node.refusal(f"{text}.{b64(hmac.digest(secret, text.encode(), hashlib.sha256))}")


def test_a_key_is_used_with_its_own_algorithm_only(node: Node) -> None:
    """The id of the RSA key with ES256, the id of the EC key with RS256, and another curve's key."""
    for kid, key in (("r", ec_key()), ("a", rsa_key())):
        assert "key is not known" in str(node.refusal(token(key, kid)))
    node.refusal(token(ec_key("other")))
    node.refusal(token(rsa_key(3072), "r"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"exp": time.time() - 3600}, "expired"),
        ({"exp": None}, "lacks"),
        ({"nbf": time.time() + 36_000}, "not valid yet"),
        ({"iat": time.time() + 36_000}, "not valid yet"),
        ({"aud": "another-node"}, "audience"),
        ({"aud": ["x", "y"]}, "audience"),
        ({"aud": []}, "lacks"),
        ({"aud": AUDIENCE.upper()}, "audience"),
        ({"aud": {AUDIENCE: 1}}, "audience"),
        ({"aud": None}, "lacks"),
        ({"iss": "https://evil.example"}, "issuer"),
        ({"iss": ISSUER + "/"}, "issuer"),
        ({"iss": [ISSUER]}, "issuer"),
        ({"iss": None}, "lacks"),
        ({"sub": None}, "lacks"),
        ({"sub": ""}, "subject"),
        ({"sub": "x" * 257}, "subject"),
        ({"sub": "a\nb"}, "subject"),
        ({"sub": "a\x1b[2J"}, "subject"),
        ({"exp": True}, "not a number"),
        ({"exp": "9999999999"}, "not a number"),
        ({"exp": 10**400}, "not a number"),
        ({"exp": 1e300}, "not a number"),
        ({"exp": -1}, "not a number"),
        ({"exp": [1]}, "not a number"),
        ({"exp": {}}, "not a number"),
        ({"nbf": "soon"}, "not a number"),
        ({"nbf": [1]}, "not a number"),
        ({"iat": {}}, "not a number"),
    ],
)
def test_claims_that_are_wrong(node: Node, more: dict[str, object], says: str) -> None:
    refusal = node.refusal(token(**more))
    assert says in str(refusal)
    assert f'error="invalid_token", error_description="{refusal}"' in str(refusal.challenge)
    assert not node.authenticator._known.cache


def test_an_audience_among_several_is_enough(node: Node) -> None:
    assert node.ask(token(aud=["x", AUDIENCE])).name == "scanner-7"


def test_clocks_may_differ_by_the_leeway(node: Node) -> None:
    now = time.time()
    assert node.ask(token(exp=now - 15, nbf=now + 15, iat=now + 15)).name == "scanner-7"
    node.refusal(token(exp=now - 45))
    node.refusal(token(nbf=now + 45))


@pytest.mark.parametrize(
    "body",
    [
        '{"sub": "a", "sub": "admin", %s}',
        '{"sub": "a", "\\u0073ub": "admin", %s}',
        '{"sub": "a", "cnf": {"x": 1, "x": 2}, %s}',
        '{"sub": "a", "x": Infinity, %s}',
        '{"sub": "a", "x": NaN, %s}',
        '{"sub": "a", %s} {}',
        '["a", {%s}]',
        '"%s',
        "",
    ],
)
def test_bodies_that_parsers_read_differently(node: Node, body: str) -> None:
    rest = json.dumps(claims(sub=None))[1:-1]
    assert "malformed" in str(node.refusal(signed(HEADER, body % rest if "%s" in body else body)))


def test_deep_nesting_is_at_worst_refused(node: Node) -> None:
    """How deep a parser goes depends on the interpreter."""
    for end in ("]", ""):
        body = json.dumps(claims())[:-1] + ', "x": ' + "[" * 2500 + end * 2500 + "}"
        with suppress(ServeRefusal):
            node.ask(signed(HEADER, body))
        with suppress(ServeRefusal):
            node.ask(signed(body, claims()))


def test_a_good_body_by_hand_is_accepted(node: Node) -> None:
    """So that the ones above are refused for what they say they are."""
    rest = json.dumps(claims(sub=None))[1:-1]
    assert node.ask(signed(HEADER, f'{{"sub": "a", {rest}}}')).name == "a"


@pytest.mark.parametrize(
    "more",
    [
        {"crit": ["exp"]},
        {"crit": []},
        {"b64": False, "crit": ["b64"]},
        {"b64": True},
        {"typ": "JOSE"},
        {"typ": "dpop+jwt"},
        {"typ": "secevent+jwt"},
        {"typ": None},
        {"typ": 7},
        {"kid": 7},
        {"kid": {"a": "b"}},
        {"kid": "a" * 300},
    ],
)
def test_headers_that_ask_for_something_else(node: Node, more: dict[str, object]) -> None:
    node.refusal(token(jose=more))


@pytest.mark.parametrize(
    "kid",
    [
        "../../../../dev/null",
        "/dev/null",
        "a\0",
        "a'; DROP TABLE keys; --",
        "https://evil.example/k",
        "A",
        " a",
        "",
        "|id",
    ],
)
def test_a_key_id_leads_nowhere_but_into_the_set(node: Node, kid: str) -> None:
    assert "key is not known" in str(node.refusal(token(kid=kid)))


def test_a_key_that_a_token_brings_along_is_not_used(node: Node) -> None:
    own = ec_key("attacker")
    for more in (
        {"jwk": jwk(own, "a")},
        {"jku": "https://evil.example/keys"},
        {"x5u": "https://evil.example/c"},
        {"x5c": ["AAAA"]},
    ):
        assert "signature" in str(node.refusal(token(own, jose=more)))
        assert "key is not known" in str(node.refusal(token(own, "attacker", jose=more)))
        assert node.ask(token(jose=more)).name == "scanner-7"


def test_without_a_key_id_the_only_key_of_the_algorithm_serves(node: Node) -> None:
    assert node.ask(token(kid=None)).name == "scanner-7"
    node.keys(jwk(ec_key()), jwk(ec_key("b"), "b"))
    node.keeper.step()
    node.refusal(token(kid=None))


def test_a_huge_token_is_refused_before_it_is_read(node: Node) -> None:
    assert node.ask(token(x="y" * 5000)).name == "scanner-7"
    assert "too long" in str(node.refusal(token(x="y" * 8192)))
    assert "too long" in str(node.refusal(b"Bearer " + b"a" * 10_000_000))


def test_a_verified_token_is_checked_once_and_until_it_expires(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    text = token(exp=time.time() + 100)
    first = node.ask(text)
    checks: list[object] = []
    monkeypatch.setattr(node.authenticator, "_check", lambda *arguments: checks.append(arguments))
    assert node.ask(text) is first
    assert not checks
    monkeypatch.undo()
    later = time.time() + 131
    monkeypatch.setattr(time, "time", lambda: later)
    # PyJWT has its own clock, which has not moved: what was remembered is not used any more.
    monkeypatch.setattr(node.authenticator, "_check", lambda *arguments: checks.append(arguments))
    node.ask(text)
    assert len(checks) == 1


def test_what_was_verified_does_not_help_a_token_that_is_nearly_the_same(node: Node) -> None:
    good = token()
    node.ask(good)
    head, body, signature = good.split(".")
    for odd in (
        f"{head}.{b64(claims(sub='admin'))}.{signature}",
        f"{head}.{body}.{signature[:-4]}AAAA",
        f"{b64({**HEADER, 'typ': 'JWT'})}.{body}.{signature}",
    ):
        node.refusal(odd)
    assert node.ask(good).name == "scanner-7"


def test_strangers_displace_nothing_and_the_cache_is_bounded(tmp_path: Path) -> None:
    node = Node(tmp_path / "keys.json", max_cached=3)
    good = [token(sub=f"s{i}") for i in range(4)]
    for text in good[:3]:
        node.ask(text)
    held = dict(node.authenticator._known.cache)
    for i in range(50):
        node.refusal(token(ec_key("attacker"), sub=f"x{i}"))
        node.refusal(f"a.b.{i}")
    assert dict(node.authenticator._known.cache) == held
    node.ask(good[0])
    node.ask(good[3])
    left = {verified.principal.name for verified in node.authenticator._known.cache.values()}
    assert left == {"s0", "s2", "s3"}


def test_tokens_of_a_key_that_was_withdrawn_are_refused_at_once(node: Node) -> None:
    old = token()
    node.ask(old)
    node.keys(jwk(ec_key("b"), "b"))
    node.keeper.step()
    assert "key is not known" in str(node.refusal(old))
    assert node.ask(token(ec_key("b"), "b")).name == "scanner-7"
    # The same id with another key behind it is another key.
    node.keys(jwk(ec_key("c"), "b"))
    node.keeper.step()
    assert "signature" in str(node.refusal(token(ec_key("b"), "b")))


def test_keys_that_stay_the_same_keep_what_was_verified(node: Node) -> None:
    first = node.ask(text := token())
    node.keys(jwk(ec_key()), jwk(rsa_key(), "r"))
    node.keeper.step()
    assert node.ask(text) is first


def test_an_unknown_key_waits_for_one_refresh(node: Node) -> None:
    fresh = token(ec_key("b"), "b")

    async def both() -> tuple[Principal, Principal]:
        first, second = (asyncio.create_task(node.authenticator.admit(bearer(fresh))) for _ in range(2))
        await asyncio.sleep(0)
        node.keys(jwk(ec_key("b"), "b"))
        await asyncio.to_thread(node.keeper.step)
        return await first, await second

    assert [one.name for one in asyncio.run(both())] == ["scanner-7"] * 2
    # The next unknown key comes too soon: it is refused without a wait.
    with pytest.raises(ServeRefusal, match="key is not known"):
        asyncio.run(asyncio.wait_for(node.authenticator.admit(bearer(token(kid="made-up"))), 5))
    node.now += 11
    assert node.keeper.ask() is not None


def test_a_node_without_keys_is_unavailable_and_not_open(tmp_path: Path) -> None:
    keeper = KeyKeeper(KeyFile(tmp_path / "missing.json"), ("ES256",))
    authenticator = Authenticator(TokenRules(ISSUER, AUDIENCE), keeper)
    assert not authenticator.ready
    with pytest.raises(ServeRefusal) as caught:
        authenticator.authenticate(bearer(token()))
    assert (caught.value.code, caught.value.retry_after) == ("unavailable", 5)
    with pytest.raises(UsageError, match=r"missing\.json"):
        authenticator.start()


def test_a_token_bound_to_a_certificate_needs_that_certificate(node: Node, tmp_path: Path) -> None:
    bound = token(cnf={"x5t#S256": "thumb"})
    for _ in range(2):
        assert "bound" in str(node.refusal(bound))
        assert "bound" in str(node.refusal(bound, "other"))
        assert node.ask(bound, "thumb").name == "scanner-7"
    for odd in ({"jkt": "x"}, {}, "thumb", {"x5t#S256": None}, {"x5t#S256": "thumb", "jkt": "x"}, ["x5t#S256"]):
        assert "cannot be checked" in str(node.refusal(token(cnf=odd), "thumb"))
    strict = Node(tmp_path / "strict.json", TokenRules(ISSUER, AUDIENCE, bound=True))
    assert "not bound" in str(strict.refusal(token(), "thumb"))
    assert strict.ask(bound, "thumb").name == "scanner-7"


def test_rules_that_would_let_everything_in_are_no_rules() -> None:
    for odd in ("none", "HS256", "HS512", "es256"):
        with pytest.raises(UsageError, match=odd):
            TokenRules(ISSUER, AUDIENCE, algorithms=("ES256", odd))
    for rules in (("", AUDIENCE), (ISSUER, "")):
        with pytest.raises(UsageError):
            TokenRules(*rules)
    with pytest.raises(UsageError):
        TokenRules(ISSUER, AUDIENCE, algorithms=())


def test_no_tokens_are_for_loopback_only() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert NoAuthentication(host).authenticate(None).name == "anonymous"
    for hosts in (("0.0.0.0",), ("::",), ("10.0.0.1",), ("node.example",), ("127.0.0.1", "0.0.0.0"), ("",), ()):
        with pytest.raises(UsageError, match="loopback"):
            NoAuthentication(*hosts)


def test_two_authorization_headers_are_ambiguous() -> None:
    assert only_header([]) is None
    assert only_header([b"x"]) == b"x"
    with pytest.raises(ServeRefusal):
        only_header([b"x", b"x"])


def test_an_address_that_fails_too_often_waits_and_disturbs_nobody_who_is_known(node: Node) -> None:
    now = 50.0
    failures = FailureLimiter(RateTable.private(), Rate(1, 5), clock=lambda: now)
    authenticator = Authenticator(TokenRules(ISSUER, AUDIENCE), node.keeper, failures)
    good, other = bearer(token()), bearer(token(sub="other"))
    authenticator.authenticate(good, address="10.0.0.1")
    codes = []
    for i in range(20):
        with pytest.raises(ServeRefusal) as caught:
            authenticator.authenticate(bearer(token(ec_key("attacker"), sub=f"x{i}")), address="10.0.0.1")
        codes.append(caught.value.code)
    assert codes == ["unauthenticated"] * 5 + ["too_many_requests"] * 15
    assert caught.value.retry_after == pytest.approx(1)
    assert authenticator.authenticate(good, address="10.0.0.1").name == "scanner-7"
    assert authenticator.authenticate(other, address="10.0.0.2").name == "other"
    with pytest.raises(ServeRefusal):
        authenticator.authenticate(bearer(token(sub="third")), address="10.0.0.1")
    now += 1.01
    assert authenticator.authenticate(bearer(token(sub="third")), address="10.0.0.1").name == "third"


def test_a_rotation_is_no_clients_failure(node: Node) -> None:
    failures = FailureLimiter(RateTable.private(), Rate(1, 1), clock=lambda: 50.0)
    authenticator = Authenticator(TokenRules(ISSUER, AUDIENCE), node.keeper, failures)
    for i in range(5):
        with pytest.raises(ServeRefusal, match="key is not known"):
            authenticator.authenticate(bearer(token(ec_key("b"), "b", sub=f"s{i}")), address="10.0.0.1")
    node.keeper.step()
    with pytest.raises(ServeRefusal, match="key is not known"):
        authenticator.authenticate(bearer(token(kid="made-up")), address="10.0.0.1")
    with pytest.raises(ServeRefusal, match="not accepted"):
        authenticator.authenticate(bearer(token(kid="made-up")), address="10.0.0.1")


def test_a_token_with_any_byte_changed_is_refused_or_the_very_same(node: Node) -> None:
    """Base64 leaves bits of a last letter unused: there alone another letter is the same signature."""
    good = bearer(token())
    first = node.ask(good)
    same = [
        place
        for place in range(7, len(good))
        for letter in (b"A", b"B", b"_", b".", b"=", b"\0")
        if letter != good[place : place + 1] and accepted(node, good[:place] + letter + good[place + 1 :], first)
    ]
    assert set(same) <= {len(good) - 1}


def accepted(node: Node, header: bytes, expected: Principal) -> bool:
    try:
        assert node.ask(header) == expected
    except ServeRefusal:
        return False
    return True


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(lambda it: b"Bearer " + it)))
def test_any_bytes_are_refused_in_words(header: bytes) -> None:
    with pytest.raises(ServeRefusal) as caught:
        HARDENED.authenticate(header)
    assert caught.value.code == "unauthenticated"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "scope", "scp", "roles", "cnf", "jti", "x"]), JSON)
def test_a_signed_claim_of_any_kind_is_accepted_or_refused_in_words(name: str, value: object) -> None:
    with suppress(ServeRefusal):
        assert HARDENED.authenticate(bearer(token(**{name: value}))).name


@given(st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jwk", "jku", "cty", "zip", "x"]), JSON)
def test_a_signed_header_of_any_kind_is_accepted_or_refused_in_words(name: str, value: object) -> None:
    with suppress(ServeRefusal):
        assert HARDENED.authenticate(bearer(token(jose={name: value}))).name == "scanner-7"


def test_no_refusal_repeats_anything_of_the_token_or_the_keys(node: Node) -> None:
    secret = "Sekret"
    for text in (
        token(sub=secret + "\n"),
        token(aud=secret),
        token(iss=secret),
        token(kid=secret),
        token(jose={"alg": secret}),
        token(jose={"typ": secret}),
        secret,
    ):
        refusal = node.refusal(text)
        assert secret not in f"{refusal}{refusal.challenge}"
        assert refusal.__cause__ is None
