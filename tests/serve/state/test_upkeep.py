"""A store that is looked after does not grow for ever, and loses nothing that is still needed."""

import pytest

from fedclaw.serve.requests import Principal
from fedclaw.serve.state.receipts import ReceiptKeys
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.state.upkeep import keep_up
from tests.serve.state.race import assigned

DAY = 86_400


def test_upkeep_merges_drops_and_rotates_when_it_is_time(store: StateStore, monkeypatch: pytest.MonkeyPatch):
    keys, now = ReceiptKeys(store, days=30), int(store.now())
    hour = (now // 3600 - 9) * 3600
    for second in (hour, hour + 1, hour + 2, now, now - 91 * DAY):
        store.add_counts("m", "v", second, {"calls": 1})
    store.beat("node", "0", [])
    store.credit("r", "m", "v", {})
    assigned(store, "m", "k", "v")
    assert keep_up(store, keys) == 3
    assert store.counts("m", 0) == {"v": {"calls": 4}}
    assert keep_up(store, keys) == 0
    assert (len(store.workers()), len(store.feedback("m")), assigned(store, "m", "k", "w")) == (1, 1, "v")

    document = store.read("feedback-keys")
    assert document is not None
    with monkeypatch.context() as patch:
        patch.setattr(store, "now", lambda: now + 29 * DAY)
        keep_up(store, keys)
        assert store.read("feedback-keys") == document
        patch.setattr(store, "now", lambda: now + 31 * DAY)
        keep_up(store, keys)
        assert store.read("feedback-keys") != document


def test_feedback_is_kept_for_as_long_as_its_receipt_could_be_shown_again(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
):
    asked: list[dict[str, float]] = []
    monkeypatch.setattr(store, "prune", lambda **ages: asked.append(ages) or 0)
    for days in (1.0, 30.0, 400.0):
        keys = ReceiptKeys(store, days=days)
        keep_up(store, keys, feedback_days=days)
        assert asked[-1]["feedback"] >= (days + 1) * DAY
    receipt = keys.issue(
        model="m", version="v", request="r", principal="p", key="k", propensity=1.0, rows=1, labels=["a"]
    )
    assert keys.check(receipt, Principal("p", frozenset())).model == "m"
