"""One site's reply costs no other site anything: not its place, not its time, not the server's memory."""

import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedclaw.identity.seal import SEGMENT
from fedclaw.identity.stream import TAG
from fedclaw.protocol.records import MessageRecords
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc import reply_receiver as receiver_module
from fedclaw.transport.grpc.message_codec import encode
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from tests.transport.grpc.uploader import Uploader

MIB = 1 << 20


def uploader(kit, grid, name: str) -> Uploader:
    return Uploader(kit.raw(name, grid.port), kit.federation.site(name))


def arrays(mebibytes: int) -> bytes:
    values = np.arange(mebibytes * MIB // 4, dtype=np.float32)
    return b"".join(encode(RecordDict({"sum": ArrayRecord({"w": Array(values)})})).parts)


def asked(kit, grid, names, *, timeout=60.0, body=None):
    """The replies to one question to `names`, gathered beside the test; join the thread to have them all."""
    ttl = {"ttl": timeout}
    messages = [kit.message(name, body or kit.content(), **ttl) for name in names]
    found: dict[str, object] = {}
    stream = grid.send_and_receive(messages, timeout=timeout)

    def gather() -> None:
        for reply in stream:
            found[grid.site_name(reply.metadata.src_node_id)] = reply

    thread = threading.Thread(target=gather, daemon=True)
    thread.start()
    return thread, found


def received(grid) -> int:
    """Bytes that have arrived of all replies that are on their way."""
    return sum(one.received for one in list(grid._connections.replies._buffers.accepted.values()))


def limits(kit, **changed):
    """Of a server that hears of the sites of these tests only when they have something to say."""
    return kit.QUICK.model_copy(update={"missed_heartbeats": 4000, **changed})


def test_four_uploads_of_40_mib_go_side_by_side_within_64_mib_and_arrive_whole(kit):
    """None has sent its last piece before each has sent all the others."""
    grid = kit.grid(limits(kit, inbound_bytes=64 * MIB))
    names = [f"site-{letter}" for letter in "abcd"]
    sites = [uploader(kit, grid, name) for name in names]
    thread, found = asked(kit, grid, names)
    body = arrays(40)
    for site in sites:
        site.offer(0, content=body)
    assert [site.accepted() for site in sites] == [0] * 4
    held = []
    for first in range(40):
        for site in sites:
            site.send(first, 1)
        held.append(kit.memory(grid))
    for site in sites:
        site.send(40, site.sealed.count - 40)
    thread.join(60)
    assert sorted(found) == names
    for reply in found.values():
        values = reply.content["sum"]["w"].numpy()
        assert (values.size, values[-1]) == (10 * MIB, 10 * MIB - 1)
    assert max(held) <= 64 * MIB
    kit.until(lambda: kit.memory(grid) == 0, "all memory is free again")


def test_what_waits_on_disk_has_no_name_there_and_is_gone_after_it_was_read(kit, tmp_path):
    grid = kit.grid(limits(kit, inbound_bytes=MIB))
    grid._connections.replies._buffers.directory = tmp_path
    names = ["site-a", "site-b"]
    sites = [uploader(kit, grid, name) for name in names]
    thread, found = asked(kit, grid, names)
    for site in sites:
        site.offer(0, content=arrays(4))
        site.accepted()
        site.send(0, 3)

    def open_there() -> list[str]:
        links = []
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                links.append(str(entry.readlink()))
        return [link for link in links if link.startswith(str(tmp_path))]

    kit.until(lambda: len(open_there()) == 1, "one of the two has gone to disk")
    assert all(link.endswith("(deleted)") for link in open_there())
    assert list(tmp_path.iterdir()) == []
    for site in sites:
        site.send(3, site.sealed.count - 3)
    thread.join(60)
    assert sorted(found) == names
    kit.until(lambda: open_there() == [], "nothing is left")


def test_a_withdrawn_reply_leaves_neither_memory_nor_disk_behind(kit, clock):
    grid = kit.grid(limits(kit, inbound_bytes=MIB))
    site = uploader(kit, grid, "site-a")
    thread, _ = asked(kit, grid, ["site-a"])
    site.offer(0, content=arrays(8))
    site.accepted()
    site.send(0, 6)
    kit.until(lambda: received(grid) == 6 * (SEGMENT + TAG), "all that was sent is there")
    clock.forward(60)
    thread.join(60)
    receiver = grid._connections.replies
    kit.until(lambda: not receiver._buffers.accepted and not receiver._buffers.waiting, "nothing is held")


@pytest.mark.parametrize("spool_bytes", [0, 2 * MIB])
def test_a_full_disk_brings_replies_one_after_the_other_and_loses_none(kit, caplog, spool_bytes):
    grid = kit.grid(limits(kit, inbound_bytes=MIB, spool_bytes=spool_bytes))
    names = ["site-a", "site-b", "site-c"]

    class Large(kit.Echo):
        def answer(self, message):
            reply = super().answer(message)
            reply.content["more"] = ArrayRecord({"w": Array(np.arange(2 * MIB, dtype=np.float32))})
            return reply

    for name in names:
        kit.link(name, grid.port, Large())
    grid.wait_for_sites(3, 20)
    gate = threading.Event()
    receiver = grid._connections.replies
    real = receiver._buffers.charge
    # All three begin before one has ended, as on a slow line.
    receiver._buffers.charge = lambda reply, more: real(reply, more) and (gate.wait(0.1) or True)
    thread, found = asked(kit, grid, names)
    thread.join(60)
    assert sorted(found) == names
    assert all(reply.has_content() for reply in found.values())


def test_a_reply_larger_than_its_question_can_yield_is_refused_by_its_offer_and_its_site_set_aside(kit, caplog):
    grid = kit.grid(limits(kit))
    liar = uploader(kit, grid, "site-a")
    kit.link("site-b", grid.port)
    grid.wait_for_sites(2, 20)
    body = MessageRecords(dict(kit.content()))
    body.reply_bytes = 4096
    thread, found = asked(kit, grid, ["site-a", "site-b"], body=body)
    liar.offer(2 * MIB)
    assert liar.refusal().reason == pb.REASON_OVERSIZED
    thread.join(60)
    assert found["site-a"].error.code == RefusalCode.UPDATE_SIZE
    assert "limit 4096" in found["site-a"].error.reason
    assert found["site-b"].has_content()
    assert list(grid.excluded_nodes()) == [kit.number_of("site-a")]
    assert "site-a is not asked again in this run" in caplog.text


def test_a_liar_within_the_bound_delays_nobody_and_is_named_by_its_rate(kit, clock, caplog):
    """It promises as much as the question allows, and sends a piece now and then: the honest are through meanwhile."""
    grid = kit.grid(limits(kit, inbound_bytes=24 * MIB))
    liar = uploader(kit, grid, "site-liar")
    honest = [uploader(kit, grid, name) for name in ("site-a", "site-b", "site-c")]
    thread, found = asked(kit, grid, ["site-liar", "site-a", "site-b", "site-c"])
    liar.offer(24 * MIB)
    liar.accepted()
    liar.send(0, 1)
    for site in honest:
        site.offer(0, content=arrays(8))
        site.accepted()
        site.send(0, site.sealed.count)
    for number in range(1, 4):
        kit.until(lambda: len(found) == 3, "the honest ones are through while the liar has hardly begun")
        liar.send(number, 1)
    clock.forward(60)
    thread.join(60)
    assert found.keys() == {"site-liar", "site-a", "site-b", "site-c"}
    assert all(found[site.name].has_content() for site in honest)
    error = found["site-liar"].error
    assert error.code == RefusalCode.SLOW
    assert "bytes/s" in error.reason
    assert list(grid.excluded_nodes()) == [kit.number_of("site-liar")]


def test_a_liar_is_named_by_its_rate_at_the_readers_deadline_too(kit, clock):
    """Whoever waits may have less patience than the question lives."""
    grid = kit.grid(limits(kit))
    liar = uploader(kit, grid, "site-a")
    stream = grid.send_and_receive([kit.message("site-a", ttl=3600.0)], timeout=60.0)
    liar.offer(200 * MIB)
    liar.accepted()
    liar.send(0, 1)
    clock.forward(60)
    (reply,) = stream
    assert reply.error.code == RefusalCode.SLOW
    assert list(grid.excluded_nodes()) == [kit.number_of("site-a")]


@pytest.mark.parametrize(("after", "named"), [(1, False), (40, True)])
def test_a_site_that_breaks_off_is_judged_by_the_time_until_then(kit, clock, after, named):
    """A crash at the begin is no bad rate; to hang up before the deadline is no excuse."""
    grid = kit.grid(limits(kit))
    site = uploader(kit, grid, "site-a")
    thread, found = asked(kit, grid, ["site-a"])
    site.offer(32 * MIB)
    site.accepted()
    site.send(0, 1)
    kit.until(lambda: received(grid), "its first piece is there")
    clock.forward(after)
    site.raw.close()
    kit.until(lambda: list(grid.get_node_ids()) == [], "it has gone")
    clock.forward(60)
    thread.join(60)
    assert [reply.error.code for reply in found.values()] == [RefusalCode.SLOW] * named
    assert list(grid.excluded_nodes()) == [kit.number_of("site-a")] * named


def test_a_site_that_began_late_at_a_good_rate_is_not_set_aside(kit, clock):
    grid = kit.grid(limits(kit))
    site = uploader(kit, grid, "site-a")
    thread, found = asked(kit, grid, ["site-a"])
    clock.forward(50)
    site.offer(0, content=arrays(8))
    site.accepted()
    site.send(0, 4)
    kit.until(lambda: received(grid) == 4 * (SEGMENT + TAG), "half of it is there")
    clock.forward(10)
    thread.join(60)
    assert found == {}
    assert grid.excluded_nodes() == {}


def test_a_site_that_offers_another_reply_every_moment_is_judged_by_all_that_came(kit, clock):
    """Each by itself has no time to be slow: a reply is judged after a quarter of its request's time."""
    grid = kit.grid(limits(kit))
    site = uploader(kit, grid, "site-a")
    thread, found = asked(kit, grid, ["site-a"])
    task = site.raw.hear("offer").offer
    for number in range(8):
        site.stamp = bytes([number])
        site.reply(task, 8 * MIB)
        site.accepted()
        clock.forward(7)
    clock.forward(4)
    thread.join(60)
    assert found["site-a"].error.code == RefusalCode.SLOW
    assert list(grid.excluded_nodes()) == [kit.number_of("site-a")]


def test_a_site_that_offers_another_reply_every_moment_keeps_no_reply_on_disk(kit, clock):
    """Each of its offers would be taken for a fast one, for whose end the others wait."""
    grid = kit.grid(limits(kit, inbound_bytes=6 * MIB))
    liar, honest = uploader(kit, grid, "site-liar"), uploader(kit, grid, "site-a")
    thread, found = asked(kit, grid, ["site-liar", "site-a"])
    liar.offer(6 * MIB)
    liar.accepted()
    liar.send(0, 3)
    honest.offer(0, content=arrays(4))
    honest.accepted()
    kit.until(
        lambda: any(one.memory_was_short for one in grid._connections.replies._buffers.accepted.values()),
        "there is no memory",
    )

    def promise() -> None:
        number = 0
        while thread.is_alive():
            number += 1
            liar.stamp = str(number).encode()
            liar.reply(liar.task, 6 * MIB)
            time.sleep(0.1)

    promises = threading.Thread(target=promise, daemon=True)
    promises.start()
    liar.accepted()
    honest.send(0, honest.sealed.count)
    kit.until(lambda: "site-a" in found, "the honest one is through")
    clock.forward(60)
    thread.join(60)
    promises.join()
    assert found["site-a"].has_content()


def test_a_reply_on_disk_whose_site_goes_as_its_last_piece_comes_is_read_all_the_same(kit, monkeypatch):
    grid = kit.grid(limits(kit, inbound_bytes=MIB))
    sites = [uploader(kit, grid, name) for name in ("site-a", "site-b")]
    receiver = grid._connections.replies
    spool = receiver._buffers.spool

    def gone_meanwhile(reply, chunk) -> None:
        spool(reply, chunk)
        if reply.received + len(chunk.data) == reply.offer.size:
            receiver.on_disconnect(reply.session)

    monkeypatch.setattr(receiver._buffers, "spool", gone_meanwhile)
    thread, found = asked(kit, grid, ["site-a", "site-b"], timeout=10.0)
    for site in sites:
        site.offer(0, content=arrays(4))
        site.accepted()
        site.send(0, 3)
    for site in sites:
        site.send(3, site.sealed.count - 3)
    thread.join(60)
    assert sorted(found) == ["site-a", "site-b"]
    assert all(reply.has_content() for reply in found.values())


def test_a_site_that_goes_as_its_turn_comes_may_come_back_and_nobody_else_is_hung_up_on(kit, monkeypatch, caplog):
    """Its turn may come on the thread of another site's stream."""
    grid = kit.grid(limits(kit))
    site = uploader(kit, grid, "site-a")
    receiver = grid._connections.replies
    accept_next, gone = receiver._buffers.accept_next, []

    def gone_meanwhile():
        found = accept_next()
        if found is not None and not gone:
            gone.append(found)
            receiver.on_disconnect(grid._connections._sessions[kit.number_of("site-a")])
        return found

    monkeypatch.setattr(receiver._buffers, "accept_next", gone_meanwhile)
    thread, found = asked(kit, grid, ["site-a"], timeout=10.0)
    site.offer(0, content=arrays(4))
    kit.until(lambda: gone, "its turn has come")
    again = kit.raw("site-a", grid.port)
    again.enter()
    again.say(pb.Frame(offer=site.made))
    site.raw = again
    assert site.accepted() == 0
    site.send(0, site.sealed.count)
    thread.join(60)
    assert found["site-a"].has_content()
    assert "failed" not in caplog.text


@pytest.mark.parametrize("inbound", [64, 1])
def test_a_reply_on_which_the_server_fails_keeps_no_memory(kit, monkeypatch, inbound):
    """In memory and on disk: what it held is free for others at once, and whoever waits for it is told."""
    grid = kit.grid(limits(kit, inbound_bytes=inbound * MIB))
    sites = [uploader(kit, grid, name) for name in ("site-a", "site-b")]

    def no_memory(_body):
        raise MemoryError("no memory is left")

    monkeypatch.setattr(receiver_module, "decode", no_memory)
    thread, found = asked(kit, grid, ["site-a", "site-b"])
    for site in sites:
        site.offer(0, content=arrays(4))
        site.accepted()
        site.send(0, 3)
    for site in sites:
        site.send(3, site.sealed.count - 3)
    thread.join(30)
    assert [reply.error.code for reply in found.values()] == [RefusalCode.FAILED] * 2
    assert kit.memory(grid) == 0


def test_a_trickle_below_the_least_rate_is_given_up_long_before_the_deadline(kit):
    grid = kit.grid(limits(kit, stall=0.5, least_rate=10 * MIB))
    site = uploader(kit, grid, "site-a")
    thread, found = asked(kit, grid, ["site-a"])
    site.offer(8 * MIB)
    site.accepted()
    site.send(0, 1)
    thread.join(30)
    assert found["site-a"].error.code == RefusalCode.SLOW
    assert "the least is" in found["site-a"].error.reason
    assert list(grid.excluded_nodes()) == [kit.number_of("site-a")]


def test_hundreds_of_waiting_replies_with_bad_seals_are_refused_one_by_one(kit):
    """They wait behind one that holds what memory there is; each refusal made room for the next, ever deeper."""
    grid = kit.grid(limits(kit, inbound_bytes=MIB, spool_bytes=0))
    receiver = grid._connections.replies
    site = uploader(kit, grid, "site-a")
    messages = [kit.message("site-a", group=str(number)) for number in range(500)]
    found: list[object] = []
    stream = grid.send_and_receive(messages, timeout=60)
    # As if the disk had just been found full: a reply is begun only if memory has room for all of it.
    receiver._buffers.no_disk_until = time.monotonic() + 3600
    tasks = [site.raw.hear("offer").offer for _ in messages]
    site.reply(tasks[0], MIB)
    sealed = site.sealed
    site.accepted()
    for task in tasks[1:]:
        site.reply(task, 100, header=b"bad seal")
    kit.until(lambda: len(receiver._buffers.waiting) == len(messages) - 1, "all others wait")
    site.task, site.sealed = tasks[0], sealed
    site.send(0, 1)
    for reply in stream:
        found.append(reply)
    assert len(found) == len(messages)
    assert all(reply.has_error() for reply in found)
    assert site.raw.channel is not None


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_stream_of_idle_offers_is_ended_and_fills_no_log(kit, caplog, asked_for):
    """Of replies that nobody asked for, or of one that is on its way: each was answered and logged, for ever."""
    grid = kit.grid(limits(kit))
    site = uploader(kit, grid, "site-a")
    asked(kit, grid, ["site-a"])
    site.offer(0, content=arrays(4))
    site.accepted()
    site.send(0, 1)
    offer = pb.Offer()
    offer.CopyFrom(site.made)
    if not asked_for:
        offer.transfer_id = "nobody-asked"
    for _ in range(3000):
        site.raw.say(pb.Frame(offer=offer))
    kit.until(lambda: not grid._connections.connected(), "its stream is ended")
    assert len([line for line in caplog.messages if "site-a" in line]) < 400


def test_offers_with_a_swollen_header_or_identifier_are_not_kept(kit):
    grid = kit.grid(limits(kit))
    site = uploader(kit, grid, "site-a")
    thread, found = asked(kit, grid, ["site-a"])
    site.offer(100, header=bytes(MIB))
    assert site.refusal().reason == pb.REASON_MALFORMED
    thread.join(30)
    assert found["site-a"].error.code == RefusalCode.MALFORMED
    site.raw.say(frames.done("x" * MIB))
    assert site.refusal().reason == pb.REASON_PROTOCOL


def test_junk_at_a_trickle_sends_no_honest_reply_to_disk_and_lets_none_wait(kit, clock, monkeypatch):
    """What a liar promises takes no room, so beside it all goes as without it: at once, and through memory alone.

    Three honest replies fit beside what it has sent, and not one and a half beside what it has promised.
    """
    patient = limits(kit, inbound_bytes=24 * MIB)
    grid = kit.grid(patient)
    names = ("site-a", "site-b", "site-c")
    update = np.ones(MIB, np.float32)

    class Heavy(kit.Echo):
        def answer(self, message):
            return Message(RecordDict({"sum": ArrayRecord({"w": Array(update)})}), reply_to=message)

    for name in names:
        kit.link(name, grid.port, Heavy(), limits=patient)
    liar = uploader(kit, grid, "site-liar")
    grid.wait_for_sites(4, 30)
    buffers, held_back, on_disk = grid._connections.replies._buffers, [], []
    may_begin, spool = buffers._may_begin, buffers.spool

    def begins(reply, now) -> bool:
        if not (now_or_later := may_begin(reply, now)):
            held_back.append(reply.site)
        return now_or_later

    def spooled(reply, chunk) -> None:
        on_disk.append(reply.site)
        spool(reply, chunk)

    monkeypatch.setattr(buffers, "_may_begin", begins)
    monkeypatch.setattr(buffers, "spool", spooled)
    thread, found = asked(kit, grid, ["site-liar"])
    liar.offer(20 * MIB)
    liar.accepted()
    liar.send(0, 1)
    kit.until(lambda: received(grid), "its first piece is there")
    clock.forward(2)
    for number in range(1, 6):
        questions = [kit.message(name, group=f"beside-{number}") for name in names]
        assert len(list(grid.send_and_receive(questions, timeout=120))) == 3
        liar.send(number, 1)
    assert (held_back, on_disk) == ([], [])
    clock.forward(60)
    thread.join(60)
    assert found["site-liar"].error.code == RefusalCode.SLOW
    assert list(grid.excluded_nodes()) == [kit.number_of("site-liar")]
