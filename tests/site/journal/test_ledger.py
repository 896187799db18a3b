import math
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from datetime import datetime, tzinfo
from pathlib import Path

import pytest

from fedclaw.errors import BudgetExceeded, LedgerError
from fedclaw.privacy.accounting import NoiseEvent, epsilon_of
from fedclaw.protocol import chain
from fedclaw.site.journal.ledger import Budget, Ledger, Reservation, describe

ROUND = NoiseEvent(0.1, 2.0, 10)
DELTA = 1e-5
WIDE = Budget(epsilon=100.0, delta=DELTA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


def reserve(ledger: Ledger, key: str, mechanism: NoiseEvent | None = ROUND, **fields: object) -> Reservation:
    values = {"federation": "hospitals", "run": "run-1", "round": 1, "budget": WIDE, **fields}
    return ledger.reserve(key, mechanism=mechanism, **values)


def cost(times: int) -> float:
    return epsilon_of([ROUND] * times, DELTA)


def kinds(ledger: Ledger) -> list[str]:
    return [entry.body["kind"] for entry in ledger.entries()]


def tamper(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER no_update")
    connection.execute("DROP TRIGGER no_delete")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_open_and_settled_reservations_both_count() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        assert ledger.spent(DELTA) == 0
        reserve(ledger, "a")
        assert ledger.spent(DELTA) == pytest.approx(cost(1))
        ledger.settle("a")
        assert ledger.spent(DELTA) == pytest.approx(cost(1))
        reserve(ledger, "b")
        assert ledger.spent(DELTA) == pytest.approx(cost(2))
        assert ledger.spent(1e-7) == pytest.approx(epsilon_of([ROUND] * 2, 1e-7))
        assert kinds(ledger) == ["open", "reserve", "settle", "reserve"]


def test_an_open_reservation_is_taken_up_again() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        assert reserve(ledger, "a") == reserve(ledger, "a")
        assert ledger.rounds("run-1") == 1


def test_taking_up_again_needs_no_budget_left() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        exact = Budget(cost(1), DELTA)
        assert reserve(ledger, "a", budget=exact) == reserve(ledger, "a", budget=exact)


def test_a_settled_key_is_charged_anew() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        first = reserve(ledger, "a")
        ledger.settle("a")
        second = reserve(ledger, "a")
        assert (first.attempt, second.attempt) == (1, 2)
        assert ledger.rounds("run-1") == 2
        assert ledger.spent(DELTA) == pytest.approx(cost(2))


@pytest.mark.parametrize("other", [NoiseEvent(0.1, 2.0, 11), NoiseEvent(0.1, 1.9, 10), NoiseEvent(0.2, 2.0, 10), None])
def test_another_mechanism_under_the_same_key_is_charged_anew(other: NoiseEvent | None) -> None:
    unlimited = Budget(None, DELTA)
    with Ledger.open(":memory:", "data") as ledger:
        reserve(ledger, "a")
        assert reserve(ledger, "a", other, budget=unlimited).attempt == 2
        assert ledger.rounds("run-1") == 2
        assert reserve(ledger, "a").attempt == 1


def test_another_run_under_the_same_key_is_charged_anew() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        reserve(ledger, "a")
        assert reserve(ledger, "a", run="run-2").attempt == 2
        assert reserve(ledger, "a", federation="banks").attempt == 3


def test_another_round_or_content_under_the_same_key_is_charged_anew() -> None:
    """The server names its messages: a name alone says nothing of what is asked."""
    with Ledger.open(":memory:", "data") as ledger:
        first = reserve(ledger, "a", content="aa" * 32)
        assert reserve(ledger, "a", content="aa" * 32) == first
        assert reserve(ledger, "a", content="bb" * 32).attempt == 2
        assert reserve(ledger, "a", content="aa" * 32, round=2).attempt == 3
        assert reserve(ledger, "a").attempt == 4, "one that says nothing of its content is like no other"
        assert reserve(ledger, "a", content="bb" * 32).attempt == 2


def test_a_charge_is_settled_by_its_own_hash() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        first, second = reserve(ledger, "a", content="aa" * 32), reserve(ledger, "a", content="bb" * 32)
        ledger.settle("a", first.hash)
        ledger.settle("a", first.hash)
        assert reserve(ledger, "a", content="bb" * 32) == second
        assert [entry.body["reserve"] for entry in ledger.entries()[3:]] == [first.sequence]
        with pytest.raises(LedgerError, match="was not charged"):
            ledger.settle("b", second.hash)
        with pytest.raises(LedgerError, match="was not charged"):
            ledger.settle("a", "0" * 64)
        assert ledger.settle_unanswered("a") == [second.hash]
        assert ledger.settle_unanswered("a") == ledger.settle_unanswered("b") == []


def test_settling_twice_is_settling_once_and_settling_nothing_is_an_error() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        reserve(ledger, "a")
        ledger.settle("a")
        ledger.settle("a")
        assert kinds(ledger) == ["open", "reserve", "settle"]
        with pytest.raises(LedgerError, match="nothing is reserved under 'b'"):
            ledger.settle("b")
        assert kinds(ledger) == ["open", "reserve", "settle"]


def test_settling_settles_the_newest_reservation() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        older = reserve(ledger, "a")
        newer = reserve(ledger, "a", NoiseEvent(0.1, 3.0, 10))
        ledger.settle("a")
        assert reserve(ledger, "a") == older
        assert reserve(ledger, "a", newer.mechanism).attempt == 3


def test_the_budget_is_never_exceeded_and_the_message_has_the_figures() -> None:
    budget = Budget(epsilon=(cost(3) + cost(4)) / 2, delta=DELTA)
    with Ledger.open(":memory:", "data") as ledger:
        for key in "abc":
            reserve(ledger, key, budget=budget)
        with pytest.raises(BudgetExceeded) as caught:
            reserve(ledger, "d", budget=budget)
        for figure in (cost(3), budget.epsilon, cost(4)):
            assert f"{figure:.4g}" in str(caught.value)
        assert "10 steps at sample rate 0.1 with noise multiplier 2" in str(caught.value)
        assert ledger.spent(DELTA) == pytest.approx(cost(3))
        assert kinds(ledger) == ["open", *["reserve"] * 3]
        reserve(ledger, "d", NoiseEvent(0.1, 200.0, 10), budget=budget)


def test_a_budget_exactly_met_is_not_exceeded() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        reserve(ledger, "a", budget=Budget(cost(1), DELTA))
        assert ledger.rounds("run-1") == 1


def test_a_run_cannot_spend_more_than_a_run_may_by_asking_again() -> None:
    limit = Budget(epsilon=(cost(2) + cost(3)) / 2, delta=DELTA)
    with Ledger.open(":memory:", "data") as ledger:
        reserve(ledger, "a", run_budget=limit)
        reserve(ledger, "b", run_budget=limit)
        with pytest.raises(BudgetExceeded, match="is spent by this run"):
            reserve(ledger, "c", run_budget=limit)
        reserve(ledger, "d", run="run-2", run_budget=limit)
        assert ledger.rounds("run-1") == 2


def test_training_without_privacy_is_unbounded_from_then_on() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        with pytest.raises(BudgetExceeded, match="training without privacy"):
            reserve(ledger, "a", None)
        reserve(ledger, "a", None, budget=Budget(None, DELTA))
        assert ledger.spent(DELTA) == math.inf
        with pytest.raises(BudgetExceeded, match="an unbounded amount of epsilon 100"):
            reserve(ledger, "b")


def test_data_sets_have_budgets_of_their_own_in_one_file(path: Path) -> None:
    with Ledger.open(path, "left") as left, Ledger.open(path, "right") as right:
        reserve(left, "a", budget=Budget(cost(1), DELTA))
        reserve(right, "a", budget=Budget(cost(1), DELTA))
        assert left.spent(DELTA) == right.spent(DELTA) == pytest.approx(cost(1))
        assert left.head() == right.head()
        with pytest.raises(BudgetExceeded):
            reserve(left, "b", budget=Budget(cost(1), DELTA))


def test_new_content_goes_on_with_the_budget_of_its_name(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A nightly export changes the bytes and keeps the people: no byte of a file gives a budget back."""
    exact = Budget((cost(1) + cost(2)) / 2, DELTA)
    with Ledger.open(path, "wards", "aa" * 32) as ledger:
        assert reserve(ledger, "a", budget=exact).fingerprint == "aa" * 32
    with Ledger.open(path, "wards", "aa" * 32):
        assert not caplog.text
    with Ledger.open(path, "wards", "bb" * 32) as ledger:
        assert "content of data set wards has changed" in caplog.text
        assert f"{'a' * 16}, then {'b' * 16}" in caplog.text
        assert ledger.spent(DELTA) == pytest.approx(cost(1))
        with pytest.raises(BudgetExceeded):
            reserve(ledger, "b", budget=exact)
        reserve(ledger, "b")
        bodies = [entry.body for entry in ledger.entries()]
    assert [body.get("fingerprint") for body in bodies] == [None, "aa" * 32, "bb" * 32]


def test_content_that_was_charged_does_not_get_a_new_budget_by_a_new_name(path: Path) -> None:
    with Ledger.open(path, "wards", "aa" * 32) as ledger:
        reserve(ledger, "a")
    with pytest.raises(LedgerError, match=r"charged as the data set 'wards'.*write data\.name: wards"):
        Ledger.open(path, "other", "aa" * 32)
    with Ledger.open(path, "other", "cc" * 32) as ledger:
        assert ledger.spent(DELTA) == 0


def test_a_stored_reply_settles_after_content_and_name_have_changed(path: Path) -> None:
    with Ledger.open(path, "wards", "aa" * 32) as ledger:
        reserve(ledger, "a")
        reserve(ledger, "b")
    with Ledger.open(path, "wards", "bb" * 32) as ledger:
        ledger.settle("a")
        assert kinds(ledger) == ["open", "reserve", "reserve", "settle"]
    with Ledger.open(path, "other", "cc" * 32) as ledger:
        ledger.settle("b")
        ledger.settle("b")
        assert kinds(ledger) == ["open", "reserve", "reserve", "settle", "settle"]


def test_an_open_reservation_is_not_taken_up_again_for_other_content(path: Path) -> None:
    """Each charge says which content it was for; a round that is trained on other content is another charge."""
    with Ledger.open(path, "wards", "aa" * 32) as ledger:
        first = reserve(ledger, "a")
        assert reserve(ledger, "a") == first
    with Ledger.open(path, "wards", "bb" * 32) as ledger:
        second = reserve(ledger, "a")
        assert (second.attempt, second.fingerprint) == (2, "bb" * 32)


def test_a_ledger_without_fingerprints_is_read_as_before(path: Path) -> None:
    with Ledger.open(path, "wards") as ledger:
        reserve(ledger, "a")
    with Ledger.open(path, "wards", "aa" * 32) as ledger:
        ledger.verify()
        assert ledger.spent(DELTA) == pytest.approx(cost(1))
        ledger.settle("a")


def test_runs_and_federations_are_told_apart() -> None:
    with Ledger.open(":memory:", "data") as ledger:
        reserve(ledger, "a", run="x", federation="one")
        reserve(ledger, "b", run="x", federation="two")
        reserve(ledger, "c", run="y", federation="two")
        assert (ledger.rounds("x"), ledger.rounds("x", "one"), ledger.rounds("z")) == (2, 1, 0)
        assert ledger.spent(DELTA, run="x") == pytest.approx(cost(2))
        assert ledger.spent(DELTA, run="x", federation="two") == pytest.approx(cost(1))
        assert ledger.spent(DELTA, federation="two") == pytest.approx(cost(2))
        assert ledger.spent(DELTA, run="z") == 0


def test_everything_survives_reopening(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        first = reserve(ledger, "a")
        reserve(ledger, "b")
        ledger.settle("b")
        spent, head, entries = ledger.spent(DELTA), ledger.head(), ledger.entries()
    with Ledger.open(path, "data") as ledger:
        assert (ledger.spent(DELTA), ledger.head(), ledger.entries()) == (spent, head, entries)
        assert reserve(ledger, "a") == first
        assert reserve(ledger, "b").attempt == 2
        assert head in ledger.index().heads
        assert ledger.head() != head
        assert "00" * 32 not in ledger.index().heads


def test_only_the_owner_may_read_it(path: Path) -> None:
    with Ledger.open(path, "data"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with Ledger.open(path, "data"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_file_itself_refuses_changes(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "a")
    connection = sqlite3.connect(path)
    for statement in ("UPDATE entries SET hash = ''", "DELETE FROM entries"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE entries SET body = replace(body, '2.0', '9.0') WHERE sequence = 3", "entry 3 has been changed"),
        ("UPDATE entries SET body = replace(body, 'T', 't') WHERE sequence = 1", "entry 1 has been changed"),
        ("UPDATE entries SET hash = upper(hash) WHERE sequence = 2", "entry 2 has been changed"),
        ("UPDATE entries SET body = 'x' WHERE sequence = 4", "entry 4 has been changed"),
        ("DELETE FROM entries WHERE sequence = 3", "entry 3 is missing"),
        ("DELETE FROM entries WHERE sequence = 1", "entry 1 is missing"),
        ("DELETE FROM entries WHERE sequence >= 4", "entries after 3 were removed"),
        ("INSERT INTO entries VALUES (-1, '{}', '')", "entry 1 is missing"),
        ("INSERT INTO entries SELECT 6, body, hash FROM entries WHERE sequence = 5", "entry 6 has been changed"),
        ("UPDATE entries SET sequence = 99 WHERE sequence = 5", "entry 5 is missing"),
    ],
)
def test_tampering_is_named_and_blocks_training(path: Path, statement: str, message: str) -> None:
    with Ledger.open(path, "data") as ledger:
        for key in "abcd":
            reserve(ledger, key)
        head = ledger.head()
        tamper(path, statement)
        with pytest.raises(LedgerError, match=message):
            ledger.verify()
    with pytest.raises(LedgerError, match=f"{message}.*do not train on"):
        Ledger.open(path, "data")
    assert head


def test_a_forged_entry_with_a_right_hash_is_still_read_with_care(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        head = ledger.head()
    body = chain.canonical({"kind": "refund", "sequence": 2})
    tamper(path, f"INSERT INTO entries VALUES (2, '{body}', '{chain.link(head, body)}')")
    with pytest.raises(LedgerError, match="entry 2 cannot be read: 'refund'"):
        Ledger.open(path, "data")


def test_a_ledger_cut_under_a_running_process_blocks_it(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "a")
        reserve(ledger, "b")
        tamper(path, "DELETE FROM entries WHERE sequence = 3", "UPDATE sqlite_sequence SET seq = 2")
        for _ in range(2):
            with pytest.raises(LedgerError, match="changed or removed"):
                reserve(ledger, "c")
            with pytest.raises(LedgerError, match="entry 3, which this process has seen"):
                ledger.verify()


def test_an_old_copy_put_back_is_a_ledger_without_the_later_head(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "a")
        copy = path.read_bytes()
        reserve(ledger, "b")
        head = ledger.head()
    path.write_bytes(copy)
    with Ledger.open(path, "data") as ledger:
        assert head not in ledger.index().heads


def test_what_is_no_ledger_is_one_clear_error(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is no database, it is a text" * 100)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: file is not a database"):
        Ledger.open(path, "data")
    with pytest.raises(LedgerError, match="cannot be written"):
        Ledger.open(path / "below", "data")


def test_a_failed_write_leaves_no_trace(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "a")
        ledger._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(LedgerError, match="readonly"):
            reserve(ledger, "b")
        ledger._connection.execute("PRAGMA query_only = OFF")
        assert ledger.spent(DELTA) == pytest.approx(cost(1))
        assert reserve(ledger, "b").sequence == 3


def test_threads_take_turns(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        threads = [
            threading.Thread(target=lambda name=name: [reserve(ledger, f"{name}{i}") for i in range(5)])
            for name in "abcd"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ledger.rounds("run-1") == 20
        ledger.verify()


RACER = """
import sys
from fedclaw.errors import BudgetExceeded
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.site.journal.ledger import Budget, Ledger
ledger = Ledger.open(sys.argv[1], "data")
print("ready", flush=True)
sys.stdin.readline()
try:
    ledger.reserve(sys.argv[2], federation="f", run="r", round=1, mechanism=NoiseEvent(0.1, 2.0, 10),
                   budget=Budget(float(sys.argv[3]), 1e-5))
    print("won", flush=True)
except BudgetExceeded:
    print("lost", flush=True)
"""


def test_of_two_processes_racing_for_the_last_bit_of_budget_one_wins(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "before")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path), name, str((cost(2) + cost(3)) / 2)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("left", "right")
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    assert sorted(child.communicate()[0].strip() for child in children) == ["lost", "won"]
    with Ledger.open(path, "data") as ledger:
        assert ledger.spent(DELTA) == pytest.approx(cost(2))


SPENDER = """
import sys
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.site.journal.ledger import Budget, Ledger
ledger = Ledger.open(sys.argv[1], "data")
number = 0
while True:
    key = f"{sys.argv[2]}-{number}"
    ledger.reserve(key, federation="f", run="r", round=number, mechanism=NoiseEvent(0.1, 2.0, 10),
                   budget=Budget(None, 1e-5))
    print("reserved", key, flush=True)
    if number % 2:
        ledger.settle(key)
        print("settled", key, flush=True)
    number += 1
"""


def test_kill_nine_loses_nothing_that_was_acknowledged(path: Path) -> None:
    said: list[str] = []
    kills = 3
    for attempt in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", SPENDER, str(path), str(attempt)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        said.append(child.stdout.readline().strip())
        time.sleep(random.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        said += child.stdout.read().split("\n")[:-1]
        child.wait()
    with Ledger.open(path, "data") as ledger:
        bodies = [entry.body for entry in ledger.entries()]
        held = {body["sequence"]: body["key"] for body in bodies if body["kind"] == "reserve"}
        noted = {f"reserved {key}" for key in held.values()}
        noted |= {f"settled {held[body['reserve']]}" for body in bodies if body["kind"] == "settle"}
        assert set(said) <= noted
        assert len(noted) <= len(said) + kills
        assert ledger.spent(DELTA) == pytest.approx(cost(len(held)))


@pytest.mark.parametrize("year", [1, 1970, 2999, 9999])
def test_a_clock_set_back_or_forward_is_harmless(path: Path, monkeypatch: pytest.MonkeyPatch, year: int) -> None:
    class Clock:
        @staticmethod
        def now(zone: tzinfo) -> datetime:
            return datetime(year, 6, 15, 12, tzinfo=zone)

    limit = Budget((cost(2) + cost(3)) / 2, DELTA)
    with Ledger.open(path, "data") as ledger:
        first = reserve(ledger, "a", budget=limit)
        with monkeypatch.context() as other:
            other.setattr("fedclaw.site.journal.ledger.datetime", Clock)
            assert reserve(ledger, "a", budget=limit) == first
            reserve(ledger, "b", budget=limit)
            ledger.settle("a")
        with pytest.raises(BudgetExceeded):
            reserve(ledger, "c", budget=limit)
    with Ledger.open(path, "data") as ledger:
        times = [entry.body["time"] for entry in ledger.entries()]
        assert times[2].startswith(f"{year:04}-06-15T12")
        assert times[2] == times[3]
        assert ledger.spent(DELTA) == pytest.approx(cost(2))


@pytest.mark.parametrize(("steps", "words"), [(1, "1 step at"), (2, "2 steps at")])
def test_steps_are_said_as_people_count_them(steps, words):
    assert describe(NoiseEvent(0.5, 2.0, steps)).startswith(words)
