"""Feedback: believed only from whom the answer was given to, counted once, acknowledged only when it is kept."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedclaw.serve.refusals import Code, ServeRefusal
from fedclaw.serve.requests import Principal
from fedclaw.serve.state.feedback import MAX_BODY, FeedbackHandler
from fedclaw.serve.state.receipts import ReceiptKeys
from fedclaw.serve.state.store import StateStore, StateUnavailable
from tests.postgresql import PostgresServer
from tests.serve.state.conftest import postgresql_place

WARD = Principal("ward 7", frozenset({"feedback:heart"}))


@pytest.fixture
def keys(store: StateStore) -> ReceiptKeys:
    return ReceiptKeys(store)


@pytest.fixture
def handler(store: StateStore, keys: ReceiptKeys) -> FeedbackHandler:
    return FeedbackHandler(store, keys)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeedbackHandler, ReceiptKeys, StateStore]:
    """In SQLite, for what is refused before the database is asked."""
    store = StateStore.open(f"sqlite:///{tmp_path_factory.mktemp('one') / 'state.db'}")
    keys = ReceiptKeys(store)
    return FeedbackHandler(store, keys), keys, store


def issue(keys: ReceiptKeys, **other: Any) -> str:
    plain = {"model": "heart", "version": "v1", "request": "r1", "principal": WARD.name, "key": "patient 4711"}
    return keys.issue(**{**plain, "propensity": 0.05, "rows": 1, "labels": ["ill"], **other})


def body(receipt: str, **said: Any) -> bytes:
    return json.dumps({"receipt": receipt, **said}).encode()


def refusal(handler: FeedbackHandler, told: bytes, principal: Principal = WARD) -> tuple[Code, str]:
    with pytest.raises(ServeRefusal) as refused:
        handler.credit(principal, told)
    return refused.value.code, str(refused.value)


@pytest.mark.parametrize(
    ("said", "predicted", "kept"),
    [
        ({"label": "ill"}, {}, {"predicted": ["ill"], "truth": ["ill"], "reward": 1.0, "reward_from": "label"}),
        ({"label": "well"}, {}, {"predicted": ["ill"], "truth": ["well"], "reward": 0.0, "reward_from": "label"}),
        ({"label": 1}, {"labels": ["1"]}, {"predicted": ["1"], "truth": ["1"], "reward": 1.0, "reward_from": "label"}),
        (
            {"labels": ["a", None, "b", "c"]},
            {"rows": 4, "labels": ["a", "a", "c", None]},
            {
                "predicted": ["a", "a", "c", None],
                "truth": ["a", None, "b", "c"],
                "reward": 0.5,
                "reward_from": "label",
            },
        ),
        ({"value": 3}, {"labels": None, "values": [2.5]}, {"predicted": [2.5], "truth": [3.0]}),
        (
            {"values": [1.0, None]},
            {"rows": 2, "labels": None, "values": [2.5, 1.0]},
            {"predicted": [2.5, 1.0], "truth": [1.0, None]},
        ),
        ({"reward": 0}, {}, {"reward": 0.0, "reward_from": "reward"}),
        ({"reward": 0.25, "completed": True}, {}, {"reward": 0.25, "reward_from": "reward", "completed": True}),
        ({"completed": False}, {}, {"completed": False, "reward": 0.0, "reward_from": "completed"}),
        ({"satisfaction": 4}, {}, {"satisfied": True, "score": 4, "reward": 1.0, "reward_from": "satisfaction"}),
        ({"satisfaction": 3}, {}, {"satisfied": False, "score": 3, "reward": 0.0, "reward_from": "satisfaction"}),
        ({"satisfaction": "up"}, {}, {"satisfied": True, "reward": 1.0, "reward_from": "satisfaction"}),
        (
            {"satisfaction": "down", "label": None},
            {},
            {"satisfied": False, "reward": 0.0, "reward_from": "satisfaction"},
        ),
    ],
)
def test_each_outcome_is_kept_with_what_was_predicted(
    one: tuple[FeedbackHandler, ReceiptKeys, StateStore], request: Any, said: Any, predicted: Any, kept: dict[str, Any]
):
    handler, keys, store = one
    receipt = issue(keys, request=request.node.name, **predicted)
    assert handler.credit(WARD, body(receipt, **said)).body() == {
        "model": "heart",
        "version": "v1",
        "credited": True,
        "repeated": False,
    }
    found = store.credited(keys.check(receipt, WARD).identity)
    assert found is not None
    plain = found.body
    assert (plain.pop("propensity"), plain.pop("rows")) == (0.05, predicted.get("rows", 1))
    for name in ("issued", "principal", "key", "said"):
        plain.pop(name)
    assert plain == kept


def test_feedback_is_credited_once_and_the_same_again_is_told_so(
    handler: FeedbackHandler, keys: ReceiptKeys, store: StateStore
):
    receipt = issue(keys)
    assert not handler.credit(WARD, body(receipt, label="ill", reward=1)).repeated
    assert handler.credit(WARD, body(receipt, reward=1, label="ill")).repeated
    assert refusal(handler, body(receipt, label="well"))[0] == "conflict"
    assert refusal(handler, body(receipt, reward=1))[0] == "conflict"
    again = issue(keys, version="v2", labels=["well"])  # The same request, asked once more.
    assert refusal(handler, body(again, label="well"))[0] == "conflict"
    assert handler.credit(WARD, body(again, label="ill", reward=1)).version == "v1"
    assert [one.version for one in store.feedback("heart")] == ["v1"]
    assert not handler.credit(WARD, body(issue(keys, request="r2"), label="ill")).repeated


def test_of_many_that_send_the_same_at_once_one_is_credited(
    handler: FeedbackHandler, keys: ReceiptKeys, store: StateStore
):
    receipt = issue(keys)
    with ThreadPoolExecutor(6) as threads:
        told = list(threads.map(lambda _: handler.credit(WARD, body(receipt, reward=1)), range(12)))
    assert sorted(one.repeated for one in told) == [False] + [True] * 11
    assert len(store.feedback("heart")) == 1


@pytest.mark.parametrize(
    ("told", "code", "words"),
    [
        (b"", "bad_request", "not JSON"),
        (b"{", "bad_request", "not JSON"),
        (b"\xff", "bad_request", "not JSON"),
        (b"[" * 10_000, "bad_request", "not JSON"),
        (b'{"reward": NaN}', "bad_request", "not JSON"),
        (b"[]", "bad_request", "object"),
        (b'"x"', "bad_request", "object"),
        (b"x" * (MAX_BODY + 1), "too_large", "bytes"),
        (b"{}", "unprocessable", "receipt: give"),
        (b'{"receipt": 5, "reward": 1}', "unprocessable", "receipt: give"),
        (b'{"receipt": "x", "reward": 1}', "unprocessable", "receipt: it is not whole"),
        (b'{"receipt": "x"}', "unprocessable", "body: it says nothing"),
        (b'{"receipt": "x", "label": null}', "unprocessable", "body: it says nothing"),
        (b'{"receipt": "x", "rewrad": 1}', "unprocessable", "rewrad: it is not known"),
    ],
)
def test_a_body_that_is_none_is_refused(one: Any, told: bytes, code: str, words: str):
    found, message = refusal(one[0], told)
    assert found == code
    assert words in message


@pytest.mark.parametrize(
    ("said", "predicted", "field"),
    [
        ({"label": ["ill"]}, {}, "label"),
        ({"label": True}, {}, "label"),
        ({"label": 1.5}, {}, "label"),
        ({"label": ""}, {}, "label"),
        ({"label": "x" * 256}, {}, "label"),
        ({"label": {}}, {}, "label"),
        ({"labels": "ill"}, {}, "labels"),
        ({"labels": ["ill", "ill"]}, {}, "labels"),
        ({"labels": []}, {}, "labels"),
        ({"labels": {"0": "ill"}}, {}, "labels"),
        ({"label": "ill"}, {"rows": 2, "labels": ["ill", "well"]}, "label"),
        ({"label": "ill", "labels": ["ill"]}, {}, "labels"),
        ({"value": 1.0}, {}, "value"),
        ({"label": "ill"}, {"labels": None, "values": [1.0]}, "label"),
        ({"value": "1"}, {"labels": None, "values": [1.0]}, "value"),
        ({"value": True}, {"labels": None, "values": [1.0]}, "value"),
        ({"value": 1e39}, {"labels": None, "values": [1.0]}, "value"),
        ({"label": "ill"}, {"labels": None}, "label"),
        ({"reward": 1.01}, {}, "reward"),
        ({"reward": -0.01}, {}, "reward"),
        ({"reward": "1"}, {}, "reward"),
        ({"reward": True}, {}, "reward"),
        ({"completed": 1}, {}, "completed"),
        ({"completed": "yes"}, {}, "completed"),
        ({"satisfaction": 0}, {}, "satisfaction"),
        ({"satisfaction": 6}, {}, "satisfaction"),
        ({"satisfaction": 4.5}, {}, "satisfaction"),
        ({"satisfaction": True}, {}, "satisfaction"),
        ({"satisfaction": "sideways"}, {}, "satisfaction"),
        ({"satisfaction": [5]}, {}, "satisfaction"),
    ],
)
def test_an_outcome_that_is_none_is_refused_and_can_be_put_right(
    one: Any, request: Any, said: Any, predicted: Any, field: str
):
    handler, keys, _ = one
    receipt = issue(keys, request=request.node.name, **predicted)
    code, message = refusal(handler, body(receipt, **said))
    assert (code, message.split(":")[0]) == ("unprocessable", field)
    assert not handler.credit(WARD, body(receipt, completed=True)).repeated


def test_a_label_that_the_model_does_not_know_is_refused_where_its_labels_are_known(
    store: StateStore, keys: ReceiptKeys
):
    handler = FeedbackHandler(store, keys, lambda _, version: ["well", "ill"] if version == "v1" else None)
    assert "knows no label 'dead'" in refusal(handler, body(issue(keys), label="dead"))[1]
    assert not handler.credit(WARD, body(issue(keys, version="v2"), label="dead")).repeated


def test_only_the_principal_that_was_answered_with_the_scope_of_the_model_is_credited(one: Any):
    handler, keys, store = one
    receipt = issue(keys, request="of ward 7")
    for other in (
        Principal("ward 8", frozenset({"feedback:*"})),
        Principal("ward 7", frozenset()),
        Principal("ward 7", frozenset({"predict:heart", "feedback:lung", "feedback:hear"})),
    ):
        assert refusal(handler, body(receipt, reward=1), other)[0] == "forbidden"
    assert store.credited(keys.check(receipt, WARD).identity) is None
    assert not handler.credit(Principal("ward 7", frozenset({"feedback:*"})), body(receipt, reward=1)).repeated


def test_who_has_no_scope_does_not_learn_the_model_of_anothers_receipt(one: Any):
    handler, keys, _ = one
    _, message = refusal(handler, body(issue(keys), reward=1), Principal("ward 8", frozenset()))
    assert "heart" not in message


def test_nothing_is_acknowledged_while_the_database_is_away_and_it_can_be_sent_again(
    server: PostgresServer, tmp_path: Path
):
    with StateStore.open(postgresql_place(server, tmp_path)) as store:
        keys = ReceiptKeys(store)
        handler = FeedbackHandler(store, keys)
        receipt = issue(keys)
        server.stop("fast")
        try:
            with pytest.raises(StateUnavailable) as told:
                handler.credit(WARD, body(receipt, reward=1))
            assert told.value.status == 503
            assert told.value.retry_after is not None
            with pytest.raises(StateUnavailable):
                keys.refresh()
            assert keys.check(issue(keys), WARD).model == "heart"  # Answers go on.
        finally:
            server.start()
        assert not handler.credit(WARD, body(receipt, reward=1)).repeated


def test_acknowledged_feedback_is_there_after_a_kill_of_the_node(opened: Callable[[], StateStore], where: str):
    import os
    import signal

    keys = ReceiptKeys(opened())
    told, tell = os.pipe()
    if (process := os.fork()) == 0:
        own = StateStore.open(where)
        own_keys = ReceiptKeys(own)
        handler = FeedbackHandler(own, own_keys)
        for number in range(10_000):
            handler.credit(WARD, body(issue(own_keys, request=str(number)), reward=1))
            os.write(tell, f"{number}\n".encode())
    os.close(tell)
    with os.fdopen(told) as acknowledged:
        heard = [acknowledged.readline() for _ in range(5)]
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        heard += acknowledged.readlines()
    store = opened()
    for line in heard:
        if line.endswith("\n"):
            assert store.credited(keys.check(issue(keys, request=line.strip()), WARD).identity) is not None
    assert len(heard) <= len(store.feedback("heart")) <= len(heard) + 1
