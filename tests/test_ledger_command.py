"""python -m fedclaw.ledger, as a site's operator uses it."""

import io
import json
import shutil
import sqlite3
import stat
from pathlib import Path

import pytest
from rich.console import Console

from fedclaw import ledger
from fedclaw.cli import split
from fedclaw.errors import FedClawError, LedgerError, UsageError
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.reconciliation import check, open_journal, site_spending
from tests.conftest import run_module
from tests.ledgers import ROUND, UNLIMITED, Run, make_site


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("original") / "site")


@pytest.fixture
def site(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "site"))


def say(*arguments: object) -> str:
    """What the command prints, in a window that is wide enough."""
    output = io.StringIO()
    ledger.main([str(argument) for argument in arguments], Console(file=output, width=200, soft_wrap=True))
    return output.getvalue()


def tamper(site: Path, *statements: str) -> None:
    with sqlite3.connect(site / "state" / "ledger.sqlite") as connection:
        connection.execute("DROP TRIGGER no_update")
        connection.execute("DROP TRIGGER no_delete")
        for statement in statements:
            connection.execute(statement)


def test_show_has_a_line_for_each_data_set(site: Path) -> None:
    spending = site_spending(site)
    lines = say("show", f"site={site}").splitlines()
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in lines]
    cells = {row[0]: row[1:] for row in rows if row}
    ward = spending.data_set("ward-4")
    assert cells["ward-4"][:7] == ["8", "0.001", f"{ward.epsilon:.4g}", f"{8 - ward.epsilon:.4g}", "3", "9", "1"]
    assert cells["outpatients"][:7] == ["8", "0.001", "unbounded", "0", "1", "1", "0"]
    assert "!" not in "".join(lines)
    assert lines[-1] == f"20 entries, head {spending.head}"


def test_show_lists_the_present_data_set_before_it_is_charged(tmp_path: Path) -> None:
    text = say("show", f"site={make_site(tmp_path / 'site', [Run('none', 0)])}")
    assert "ward-4" in text
    assert "never" in text


def test_each_data_set_is_shown_with_its_own_budget(site: Path) -> None:
    policy = (site / "site.yaml").read_text().replace("delta: 1.0e-3}", "delta: 1.0e-3, budgets: BUDGETS}")
    (site / "site.yaml").write_text(policy.replace("BUDGETS", "{ward-4: {epsilon: 5.0, delta: 1.0e-4}}"))
    ward, outpatients = json.loads(say("show", f"site={site}", "json=true"))["data_sets"]
    assert (ward["budget"], ward["delta"]) == (5.0, 1e-4)
    assert (outpatients["budget"], outpatients["delta"]) == (8.0, 1e-3)
    with Ledger.open(site / "state" / "ledger.sqlite", "ward-4") as running:
        assert ward["spent"] == running.spent(1e-4)


def test_show_has_the_entries(site: Path) -> None:
    text = say("show", f"site={site}", "entries=true")
    for entry in open_journal(site).entries:
        assert entry.hash[:16] in text
    assert "52 steps" not in text
    assert "13 steps at sample rate 0.08 with noise multiplier 1.5" in text
    assert "training without privacy" in text
    assert "of entry 2" in text


def test_show_for_machines(site: Path) -> None:
    plain = json.loads(say("show", f"site={site}", "json=true"))
    spending = site_spending(site)
    ward, outpatients = plain["data_sets"]
    assert plain["head"] == spending.head
    assert plain["problem"] is None
    assert "chain" not in plain
    assert (ward["budget"], ward["delta"], ward["rounds"], ward["open"]) == (8.0, 1e-3, 9, 1)
    assert ward["spent"] == spending.data_set("ward-4").epsilon
    assert (outpatients["spent"], outpatients["bounded"], outpatients["left"]) == (None, False, 0.0)
    assert [run["run"] for run in ward["runs"]] == ["spring", "summer", "summer"]
    chain = json.loads(say("show", f"site={site}", "json=true", "entries=true"))["chain"]
    assert [(item["sequence"], item["hash"]) for item in chain][-1] == (plain["entries"], plain["head"])


def test_verify_is_one_clear_line_with_the_head(site: Path) -> None:
    head = open_journal(site).index.head
    first = say("verify", f"site={site}").splitlines()[0]
    assert first.startswith("verified: 20 entries, none changed, removed or inserted; 9 answers left")
    assert first.endswith(f"head {head}")


def test_verify_looks_for_a_head(site: Path) -> None:
    entry = open_journal(site).entries[4]
    assert f"entry 5, {entry.body['time']}" in say("verify", f"site={site}", f"head={entry.hash}")
    assert "entry 5" in say("verify", f"site={site}", f"head={entry.hash.upper()}")
    with pytest.raises(LedgerError, match=r"the head a{64} is not in this ledger of 20 entries"):
        say("verify", f"site={site}", f"head={'a' * 64}")
    for wrong in ("abc", entry.hash + "0", entry.hash[:-1] + "g"):
        with pytest.raises(UsageError, match="64 hexadecimal digits"):
            say("verify", f"site={site}", f"head={wrong}")


@pytest.mark.parametrize("command", ["show", "verify", "statement"])
def test_tampering_is_named(site: Path, command: str) -> None:
    tamper(site, "UPDATE entries SET body = replace(body, 'spring', 'winter') WHERE sequence = 4")
    with pytest.raises(LedgerError, match="entry 4 has been changed"):
        say(command, f"site={site}")
    assert not (site / ledger.STATEMENT_FILE).exists()


@pytest.mark.parametrize("command", ["verify", "statement"])
def test_an_old_copy_that_was_put_back_is_found_by_what_left(site: Path, command: str) -> None:
    tamper(site, "DELETE FROM entries WHERE sequence > 18", "UPDATE sqlite_sequence SET seq = 18")
    shown = say("show", f"site={site}")
    assert "18 entries" in shown, "the chain alone is whole"
    assert "! line 9 of the outbound log" in shown
    assert "line 9" in json.loads(say("show", f"site={site}", "json=true"))["problem"]
    with pytest.raises(LedgerError, match=r"line 9 of the outbound log \(run pilot, .*not in this ledger of 18"):
        say(command, f"site={site}")
    assert not (site / ledger.STATEMENT_FILE).exists()


def test_a_changed_outbound_log_is_named(site: Path) -> None:
    log = site / "state" / "outbound.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"round":"2"', b'"round":"7"', 1))
    with pytest.raises(LedgerError, match="line 2 was changed"):
        say("verify", f"site={site}")


def test_an_answer_without_a_charge_is_named(tmp_path: Path) -> None:
    """Two answers of one round, and one charge: an entry of the log is not explained by the ledger."""
    site = make_site(tmp_path / "site", [Run("spring", 1)])
    journal = open_journal(site)
    line = journal.outbound[0]
    again, other = line.model_copy(update={"resent": True}), line.model_copy(update={"digest": "77" * 32})
    check(journal.index, (line, again))
    with pytest.raises(LedgerError, match="'heart/spring/1', for which this privacy ledger has 1 settled"):
        check(journal.index, (line, again, other))


def test_a_half_written_line_of_a_running_client_is_left_alone(site: Path) -> None:
    log = site / "state" / "outbound.jsonl"
    with log.open("ab") as file:
        file.write(b'{"entry":')
    before = log.read_bytes()
    assert "9 answers left" in say("verify", f"site={site}")
    assert log.read_bytes() == before
    assert not log.with_name("outbound.jsonl.torn").exists()


def test_a_ledger_in_use_can_be_looked_at(site: Path) -> None:
    with Ledger.open(site / "state" / "ledger.sqlite", "ward-4", "cd" * 32) as running, running._writing():
        running._append(kind="settle", reserve=14)
        assert "20 entries" in say("verify", f"site={site}")


def test_the_statement_is_a_private_file_that_is_whole(site: Path, tmp_path: Path) -> None:
    assert str(site / "privacy-statement.html") in say("statement", f"site={site}")
    path = site / "privacy-statement.html"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert path.read_text().rstrip().endswith("</html>")
    elsewhere = tmp_path / "for" / "the officer.html"
    say("statement", f"site={site}", f"out='{elsewhere}'")
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o600
    assert [item.name for item in elsewhere.parent.iterdir()] == ["the officer.html"]
    with pytest.raises(UsageError, match="is a directory"):
        say("statement", f"site={site}", f"out={tmp_path}")


@pytest.mark.parametrize("command", ["show", "verify", "statement out=OUT"])
def test_nothing_is_written_to_the_books(site: Path, tmp_path: Path, command: str) -> None:
    def state() -> list[tuple[str, bytes, int, int]]:
        items = sorted((site / "state").iterdir())
        return [(item.name, item.read_bytes(), item.stat().st_mtime_ns, item.stat().st_ctime_ns) for item in items]

    before = state()
    say(*command.replace("OUT", str(tmp_path / "out.html")).split(), f"site={site}")
    assert state() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "show, verify, statement (given: none)"),
        (["prove"], "(given: prove)"),
        (["show"], "site= is missing"),
        (["show", "site=nowhere"], "nowhere does not exist"),
        (["show", "site=SITE", "head=x"], "show does not take head"),
        (["verify", "site=SITE", "out=x", "json=true"], "verify does not take json, out"),
        (["show", "site=SITE", "entries=many"], "entries"),
        (["show", "site=SITE", "colour=red"], "show does not take colour"),
        (["--verbose", "show"], "--verbose"),
    ],
)
def test_wrong_use_is_told(site: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        say(*(argument.replace("SITE", str(site)) for argument in arguments))
    assert words in str(caught.value)


def test_a_site_that_never_started(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", [])
    with pytest.raises(LedgerError, match="does not exist: the site's client makes it when it first starts"):
        say("show", f"site={site}")
    (site / "site.yaml").unlink()
    with pytest.raises(UsageError, match=r"site\.yaml"):
        say("show", f"site={site}")


def test_as_a_process(site: Path) -> None:
    shown = run_module("fedclaw.ledger", "show", f"site={site}")
    assert shown.code == 0
    assert not shown.errors
    assert "ward-4" in shown.output
    tamper(site, "DELETE FROM entries WHERE sequence = 6")
    failed = run_module("fedclaw.ledger", "verify", f"site={site}")
    assert failed.code == 1
    (line,) = failed.lines
    assert line.startswith(f"fedclaw.ledger: privacy ledger {site}/state/ledger.sqlite: entry 6 is missing")
    assert "do not train on" in line


def test_the_examples_of_the_help_can_be_pasted(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.parent)
    site.rename(site.parent / "hospital-north")
    Path("sites").mkdir()
    Path("hospital-north").rename("sites/hospital-north")
    help_text = ledger.__doc__ or ""
    examples = [line.split()[3:] for line in help_text.splitlines() if line.startswith("    python -m fedclaw.ledger ")]
    assert [split(words).words[0] for words in examples] == ["show", "show", "verify", "statement"]
    for words in examples:
        assert say(*words)
    assert Path("statement.html").exists()
    keys = {key for _, takes in ledger._COMMANDS.values() for key in takes}
    assert all(f"  {key}=" in help_text for key in keys)


def test_every_error_is_one_of_fedclaws(site: Path) -> None:
    (site / "state" / "ledger.sqlite").write_bytes(b"no database " * 1000)
    with pytest.raises(FedClawError, match="file is not a database"):
        say("verify", f"site={site}")


def test_a_charge_by_hand_changes_what_is_left(site: Path) -> None:
    before = site_spending(site).data_set("ward-4")
    with Ledger.open(site / "state" / "ledger.sqlite", "ward-4", "cd" * 32) as ledger_file:
        ledger_file.reserve("autumn/1", "heart", "autumn", 1, ROUND, UNLIMITED)
    after = site_spending(site).data_set("ward-4")
    assert after.epsilon > before.epsilon
    assert before.left is not None
    assert after.left is not None
    assert after.left < before.left
    assert after.run("autumn", "heart") is not None
