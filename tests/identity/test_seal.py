"""Sealed updates: what goes in comes out, and nothing else ever does."""

import dataclasses
import hashlib
import hmac
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.errors import SealError
from fedclaw.identity import seal
from fedclaw.identity.seal import SEGMENT, SUITES, Binding, Opener, Sealer, SealSuite
from fedclaw.identity.stream import TAG

BINDING = Binding(federation="heart", run_id=7, group_id="3", message_id="m-1", site="hospital-a")
KEYS = {suite: seal.generate(suite) for suite in SUITES}


def sealed_parts(suite: SealSuite, plain: bytes, binding: Binding = BINDING) -> tuple[bytes, list[bytes]]:
    sealed = Sealer(suite, KEYS[suite].public).seal([plain], binding)
    return sealed.header, list(sealed.segments)


def unsealed(suite: SealSuite, header: bytes, segments: list[bytes], size: int, binding: Binding = BINDING) -> bytes:
    stream = Opener(suite, KEYS[suite].private).open(header, binding, size)
    for segment in segments:
        stream.feed(segment)
    return bytes(stream.finish())


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("size", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 3 * SEGMENT + SEGMENT // 2])
def test_round_trip(suite: SealSuite, size: int) -> None:
    plain = np.random.default_rng(size).bytes(size)
    sealed = Sealer(suite, KEYS[suite].public).seal([plain], BINDING)
    segments = list(sealed.segments)
    assert unsealed(suite, sealed.header, segments, sealed.plain_size) == plain
    assert sealed.plain_size == size
    assert sealed.size == len(sealed.header) + sum(map(len, segments)) == len(sealed.header) + size + TAG * sealed.count
    assert len(sealed.header) == seal.header_size(suite)
    assert len(segments) == seal.segment_count(size)


def test_parts_of_any_buffer_type_are_joined() -> None:
    weights = np.arange(600_000, dtype=np.float32)
    parts = [b"head", bytearray(b"er"), memoryview(weights), b"", memoryview(weights[:3])]
    sealed = Sealer("x25519", KEYS["x25519"].public).seal(parts, BINDING)
    plain = unsealed("x25519", sealed.header, list(sealed.segments), sealed.plain_size)
    assert plain == b"header" + weights.tobytes() + weights[:3].tobytes()


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.binary(max_size=70), max_size=6), segment=st.integers(1, 40))
def test_any_division_into_parts_and_segments(parts: list[bytes], segment: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "SEGMENT", segment)
        sealed = Sealer("x25519", KEYS["x25519"].public).seal(parts, BINDING)
        segments = list(sealed.segments)
        assert all(len(item) == segment + TAG for item in segments[:-1])
        assert sealed.size == len(sealed.header) + sum(map(len, segments))
        assert unsealed("x25519", sealed.header, segments, sealed.plain_size) == b"".join(parts)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.integers(0, 90))
def test_no_bit_can_be_flipped(data: st.DataObject, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "SEGMENT", 32)
        header, segments = sealed_parts("x25519", bytes(size))
        pieces = [bytearray(header), *map(bytearray, segments)]
        piece = data.draw(st.sampled_from(pieces))
        piece[data.draw(st.integers(0, len(piece) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        with pytest.raises(SealError):
            unsealed("x25519", bytes(pieces[0]), [bytes(item) for item in pieces[1:]], size)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("where", ["magic", "encapsulation", "wrapped secret", "secret tag", "index", "salt", "check"])
def test_header_tampering(suite: SealSuite, where: str) -> None:
    header, segments = sealed_parts(suite, b"update")
    end = len(header)
    position = {
        "magic": 0,
        "encapsulation": 5,
        "wrapped secret": end - 76,
        "secret tag": end - 37,
        "index": end - 33,
        "salt": end - 20,
        "check": end - 1,
    }[where]
    changed = bytearray(header)
    changed[position] ^= 1
    with pytest.raises(SealError):
        unsealed(suite, bytes(changed), segments, 6)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("position", [0, 100, -TAG, -1])
def test_segment_tampering(suite: SealSuite, index: int, position: int) -> None:
    plain = bytes(2 * SEGMENT + 500)
    header, segments = sealed_parts(suite, plain)
    changed = bytearray(segments[index])
    changed[position] ^= 0x80
    segments[index] = bytes(changed)
    with pytest.raises(SealError, match=f"segment {index + 1} of 3 does not open"):
        unsealed(suite, header, segments, len(plain))


def swapped(items: list[bytes]) -> list[bytes]:
    return [items[1], items[0], *items[2:]]


@pytest.mark.parametrize(
    "change",
    [
        swapped,
        lambda items: [items[0], items[0], items[2]],
        lambda items: items[:-1],
        lambda items: items[1:],
        lambda items: items[:0],
        lambda items: [*items, items[-1]],
        lambda items: [*items, b""],
        lambda items: [*items[:-1], items[-1][:-1]],
        lambda items: [*items[:-1], items[-1] + b"\0"],
    ],
    ids=["reordered", "repeated", "last gone", "first gone", "none", "one more", "empty more", "cut", "longer"],
)
def test_segments_only_in_their_places(change: Callable[[list[bytes]], list[bytes]]) -> None:
    plain = bytes(3 * SEGMENT)
    header, segments = sealed_parts("x25519", plain)
    with pytest.raises(SealError):
        unsealed("x25519", header, change(segments), len(plain))


def test_a_shorter_claimed_size_does_not_cut_the_message_off() -> None:
    """The last segment is marked inside its nonce, so a whole prefix of segments is not a message."""
    header, segments = sealed_parts("x25519", bytes(3 * SEGMENT))
    with pytest.raises(SealError, match="segment 2 of 2 does not open"):
        unsealed("x25519", header, segments[:2], 2 * SEGMENT)


def test_a_longer_claimed_size_does_not_extend_it() -> None:
    header, segments = sealed_parts("x25519", bytes(2 * SEGMENT))
    with pytest.raises(SealError, match="segment 2 of 3 does not open"):
        unsealed("x25519", header, segments, 3 * SEGMENT)


def test_segments_of_another_message_do_not_fit() -> None:
    plain = bytes(2 * SEGMENT)
    header, _ = sealed_parts("x25519", plain)
    _, others = sealed_parts("x25519", plain)
    with pytest.raises(SealError):
        unsealed("x25519", header, others, len(plain))


def test_after_a_failure_nothing_comes_out() -> None:
    header, segments = sealed_parts("x25519", bytes(SEGMENT + 1))
    stream = Opener("x25519", KEYS["x25519"].private).open(header, BINDING, SEGMENT + 1)
    stream.feed(segments[0])
    with pytest.raises(SealError):
        stream.feed(segments[0])
    with pytest.raises(SealError):
        stream.feed(segments[1])
    with pytest.raises(SealError):
        stream.finish()


def test_one_segment_too_many_spoils_a_whole_message() -> None:
    header, segments = sealed_parts("x25519", b"update")
    stream = Opener("x25519", KEYS["x25519"].private).open(header, BINDING, 6)
    stream.feed(segments[0])
    with pytest.raises(SealError, match="one too many"):
        stream.feed(segments[0])
    with pytest.raises(SealError, match="did not open"):
        stream.finish()


def test_nothing_comes_out_before_the_end() -> None:
    header, segments = sealed_parts("x25519", bytes(SEGMENT + 1))
    stream = Opener("x25519", KEYS["x25519"].private).open(header, BINDING, SEGMENT + 1)
    stream.feed(segments[0])
    with pytest.raises(SealError, match="1 of 2 segments"):
        stream.finish()


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(
    ("name", "value"),
    [("federation", "lung"), ("run_id", 8), ("group_id", "4"), ("message_id", "m-2"), ("site", "hospital-b")],
)
def test_every_field_of_the_binding_counts(suite: SealSuite, name: str, value: object) -> None:
    header, segments = sealed_parts(suite, b"update")
    other = dataclasses.replace(BINDING, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(SealError, match="does not open for site"):
        unsealed(suite, header, segments, 6, other)
    assert unsealed(suite, header, segments, 6) == b"update"


texts = st.text(max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.tuples(texts, st.integers(), texts, texts, texts), st.tuples(texts, st.integers(), texts, texts, texts))
def test_bindings_are_unambiguous(one: tuple[str, int, str, str, str], other: tuple[str, int, str, str, str]) -> None:
    assert (Binding(*one).to_bytes() == Binding(*other).to_bytes()) == (one == other)


def test_moving_text_between_fields_changes_the_binding() -> None:
    one = Binding("f", 1, "ab", "c", "s")
    assert one.to_bytes() != dataclasses.replace(one, group_id="a", message_id="bc").to_bytes()


def test_another_key_does_not_open() -> None:
    header, _ = sealed_parts("x25519", b"update")
    with pytest.raises(SealError):
        Opener("x25519", seal.generate("x25519").private).open(header, BINDING, 6)


def test_another_suite_does_not_open() -> None:
    header, _ = sealed_parts("x25519", b"update")
    with pytest.raises(SealError, match="another suite"):
        Opener("mlkem768-x25519", KEYS["mlkem768-x25519"].private).open(header, BINDING, 6)


def test_equal_messages_look_different() -> None:
    one, other = sealed_parts("x25519", bytes(100)), sealed_parts("x25519", bytes(100))
    assert one[0] != other[0]
    assert one[1] != other[1]


HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
PRIVATE = X25519PrivateKey.from_private_bytes(KEYS["x25519"].private)


def joined(label: bytes, *fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(4, "big") + field for field in (label, b"x25519", *fields))


def decrypted(key: bytes, segments: list[bytes], context: bytes) -> bytes:
    found = b""
    for index, segment in enumerate(segments):
        nonce = bytes(7) + index.to_bytes(4, "big") + bytes([index == len(segments) - 1])
        found += AESGCM(key).decrypt(nonce, segment, hashlib.sha256(context).digest())
    return found


def expanded(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand as in RFC 5869, section 2.3."""
    found, block = b"", b""
    for number in range(1, 3):
        block = hmac.digest(secret, block + info + bytes([number]), "sha256")
        found += block
    return found[:length]


@pytest.mark.parametrize("before", [0, 1, 5])
def test_the_format_is_the_documented_one(before: int) -> None:
    """Opened by hand from the docstring: RFC 9180 for the secret, RFC 5869 for the key, STREAM for the segments."""
    plain = np.random.default_rng(1).bytes(2 * SEGMENT + 9)
    sealer = Sealer("x25519", KEYS["x25519"].public)
    for _ in range(before):
        sealer.seal([b"an earlier message"], BINDING)
    sealed = sealer.seal([plain], BINDING)
    magic, session, index = sealed.header[:4], sealed.header[4:84], sealed.header[84:88]
    salt, check = sealed.header[88:104], sealed.header[104:]
    assert (magic, index, len(check)) == (b"FCS2", before.to_bytes(4, "big"), 16)
    secret = HPKE.decrypt(session, PRIVATE, info=joined(b"fedclaw seal v2"))
    assert len(secret) == 32
    for _ in range(before):
        secret = expanded(secret, b"next", 32)
    context = joined(b"fedclaw seal v2", b"heart", b"7", b"3", b"m-1", b"hospital-a")
    both = expanded(secret, b"message" + salt + context, 48)
    assert both[32:] == check
    assert decrypted(both[:32], list(sealed.segments), context) == plain


def test_a_message_in_the_earlier_format_opens_under_its_binding_alone() -> None:
    """One that an earlier version sealed and stored, and that leaves after an upgrade."""
    context, key, plain = (
        joined(b"fedclaw seal v1", b"heart", b"7", b"3", b"m-1", b"hospital-a"),
        bytes(range(32)),
        b"w",
    )
    header = b"FCS1" + HPKE.encrypt(key, PRIVATE.public_key(), info=context)
    segment = AESGCM(key).encrypt(bytes(11) + b"\1", plain, hashlib.sha256(context).digest())
    assert unsealed("x25519", header, [segment], 1) == plain
    with pytest.raises(SealError, match="does not open for site"):
        unsealed("x25519", header, [segment], 1, dataclasses.replace(BINDING, group_id="4"))
    with pytest.raises(SealError, match="damaged or of another suite"):
        unsealed("x25519", b"FCS2" + header[4:], [segment], 1)


def session_of(header: bytes) -> bytes:
    return header[4:84]


def test_a_session_serves_so_many_messages_and_no_longer_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sealer = Sealer("x25519", KEYS["x25519"].public)
    headers = [sealer.seal([b""], BINDING).header for _ in range(2 * seal.SESSION_MESSAGES)]
    sessions = list(map(session_of, headers))
    assert len(set(sessions[: seal.SESSION_MESSAGES])) == len(set(sessions[seal.SESSION_MESSAGES :])) == 1
    assert len(set(sessions)) == 2
    fresh = Sealer("x25519", KEYS["x25519"].public)
    first = session_of(fresh.seal([b""], BINDING).header)
    assert session_of(fresh.seal([b""], BINDING).header) == first
    now = time.monotonic() + seal.SESSION_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert session_of(fresh.seal([b""], BINDING).header) != first


def test_what_a_sealer_keeps_opens_nothing_that_it_has_sealed() -> None:
    """Forward secrecy at the site: its memory, read later, does not give an earlier key away."""
    sealer = Sealer("x25519", KEYS["x25519"].public)
    header = sealer.seal([b"update"], BINDING).header
    kept = next(value for value in vars(sealer).values() if isinstance(value, bytes) and len(value) == 32)
    context = joined(b"fedclaw seal v2", b"heart", b"7", b"3", b"m-1", b"hospital-a")
    for _ in range(seal.SESSION_MESSAGES):
        assert expanded(kept, b"message" + header[88:104] + context, 48)[32:] != header[104:]
        kept = expanded(kept, b"next", 32)


def test_messages_of_a_session_open_in_any_order_and_after_a_restart() -> None:
    sealer = Sealer("x25519", KEYS["x25519"].public)
    sealed = [sealer.seal([bytes([number])], BINDING) for number in range(6)]
    opener = Opener("x25519", KEYS["x25519"].private)
    for number in (2, 0, 5, 5, 1, 4, 3):
        for one in (opener, Opener("x25519", KEYS["x25519"].private)):
            stream = one.open(sealed[number].header, BINDING, 1)
            stream.feed(sealed[number].segment(0))
            assert stream.finish() == bytes([number])


def test_the_opener_does_the_expensive_step_once_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    decrypt = Opener._decrypt
    monkeypatch.setattr(Opener, "_decrypt", lambda *arguments: done.append(1) or decrypt(*arguments))
    sealer, opener = Sealer("x25519", KEYS["x25519"].public), Opener("x25519", KEYS["x25519"].private)
    for _ in range(5):
        opener.open(sealer.seal([b""], BINDING).header, BINDING, 0)
    assert len(done) == 1


def test_a_forged_header_moves_no_session_on_and_costs_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer may repeat a session that it has seen, with any index: it is not believed, and it is not followed far."""
    sealer, opener = Sealer("x25519", KEYS["x25519"].public), Opener("x25519", KEYS["x25519"].private)
    first, second = (sealer.seal([b""], BINDING).header for _ in range(2))
    opener.open(first, BINDING, 0)
    steps = []
    monkeypatch.setattr(seal, "_next_secret", lambda secret: steps.append(1) or hashlib.sha256(secret).digest())
    for index in (7, seal.SESSION_MESSAGES - 1, seal.SESSION_MESSAGES, (1 << 32) - 1):
        with pytest.raises(SealError, match="does not open"):
            opener.open(first[:84] + index.to_bytes(4, "big") + first[88:], BINDING, 0)
    assert len(steps) == 7 + seal.SESSION_MESSAGES - 1
    monkeypatch.undo()
    monkeypatch.setattr(Opener, "_decrypt", None)
    opener.open(second, BINDING, 0)


def test_sessions_that_an_opener_keeps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "_OPEN_SESSIONS", 3)
    opener = Opener("x25519", KEYS["x25519"].private)
    headers = [sealed_parts("x25519", b"")[0] for _ in range(5)]
    for header in [*headers, headers[0]]:
        opener.open(header, BINDING, 0)
    assert len(opener._sessions) == 3


def test_many_threads_never_seal_two_messages_under_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(secret: bytes) -> bytes:
        time.sleep(0.002)
        return hashlib.sha256(secret).digest()

    monkeypatch.setattr(seal, "_next_secret", slow)
    sealer = Sealer("x25519", KEYS["x25519"].public)
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda _: sealer.seal([b""], BINDING).header, range(40)))
    assert len({header[4:88] for header in headers}) == 40
    assert len({header[88:104] for header in headers}) == 40


@pytest.mark.parametrize("suite", SUITES)
def test_public_of(suite: SealSuite) -> None:
    assert seal.public_of(suite, KEYS[suite].private) == KEYS[suite].public


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("key", [b"", b"short", bytes(31), bytes(5000)])
def test_wrong_keys_are_refused(suite: SealSuite, key: bytes) -> None:
    with pytest.raises(SealError, match="public seal key"):
        Sealer(suite, key)
    with pytest.raises(SealError, match="private seal key"):
        Opener(suite, key)


def test_unknown_suite() -> None:
    with pytest.raises(SealError, match="no seal suite is called 'rsa'"):
        seal.generate("rsa")  # type: ignore[arg-type]


@pytest.mark.parametrize("header", [b"", b"FCS1", b"XXXX" + bytes(80), bytes(10_000)])
def test_garbage_headers(header: bytes) -> None:
    with pytest.raises(SealError):
        Opener("x25519", KEYS["x25519"].private).open(header, BINDING, 1)


@pytest.mark.parametrize("size", [-1, (1 << 32) * SEGMENT + 1])
def test_impossible_sizes(size: int) -> None:
    header, _ = sealed_parts("x25519", b"")
    with pytest.raises(SealError, match="cannot hold"):
        Opener("x25519", KEYS["x25519"].private).open(header, BINDING, size)


def test_keys_stay_out_of_representations() -> None:
    keys = KEYS["x25519"]
    for item in (keys, Opener("x25519", keys.private), Sealer("x25519", keys.public)):
        assert repr(keys.private) not in repr(item)
    with pytest.raises(SealError) as caught:
        seal.decode_key("c2VjcmV0!")
    assert "c2VjcmV0" not in str(caught.value)
