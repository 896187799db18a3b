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
from fedclaw.identity.stream import TAG
from fedclaw.protocol.message_identity import Envelope
from fedclaw.transport.grpc import outbox as outbox_module
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.message_codec import encode
from fedclaw.transport.grpc.outbox import Outbox, StoredReply
from fedclaw.transport.grpc.protocol import link_pb2 as pb

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
    chunks = [b"".join(found.read(offset)) for offset in range(0, found.body_size, seal.SEGMENT + TAG)]
    leaves = b"".join(hashlib.sha256(part).digest() for part in (found.header, *chunks))
    assert "tree:" + hashlib.sha256(leaves).hexdigest() == found.digest
    body = b"".join(chunks)
    binding = seal.Binding("f", 1, "1", task(1).message_id, "s")
    stream = seal.Opener("x25519", KEYS.private).open(found.header, binding, size)
    for offset in range(0, len(body), seal.SEGMENT + TAG):
        stream.feed(body[offset : offset + seal.SEGMENT + TAG])
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


@pytest.mark.parametrize("where", [0, 500, 1_500_000, -1, -30])
def test_a_damaged_file_is_not_sent(tmp_path: Path, where: int):
    path = store(Outbox(tmp_path, Limits()), 1, size=2_000_000).path
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


def reuse(directory: Path) -> Outbox:
    """An outbox with one reply, and the file of another to write over."""
    outbox = Outbox(directory, Limits(outbox_replies=1))
    store(outbox, 1)
    store(outbox, 2)
    assert sorted(path.suffix for path in directory.iterdir()) == [".part", ".sealed"]
    return outbox


def test_a_file_that_is_written_over_is_flushed_once_and_keeps_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    outbox = reuse(tmp_path)
    (spare,) = tmp_path.glob(".*.part")
    length, inode = spare.stat().st_size, spare.stat().st_ino
    whole, data = Disk(tmp_path), Disk(tmp_path)
    monkeypatch.setattr(os, "fsync", whole)
    monkeypatch.setattr(os, "fdatasync", data)
    entry = store(outbox, 3, size=1100)
    assert whole.seen == [], "neither its length nor its directory has to be flushed"
    assert [(what, size, names) for what, size, names in data.seen] == [("file", length, [".part", ".sealed"])]
    assert (entry.path.stat().st_size, entry.path.stat().st_ino) == (length, inode)


@pytest.mark.parametrize("name", [".spare.part", "earlier"])
def test_a_reply_is_found_under_whatever_name_a_power_cut_has_left_it(tmp_path: Path, name: str):
    """The renames of a file that is written over are not flushed: any of them may be lost, its content is not."""
    outbox = reuse(tmp_path)
    earlier = hashlib.sha256(task(1).message_id.encode()).hexdigest()[:40] + ".sealed"
    path = store(outbox, 3).path
    for spare in tmp_path.glob(".*.part"):
        spare.unlink()
    path.rename(tmp_path / (earlier if name == "earlier" else name))
    again = Outbox(tmp_path, Limits(outbox_replies=1))
    found = again.find(task(3))
    assert found is not None
    assert found.path == path
    assert path.exists()
    assert again.find(task(1)) is None


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_a_reply_that_was_being_written_over_another_when_the_process_died_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
):
    """Before a byte, after the body, before the flush: nothing of the old reply is found, nor half of the new one."""
    outbox = reuse(tmp_path)
    write, written = outbox_module.write_all, []

    class Killed(BaseException):
        pass

    def dying(descriptor: int, data: bytes, offset: int) -> None:
        if when == "before" or (when == "within" and written):
            raise Killed
        written.append(write(descriptor, data, offset))

    def no_flush(_descriptor: int) -> None:
        raise Killed

    monkeypatch.setattr(outbox_module, "write_all", dying)
    monkeypatch.setattr(os, "fdatasync", no_flush)
    monkeypatch.setattr(Path, "unlink", lambda *_arguments, **_options: None)
    with pytest.raises(Killed):
        store(outbox, 3)
    monkeypatch.undo()
    again = Outbox(tmp_path, Limits())
    assert again.find(task(1)) is None
    assert again.find(task(2)) is not None
    assert (again.find(task(3)) is not None) == (when == "after"), "whole before its flush, as far as this machine goes"
    assert caplog.text == ""


def test_any_damage_to_a_trailer_is_found(tmp_path: Path):
    path = store(Outbox(tmp_path, Limits()), 1).path
    content = path.read_bytes()
    trailer = len(content) - 24 - int.from_bytes(content[-24:-20], "big")
    for where in range(trailer, len(content), 5):
        path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
        assert Outbox(tmp_path, Limits()).find(task(1)) is None, where
        assert not path.exists()


def test_a_file_of_before_trailers_had_a_digest_is_read(tmp_path: Path):
    stored = store(Outbox(tmp_path, Limits()), 1)
    content = stored.path.read_bytes()
    size = int.from_bytes(content[-24:-20], "big")
    assert content[-4:] == b"FCO2"
    body, trailer = content[: stored.body_size], content[-24 - size : -24]
    stored.path.write_bytes(body + trailer + len(trailer).to_bytes(4, "big") + b"FCO1")
    found = Outbox(tmp_path, Limits()).find(task(1))
    assert found is not None
    assert {**found.__dict__, "stored": 0} == {**stored.__dict__, "stored": 0}


@pytest.mark.parametrize("magic", [b"FCO1", b"FCO2"])
def test_a_reply_that_an_earlier_version_stored_keeps_its_digest_and_is_checked_by_it(tmp_path: Path, magic: bytes):
    """Its digest was that of all bytes, and is in the outbound log: what is sent again is the very same message."""
    stored = store(Outbox(tmp_path, Limits()), 1, size=3_000_000)
    content = stored.path.read_bytes()
    body = content[: stored.body_size]
    size = int.from_bytes(content[-24:-20], "big")
    trailer = pb.Spooled.FromString(content[-24 - size : -24])
    trailer.digest = hashlib.sha256(stored.header + body).hexdigest()
    raw = trailer.SerializeToString()
    check = hashlib.sha256(raw).digest()[:16] if magic == b"FCO2" else b""
    earlier = body + raw + len(raw).to_bytes(4, "big") + check + magic
    stored.path.write_bytes(earlier)
    found = Outbox(tmp_path, Limits()).find(task(1))
    assert found is not None
    assert found.digest == trailer.digest
    assert found.outgoing().offer.stamp.hex() == trailer.digest
    spoilt = bytes([earlier[2_000_000] ^ 1])
    stored.path.write_bytes(earlier[:2_000_000] + spoilt + earlier[2_000_001:])
    assert Outbox(tmp_path, Limits()).find(task(1)) is None
