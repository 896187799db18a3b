"""Keys in a real PKCS#11 token (SoftHSM2)."""

import os
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag

from fedclaw.errors import EncryptionError, UsageError
from fedclaw.identity import pki
from fedclaw.identity.at_rest import FileStore, read_header
from fedclaw.identity.data_keys import Keyring, load_keyring
from fedclaw.identity.rekey import Rewrap, change_file
from fedclaw.identity.token_keys import SigningKey, TokenUri, WrappingKey
from tests.tokens import PIN, Token

pkcs11 = pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")


def uri(token: Token, name: str, **query: str) -> TokenUri:
    return TokenUri.parse(token.uri(name, **query))


def test_a_key_that_never_leaves_the_token_wraps(token: Token, tmp_path: Path) -> None:
    key = WrappingKey.create(uri(token, "wraps"))
    wrapped = key.wrap(bytes(range(32)))
    again = WrappingKey.open(uri(token, "wraps"))
    assert again.id == key.id
    assert again.unwrap(wrapped) == bytes(range(32))
    assert key.wrap(bytes(range(32))) != wrapped
    for place in range(len(wrapped)):
        spoilt = bytearray(wrapped)
        spoilt[place] ^= 1
        with pytest.raises(InvalidTag):
            key.unwrap(bytes(spoilt))
    for size in (0, 11, 12, 28, len(wrapped) - 1):
        with pytest.raises(InvalidTag):
            key.unwrap(wrapped[:size])
    with key.uri.session() as (_, session):
        held = session.get_key(label="wraps")
        assert held[pkcs11.Attribute.EXTRACTABLE] is False
        with pytest.raises(pkcs11.exceptions.AttributeSensitive):
            held[pkcs11.Attribute.VALUE]
    with pytest.raises(EncryptionError, match="holds an object of that name already"):
        WrappingKey.create(uri(token, "wraps"))


def test_files_under_a_token_key_and_back_to_a_file_key(token: Token, tmp_path: Path) -> None:
    WrappingKey.create(uri(token, "files"))
    store, path = FileStore(load_keyring(token.uri("files")), "run/demo"), tmp_path / "model.npz"
    store.write(path, b"weights")
    fresh = FileStore(load_keyring(token.uri("files")), "run/demo")
    assert fresh.read(path) == b"weights"
    WrappingKey.create(uri(token, "others"))
    with pytest.raises(EncryptionError, match="under the key"):
        FileStore(load_keyring(token.uri("others")), "run/demo").read(path)
    header = read_header(path)
    spoilt = path.read_bytes().replace(header.wrapped, header.wrapped[:-1] + bytes([header.wrapped[-1] ^ 1]))
    (tmp_path / "spoilt").write_bytes(spoilt)
    with pytest.raises(EncryptionError, match="spoilt does not open: the wrapped key"):
        fresh.read(tmp_path / "spoilt", "model.npz")
    assert change_file(path, path.name, Rewrap(store, other := load_keyring(token.uri("others"))))
    assert FileStore(other, "run/demo").read(path) == b"weights"


def test_the_token_is_asked_once_for_many_files(token: Token, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WrappingKey.create(uri(token, "once"))
    asked = []
    for name in ("wrap", "unwrap"):
        real = getattr(WrappingKey, name)
        monkeypatch.setattr(WrappingKey, name, lambda self, data, real=real: asked.append(real) or real(self, data))
    store = FileStore(load_keyring(token.uri("once")), "run/demo")
    for number in range(5):
        store.write(tmp_path / f"{number}.ckpt", b"x")
    reader = FileStore(load_keyring(token.uri("once")), "run/demo")
    assert {reader.read(tmp_path / f"{number}.ckpt") for number in range(5)} == {b"x"}
    assert len(asked) == 2


def test_a_signing_key_in_the_token(token: Token) -> None:
    key, made = SigningKey.open_or_create(uri(token, "signs"))
    assert made
    again, made = SigningKey.open_or_create(uri(token, "signs"))
    assert not made
    assert again.public_key() == key.public_key()
    signature = again.sign(b"content")
    key.public_key().verify(signature, b"content", pki.ECDSA)
    with pytest.raises(InvalidSignature):
        key.public_key().verify(signature, b"other", pki.ECDSA)
    with key.uri.session() as (_, session):
        private = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, label="signs")
        assert (private[pkcs11.Attribute.EXTRACTABLE], private[pkcs11.Attribute.SENSITIVE]) == (False, True)


def test_a_key_on_another_curve_is_refused(token: Token) -> None:
    place = uri(token, "p256")
    with place.session(writing=True) as (library, session):
        curve = library.util.ec.encode_named_curve_parameters("secp256r1")
        parameters = session.create_domain_parameters(
            library.KeyType.EC, {library.Attribute.EC_PARAMS: curve}, local=True
        )
        parameters.generate_keypair(store=True, label="p256")
    with pytest.raises(EncryptionError, match="is not an ECDSA P-384 key"):
        SigningKey.open(place)


def test_what_fails_is_said_in_words_without_the_pin(token: Token, tmp_path: Path) -> None:
    wrong = tmp_path / "pin"
    wrong.touch(0o600)
    wrong.write_text("not-the-pin-of-it")
    open_file = tmp_path / "open"
    open_file.write_text(PIN)
    open_file.chmod(0o644)
    cases = {
        token.uri("nothing"): "the token holds no such key",
        token.uri("x").replace("token=fedclaw", "token=other"): "there is no such token",
        token.uri("x", **{"pin-source": f"file:{wrong}"}): "the token refuses the PIN",
        token.uri("x", **{"pin-source": f"file:{open_file}"}): "can be read by others",
        token.uri("x", **{"pin-source": "env:NO_SUCH_PIN"}): "NO_SUCH_PIN, which holds the PIN, is not set",
        token.uri("x", **{"module-path": str(tmp_path / "no.so")}): "cannot be loaded as a PKCS#11 module",
        "pkcs11:token=fedclaw;object=x": "no PKCS#11 module is named",
    }
    for text, words in cases.items():
        with pytest.raises(EncryptionError, match=words) as caught:
            load_keyring(text)
        assert PIN not in str(caught.value)
        assert "not-the-pin" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "pkcs11:",
        "pkcs11:token=a",
        "pkcs11:object=a",
        "pkcs11:token=a;object=b;colour=red",
        "pkcs11:token=a;object=b?pin-value=4711-0815",
        "pkcs11:token=a;object=b;pin-value=4711-0815",
        "pkcs11:token=a;object=b?pin=4711-0815",
        "pkcs11:token=a;object=b;type=cert",
    ],
)
def test_what_is_no_uri_of_a_key(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        TokenUri.parse(text)
    assert "pin-value" not in text or "4711" not in str(caught.value)


def test_a_uri_is_read_as_rfc_7512_says() -> None:
    parsed = TokenUri.parse("pkcs11:token=My%20token;object=a%3Bb;id=%01%ff?module-path=%2Flib%2Fx.so")
    assert (parsed.token, parsed.label, parsed.id) == ("My token", "a;b", b"\x01\xff")
    assert parsed.module == "/lib/x.so"


def test_names_come_from_the_environment_too(token: Token, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCLAW_PKCS11_MODULE", str(token.module))
    monkeypatch.setenv("FEDCLAW_PKCS11_PIN", PIN)
    key = WrappingKey.create(TokenUri.parse("pkcs11:token=fedclaw;object=short"))
    assert Keyring([key]).id == load_keyring("pkcs11:token=fedclaw;object=short").id
    assert "SOFTHSM2_CONF" in os.environ
