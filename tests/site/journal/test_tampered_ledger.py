"""A ledger that was touched stops the site, with a typed refusal while it runs; nothing is trained."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from fedclaw.errors import LedgerError
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.site.journal.reconciliation import open_journal, site_spending
from tests.site.conftest import Asker


def rewrite(*statements):
    """A change through SQLite, by somebody who knows how to get around the triggers."""

    def change(path: Path, _old: bytes) -> None:
        connection = sqlite3.connect(path)
        connection.execute("DROP TRIGGER no_update")
        connection.execute("DROP TRIGGER no_delete")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        connection.close()

    return change


def change_a_byte(path: Path, _old: bytes) -> None:
    """In the file itself, where SQLite does not see it."""
    content = path.read_bytes()
    assert content.count(b'"round":2,') == 1
    path.write_bytes(content.replace(b'"round":2,', b'"round":9,'))


def put_back(path: Path, old: bytes) -> None:
    path.write_bytes(old)


def exchange(path: Path, old: bytes) -> None:
    """Another file under the same name."""
    other = path.with_suffix(".old")
    other.write_bytes(old)
    other.rename(path)


def remove(path: Path, _old: bytes) -> None:
    path.unlink()


SWAP = (
    "CREATE TABLE spare AS SELECT * FROM entries WHERE sequence IN (2, 4)",
    "UPDATE entries SET (body, hash) = (SELECT body, hash FROM spare WHERE sequence = 4) WHERE sequence = 2",
    "UPDATE entries SET (body, hash) = (SELECT body, hash FROM spare WHERE sequence = 2) WHERE sequence = 4",
)
CUT = ("DELETE FROM entries WHERE sequence >= 5", "UPDATE sqlite_sequence SET seq = 4")
KINDS = {
    "changed": (rewrite("UPDATE entries SET body = replace(body, 'run-1', 'run-2') WHERE sequence = 2"), "entry 2 "),
    "changed byte": (change_a_byte, "entry 4 has been changed"),
    "removed": (rewrite("DELETE FROM entries WHERE sequence = 3"), "entry 3 is missing"),
    "reordered": (rewrite(*SWAP), "entry 2 has been changed"),
    "cut": (rewrite("DELETE FROM entries WHERE sequence >= 6"), "entries after 5 were removed"),
    "cut with care": (rewrite(*CUT), "entry 7, which this process has seen"),
    "old copy": (put_back, "entry 7, which this process has seen"),
    "exchanged": (exchange, "another file was put in its place"),
    "gone": (remove, "cannot be found any more"),
}


@pytest.fixture
def run(root):
    """A site after three rounds, and its ledger as it was after the first."""
    asker = Asker(root)
    path = root / "state" / "ledger.sqlite"
    asker.ask(round=1)
    old = path.read_bytes()
    asker.ask(round=2)
    asker.ask(round=3)
    return asker, path, old


@pytest.mark.parametrize("kind", KINDS)
def test_a_running_site_refuses_and_trains_nothing(run, kind, caplog, monkeypatch):
    asker, path, old = run
    tamper, message = KINDS[kind]
    tamper(path, old)
    monkeypatch.setattr("fedclaw.site.training.take_steps", lambda *_, **__: pytest.fail("it trained"))
    for _ in range(2):
        reply = asker.ask(release=False)
        assert reply.has_error()
        assert RefusalCode(reply.error.code) is RefusalCode.FAILED
        assert "privacy ledger cannot be used" in reply.error.reason
    assert message in caplog.text
    assert "do not train on" in caplog.text
    assert not reply.has_content()


STARTING = {
    "cut with care": "line 2 of the outbound log .*'message-2', for which this privacy ledger has 0 settled",
    "old copy": "line 2 of the outbound log .*which is not in this ledger of 3 entries",
    "exchanged": "line 2 of the outbound log",
    "gone": "line 1 of the outbound log .*which is not in this ledger of 1 entries",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_does_not_start(run, root, kind):
    asker, path, old = run
    asker.site.ledger.close()
    tamper, message = KINDS[kind]
    tamper(path, old)
    with pytest.raises(LedgerError, match=STARTING.get(kind, message)):
        Asker(root)
    with pytest.raises(LedgerError):
        Asker(root)


def test_a_result_whose_charge_cannot_be_settled_does_not_leave(run, root):
    asker, path, old = run
    message = asker.message(round=4)
    reply = asker.site.answer(message)
    log = (root / "state" / "outbound.jsonl").read_bytes()
    change_a_byte(path, old)
    with pytest.raises(LedgerError, match="entry 4 has been changed"):
        asker.site.release(message, reply, 10, "11" * 32)
    assert (root / "state" / "outbound.jsonl").read_bytes() == log


def test_restoring_the_newest_backup_lets_it_go_on(run, root):
    asker, path, old = run
    backup = path.read_bytes()
    spent = asker.site.ledger.spent(1e-3)
    asker.site.ledger.close()
    put_back(path, old)
    with pytest.raises(LedgerError):
        Asker(root)
    put_back(path, backup)
    again = Asker(root)
    assert again.site.ledger.spent(1e-3) == spent
    assert not again.ask(round=4).has_error()


def test_the_books_agree_with_the_running_site(run, root):
    asker = run[0]
    own = site_spending(root).data_set("hospital-north")
    receipt = asker.ask(round=4).content["receipt"]["json"]
    assert own.rounds == own.charges == 3
    assert own.open == 0
    after = site_spending(root).data_set("hospital-north")
    assert after.epsilon == asker.site.ledger.spent(1e-3)
    assert after.left == 6 - after.epsilon
    assert after.run("run-1", "clinic").epsilon == asker.site.ledger.spent(1e-3, "run-1", "clinic")
    assert after.run("run-1", "elsewhere") is None
    assert f'"epsilon_left":{after.left}' in receipt


def test_reading_the_books_writes_nothing(run, root, tmp_path):
    run[0].site.ledger.close()
    state = root / "state"
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ctime_ns, file.read_bytes()) for file in state.iterdir()}
    journal = open_journal(root)
    assert len(journal.entries) == 7
    assert len(journal.outbound) == 3
    after = {file: (file.stat().st_mtime_ns, file.stat().st_ctime_ns, file.read_bytes()) for file in state.iterdir()}
    assert after == before
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    assert open_journal(copy).index.head == journal.index.head
