"""Foreign hands on the file of a ledger that is in use, and reading it without writing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedclaw.errors import LedgerError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.site.journal.history import Entry, Index, read_ledger
from fedclaw.site.journal.ledger import Budget, Ledger
from tests.conftest import environment

UNLIMITED = Budget(None, 1e-5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


def reserve(ledger: Ledger, key: str) -> None:
    ledger.reserve(key, federation="f", run="r", round=1, mechanism=NoiseEvent(0.1, 2.0, 10), budget=UNLIMITED)


def test_reading_gives_what_the_ledger_gives(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "a")
        ledger.settle("a")
        reserve(ledger, "b")
        entries, index = read_ledger(path)
        assert entries == ledger.entries()
        assert index.head == ledger.head()
        assert index.open == {("data", "a"): [], ("data", "b"): [4]}


def test_reading_needs_no_right_to_write(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "a")
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        before = path.stat()
        assert len(read_ledger(path)[0]) == 2
        assert [entry.name for entry in path.parent.iterdir()] == ["ledger.sqlite"]
        assert (path.stat().st_mtime_ns, path.stat().st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    finally:
        path.parent.chmod(0o700)


def test_a_write_in_progress_is_not_in_the_way(path: Path) -> None:
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "a")
        with ledger._writing():
            ledger._append(kind="settle", reserve=2)
            assert len(read_ledger(path)[0]) == 2
        assert len(read_ledger(path)[0]) == 3


def test_no_ledger_is_one_clear_error_and_none_is_begun(path: Path) -> None:
    with pytest.raises(LedgerError, match=r"ledger\.sqlite does not exist: the site's client makes it"):
        read_ledger(path)
    assert not path.parent.exists()
    path.parent.mkdir()
    path.write_text("this is a text " * 1000)
    with pytest.raises(LedgerError, match="file is not a database"):
        read_ledger(path)
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="no such table"):
        read_ledger(path)


def test_a_write_that_a_crash_cut_off_is_undone_before_reading(path: Path) -> None:
    """The journal of a dead process says how; that is the one case that needs the right to write."""
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "a")
        head = ledger.head()
    half_written(path)
    entries, index = read_ledger(path)
    assert (len(entries), index.head) == (2, head)
    assert not path.with_name("ledger.sqlite-journal").exists()


def half_written(path: Path) -> None:
    """What a process leaves that is killed while its pages go to the file: new pages and a journal with the old."""
    script = (
        "import os, signal, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('PRAGMA cache_size = 1')\n"
        "connection.execute('PRAGMA cache_spill = 1')\n"
        "connection.execute('BEGIN IMMEDIATE')\n"
        "for number in range(3, 200):\n"
        "    connection.execute('INSERT INTO entries VALUES (?, ?, ?)', (number, 'x' * 500, 'y'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], env=environment(), check=False)
    journal = path.with_name("ledger.sqlite-journal")
    assert journal.stat().st_size > 0, "the journal is hot"
    assert b"x" * 400 in path.read_bytes(), "and some new pages are written"


def change_a_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"key":"a"', b'"key":"z"'))


def change_a_byte_and_the_modification_time(path: Path) -> None:
    before = path.stat()
    change_a_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange(path: Path) -> None:
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    copy.rename(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_byte, "entry 2 has been changed"),
        (change_a_byte_and_the_modification_time, "entry 2 has been changed"),
        (exchange, "another file was put in its place"),
        (Path.unlink, "cannot be found any more"),
    ],
)
def test_a_ledger_in_use_notices_what_sqlite_does_not(path: Path, change: Callable[[Path], None], message: str) -> None:
    uses: list[Callable[[Ledger], object]] = [
        lambda ledger: reserve(ledger, "c"),
        lambda ledger: ledger.settle("b"),
        lambda ledger: ledger.spent(1e-5),
        Ledger.head,
        Ledger.verify,
    ]
    with Ledger.open(path, "data") as ledger:
        reserve(ledger, "a")
        reserve(ledger, "b")
        change(path)
        for use in uses:
            with pytest.raises(LedgerError, match=f"{message}.*do not train on"):
                use(ledger)


def test_what_other_processes_write_rightly_is_followed(path: Path) -> None:
    with Ledger.open(path, "data") as one, Ledger.open(path, "data") as other:
        for key in "abc":
            reserve(one, key)
            other.settle(key)
        assert one.head() == other.head()
        path.chmod(0o600)
        reserve(one, "d")
        assert other.rounds("r") == 4


def test_only_a_foreign_hand_makes_it_read_everything_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long ledger stays as fast as a short one for the process that writes it."""
    with Ledger.open(path, "data") as ledger, Ledger.open(path, "data/test") as other:
        reserve(ledger, "a")
        with monkeypatch.context() as watched:
            watched.setattr(Ledger, "_verified", lambda *_: pytest.fail("all of it was read"))
            reserve(ledger, "b")
            ledger.settle("b")
            ledger.spent(1e-5)
            with other._writing():
                other._append(kind="settle", reserve=2)
            assert ledger.head() == other.head()
        path.touch()
        reads = 0

        def count(one: Ledger) -> tuple[tuple[Entry, ...], Index]:
            nonlocal reads
            reads += 1
            return (), one._index

        monkeypatch.setattr(Ledger, "_verified", count)
        ledger.head()
        ledger.head()
        assert reads == 1
