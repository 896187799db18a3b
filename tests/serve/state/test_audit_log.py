"""The audit log: no acknowledged line is lost with its process, and nothing in it changes unseen."""

import json
import os
import signal
import stat
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedclaw.protocol.chain import GENESIS, link
from fedclaw.serve.state.audit_log import AuditLog, AuditLogError, AuditUnavailable, segments_of
from fedclaw.serve.state.audit_verification import entries, of_node, show_audit_log, verify
from fedclaw.serve.state.store import StateStore
from tests.disks import full_after

CHAIN = "node.worker-0"


def append(log: AuditLog, request: str = "r", **other: Any) -> None:
    plain = {"principal": "ward 7", "peer": "127.0.0.1", "model": "heart", "version": "0123456789ab", "rows": 2}
    log.append(**{**plain, "request": request, "status": 200, "received": 120, **other})


def written(directory: Path, *requests: str, **settings: Any) -> AuditLog:
    """A log with one line for each of these, closed."""
    with AuditLog(directory, CHAIN, **settings) as log:
        for request in requests:
            append(log, request)
    return log


def files(directory: Path) -> list[Path]:
    return [segment.path for segment in segments_of(directory)[CHAIN]]


def lines(directory: Path) -> list[bytes]:
    return [line for path in files(directory) for line in path.read_bytes().splitlines(keepends=True)]


def requests(directory: Path) -> list[str]:
    return [entry["request"] for entry in entries(directory) if entry["kind"] == "answer"]


def faults(directory: Path, **asked: Any) -> list[str]:
    return [fault for report in verify(directory, **asked) for fault in report.faults]


def notes(directory: Path) -> list[str]:
    return [note for report in verify(directory) for note in report.notes]


def test_a_line_says_who_asked_what_and_follows_the_one_before(tmp_path: Path):
    written(tmp_path, "r1", "r2")
    begin, first, second = (json.loads(line) for line in lines(tmp_path))
    assert begin["entry"]["kind"] == "begin"
    assert {name: first["entry"][name] for name in first["entry"] if name != "time"} == {
        "sequence": 2,
        "kind": "answer",
        "principal": "ward 7",
        "peer": "127.0.0.1",
        "model": "heart",
        "version": "0123456789ab",
        "request": "r1",
        "rows": 2,
        "status": 200,
        "code": "",
        "received": 120,
    }
    previous = GENESIS
    for told in (begin, first, second):
        previous = link(previous, json.dumps(told["entry"], separators=(",", ":")))
        assert told["hash"] == previous


def test_all_files_are_private(tmp_path: Path):
    old = os.umask(0)
    try:
        written(tmp_path / "audit", "r")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "audit").iterdir()} == {0o600}


@pytest.mark.parametrize(
    ("inputs", "body", "expected"),
    [
        ("no", b"age,sex", {}),
        ("digest", b"abc", {"body_sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}),
        ("full", '{"age": "é"}'.encode(), {"body": '{"age": "é"}'}),
        ("full", b"\xff\x00", {"body_base64": "/wA="}),
    ],
)
def test_inputs_are_logged_only_as_asked_for(tmp_path: Path, inputs: Any, body: bytes, expected: dict[str, str]):
    with AuditLog(tmp_path, CHAIN, inputs=inputs) as log:
        append(log, body=body)
    entry = list(entries(tmp_path))[-1]
    assert {name: entry[name] for name in entry if name.startswith("body")} == expected
    assert faults(tmp_path) == []


@pytest.mark.parametrize("text", ['"}\n{"entry":', "\ud800", "\x1b[2J\u202e", "\u0000\x7f", "é" * 10_000, "a\nb"])
def test_no_text_of_a_client_can_break_a_line(tmp_path: Path, text: str):
    with AuditLog(tmp_path, CHAIN) as log:
        append(log, text, principal=text)
        append(log, "after")
    assert faults(tmp_path) == []
    assert requests(tmp_path) == [text[:200], "after"]


def test_the_chain_goes_on_over_restarts_and_files(tmp_path: Path):
    written(tmp_path, "r1", "r2")
    written(tmp_path, "r3")
    assert len(files(tmp_path)) == 1
    written(tmp_path, *(f"s{number}" for number in range(20)), segment_bytes=2000)
    assert len(files(tmp_path)) > 3
    assert requests(tmp_path) == ["r1", "r2", "r3", *(f"s{number}" for number in range(20))]
    sequences = [json.loads(line)["entry"]["sequence"] for line in lines(tmp_path)]
    assert sequences == list(range(1, len(sequences) + 1))
    assert faults(tmp_path) == []
    assert notes(tmp_path) == []


def test_a_process_beside_another_takes_a_chain_of_its_own(tmp_path: Path):
    with AuditLog(tmp_path, CHAIN) as first, AuditLog(tmp_path, CHAIN) as second:
        append(first, "1")
        append(second, "2")
        append(first, "3")
        assert (first.chain, second.chain) == (CHAIN, f"{CHAIN}-2")
    with AuditLog(tmp_path, CHAIN) as third:
        assert third.chain == CHAIN
    assert faults(tmp_path) == []
    assert sorted(requests(tmp_path)) == ["1", "2", "3"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 151])
def test_a_name_that_is_no_file_is_refused(tmp_path: Path, name: str):
    with pytest.raises(AuditLogError, match="no name for a chain"):
        AuditLog(tmp_path, name)


def test_a_killed_process_loses_no_acknowledged_line(tmp_path: Path):
    for attempt in range(3):
        told, tell = os.pipe()
        if (process := os.fork()) == 0:
            log = AuditLog(tmp_path, CHAIN, segment_bytes=20_000)
            for number in range(1_000_000):
                append(log, f"{attempt}.{number}")
                os.write(tell, f"{attempt}.{number}\n".encode())
        os.close(tell)
        with os.fdopen(told) as acknowledged:
            heard = [acknowledged.readline() for _ in range(200)]
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            heard += acknowledged.readlines()
        kept = [request for request in requests(tmp_path) if request.startswith(f"{attempt}.")]
        whole = [line.strip() for line in heard if line.endswith("\n")]
        assert kept[: len(whole)] == whole
        assert len(kept) - len(whole) <= 1
    assert faults(tmp_path) == []


@pytest.mark.parametrize("left", [b'{"entry":{"seq', b"\x00" * 5000, b'garbage\n{"entry":{', b"\n"])
def test_what_a_crash_left_of_a_line_is_told_and_the_chain_goes_on_behind(tmp_path: Path, left: bytes):
    written(tmp_path, "r1", "r2")
    with files(tmp_path)[0].open("ab") as file:
        file.write(left)
    assert "no whole line" in notes(tmp_path)[0]
    written(tmp_path, "r3")
    assert len(files(tmp_path)) == 2
    assert requests(tmp_path) == ["r1", "r2", "r3"]
    assert faults(tmp_path) == []
    assert f"a crash left {len(left)} bytes" in notes(tmp_path)[0]
    with files(tmp_path)[0].open("ab") as file:
        file.write(b"more")
    assert "is not so" in faults(tmp_path)[0]


def test_a_file_that_holds_no_whole_line_is_passed_over(tmp_path: Path):
    written(tmp_path, "r1")
    with files(tmp_path)[0].open("ab") as file:
        file.write(b"torn too")
    (tmp_path / f"{CHAIN}.000002.jsonl").write_bytes(b"torn")
    (tmp_path / f"{CHAIN}.000003.jsonl").write_bytes(b"")
    written(tmp_path, "r2")
    assert requests(tmp_path) == ["r1", "r2"]
    assert faults(tmp_path) == []
    assert len(notes(tmp_path)) == 2
    (tmp_path / f"{CHAIN}.000002.jsonl").write_bytes(b"")
    assert "is not so" in faults(tmp_path)[0]


def test_on_a_full_disk_nothing_is_answered(tmp_path: Path):
    with AuditLog(tmp_path, CHAIN) as log:
        append(log, "before")
        for room in (0, 40):  # Nothing of the line is written, or a part.
            with full_after(files(tmp_path)[0].stat().st_size + room), pytest.raises(AuditUnavailable) as told:
                append(log, "refused")
            assert told.value.status == 503
            assert str(tmp_path) not in str(told.value)
            append(log, "after")
        assert log.missed == 0
    assert requests(tmp_path) == ["before", "after", "after"]
    assert faults(tmp_path) == notes(tmp_path) == []


def test_on_a_full_disk_answers_leave_where_that_was_asked_for_and_are_counted(tmp_path: Path):
    with AuditLog(tmp_path, CHAIN, when_full="go_on") as log:
        append(log, "before")
        with full_after(files(tmp_path)[0].stat().st_size):
            append(log, "unseen")
            append(log, "unseen")
        assert log.missed == 2
        append(log, "after")
        assert log.missed == 0
    kinds = [(entry["kind"], entry.get("answers")) for entry in entries(tmp_path)]
    assert kinds == [("begin", None), ("answer", None), ("missed", 2), ("answer", None)]
    assert faults(tmp_path) == []


def test_a_next_file_that_cannot_be_begun_leaves_the_chain_as_it_was(tmp_path: Path):
    with AuditLog(tmp_path, CHAIN, segment_bytes=300) as log:
        append(log, "1")
        with full_after(10), pytest.raises(AuditUnavailable):
            append(log, "2")
        assert len(files(tmp_path)) == 1
        append(log, "3")
        assert len(files(tmp_path)) == 2
    assert requests(tmp_path) == ["1", "3"]
    assert faults(tmp_path) == notes(tmp_path) == []


def test_a_next_file_that_cannot_be_synced_leaves_the_chain_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with AuditLog(tmp_path, CHAIN, segment_bytes=300, sync_seconds=0) as log:
        append(log, "1")
        with monkeypatch.context() as patch:
            patch.setattr("fedclaw.serve.state.audit_log.sync_data", broken)
            with pytest.raises(AuditUnavailable):
                append(log, "2")
        append(log, "3")
    assert requests(tmp_path) == ["1", "2", "3"]  # What was refused may stand there; what was answered does.
    assert faults(tmp_path) == notes(tmp_path) == []


def test_a_node_does_not_start_without_room_for_a_line(tmp_path: Path):
    (tmp_path / f"{CHAIN}.lock").touch()
    with full_after(0):
        with pytest.raises(AuditLogError, match="cannot be written"):
            AuditLog(tmp_path, CHAIN)
        AuditLog(tmp_path, CHAIN, when_full="go_on").close()
    written(tmp_path, "r")
    assert faults(tmp_path) == []


def test_a_part_of_a_line_that_cannot_be_taken_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(descriptor: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    with AuditLog(tmp_path, CHAIN) as log:
        append(log, "before")
        with monkeypatch.context() as patch, full_after(files(tmp_path)[0].stat().st_size + 40):
            patch.setattr(os, "ftruncate", refused)
            with pytest.raises(AuditUnavailable):
                append(log, "refused")
        append(log, "after")
    assert requests(tmp_path) == ["before", "after"]
    assert faults(tmp_path) == []
    assert "a crash left 40 bytes" in notes(tmp_path)[0]


def test_nothing_is_appended_to_a_closed_log(tmp_path: Path):
    for how in ("refuse", "go_on"):
        log = written(tmp_path, "r", when_full=how)
        with pytest.raises(AuditUnavailable):
            append(log)


def test_lines_are_synced_each_or_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    monkeypatch.setattr("fedclaw.serve.state.audit_log.sync_data", synced.append)
    with AuditLog(tmp_path / "each", CHAIN, sync_seconds=0) as log:
        before = len(synced)
        append(log)
        append(log)
        assert len(synced) == before + 2
    with AuditLog(tmp_path / "later", CHAIN, sync_seconds=0.01) as log:
        append(log)
        before, end = len(synced), time.monotonic() + 60
        append(log)
        while len(synced) == before and time.monotonic() < end:
            time.sleep(0.005)
        assert len(synced) > before


def test_a_log_whose_file_is_removed_begins_another(tmp_path: Path):
    with AuditLog(tmp_path, CHAIN, sync_seconds=0.01) as log:
        append(log, "gone")
        files(tmp_path)[0].unlink()
        end = time.monotonic() + 60
        while CHAIN not in segments_of(tmp_path) and time.monotonic() < end:
            append(log, "r")
            time.sleep(0.005)
    assert requests(tmp_path)
    assert "are not here" in faults(tmp_path)[0]


def rewrite(directory: Path, changed: list[bytes]) -> None:
    first, *others = files(directory)
    first.write_bytes(b"".join(changed))
    for other in others:
        other.unlink()


def with_entry(line: bytes, **fields: Any) -> bytes:
    plain = json.loads(line)
    return json.dumps({**plain, "entry": {**plain["entry"], **fields}}, separators=(",", ":")).encode() + b"\n"


def test_whatever_is_done_to_a_line_in_the_middle_is_found_and_where(tmp_path: Path):
    written(tmp_path, *(f"r{number}" for number in range(8)))
    whole = lines(tmp_path)
    done = {
        "line 4: it was changed": [*whole[:3], with_entry(whole[3], principal="nobody"), *whole[4:]],
        "line 4: lines 4 to 4 before it are missing": [*whole[:3], *whole[4:]],
        "line 4: lines 4 to 6 before it are missing": [*whole[:3], *whole[6:]],
        "line 4: lines 4 to 4 before it are missing or were moved": [*whole[:3], whole[4], whole[3], *whole[5:]],
        "line 5: number 4 stands where number 5 belongs": [*whole[:4], whole[3], *whole[4:]],
        "line 4: it is not as the log writes one": [*whole[:3], b"x" + whole[3], *whole[4:]],
        "line 1: lines 1 to 2 are not here": whole[2:],
    }
    for fault, changed in done.items():
        rewrite(tmp_path, changed)
        assert fault in faults(tmp_path)[0]
    rewrite(tmp_path, whole)
    assert faults(tmp_path) == []


def forged(whole: list[bytes], number: int) -> list[bytes]:
    """The chain with one entry changed and every hash after it computed anew."""
    previous, changed = GENESIS, []
    for place, line in enumerate(whole):
        entry = json.loads(line)["entry"]
        if place == number:
            entry["principal"] = "nobody"
        previous = link(previous, json.dumps(entry, separators=(",", ":")))
        changed.append(json.dumps({"entry": entry, "hash": previous}, separators=(",", ":")).encode() + b"\n")
    return changed


def test_an_end_that_is_cut_off_and_a_chain_written_anew_are_found_by_the_anchors(tmp_path: Path, store: StateStore):
    directory = tmp_path / "audit"
    with AuditLog(directory, CHAIN) as log:
        for number in range(5):
            append(log, f"r{number}")
            if number in (2, 4):
                assert log.anchor(store)
                assert log.anchor(store)  # Again the same: nothing new.
    anchors = of_node(store, "node")
    whole = lines(directory)
    assert [report.anchored for report in verify(directory, anchors)] == [2]
    assert faults(directory, anchors=anchors) == []

    rewrite(directory, whole[:-1])
    assert faults(directory) == []
    assert faults(directory, anchors=anchors) == ["lines 6 to 6 were cut off its end: line 6 is anchored"]
    with AuditLog(directory, CHAIN) as log:  # Who goes on behind the cut is told, and hides nothing.
        assert not log.anchor(store)
    assert "not the line that was anchored as number 6" in faults(directory, anchors=of_node(store, "node"))[0]

    rewrite(directory, forged(whole, 2))
    assert faults(directory) == []
    assert len(faults(directory, anchors=anchors)) == 2
    with AuditLog(directory, CHAIN) as log:
        append(log)
        assert log.anchor(store)
    assert len(faults(directory, anchors=of_node(store, "node"))) == 2

    files(directory)[0].unlink()
    assert "were cut off" in faults(directory, anchors=anchors)[0]


def test_the_anchors_of_a_node_are_its_own(store: StateStore):
    for chain in ("a.worker-0", "a.worker-0-2", "a.b.worker-0", "ab.worker-0"):
        store.anchor(chain, 1, "00")
    assert sorted(of_node(store, "a")) == ["a.worker-0", "a.worker-0-2"]


def test_files_that_were_archived_are_a_note_where_that_is_said(tmp_path: Path):
    written(tmp_path, *(f"r{number}" for number in range(20)), segment_bytes=2000)
    files(tmp_path)[0].unlink()
    assert "are not here" in faults(tmp_path)[0]
    assert faults(tmp_path, archived=True) == []
    files(tmp_path)[1].unlink()
    assert "missing" in faults(tmp_path, archived=True)[0]


def test_a_log_at_work_can_be_verified(tmp_path: Path):
    with AuditLog(tmp_path, CHAIN) as log:
        for _ in range(50):
            append(log)
            assert faults(tmp_path) == []


def shown(directory: Path, **asked: Any) -> tuple[int, str]:
    out = StringIO()
    code = show_audit_log(directory, Console(file=out, width=300), **asked)
    return code, out.getvalue()


def test_the_command_shows_the_newest_answers_and_whether_the_chains_are_whole(tmp_path: Path):
    with AuditLog(tmp_path, CHAIN) as log:
        append(log, "r1")
        append(log, "r2", principal="\x1b[2J[red]ward 8[/red]")
        append(log, "r3", model="lung")
    code, text = shown(tmp_path)
    assert code == 0
    assert f"{CHAIN}: 4 lines, not held against anchors: whole" in text
    assert "\x1b" not in text
    assert "[red]ward 8[/red]" in text
    assert "r1" not in shown(tmp_path, last=1)[1]
    assert "r3" not in shown(tmp_path, model="heart")[1]
    assert "r2" not in shown(tmp_path, principal="ward 7")[1]
    whole = lines(tmp_path)
    rewrite(tmp_path, [*whole[:1], *whole[2:]])
    code, text = shown(tmp_path, anchors={})
    assert code == 1
    assert "tampered with" in text
    with pytest.raises(AuditLogError, match="no such directory"):
        shown(tmp_path / "none")
