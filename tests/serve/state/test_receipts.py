"""Receipts: what a node said comes back word for word, and from nobody but whom it said it to."""

import base64
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Principal
from fedclaw.serve.state import receipts
from fedclaw.serve.state.receipts import MAX_RECEIPT, MAX_ROWS, ReceiptKeys
from fedclaw.serve.state.store import StateStore, StateStoreError

WARD = Principal("ward 7", frozenset())


@pytest.fixture
def keys(store: StateStore) -> ReceiptKeys:
    return ReceiptKeys(store)


@pytest.fixture(scope="module")
def one_keys(tmp_path_factory: pytest.TempPathFactory) -> ReceiptKeys:
    """In SQLite, for tests of what is signed, which is the same in either."""
    return ReceiptKeys(StateStore.open(f"sqlite:///{tmp_path_factory.mktemp('keys') / 'state.db'}"))


def issue(keys: ReceiptKeys, **other: Any) -> str:
    plain = {
        "model": "heart",
        "version": "0123456789ab",
        "request": "r1",
        "principal": WARD.name,
        "key": "patient 4711",
    }
    return keys.issue(**{**plain, "propensity": 0.05, "rows": 1, "labels": ["ill"], **other})


def refused(keys: ReceiptKeys, receipt: Any, principal: Principal = WARD) -> str:
    with pytest.raises(ServeRefusal) as told:
        keys.check(receipt, principal)
    return told.value.code


def test_a_receipt_says_what_was_answered_at_any_node(keys: ReceiptKeys, store: StateStore):
    found = ReceiptKeys(store).check(issue(keys), WARD)
    assert (found.model, found.version, found.propensity, found.rows) == ("heart", "0123456789ab", 0.05, 1)
    assert (found.predicted, found.has_values) == (("ill",), False)
    assert abs(found.issued - store.now()) < 60


@settings(max_examples=50)
@given(
    labels=st.lists(st.none() | st.text(max_size=5), max_size=50),
    names=st.tuples(*[st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")] * 2),
    texts=st.tuples(*[st.text(max_size=50)] * 2),
)
def test_whatever_was_predicted_comes_back(one_keys: ReceiptKeys, labels: list[str | None], names: Any, texts: Any):
    model, version = names
    request, key = texts
    receipt = issue(one_keys, model=model, version=version, request=request, key=key, rows=len(labels), labels=labels)
    assert receipt.isascii()
    assert not set(receipt) & set("+/= \n")
    found = one_keys.check(receipt, WARD)
    assert (found.model, found.version, found.rows) == (model, version, len(labels))
    assert found.predicted == tuple(labels)


def test_values_come_back_as_float32_and_what_is_none_as_none(one_keys: ReceiptKeys):
    receipt = issue(one_keys, rows=4, labels=None, values=[1.5, -2.0, math.nan, 1e300])
    assert one_keys.check(receipt, WARD).predicted == (1.5, -2.0, None, None)
    assert one_keys.check(issue(one_keys, labels=None, values=[math.nan]), WARD).has_values


@pytest.mark.parametrize(
    "predicted",
    [
        {"rows": MAX_ROWS + 1, "labels": ["a"] * (MAX_ROWS + 1)},
        {"rows": 256, "labels": [f"label {number}" for number in range(256)]},
        {"rows": 1, "labels": ["x" * 256]},
        {"rows": 2, "labels": ["a"]},
        {"rows": 300, "labels": None, "values": [1.0] * 300},
        {"rows": 3, "labels": None},
    ],
)
def test_what_does_not_fit_is_counted(one_keys: ReceiptKeys, predicted: dict[str, Any]):
    receipt = issue(one_keys, **predicted)
    found = one_keys.check(receipt, WARD)
    assert (found.rows, found.predicted) == (predicted["rows"], None)


def test_every_receipt_fits_into_a_header(one_keys: ReceiptKeys):
    longest = {"model": "m" * 100, "version": "v" * 100}
    for rows in range(1, MAX_ROWS + 1, 5):
        labels = [f"{number:0>20}" for number in range(rows)]
        assert len(issue(one_keys, **longest, rows=rows, labels=labels)) <= MAX_RECEIPT
        assert len(issue(one_keys, **longest, rows=rows, labels=None, values=[1.0] * rows)) <= MAX_RECEIPT
    assert one_keys.check(issue(one_keys, **longest, rows=50, labels=labels[:50]), WARD).predicted is not None
    assert len(issue(one_keys)) < 150
    many = issue(one_keys, rows=200, labels=[f"{number:0>255}" for number in range(200)])
    assert len(many) < 2000
    assert one_keys.check(many, WARD).predicted is None


def test_one_bit_changed_anywhere_is_refused(one_keys: ReceiptKeys):
    receipt = issue(one_keys)
    signed = base64.urlsafe_b64decode(receipt + "=" * (-len(receipt) % 4))
    for place in range(len(signed)):
        for bit in (1, 128):
            changed = bytearray(signed)
            changed[place] ^= bit
            assert refused(one_keys, base64.urlsafe_b64encode(changed).rstrip(b"=").decode()) == "forbidden"


def test_what_is_no_receipt_is_refused(one_keys: ReceiptKeys):
    receipt = issue(one_keys)
    for wrong in (
        "",
        "x",
        "é" * 60,
        "\ud800",
        receipt + "=",
        receipt[:30],
        receipt + "\n",
        "A" * (MAX_RECEIPT + 1),
        None,
        5,
    ):
        assert refused(one_keys, wrong) == "unprocessable"
    for wrong in (receipt[:-4], receipt + "AAAA", "AAAA" + receipt, "A" * 200):
        assert refused(one_keys, wrong) == "forbidden"


def test_another_principal_or_another_database_is_told_no_more_than_a_forger(one_keys: ReceiptKeys, tmp_path: Path):
    receipt = issue(one_keys)
    told = []
    with StateStore.open(f"sqlite:///{tmp_path / 'state.db'}") as store:
        strangers = [(one_keys, Principal("ward 8", frozenset())), (ReceiptKeys(store), WARD)]
        for keys, principal in strangers:
            with pytest.raises(ServeRefusal) as refusal:
                keys.check(receipt, principal)
            told.append((refusal.value.code, str(refusal.value)))
    assert told == [("forbidden", "receipt: it was not given to you by this service")] * 2


def test_an_old_receipt_is_refused(one_keys: ReceiptKeys, monkeypatch: pytest.MonkeyPatch):
    receipt, now = issue(one_keys), receipts.time.time()
    monkeypatch.setattr(receipts.time, "time", lambda: now + 30 * 86_400 - 2)
    one_keys.check(receipt, WARD)
    monkeypatch.setattr(receipts.time, "time", lambda: now + 30 * 86_400 + 2)
    assert refused(one_keys, receipt) == "unprocessable"


def test_the_identity_is_that_of_the_principals_request(one_keys: ReceiptKeys):
    def identity(**other: Any) -> str:
        principal = Principal(other.get("principal", WARD.name), frozenset())
        return one_keys.check(issue(one_keys, **other), principal).identity

    assert identity() == identity(version="b", labels=["well"], key="k", propensity=1.0)
    others = {identity(), identity(request="r2"), identity(model="lung"), identity(principal="ward 8")}
    assert len(others | {identity(model="hea", request="rt"), identity(request="")}) == 6


def test_the_same_routing_key_is_known_again_and_another_database_knows_it_otherwise(
    one_keys: ReceiptKeys, tmp_path: Path
):
    def key(keys: ReceiptKeys, **other: Any) -> str:
        return keys.check(issue(keys, **other), WARD).key

    assert key(one_keys) == key(one_keys, request="r2") != key(one_keys, key="patient 4712")
    with StateStore.open(f"sqlite:///{tmp_path / 'state.db'}") as store:
        assert key(ReceiptKeys(store)) != key(one_keys)


def test_a_receipt_names_neither_principal_nor_key_nor_request(one_keys: ReceiptKeys):
    receipt = issue(one_keys)
    signed = base64.urlsafe_b64decode(receipt + "=" * (-len(receipt) % 4))
    for secret in (b"4711", b"ward", b"r1"):
        assert secret not in signed


def move(monkeypatch: pytest.MonkeyPatch, store: StateStore, seconds: float) -> None:
    """The clocks of the node and of the database go forward."""
    now, real, ticks = receipts.time.time(), store.now(), receipts.time.monotonic()
    monkeypatch.setattr(receipts.time, "monotonic", lambda: ticks + seconds)
    monkeypatch.setattr(receipts.time, "time", lambda: now + seconds)
    monkeypatch.setattr(store, "now", lambda: real + seconds)


def test_keys_rotate_without_a_receipt_that_no_node_knows(
    store: StateStore, opened: Callable[[], StateStore], monkeypatch: pytest.MonkeyPatch
):
    first, other = ReceiptKeys(store), ReceiptKeys(opened())
    old = issue(first)
    first.rotate()
    assert issue(first)[:8] == old[:8]  # The new key waits until all have heard of it.
    with monkeypatch.context() as patch:
        move(patch, store, 61)
        new = issue(first)
        assert new[:8] != old[:8]
        assert other.check(new, WARD).key == other.check(old, WARD).key
        assert first.age() < 60
    with monkeypatch.context() as patch:
        move(patch, store, 29 * 86_400)
        first.rotate()
        other.check(old, WARD)
        first.check(old, WARD)
    with monkeypatch.context() as patch:
        move(patch, store, 31 * 86_400)
        first.rotate()
        assert refused(first, old) == "forbidden"  # Its key is gone.
        first.check(issue(first), WARD)


def test_of_two_that_rotate_together_one_wins_and_both_know(store: StateStore, opened: Callable[[], StateStore]):
    first, second = ReceiptKeys(store), ReceiptKeys(opened())
    first.rotate()
    second.rotate()
    second.rotate()
    first.refresh()
    assert sorted(first._keys) == sorted(second._keys)
    second.check(issue(first), WARD)


def test_a_store_that_lost_its_keys_is_told(store: StateStore, keys: ReceiptKeys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "read", lambda _: None)
    with pytest.raises(StateStoreError, match="feedback keys were removed"):
        keys.refresh()
    keys.check(issue(keys), WARD)
