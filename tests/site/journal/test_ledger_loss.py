"""A site whose ledger is lost, in whatever way, does not begin with a full budget unless its operator says so."""

import json
import shutil

import pytest

from fedclaw.cli import make_console
from fedclaw.errors import LedgerError, UsageError
from fedclaw.ledger import main
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.site.directory import begin_again, only_client
from fedclaw.site.journal.reconciliation import check_journal, open_journal
from fedclaw.site.preflight.check import examine
from fedclaw.site.settings import load_site_settings
from tests.site.conftest import Asker


def close(asker):
    for book in (asker.site.ledger, asker.site.outbound):
        book.close()


def copied(root, name):
    return shutil.copytree(root / "state", root / name)


@pytest.fixture
def stopped(root):
    """A site after two rounds, stopped, with a copy of its state from before the second in `old`."""
    asker = Asker(root)
    asker.ask(round=1)
    copied(root, "old")
    asker.ask(round=2)
    close(asker)


def remove_state(root):
    shutil.rmtree(root / "state")


def remove_both_books(root):
    for name in ("ledger.sqlite", "outbound.jsonl"):
        (root / "state" / name).unlink()


def empty_the_ledger(root):
    remove_both_books(root)
    (root / "state" / "ledger.sqlite").touch()


def put_back_all_of_an_old_state(root):
    remove_state(root)
    shutil.copytree(root / "old", root / "state")


def another_sites_state(root):
    remove_state(root)
    mark = (root / "ledger.json").read_bytes()
    (root / "ledger.json").unlink()
    close(Asker(root))
    (root / "ledger.json").write_bytes(mark)


LOST = {
    "state": (remove_state, "is gone (it had 4 entries"),
    "both books": (remove_both_books, "is gone"),
    "emptied": (empty_the_ledger, "is not the one that was begun here"),
    "old copies": (put_back_all_of_an_old_state, "has 3 entries and lacks what was charged since"),
    "another": (another_sites_state, "is not the one that was begun here"),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_site_does_not_start_on_a_lost_ledger(stopped, root, kind):
    lose, words = LOST[kind]
    lose(root)
    for _ in range(2):
        with pytest.raises(LedgerError) as caught:
            Asker(root)
        assert words in str(caught.value)
        assert f"begin-again site={root}" in str(caught.value)
    failure = examine(root, load_site_settings(root)).findings.failure
    assert words in str(failure)
    if kind != "emptied":
        with pytest.raises(LedgerError, match="ledger"):
            main(["statement", f"site={root}"])


def test_a_refused_start_writes_no_new_ledger(stopped, root):
    remove_state(root)
    with pytest.raises(LedgerError):
        Asker(root)
    assert not (root / "state").exists()


def test_a_directory_that_is_copied_without_its_state(stopped, root, tmp_path):
    other = tmp_path / "copy"
    shutil.copytree(root, other, ignore=shutil.ignore_patterns("state"))
    with pytest.raises(LedgerError, match="is gone"):
        Asker(other)


def test_a_fresh_site_starts_and_is_marked_before_it_is_charged(root):
    assert not (root / "ledger.json").exists()
    asker = Asker(root)
    path = root / "ledger.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["entries"] == 1
    asker.ask(release=False)
    assert json.loads(path.read_text())["head"] == asker.site.ledger.head()
    close(asker)
    assert not Asker(root).ask(round=2).has_error()


def test_a_site_of_the_version_before_is_marked_when_it_starts(stopped, root):
    (root / "ledger.json").unlink()
    close(Asker(root))
    remove_state(root)
    with pytest.raises(LedgerError, match="it had 5 entries"):
        Asker(root)


def test_a_site_that_was_killed_between_charge_and_mark_starts(stopped, root):
    old = (root / "ledger.json").read_bytes()
    asker = Asker(root)
    asker.ask(round=3)
    close(asker)
    (root / "ledger.json").write_bytes(old)
    assert not Asker(root).ask(round=4).has_error()


def test_books_that_were_read_while_the_client_is_charged_are_whole(root):
    asker = Asker(root)
    asker.ask(round=1)
    journal = open_journal(root)
    asker.ask(round=2)
    check_journal(journal)


def test_a_damaged_mark_is_told_beside_the_figures(stopped, root, capsys):
    (root / "ledger.json").write_text("{}")
    said = told(root, "show", capsys=capsys)
    assert "5 entries" in said
    assert "cannot be read" in said


def test_nothing_is_trained_when_the_mark_cannot_be_written(root, monkeypatch):
    asker = Asker(root)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedclaw.site.journal.reconciliation.write_atomic", full)
    monkeypatch.setattr("fedclaw.site.training.take_steps", lambda *_, **__: pytest.fail("it trained"))
    assert RefusalCode(asker.ask().error.code) is RefusalCode.FAILED


def test_a_damaged_mark_is_named(stopped, root):
    (root / "ledger.json").write_text("{}")
    with pytest.raises(LedgerError, match=r"ledger\.json, which says that a privacy ledger was begun here, cannot be"):
        Asker(root)
    begin_again(root, "the disk ate it")
    assert open_journal(root).index.reservations, "the ledger was there"


def told(root, *arguments, capsys):
    main([*arguments, f"site={root}"], make_console())
    return " ".join(capsys.readouterr().out.split())


def test_the_operators_word_is_kept_for_ever(stopped, root, capsys):
    remove_state(root)
    reason = "fire in the server room: row 4, 'B'"
    assert "a new ledger was begun" in told(root, "begin-again", f"reason={reason}", capsys=capsys)
    (entry,) = [entry.body for entry in open_journal(root).entries if entry.body["kind"] == "again"]
    assert entry["reason"] == reason
    assert entry["lost"]["entries"] == 4
    asker = Asker(root)
    receipt = Receipt.model_validate_json(asker.ask(round=3).content["receipt"]["json"])
    assert receipt.ledger_losses == 1
    close(asker)
    again = Receipt.model_validate_json(Asker(root).ask(round=4).content["receipt"]["json"])
    assert again.ledger_losses == 1
    assert again.after(receipt.model_copy(update={"ledger_losses": 3})).ledger_losses == 3, "it never gets better"
    assert "fire in the server room" in told(root, "show", capsys=capsys)
    told(root, "statement", capsys=capsys)
    assert "fire in the server room" in (root / "privacy-statement.html").read_text()
    assert "fire in the server room" in " ".join(examine(root, load_site_settings(root)).findings.warnings)
    assert "verified" in told(root, "verify", capsys=capsys)


def test_an_older_copy_is_gone_on_with_and_what_it_has_counts(stopped, root):
    put_back_all_of_an_old_state(root)
    assert "the ledger of 3 entries is gone on with" in begin_again(root, "restored last week's backup")
    asker = Asker(root)
    assert asker.site.ledger.rounds("run-1") == 1
    assert not asker.ask(round=3).has_error()
    (aside,) = (root / "state").glob("before-*")
    assert (aside / "outbound.jsonl").exists(), "set aside, not deleted"


def test_a_damaged_ledger_is_set_aside(stopped, root):
    path = root / "state" / "ledger.sqlite"
    path.write_bytes(b"x" * 100)
    begin_again(root, "bad disk")
    assert not Asker(root).ask(round=3).has_error()
    (aside,) = (root / "state").glob("before-*")
    assert (aside / "ledger.sqlite").read_bytes() == b"x" * 100


def test_a_second_loss_is_a_second_word(stopped, root):
    for count in (1, 2):
        remove_state(root)
        begin_again(root, "again")
        assert len(open_journal(root).index.losses) == 1, "the first word was lost with the ledger"
        asker = Asker(root)
        asker.ask(round=count)
        close(asker)


def test_it_is_no_way_to_a_new_budget(stopped, root):
    with pytest.raises(UsageError, match="nothing is lost"):
        begin_again(root, "I would like more")
    remove_state(root)
    for reason in ("", "  ", "x" * 501, "bell \a"):
        with pytest.raises(UsageError, match="reason"):
            begin_again(root, reason)
    with only_client(root), pytest.raises(UsageError, match="stop it first"):
        begin_again(root, "fire")
    with pytest.raises(UsageError, match="reason"):
        main(["begin-again", f"site={root}"])
    with pytest.raises(LedgerError):
        Asker(root)


def test_a_fresh_site_has_nothing_to_begin_again(root):
    with pytest.raises(UsageError, match="nothing is lost"):
        begin_again(root, "no reason at all")
    close(Asker(root))
    with pytest.raises(UsageError, match="nothing is lost"):
        begin_again(root, "no reason at all")
