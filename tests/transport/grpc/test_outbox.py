"""Stored replies: whole or not there, private, flushed to the disk, checked after a restart, pruned."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest
from flwr.app import Error, RecordDict

from fedclaw.errors import TransportError
from fedclaw.identity import seal
from fedclaw.protocol.message_identity import Envelope
from fedclaw.transport.grpc import Limits
from fedclaw.transport.grpc.message_codec import encode
from fedclaw.transport.grpc.outbox import Outbox, StoredReply

KEYS = seal.generate("x25519")


def task(number: int, run: int = 1) -> Envelope:
    return Envelope(run, f"run{run}-task{number}", "", 1, 2, str(number), "train", 5.0, 60.0)


def store(
    outbox: Outbox, number: int, run: int = 1, size: int = 1000, content: RecordDict | Error | None = None
) -> StoredReply:
    asked = task(number, run)
    binding = seal.Binding("f", run, asked.group_id, asked.message_id, "s")
    sealed = seal.Sealer("x25519", KEYS.public).seal([bytes(size)], binding)
    reply = Envelope(**{**asked.__dict__, "reply_to_message_id": asked.message_id})
    entry = outbox.store(asked, reply, sealed, b"".join(encode(content or RecordDict()).parts))
    outbox.prune(entry)
    return entry


@pytest.mark.parametrize("size", [0, 1000, 6_000_000])
def test_what_is_stored_is_found_whole_after_a_restart(tmp_path: Path, size: int):
    stored = store(Outbox(tmp_path, Limits()), 1, size=size)
    found = Outbox(tmp_path, Limits()).find(task(1))
    assert found is not None
    assert {**found.__dict__, "stored": 0} == {**stored.__dict__, "stored": 0}
    body = b"".join(b"".join(found.read(offset)) for offset in range(0, found.body_size, seal.SEGMENT + seal.TAG))
    assert hashlib.sha256(found.header + body).hexdigest() == found.digest
    binding = seal.Binding("f", 1, "1", task(1).message_id, "s")
    stream = seal.Opener("x25519", KEYS.private).open(found.header, binding, size)
    for offset in range(0, len(body), seal.SEGMENT + seal.TAG):
        stream.feed(body[offset : offset + seal.SEGMENT + seal.TAG])
    assert stream.finish() == bytes(size)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_refusal_is_not_kept_for_a_second_asking(tmp_path: Path, restarted: bool):
    outbox = Outbox(tmp_path, Limits())
    path = store(outbox, 1, content=Error(2008, "the budget is gone")).path
    assert path.exists(), "it is sent like every other reply"
    if restarted:
        outbox = Outbox(tmp_path, Limits())
    assert outbox.find(task(1)) is None
    assert not path.exists()


def test_files_are_for_their_owner_only(tmp_path: Path):
    entry = store(Outbox(tmp_path / "outbox", Limits()), 1)
    assert stat.S_IMODE(entry.path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "outbox").stat().st_mode) == 0o700


@pytest.mark.parametrize("where", [0, 500, -1, -30])
def test_a_damaged_file_is_not_sent(tmp_path: Path, where: int):
    path = store(Outbox(tmp_path, Limits()), 1).path
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    assert Outbox(tmp_path, Limits()).find(task(1)) is None
    assert not path.exists()


def test_a_file_that_was_cut_off_is_not_sent(tmp_path: Path):
    path = store(Outbox(tmp_path, Limits()), 1).path
    path.write_bytes(path.read_bytes()[:-200])
    assert Outbox(tmp_path, Limits()).find(task(1)) is None


def test_a_half_written_file_is_cleared_away(tmp_path: Path):
    (tmp_path / ".half.part").write_bytes(b"x")
    Outbox(tmp_path, Limits())
    assert list(tmp_path.iterdir()) == []


def test_a_task_of_the_same_name_in_another_run_or_round_is_another_task(tmp_path: Path):
    outbox = Outbox(tmp_path, Limits())
    store(outbox, 1)
    for changed in ({"run_id": 2}, {"group_id": "7"}):
        assert outbox.find(Envelope(**{**task(1).__dict__, **changed})) is None
    assert outbox.find(task(1)) is not None


def test_only_the_newest_replies_of_a_run_are_kept(tmp_path: Path):
    outbox = Outbox(tmp_path, Limits(outbox_replies=2))
    store(outbox, 9, run=8)
    for number in range(5):
        store(outbox, number)
    kept = [number for number in range(5) if outbox.find(task(number)) is not None]
    assert kept == [3, 4]
    assert outbox.find(task(9, run=8)) is not None
    assert len(list(tmp_path.glob("*.sealed"))) == 3


def test_a_file_that_is_written_over_holds_only_the_new_reply(tmp_path: Path):
    outbox = Outbox(tmp_path, Limits(outbox_replies=1))
    sizes = [5000, 100, 3000, 50, 4000]
    for number, size in enumerate(sizes):
        store(outbox, number, size=size)
        found = Outbox(tmp_path, Limits(outbox_replies=1)).find(task(number))
        assert found is not None
        assert found.plain_size == size
    assert len(list(tmp_path.glob("*.sealed"))) == 1


def test_replies_of_other_runs_go_by_age(tmp_path: Path):
    outbox = Outbox(tmp_path, Limits(outbox_age=1e-9))
    store(outbox, 9, run=8)
    store(outbox, 1)
    assert outbox.find(task(9, run=8)) is None


def test_the_outbox_is_bounded_and_never_drops_the_newest(tmp_path: Path):
    outbox = Outbox(tmp_path, Limits(outbox_bytes=2500))
    store(outbox, 1, run=8)
    store(outbox, 1, run=9)
    newest = store(outbox, 1, run=10, size=5000)
    assert list(tmp_path.glob("*.sealed")) == [newest.path]


def test_a_disk_that_refuses_is_a_clear_error(tmp_path: Path):
    outbox = Outbox(tmp_path / "outbox", Limits())
    (tmp_path / "outbox").rmdir()
    with pytest.raises(TransportError, match="cannot store a reply in"):
        store(outbox, 1)


class Disk:
    """Watches the real flushes in a directory: what had which name and size at each; can fail the nth.

    Threads that earlier tests left behind flush files of their own, elsewhere.
    """

    def __init__(self, directory: Path, fails: int | None = None) -> None:
        self.directory = directory
        self.seen: list[tuple[str, int, list[str]]] = []
        self._fails = fails
        self._fsync = os.fsync

    def __call__(self, descriptor: int) -> None:
        if not Path(f"/proc/self/fd/{descriptor}").resolve().is_relative_to(self.directory.resolve()):
            self._fsync(descriptor)
            return
        status = os.fstat(descriptor)
        what = "directory" if stat.S_ISDIR(status.st_mode) else "file"
        names = sorted(path.suffix for path in self.directory.iterdir())
        self.seen.append((what, status.st_size, names))
        if self._fails == len(self.seen):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(descriptor)


@pytest.mark.parametrize("size", [100, 6_000_000])
def test_a_reply_is_flushed_whole_before_it_has_its_name_and_the_name_before_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
):
    outbox = Outbox(tmp_path, Limits())
    disk = Disk(tmp_path)
    monkeypatch.setattr(os, "fsync", disk)
    entry = store(outbox, 1, size=size)
    (what, flushed, before), (then, _, after) = disk.seen
    assert (what, flushed, before) == ("file", entry.path.stat().st_size, [".part"])
    assert (then, after) == ("directory", [".sealed"])


@pytest.mark.parametrize("fails", [1, 2])
def test_a_reply_that_cannot_be_flushed_is_an_error_and_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
):
    outbox = Outbox(tmp_path, Limits())
    monkeypatch.setattr(os, "fsync", Disk(tmp_path, fails))
    with pytest.raises(TransportError, match=r"cannot store a reply in .*: Input/output error"):
        store(outbox, 1)
    assert outbox.find(task(1)) is None
    assert list(tmp_path.iterdir()) == []
