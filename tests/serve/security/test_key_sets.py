"""Key sets as a careless or hostile provider would publish them, from files and from a real https server."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fedclaw.errors import UsageError
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.security.key_sets import MAX_BYTES, KeyFile, KeyKeeper, KeyUrl, parse_key_set
from fedclaw.serve.security.tokens import Authenticator, TokenRules
from tests.serve.security.issuer import AUDIENCE, ISSUER, bearer, ec_key, jwk, key_server, key_set, rsa_key, token

BOTH = ("ES256", "RS256")


def until(true: Callable[[], bool]) -> None:
    """Wait for a thread, at most as long as a test may take."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_key_serves_its_own_algorithm() -> None:
    found = parse_key_set(
        key_set(jwk(ec_key()), jwk(rsa_key(), "r"), jwk(ec_key("b"), "b", use="sig", alg="ES256")), BOTH
    )
    assert set(found.keys) == {("a", "ES256"), ("r", "RS256"), ("b", "ES256")}
    assert found.find("a", "RS256") is None
    assert found.find(None, "RS256") is not None
    assert found.find(None, "ES256") is None


@pytest.mark.parametrize(
    "more",
    [
        {"use": "enc"},
        {"use": None},
        {"key_ops": ["sign"]},
        {"key_ops": "verify"},
        {"alg": "ES384"},
        {"alg": "HS256"},
        {"alg": None},
        {"kty": "RSA"},
        {"kty": "oct", "k": "AAAA"},
        {"kty": ["EC"]},
        {"crv": "P-384"},
        {"crv": ["P-256"]},
        {"x": "AAAA"},
        {"x": 7},
        {"y": None},
        {"x": "A" * 100_000},
        {"kid": 7},
        {"kid": ""},
        {"kid": "k" * 300},
        {"d": "AAAA"},
    ],
)
def test_a_key_that_does_not_agree_with_itself_is_not_used(more: dict[str, object]) -> None:
    odd = {**jwk(ec_key("b"), "b"), **more}
    found = parse_key_set(key_set(jwk(ec_key()), odd), BOTH)
    assert set(found.keys) == {("a", "ES256")}
    assert len(found.skipped) == 1
    with pytest.raises(ValueError, match="none of its keys"):
        parse_key_set(key_set(odd), BOTH)


def test_a_published_private_key_is_not_used_and_not_logged() -> None:
    private = jwt.algorithms.ECAlgorithm.to_jwk(ec_key(), as_dict=True)
    with pytest.raises(ValueError, match="secret key") as caught:
        parse_key_set(key_set({**private, "kid": "a"}), BOTH)
    assert private["d"] not in str(caught.value)


def test_weak_rsa_keys_are_not_used() -> None:
    with pytest.raises(ValueError, match="2048"):
        parse_key_set(key_set(jwk(rsa_key(1024))), BOTH)
    with pytest.raises(ValueError, match=r"65537|numbers"):
        parse_key_set(key_set({**jwk(rsa_key()), "e": "Aw"}), BOTH)


def test_a_key_of_another_curve_is_not_used() -> None:
    for curve in (ec.SECP384R1(), ec.SECP256K1()):
        with pytest.raises(ValueError, match="suit no algorithm"):
            parse_key_set(key_set(jwk(ec.generate_private_key(curve))), BOTH)


def test_one_id_for_two_keys_is_ambiguous() -> None:
    assert len(parse_key_set(key_set(jwk(ec_key()), jwk(ec_key())), BOTH).keys) == 1
    with pytest.raises(ValueError, match="two different keys"):
        parse_key_set(key_set(jwk(ec_key()), jwk(ec_key("b"))), BOTH)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"null",
        b'{"keys": {}}',
        b'{"keys": null}',
        b"{}",
        b"<html>",
        b"\xff\xfe",
        b'{"keys": [7, "a", null]}',
        b"[" * 100_000,
        json.dumps({"keys": [{}] * 101}).encode(),
        b" " * (MAX_BYTES + 1),
    ],
)
def test_documents_that_are_no_key_set(document: bytes) -> None:
    with pytest.raises(ValueError, match=r"it |none of"):
        parse_key_set(document, BOTH)


@given(
    st.sampled_from(["kty", "crv", "x", "y", "n", "e", "kid", "use", "key_ops", "alg", "x5c"]),
    st.none() | st.booleans() | st.integers() | st.text(max_size=90) | st.lists(st.text(max_size=3), max_size=2),
    st.booleans(),
)
def test_a_member_of_any_kind_is_used_or_passed_over(name: str, value: object, rsa: bool) -> None:
    odd = {**(jwk(rsa_key(), "b") if rsa else jwk(ec_key("b"), "b")), name: value}
    found = parse_key_set(key_set(jwk(ec_key()), odd), BOTH)
    assert ("a", "ES256") in found.keys


def test_an_empty_set_withdraws_all_keys() -> None:
    assert not parse_key_set(key_set(), BOTH).keys


def test_a_file_is_read_again_when_another_is_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(key_set(jwk(ec_key())))
    keeper = KeyKeeper(KeyFile(path), BOTH)
    authenticator = Authenticator(TokenRules(ISSUER, AUDIENCE), keeper)
    authenticator.start()
    try:
        assert authenticator.authenticate(bearer(token())).name == "scanner-7"
        (tmp_path / "new").write_bytes(key_set(jwk(ec_key("b"), "b")))
        (tmp_path / "new").rename(path)
        until(lambda: keeper.current is not None and ("b", "ES256") in keeper.current.keys)
        with pytest.raises(ServeRefusal, match="not known"):
            authenticator.authenticate(bearer(token()))
    finally:
        authenticator.close()
    assert not keeper._thread.is_alive()


def test_a_damaged_file_leaves_the_old_keys_for_a_stated_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    path = tmp_path / "keys.json"
    path.write_bytes(key_set(jwk(ec_key())))
    keeper = KeyKeeper(KeyFile(path), BOTH, keep=3600, clock=lambda: now)
    keeper.start()
    keeper.close()
    path.write_bytes(b"{")
    now = 1000.0
    keeper.step()
    assert keeper.current is not None
    assert "the old ones stay for 2600 s" in caplog.text
    assert "it is not JSON" in caplog.text
    now = 3600.0
    keeper.step()
    assert keeper.current is not None
    now = 3600.1
    keeper.step()
    assert keeper.current is None
    path.write_bytes(key_set(jwk(ec_key())))
    keeper.step()
    assert keeper.current is not None


def test_a_pipe_or_directory_is_no_key_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        with pytest.raises(UsageError, match=path.name):
            KeyKeeper(KeyFile(path), BOTH).start()


def test_keys_from_a_server_and_a_rotation_under_way(tmp_path: Path) -> None:
    """The old key's token is refused as soon as the new set is there, and a new key's token makes it be fetched."""
    with key_server(tmp_path, key_set(jwk(ec_key()))) as server:
        keeper = KeyKeeper(KeyUrl(server.url, server.ca), BOTH)
        authenticator = Authenticator(TokenRules(ISSUER, AUDIENCE), keeper)
        authenticator.start()
        try:
            assert authenticator.authenticate(bearer(token())).name == "scanner-7"
            assert server.asked == 1
            server.body = key_set(jwk(ec_key("b"), "b"))
            fresh = bearer(token(ec_key("b"), "b"))
            with pytest.raises(ServeRefusal, match="not known"):
                authenticator.authenticate(fresh)
            until(lambda: keeper.current is not None and ("b", "ES256") in keeper.current.keys)
            assert authenticator.authenticate(fresh).name == "scanner-7"
            with pytest.raises(ServeRefusal, match="not known"):
                authenticator.authenticate(bearer(token()))
            # Made-up key ids cause no more requests.
            asked = server.asked
            for i in range(50):
                with pytest.raises(ServeRefusal, match="not known"):
                    authenticator.authenticate(bearer(token(kid=f"made-up-{i}")))
            time.sleep(0.2)
            assert server.asked == asked == 2
        finally:
            authenticator.close()


def test_the_provider_says_how_long_its_keys_are_fresh(tmp_path: Path) -> None:
    now = 0.0
    with key_server(tmp_path, key_set(jwk(ec_key()))) as server:
        keeper = KeyKeeper(KeyUrl(server.url, server.ca), BOTH, interval=300, clock=lambda: now)
        for header, due in (("public, max-age=60", 60), ("max-age=86400", 300), ("no-store", 300), ("max-age=0", 10)):
            server.headers = {"cache-control": header}
            assert keeper.refresh() is None
            asked = server.asked
            now += due - 1
            keeper.step()
            assert server.asked == asked
            now += 1
            keeper.step()
            assert server.asked == asked + 1


def test_a_server_that_is_not_the_provider_gives_no_keys(tmp_path: Path) -> None:
    """No certificate of the trusted CA, one for another host, and one that only the system would have to know."""
    keys = key_set(jwk(ec_key()))
    with key_server(tmp_path / "a", keys) as one, key_server(tmp_path / "b", keys, "idp.example") as other:
        for source in (KeyUrl(one.url, other.ca), KeyUrl(other.url, other.ca), KeyUrl(one.url)):
            problem = KeyKeeper(source, BOTH).refresh()
            assert problem is not None
            assert "CERTIFICATE_VERIFY_FAILED" in problem or "certificate verify failed" in problem
        assert one.asked == other.asked == 0


def test_a_provider_that_is_down_is_asked_again(tmp_path: Path) -> None:
    now = 0.0
    with key_server(tmp_path, b"") as server:
        keeper = KeyKeeper(KeyUrl(server.url, server.ca), BOTH, clock=lambda: now)
        server.status = 500
        keeper.start()
        keeper.close()
        assert keeper.current is None
        server.status, server.body = 200, key_set(jwk(ec_key()))
        now = 5.0
        keeper.step()
        assert keeper.current is not None
        for status in (404, 500):
            server.status = status
            assert keeper.refresh()
            assert keeper.current is not None
        assert [keeper.refresh() and keeper._due - now for _ in range(4)] == [20, 40, 60, 60]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(tmp_path: Path, status: int) -> None:
    """Not even to a server of the same authority."""
    with key_server(tmp_path, key_set(jwk(ec_key()))) as server:
        server.status, server.headers = status, {"location": server.url + "/elsewhere"}
        problem = KeyKeeper(KeyUrl(server.url, server.ca), BOTH).refresh()
        assert problem is not None
        assert "redirect" in problem
        assert server.asked == 1


def test_whatever_goes_wrong_the_keys_are_looked_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys.json").write_bytes(key_set(jwk(ec_key())))
    keeper = KeyKeeper(KeyFile(tmp_path / "keys.json"), BOTH)
    steps: list[int] = []

    def fails() -> None:
        steps.append(1)
        keeper._wake.set()
        raise RuntimeError("never seen before")

    monkeypatch.setattr(keeper, "step", fails)
    keeper.start()
    until(lambda: len(steps) > 3)
    keeper.close()


def test_answers_that_never_end_or_are_too_large(tmp_path: Path) -> None:
    with key_server(tmp_path, b" " * 40_000_000) as server:
        problem = KeyKeeper(KeyUrl(server.url, server.ca), BOTH).refresh()
        assert problem is not None
        assert "more than" in problem
        assert server.sent < 20_000_000
        server.body, server.pause = key_set(jwk(ec_key())), 0.05
        problem = KeyKeeper(KeyUrl(server.url, server.ca, whole=0.1), BOTH).refresh()
        assert problem is not None
        assert "took more than" in problem
        server.headers = {"content-length": "1000000"}
        server.body, server.pause = server.body[:-5], 0
        problem = KeyKeeper(KeyUrl(server.url, server.ca), BOTH).refresh()
        assert problem is not None
        assert "not JSON" in problem


@pytest.mark.parametrize(
    "url",
    [
        "http://idp.example/keys",
        "file:///etc/passwd",
        "ftp://idp.example/keys",
        "https://user:secret@idp.example/keys",
        "https:///keys",
        "idp.example/keys",
        "",
    ],
)
def test_urls_that_are_not_https(url: str) -> None:
    with pytest.raises(UsageError, match="https") as caught:
        KeyUrl(url)
    assert "secret" not in str(caught.value)


def test_a_ca_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("nothing")
    for path in (tmp_path / "ca.crt", tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match=path.name):
            KeyUrl("https://idp.example/keys", path)
    shutil.rmtree(tmp_path)
