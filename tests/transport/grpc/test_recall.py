"""What nobody waits for any more goes: tasks that half arrived, tasks that wait, replies that nobody reads."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fedclaw.errors import TransportError
from fedclaw.protocol.message_identity import assign_message_id, expires_at, rebuild
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.message_codec import encode
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.sender import Sender
from fedclaw.transport.grpc.worker import TaskReassembler

MIB = 1 << 20


def task(kit, identity: str, *, size: int = 4, seconds_left: float = 60.0, created_at: float | None = None) -> pb.Offer:
    """The offer of a task as a server makes it, and nothing of its content."""
    envelope = pb.Envelope(
        run_id=kit.RUN_ID,
        message_id=identity,
        src_node_id=1,
        dst_node_id=2,
        group_id="1",
        message_type="train",
        created_at=time.time() if created_at is None else created_at,
        ttl=60.0,
    )
    return pb.Offer(transfer_id=identity, envelope=envelope, size=size, stamp=b"stamp", seconds_left=seconds_left)


def begin(reassembler: TaskReassembler, offer: pb.Offer) -> int:
    envelope, left = frames.task_of(offer)
    return reassembler.begin(offer, envelope, time.monotonic() + left)


def slow_downloads(kit, grid, count: int) -> None:
    """Rounds whose question is still on its way when its time is over."""
    for number in range(count):
        message = kit.message("site-a", kit.content(1_000_000, seed=number), group=f"late-{number}", ttl=0.5)
        assert list(grid.send_and_receive([message], timeout=0.5)) == []


def test_a_site_answers_after_more_rounds_with_a_missed_download_than_it_has_room_for(kit):
    """Eight such rounds left eight models at a site that then was busy for ever."""
    grid = kit.grid()
    echo = kit.Echo()
    running = kit.link("site-a", grid.port, echo, limits=kit.QUICK.model_copy(update={"queued_tasks": 2}))
    grid.wait_for_sites(1, 20)
    reassembler = running.link._reassembler
    real, reassembler.add = reassembler.add, lambda _chunk: None  # As on a line on which nothing gets through in time.
    slow_downloads(kit, grid, 4)
    reassembler.add = real
    kit.until(lambda: not reassembler._partials, "a recall has reached the site for each of them")
    (reply,) = grid.send_and_receive([kit.message("site-a")], timeout=20)
    assert reply.has_content()
    assert len(echo.asked) == 1


def test_partly_received_tasks_expire_by_themselves_and_their_number_and_size_are_bounded(kit, clock):
    reassembler = TaskReassembler(room=10 * MIB)
    begin(reassembler, task(kit, "a", size=6 * MIB, seconds_left=50.0))
    assert reassembler.has_room(4 * MIB, tasks=2)
    assert not reassembler.has_room(5 * MIB, tasks=2)
    assert not reassembler.has_room(1, tasks=1)
    clock.forward(51)
    assert reassembler.has_room(20 * MIB, tasks=1), "a single one larger than the room comes alone"
    assert reassembler.add(frames.Chunk("a", 0, b"x")) is None


def test_a_task_offered_again_as_a_larger_one_takes_no_more_than_the_room_there_is(kit):
    """Small ones first, then, under the same names, large ones: their sizes count as those of any others do."""
    running = kit.link("site-a", kit.grid().port, limits=kit.QUICK.model_copy(update={"intake_bytes": 10 * MIB}))
    link, stream = running.link, SimpleNamespace(sender=Sender())
    for size in (1, 6 * MIB):
        for name in "abcd":
            link._on_offer(stream, task(kit, name, size=size))
    held = [len(partial.buffer) for partial in link._reassembler._partials.values()]
    assert sum(held) <= 10 * MIB
    assert max(held) == 6 * MIB
    said = [frame.refuse.reason for frame in stream.sender._control if frame.WhichOneof("body") == "refuse"]
    assert said == [pb.REASON_BUSY] * 3


def test_a_recalled_task_that_waits_is_never_begun_and_may_be_asked_again(kit):
    grid = kit.grid()
    echo = kit.Echo()
    echo.gate.clear()
    kit.link("site-a", grid.port, echo)
    grid.wait_for_sites(1, 20)
    first = grid.send_and_receive([kit.message("site-a", group="1")], timeout=60)
    echo.working.wait(10)

    def ask(timeout: float):
        message = kit.message("site-a", group="2", ttl=timeout)
        assign_message_id(message, "asked-twice")
        return list(grid.send_and_receive([message], timeout=timeout))

    assert ask(0.7) == []
    echo.gate.set()
    assert len(list(first)) == 1
    assert [message.metadata.group_id for message in echo.asked] == ["1"]
    assert len(ask(20.0)) == 1
    assert [message.metadata.group_id for message in echo.asked] == ["1", "2"]


def test_replies_that_nobody_reads_expire(kit, clock):
    patient = kit.QUICK.model_copy(update={"gone": 50.0, "missed_heartbeats": 4000})
    grid = kit.grid(patient)
    kit.link("site-a", grid.port, limits=patient)
    grid.wait_for_sites(1, 20)
    (identity,) = grid.push_messages([kit.message("site-a", kit.content(500_000), ttl=50.0)])
    kit.until(lambda: grid._pending.has_reply([identity]), "the reply is there")
    assert kit.memory(grid) > 0
    clock.forward(51)
    kit.until(lambda: not grid._pending.has_reply([identity]), "it has expired")
    kit.until(lambda: kit.memory(grid) == 0, "and takes no memory any more")
    assert list(grid.pull_messages([identity])) == []


def test_a_site_whose_disk_is_full_says_so_and_the_server_does_not_wait(kit, caplog):
    grid = kit.grid()
    echo = kit.Echo()
    running = kit.link("site-a", grid.port, echo)
    grid.wait_for_sites(1, 20)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    running.link._outbox._write = full
    (reply,) = grid.send_and_receive([kit.message("site-a")], timeout=600)
    assert reply.error.code == RefusalCode.FAILED
    assert "could not keep or release its answer" in reply.error.reason
    assert echo.released == [], "nothing left"
    assert "No space left" in caplog.text


def test_a_site_whose_clock_is_an_hour_ahead_answers_and_both_ends_name_the_clock(kit, caplog, monkeypatch):
    """The site's threads have a clock of their own here. By it, every task's time was over before it came."""
    real = time.time

    def clock() -> float:
        name = threading.current_thread().name
        return real() + 3600.0 * (name in {"fedclaw-read", "fedclaw-work"} or "_run" in name)

    monkeypatch.setattr(time, "time", clock)
    grid = kit.grid()
    kit.link("site-a", grid.port)
    grid.wait_for_sites(1, 20)
    (reply,) = grid.send_and_receive([kit.message("site-a", ttl=20.0)], timeout=20)
    assert reply.has_content()
    assert "this machine's clock is 3600 s ahead of the server's" in caplog.text
    assert "this server's clock is 3600 s behind that of site-a" in caplog.text


def test_the_time_of_a_task_is_what_is_left_of_it_whatever_the_clocks_say(kit):
    offer = task(kit, "a", seconds_left=20.0, created_at=time.time() - 7200)
    envelope, left = frames.task_of(offer)
    assert left == 20.0
    assert expires_at(rebuild(envelope, kit.content())) == pytest.approx(time.time() + 20.0, abs=1)
    older = task(kit, "a", seconds_left=0.0, created_at=time.time() - 50)
    assert frames.task_of(older)[1] == pytest.approx(10.0, abs=1), "a server of before says it by its clock"
    assert frames.task_of(task(kit, "a", seconds_left=1e9))[1] == 60.0, "no longer than the message lives"
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(TransportError):
            frames.task_of(task(kit, "a", seconds_left=wrong))


@pytest.mark.parametrize(("ahead", "said"), [(400.0, "400 s behind"), (-400.0, "400 s ahead of"), (30.0, None)])
def test_a_wrong_clock_is_named(ahead, said):
    assert frames.clock_trouble(time.time() + ahead) == said
    assert frames.clock_trouble(0.0) is None
    assert frames.clock_trouble(float("nan")) is None


def test_the_heartbeats_go_on_after_one_that_fails(kit, caplog):
    """A list of revoked sites that cannot be read ended the thread, and with it every connection."""
    grid = kit.grid()
    running = kit.link("site-a", grid.port)
    kit.link("site-b", grid.port)
    grid.wait_for_sites(2, 20)
    connections = grid._connections
    real, failures = connections._check, []

    def fails_once(session) -> None:
        if session.peer.site == "site-a" and len(failures) < 3:
            failures.append(session)
            raise RuntimeError("nobody has thought of this")
        real(session)

    connections._check = fails_once
    kit.until(lambda: len(failures) == 3, "it has failed three times")
    assert connections._ticker.is_alive()
    before = connections._sequence
    kit.until(lambda: connections._sequence > before + 3, "heartbeats go on")
    assert running.link.connected
    assert "a heartbeat failed" in caplog.text
    assert set(grid.wait_for_sites(2, 20)) == {"site-a", "site-b"}


def test_the_arrays_of_a_task_are_as_sent(kit):
    """What is rebuilt under the site's clock is the same message but for its times."""
    body = kit.content(10)
    raw = b"".join(encode(body).parts)
    reassembler = TaskReassembler(room=MIB)
    offer = task(kit, "a", size=len(raw), created_at=1.0)
    assert begin(reassembler, offer) == 0
    arrived = reassembler.add(frames.Chunk("a", 0, raw))
    assert arrived is not None
    np.testing.assert_array_equal(arrived.message.content["arrays"]["w"].numpy(), body["arrays"]["w"].numpy())
    assert arrived.message.metadata.message_id == "a"
