"""Files encrypted at rest: what was written comes back, and nothing else ever does."""

import hashlib
import io
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.errors import EncryptionError
from fedclaw.identity import at_rest
from fedclaw.identity.at_rest import CHUNK, MAGIC, PLAIN, FileStore, is_encrypted, read_header
from fedclaw.identity.data_keys import Keyring, SecretKey
from fedclaw.identity.rekey import Decrypt, Encrypt, Reencrypt, Rewrap, change_file
from fedclaw.identity.stream import TAG

SECRET = bytes(range(32))
KEYS = Keyring([SecretKey(SECRET)])
OTHER = Keyring([SecretKey(bytes(32))])
STORE = FileStore(KEYS, "run/demo")
EDGES = [size + more for size in (0, CHUNK, 2 * CHUNK, 3 * CHUNK) for more in (-1, 0, 1) if size + more >= 0]


def content_of(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def header_size(path: Path) -> int:
    return len(read_header(path).to_bytes())


def chunks_of(path: Path) -> tuple[bytes, list[bytes]]:
    raw, start = path.read_bytes(), header_size(path)
    return raw[:start], [raw[at : at + CHUNK + TAG] for at in range(start, len(raw), CHUNK + TAG)]


def refused(path: Path, *, store: FileStore = STORE, words: str = "") -> None:
    with pytest.raises(EncryptionError, match=f"(?s){re.escape(str(path))}.*{words}"):
        store.read(path)


@pytest.mark.parametrize("size", EDGES)
def test_round_trip(size: int, tmp_path: Path) -> None:
    path, content = tmp_path / "model.npz", content_of(size)
    STORE.write(path, content, 0o600)
    assert STORE.read(path) == content
    header, chunks = chunks_of(path)
    assert path.stat().st_size == len(header) + size + TAG * len(chunks)
    assert len(chunks) == max(1, -(-size // CHUNK))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["model.npz"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 7, 4096, CHUNK - 1, CHUNK, CHUNK + 1]), max_size=6), st.data())
def test_any_pieces_in_and_any_place_out(sizes: list[int], data: st.DataObject) -> None:
    pieces = [content_of(size) for size in sizes]
    content, file = b"".join(pieces), io.BytesIO()
    with STORE.writing(file, "a") as target:
        for piece in pieces:
            target.write(piece)
    opened = STORE.reading(file, "a", "a")
    assert opened.read() == content
    for _ in range(4):
        start = data.draw(st.integers(0, len(content) + 2))
        count = data.draw(st.sampled_from([0, 1, 100, CHUNK, 2 * CHUNK]))
        opened.seek(start)
        assert opened.read(count) == content[start : start + count]
    opened.seek(-1 if content else 0, io.SEEK_END)
    assert opened.read() == content[-1:]


def test_the_format_is_the_one_that_is_documented(tmp_path: Path) -> None:
    """Decrypted by the description in docs/encryption.md, with nothing of ours."""
    path, content = tmp_path / "model.npz", content_of(CHUNK + 5)
    STORE.write(path, content)
    raw = path.read_bytes()
    assert raw.startswith(b"FEDCLAW-SEALED-1\n")
    chunk = int.from_bytes(raw[17:21], "big")
    salt, check, length = raw[21:53], raw[53:85], int.from_bytes(raw[85:87], "big")
    label, at = raw[87 : 87 + length], 87 + length
    core = raw[:at]
    assert label == b"run/demo/model.npz"
    key_id, size = raw[at : at + 16], int.from_bytes(raw[at + 16 : at + 18], "big")
    wrapped, body = raw[at + 18 : at + 18 + size], raw[at + 18 + size :]
    assert key_id == HKDF(SHA256(), 32, b"", b"fedclaw key id v1").derive(SECRET)[:16]
    wrap_key = HKDF(SHA256(), 32, wrapped[:32], b"fedclaw wrap v1").derive(SECRET)
    data_key = AESGCM(wrap_key).decrypt(bytes(12), wrapped[32:], key_id)
    both = HKDF(SHA256(), 64, salt, b"fedclaw at rest v1" + raw[17:21] + label).derive(data_key)
    assert both[32:] == check
    cipher, aad = AESGCM(both[:32]), hashlib.sha256(core).digest()
    first = cipher.decrypt(bytes(12), body[: chunk + 16], aad)
    last = cipher.decrypt(bytes(10) + b"\x01\x01", body[chunk + 16 :], aad)
    assert first + last == content


@pytest.mark.parametrize("size", [0, 1, CHUNK, 2 * CHUNK + 100])
def test_cut_off_anywhere(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    STORE.write(path, content_of(size))
    raw, start = path.read_bytes(), header_size(path)
    bounds = {start + index * (CHUNK + TAG) for index in range(4)} & set(range(len(raw)))
    places = {*range(len(MAGIC)), *range(len(MAGIC), start, 7), start - 1, *bounds, len(raw) - 1, len(raw) - TAG}
    places |= {place + step for place in bounds for step in (-1, 1, TAG - 1, TAG, TAG + 1)}
    for place in sorted(place for place in places if 0 <= place < len(raw)):
        path.write_bytes(raw[:place])
        refused(path)
    for more in (b"\0", bytes(TAG), raw[start:]):
        path.write_bytes(raw + more)
        refused(path)


def test_every_byte_of_the_header_and_every_region_of_the_chunks(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    STORE.write(path, content_of(2 * CHUNK + 3))
    raw, start = path.read_bytes(), header_size(path)
    later = [start, start + CHUNK // 2, start + CHUNK, start + CHUNK + TAG - 1, start + CHUNK + TAG]
    for place in [*range(start), *later, len(raw) - TAG - 1, len(raw) - TAG, len(raw) - 1]:
        spoilt = bytearray(raw)
        spoilt[place] ^= 1 << place % 8
        path.write_bytes(spoilt)
        refused(path)
    path.write_bytes(raw)
    assert STORE.read(path) == content_of(2 * CHUNK + 3)


@pytest.mark.parametrize(
    "mix",
    ["bacd", "aacd", "acd", "bcd", "abc", "abd", "abccd", "abcdd", "dabc", "d"],
)
def test_chunks_that_are_exchanged_repeated_or_gone(mix: str, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    STORE.write(path, content_of(3 * CHUNK + 9))
    header, chunks = chunks_of(path)
    path.write_bytes(header + b"".join(chunks["abcd".index(one)] for one in mix))
    refused(path)


def test_chunks_of_another_file_or_of_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    STORE.write(path, content_of(2 * CHUNK))
    _, earlier = chunks_of(path)
    STORE.write(path, content_of(2 * CHUNK))
    header, chunks = chunks_of(path)
    assert not set(earlier) & set(chunks), "one content, twice encrypted, shows nothing of being one"
    path.write_bytes(header + earlier[0] + chunks[1])
    refused(path)


def test_a_file_in_the_place_of_another(tmp_path: Path) -> None:
    one, two = tmp_path / "a.npz", tmp_path / "b.npz"
    STORE.write(one, b"one")
    STORE.write(two, b"two")
    one.rename(tmp_path / "c")
    two.rename(one)
    (tmp_path / "c").rename(two)
    refused(one, words="run/demo/b.npz.*in the place of another")
    refused(two)
    FileStore(KEYS, "run/other").write(one, b"one")
    refused(one, words="run/other/a.npz")
    assert FileStore(KEYS).read(one) == b"one"
    with pytest.raises(EncryptionError):
        FileStore(KEYS).read(one, "b.npz")


def test_an_older_version_under_the_same_name_opens(tmp_path: Path) -> None:
    """What docs/encryption.md says is not promised; a guarantee that appears one day is to be told there."""
    path = tmp_path / "model.npz"
    STORE.write(path, b"old")
    shutil.copy(path, tmp_path / "kept")
    STORE.write(path, b"new")
    shutil.copy(tmp_path / "kept", path)
    assert STORE.read(path) == b"old"


def test_a_wrong_key_is_told_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    STORE.write(path, b"secret")
    refused(path, store=FileStore(OTHER, "run/demo"), words=f"{KEYS.id.hex()}.*{OTHER.id.hex()}")
    assert FileStore(Keyring([SecretKey(bytes(32)), SecretKey(SECRET)]), "run/demo").read(path) == b"secret"
    refused(path, store=PLAIN, words="is encrypted, and no key was given")
    assert SECRET.hex() not in repr([KEYS, SecretKey(SECRET), KEYS.data_key(), STORE])


def test_with_a_key_a_plain_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    for content in (b"", b"planted", MAGIC[:-1]):
        PLAIN.write(path, content)
        refused(path, words="not encrypted.*fedclaw.encryption seal")
        with pytest.raises(EncryptionError, match="not encrypted"):
            STORE.check([path])
    STORE.write(path, b"x")
    STORE.check([path])
    for store in (PLAIN, FileStore(OTHER, "run/demo")):
        with pytest.raises(EncryptionError, match=re.escape(str(path))):
            store.check([path])


def test_what_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    STORE.write(path, b"old")
    with pytest.raises(ZeroDivisionError), STORE.replacing(path) as file:
        file.write(content_of(CHUNK + 1)[: 1 // 0])
    assert STORE.read(path) == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_plaintext_is_never_on_disk(tmp_path: Path) -> None:
    """While a large file is written, rekeyed and read, nothing below the directory ever holds a piece of it."""
    needle = b"personal data of a patient, to be seen by nobody else"
    seen: list[Path] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for item in tmp_path.rglob("*"):
                try:
                    seen.extend([item] if needle in item.read_bytes() else [])
                except OSError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        path = tmp_path / "model.npz"
        for _ in range(3):
            STORE.write(path, needle * 40_000)
            change_file(path, path.name, Reencrypt(STORE, OTHER))
            change_file(path, path.name, Rewrap(FileStore(OTHER, "run/demo"), KEYS))
            assert STORE.read(path) == needle * 40_000
        assert not seen
        change_file(path, path.name, Decrypt(STORE))
        end = time.monotonic() + 30
        while not seen and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        stop.set()
        watcher.join()
    assert seen, "the watch sees it where it is"


def test_reading_holds_a_chunk_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    path, piece = tmp_path / "model.npz", content_of(1 << 20)
    with STORE.replacing(path) as file:
        for _ in range(16):
            file.write(piece)
    tracemalloc.start()
    try:
        with STORE.open(path) as file:
            while file.read(CHUNK):
                continue
        change_file(path, path.name, Reencrypt(STORE, KEYS))
        change_file(path, path.name, Rewrap(STORE, OTHER))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20, "of 16 MiB"


def test_rewrapping_leaves_the_chunks_and_takes_the_old_key_its_power(tmp_path: Path) -> None:
    path, content = tmp_path / "model.npz", content_of(CHUNK + 1)
    STORE.write(path, content, 0o600)
    os.utime(path, ns=(1, 1_000_000_000))
    _, before = chunks_of(path)
    assert change_file(path, path.name, Rewrap(STORE, OTHER))
    assert chunks_of(path)[1] == before
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_mtime_ns == 1_000_000_000
    refused(path)
    assert FileStore(OTHER, "run/demo").read(path) == content
    assert not change_file(path, path.name, Rewrap(STORE, OTHER)), "done before, so skipped"


def test_reencrypting_changes_key_and_chunks(tmp_path: Path) -> None:
    path, content = tmp_path / "model.npz", content_of(CHUNK + 1)
    STORE.write(path, content)
    _, before = chunks_of(path)
    data_key = KEYS.data_key().secret
    fresh = Keyring([SecretKey(SECRET)])
    assert change_file(path, path.name, Reencrypt(STORE, fresh))
    assert STORE.read(path) == content
    _, chunks = chunks_of(path)
    assert not set(chunks) & set(before)
    assert fresh.data_key().secret != data_key
    assert read_header(path).wrapped == fresh.data_key().wrapped


@pytest.mark.parametrize("kind", [Rewrap, Reencrypt])
def test_what_does_not_open_is_not_made_anew(kind: type[Rewrap] | type[Reencrypt], tmp_path: Path) -> None:
    """A damaged file, or one in the place of another, would be blessed with the new key."""
    path = tmp_path / "model.npz"
    FileStore(KEYS, "run/demo").write(path, content_of(9), name="other.npz")
    raw = path.read_bytes()
    with pytest.raises(EncryptionError, match="in the place of another"):
        change_file(path, path.name, kind(STORE, OTHER))
    STORE.write(path, content_of(9))
    spoilt = bytearray(path.read_bytes())
    spoilt[30] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(EncryptionError, match="header was changed"):
        change_file(path, path.name, kind(STORE, OTHER))
    assert path.read_bytes() == bytes(spoilt) != raw
    with pytest.raises(EncryptionError):
        change_file(path, path.name, kind(FileStore(OTHER, "run/demo"), OTHER))
    path.write_bytes(b"plain")
    with pytest.raises(EncryptionError, match="not encrypted"):
        change_file(path, path.name, kind(STORE, OTHER))
    assert list(tmp_path.iterdir()) == [path]


def test_sealing_and_decrypting(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    PLAIN.write(path, b"plain")
    assert not change_file(path, path.name, Decrypt(STORE))
    assert change_file(path, path.name, Encrypt(STORE))
    assert is_encrypted(path)
    assert not change_file(path, path.name, Encrypt(STORE))
    assert STORE.read(path) == b"plain"
    assert change_file(path, path.name, Decrypt(STORE))
    assert path.read_bytes() == b"plain"


def test_no_two_files_share_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """AES-GCM falls with one nonce used twice under a key; the chunks of all files are numbered from 0."""
    used: list[tuple[bytes, bytes]] = []

    class Watched:
        def __init__(self, key: bytes) -> None:
            self.key = key

        def encrypt(self, nonce: bytes, plain: bytes, aad: bytes) -> bytes:
            used.append((self.key, nonce))
            return AESGCM(self.key).encrypt(nonce, bytes(plain), aad)

    monkeypatch.setattr(at_rest, "AESGCM", Watched)
    for _ in range(20):
        STORE.pack(bytes(2 * CHUNK + 1), "same name")
    assert len(used) == 60
    assert len(set(used)) == 60
