"""Where keys come from, and what is refused."""

import base64
import stat
from pathlib import Path

import pytest

from fedclaw.errors import EncryptionError, UsageError
from fedclaw.identity.data_keys import Keyring, SecretKey, load_keyring, new_key_file

SECRET = bytes(range(32))
TEXT = base64.b64encode(SECRET).decode()


def test_from_a_file_and_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.key"
    path.write_text(TEXT + "\n")
    path.chmod(0o600)
    monkeypatch.setenv("FEDCLAW_KEY", TEXT)
    expected = Keyring([SecretKey(SECRET)]).id
    assert load_keyring(f"file:{path}").id == load_keyring("env:FEDCLAW_KEY").id == expected
    assert load_keyring("file:a.key", tmp_path).id == expected, "a relative path starts at the base"
    assert load_keyring(("file:a.key", "env:FEDCLAW_KEY"), tmp_path).id == expected


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    path.write_text(TEXT)
    path.chmod(mode)
    with pytest.raises(EncryptionError, match=r"can be read by others.*chmod 600"):
        load_keyring(f"file:{path}")


@pytest.mark.parametrize("content", ["", "short", TEXT[:-4], TEXT + TEXT, "é" * 40, SECRET.hex()])
def test_what_is_no_key_is_never_quoted(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.key"
    path.write_text(content)
    path.chmod(0o600)
    monkeypatch.setenv("FEDCLAW_KEY", content)
    for source in (f"file:{path}", "env:FEDCLAW_KEY"):
        with pytest.raises(EncryptionError, match="is not an encryption key") as caught:
            load_keyring(source)
        assert not content or content not in str(caught.value)


@pytest.mark.parametrize("source", [TEXT, SECRET.hex(), "file:", "env:", f"env:{TEXT}", "base64:" + TEXT, "", "hsm:x"])
def test_a_key_in_the_place_of_its_source_is_refused_and_not_repeated(source: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_keyring(source)
    assert TEXT not in str(caught.value)
    assert SECRET.hex() not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(EncryptionError, match=r"a\.key is missing"):
        load_keyring("file:a.key", tmp_path)
    with pytest.raises(EncryptionError, match=r"NO_SUCH_VARIABLE.*is not set"):
        load_keyring("env:NO_SUCH_VARIABLE")
    with pytest.raises(UsageError, match="names no key"):
        load_keyring(())


def test_a_new_key_is_its_owners_and_replaces_none(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "a.key"
    assert new_key_file(path) == load_keyring(f"file:{path}").id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(EncryptionError, match="exists already"):
        new_key_file(path)
    assert path.read_bytes() == before


def test_one_data_key_wrapped_twice_looks_different() -> None:
    key = SecretKey(SECRET)
    one, two = key.wrap(bytes(32)), key.wrap(bytes(32))
    assert one != two
    assert key.unwrap(one) == key.unwrap(two) == bytes(32)
