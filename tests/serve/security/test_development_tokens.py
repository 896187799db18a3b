"""A node's own signing key, its key set and tokens."""

import json
import stat
import time
from pathlib import Path

import jwt
import pytest

from fedclaw.errors import FedClawError, ProvisionError, UsageError
from fedclaw.identity import pki
from fedclaw.serve.__main__ import main
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.security.development_tokens import KEY_SET, SIGNING_KEY, sign_token, write_keys
from fedclaw.serve.security.key_sets import KeyFile, KeyKeeper
from fedclaw.serve.security.tokens import Authenticator, TokenRules


def test_a_token_of_the_own_key_is_accepted_by_a_node_with_its_key_set(tmp_path: Path) -> None:
    key_set = write_keys(tmp_path / "keys")
    keeper = KeyKeeper(KeyFile(key_set), ("ES256",))
    keeper.refresh()
    node = Authenticator(TokenRules("development", "node"), keeper)
    text = sign_token(tmp_path / "keys", "development", "node", "me", ["predict:heart", "admin:read"], 5)
    principal = node.authenticate(b"Bearer " + text.encode())
    assert principal.name == "me"
    assert principal.scopes == {"predict:heart", "admin:read"}
    claims = jwt.decode(text, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 300
    assert abs(claims["iat"] - time.time()) < 60
    write_keys(tmp_path / "others")
    text = sign_token(tmp_path / "others", "development", "node", "me", ["predict:heart"], 5)
    with pytest.raises(ServeRefusal):
        node.authenticate(b"Bearer " + text.encode())


def test_the_signing_key_is_private_and_no_part_of_the_key_set(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "keys" / SIGNING_KEY).stat().st_mode) == 0o600
    (key,) = json.loads((tmp_path / "keys" / KEY_SET).read_bytes())["keys"]
    assert set(key) == {"kty", "crv", "x", "y", "kid", "use", "alg"}
    assert jwt.PyJWK(key).key is not None


def test_keys_are_never_written_over(tmp_path: Path) -> None:
    write_keys(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ProvisionError, match=r"there already"):
        write_keys(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / SIGNING_KEY).unlink()
    with pytest.raises(ProvisionError, match=KEY_SET):
        write_keys(tmp_path)


def test_a_key_that_others_may_read_signs_nothing(tmp_path: Path) -> None:
    write_keys(tmp_path)
    (tmp_path / SIGNING_KEY).chmod(0o640)
    with pytest.raises(ProvisionError, match="chmod 600"):
        sign_token(tmp_path, "i", "a", "me", [], 5)


def test_keys_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="serve keys"):
        sign_token(tmp_path, "i", "a", "me", [], 5)
    (tmp_path / SIGNING_KEY).touch(0o600)
    with pytest.raises(ProvisionError, match="not a private key"):
        sign_token(tmp_path, "i", "a", "me", [], 5)
    pki.save_key(tmp_path / SIGNING_KEY, pki.new_key())
    with pytest.raises(ProvisionError, match="P-256"):
        sign_token(tmp_path, "i", "a", "me", [], 5)


@pytest.mark.parametrize(
    ("subject", "scopes", "minutes"),
    [
        ("", [], 5),
        ("a\nb", [], 5),
        ("x" * 257, [], 5),
        ("me", ["predict:heart feedback:heart"], 5),
        ("me", ["predict:é"], 5),
        ("me", ["predit:heart"], 5),
        ("me", ["admin:publish:heart"], 5),
        ("me", ["predict"], 5),
        ("me", [""], 5),
        ("me", [], 0),
        ("me", [], -5),
        ("me", [], float("nan")),
        ("me", [], 1e9),
    ],
)
def test_tokens_that_no_node_would_take_are_not_signed(
    tmp_path: Path, subject: str, scopes: list[str], minutes: float
) -> None:
    write_keys(tmp_path)
    with pytest.raises(UsageError) as caught:
        sign_token(tmp_path, "i", "a", subject, scopes, minutes)
    assert isinstance(caught.value, FedClawError)


def test_the_words_make_what_a_node_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys"
    main(["keys", f"directory={keys}"])
    said = dict(setting.split("=") for setting in capsys.readouterr().out.split())
    assert said["tokens.jwks"] == str(keys / KEY_SET)
    main(["token", f"keys={keys}", "subject=me", "scopes=predict:heart"])
    claims = jwt.decode(capsys.readouterr().out.strip(), options={"verify_signature": False})
    assert (claims["iss"], claims["aud"]) == (said["tokens.issuer"], said["tokens.audience"])
    assert claims["scope"] == "predict:heart"
