import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedclaw.errors import LedgerError
from fedclaw.site.journal.outbound import OutboundEntry, OutboundLog
from tests.disks import full_after

RECEIPT = '{"mechanism": "dp-sgd", "epsilon_run": 1.5}'


def append(log: OutboundLog, message_id: str = "m1", digest: str = "aa" * 32, **fields: object) -> OutboundEntry:
    values = {
        "federation": "hospitals",
        "run": "run-1",
        "round": "3",
        "kind": "train",
        "size": 1234,
        "receipt": RECEIPT,
        **fields,
    }
    return log.append(message_id=message_id, digest=digest, **values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "outbound.jsonl"


def test_what_is_written_is_read_again(path: Path) -> None:
    with OutboundLog(path) as log:
        first, second = append(log), append(log, "m2", receipt=None, kind="evaluate")
        assert log.entries() == (first, second)
        head = log.head()
    with OutboundLog(path) as log:
        assert log.entries() == (first, second)
        assert log.head() == head
    assert first.receipt == {"mechanism": "dp-sgd", "epsilon_run": 1.5}
    assert (first.sequence, second.sequence, first.bytes, first.resent) == (1, 2, 1234, False)
    assert first.time.endswith("+00:00")
    assert [json.loads(line)["entry"]["message_id"] for line in path.read_text().splitlines()] == ["m1", "m2"]


def test_only_the_owner_may_read_it(path: Path) -> None:
    path.parent.mkdir()
    path.touch(0o644)
    with OutboundLog(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_same_message_again_is_marked(path: Path) -> None:
    with OutboundLog(path) as log:
        assert not append(log).resent
        assert append(log).resent
        assert not append(log, digest="bb" * 32).resent
    with OutboundLog(path) as log:
        assert append(log).resent


@pytest.mark.parametrize("bad", [1, 2, 3])
@pytest.mark.parametrize("how", ["change", "remove", "swap", "respace", "garbage"])
def test_a_bad_line_is_named(path: Path, bad: int, how: str) -> None:
    with OutboundLog(path) as log:
        for number in range(5):
            append(log, f"m{number}")
    lines = path.read_text().splitlines(keepends=True)
    line = lines[bad - 1]
    if how == "change":
        lines[bad - 1] = line.replace('"bytes":1234', '"bytes":1235')
    elif how == "remove":
        del lines[bad - 1]
    elif how == "swap":
        lines[bad - 1], lines[bad] = lines[bad], line
    elif how == "respace":
        lines[bad - 1] = line.replace(",", ", ")
    else:
        lines[bad - 1] = "x\n"
    path.write_text("".join(lines))
    with pytest.raises(LedgerError, match=f"line {bad} "):
        OutboundLog(path)


def test_a_last_line_without_its_end_is_set_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with OutboundLog(path) as log:
        append(log, "m1")
        append(log, "m2")
    whole = path.read_bytes()
    end_of_first = whole.index(b"\n") + 1
    for cut in (end_of_first + 1, (end_of_first + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        caplog.clear()
        with OutboundLog(path) as log:
            assert [entry.message_id for entry in log.entries()] == ["m1"]
            assert "line 2 was cut off" in caplog.text
            assert path.with_name("outbound.jsonl.torn").read_bytes().endswith(whole[end_of_first:cut] + b"\n")
            assert append(log, "m3").sequence == 2
            log.verify()


def test_lines_cut_off_under_a_running_process_are_noticed(path: Path) -> None:
    with OutboundLog(path) as log:
        append(log, "m1")
        first = path.read_bytes()
        append(log, "m2")
        path.write_bytes(first)
        with pytest.raises(LedgerError, match="gone"):
            append(log, "m3")
        with pytest.raises(LedgerError, match="gone"):
            log.verify()
        with pytest.raises(LedgerError, match="gone"):
            log.verify()


def test_two_writers_take_turns(path: Path) -> None:
    with OutboundLog(path) as left, OutboundLog(path) as right:
        for number in range(10):
            append(left, f"l{number}")
            append(right, f"r{number}")
        assert left.entries() == right.entries()
        assert [entry.sequence for entry in left.entries()] == list(range(1, 21))


def test_what_cannot_be_noted_is_refused_and_leaves_no_trace(path: Path) -> None:
    with OutboundLog(path) as log:
        with pytest.raises(LedgerError, match="receipt is not JSON"):
            append(log, receipt="{")
        with pytest.raises(LedgerError, match=r"receipt.*finite"):
            append(log, receipt='{"epsilon": Infinity}')
        with pytest.raises(LedgerError, match="bytes"):
            append(log, size=-1)
        assert log.entries() == ()
        append(log)
    with pytest.raises(LedgerError, match="closed"):
        append(log)


@pytest.mark.parametrize("room", [0, 16, 100])
def test_a_full_disk_leaves_no_part_of_a_line(path: Path, room: int) -> None:
    with OutboundLog(path) as log:
        first = append(log)
        with full_after(path.stat().st_size + room), pytest.raises(LedgerError, match="cannot be written"):
            append(log, "m2")
        assert path.read_bytes().endswith(b"\n")
        assert log.entries() == (first,)
        append(log, "m2")
    assert not path.with_name(path.name + ".torn").exists()
    with OutboundLog(path) as log:
        assert [entry.message_id for entry in log.entries()] == ["m1", "m2"]


def test_a_path_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="cannot be written"):
        OutboundLog(tmp_path / "file" / "outbound.jsonl")


WRITER = """
import sys
from pathlib import Path
from fedclaw.site.journal.outbound import OutboundLog
log = OutboundLog(Path(sys.argv[1]))
number = 0
while True:
    log.append(federation="f", run="r", round="1", kind="train", message_id=f"{sys.argv[2]}-{number}", size=1,
               digest="d", receipt=None)
    print(f"{sys.argv[2]}-{number}", flush=True)
    number += 1
"""


def test_kill_nine_loses_nothing_that_was_acknowledged(path: Path) -> None:
    acknowledged: list[str] = []
    for attempt in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(attempt)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        acknowledged.append(child.stdout.readline().strip())
        time.sleep(random.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        acknowledged += child.stdout.read().split("\n")[:-1]
        child.wait()
    with OutboundLog(path) as log:
        noted = [entry.message_id for entry in log.entries()]
    assert set(acknowledged) <= set(noted)
    assert len(noted) <= len(acknowledged) + 4
