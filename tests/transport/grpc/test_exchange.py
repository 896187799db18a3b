"""Tasks out, replies back, over real sockets: delivery, timeouts, and sites that come, go and come back."""

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import Message, RecordDict

from fedclaw.errors import ConnectionRefused, SecureAggregationError, TransportError
from fedclaw.protocol.message_identity import assign_message_id, empty_run
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.transport.grpc.limits import Limits


def test_a_reply_comes_back_from_every_site_with_the_same_content(kit):
    grid = kit.grid()
    names = ["site-a", "site-b", "site-c"]
    for name in names:
        kit.link(name, grid.port)
    assert grid.wait_for_sites(3, 20) == tuple(names)
    body = kit.content(1000)
    messages = [kit.message(name, body) for name in names]

    replies = list(grid.send_and_receive(messages, timeout=20))

    assert sorted(grid.site_name(reply.metadata.src_node_id) for reply in replies) == names
    assert {reply.metadata.reply_to_message_id for reply in replies} == {m.metadata.message_id for m in messages}
    for reply in replies:
        np.testing.assert_array_equal(reply.content["arrays"]["w"].numpy(), body["arrays"]["w"].numpy())
        assert reply.content["metrics"]["n"] == 3
        assert reply.content["config"]["a"] == "b"
        assert reply.metadata.group_id == "1"
        assert reply.metadata.run_id == kit.RUN_ID


def test_messages_of_many_chunks_travel_both_ways(kit):
    grid = kit.grid()
    kit.link("site-a", grid.port)
    grid.wait_for_sites(1, 20)
    body = kit.content(2_500_000)

    (reply,) = grid.send_and_receive([kit.message("site-a", body)], timeout=30)

    assert reply.content["arrays"]["w"].data == body["arrays"]["w"].data


def test_replies_above_the_budget_are_held_in_memory_one_after_the_other(kit):
    grid = kit.grid(Limits(heartbeat=0.15, inbound_bytes=1_000_000))
    names = ["site-a", "site-b", "site-c"]
    for name in names:
        kit.link(name, grid.port)
    grid.wait_for_sites(3, 20)
    body = kit.content(600_000)
    held = []

    for reply in grid.send_and_receive([kit.message(name, body) for name in names], timeout=30):
        held.append(kit.memory(grid))
        assert reply.content["arrays"]["w"].data == body["arrays"]["w"].data

    assert len(held) == 3
    assert max(held) < 2 * 600_000 * 4


def test_a_slow_site_is_left_behind_at_the_timeout_and_its_late_reply_is_refused(kit, clock):
    patient = kit.QUICK.model_copy(update={"missed_heartbeats": 4000})
    grid = kit.grid(patient)
    slow = kit.Echo()
    slow.gate.clear()
    kit.link("site-a", grid.port, limits=patient)
    kit.link("site-b", grid.port, slow, limits=patient)
    grid.wait_for_sites(2, 20)

    replies = grid.send_and_receive([kit.message("site-a"), kit.message("site-b")], timeout=60)

    assert grid.site_name(next(replies).metadata.src_node_id) == "site-a"
    clock.forward(60)
    assert list(replies) == []
    slow.gate.set()
    kit.until(lambda: len(slow.released) == 1, "the slow site has sent its late reply")
    again = list(grid.send_and_receive([kit.message("site-b", group="2")], timeout=20))
    assert [reply.metadata.group_id for reply in again] == ["2"]


def test_pushed_messages_are_pulled_once(kit):
    grid = kit.grid()
    kit.link("site-a", grid.port)
    grid.wait_for_sites(1, 20)
    (identity,) = grid.push_messages([kit.message("site-a")])
    pulled: list[Message] = []

    kit.until(lambda: pulled.extend(grid.pull_messages([identity])) or bool(pulled), "the reply is there")

    assert pulled[0].metadata.reply_to_message_id == identity
    assert list(grid.pull_messages([identity])) == []


def test_a_message_keeps_its_own_identity_and_belongs_to_the_run(kit):
    grid = kit.grid()
    message = kit.message("site-a")
    assign_message_id(message, "round-1-site-a")
    assert list(grid.push_messages([message])) == ["round-1-site-a"]
    with pytest.raises(TransportError, match="not 5"):
        grid.set_run(empty_run(5))


def test_heartbeats_go_on_while_a_site_works(kit, clock):
    """Both ends hear something anew again and again, for three times as long as a silent peer is kept."""
    grid = kit.grid()
    busy = kit.Echo()
    busy.gate.clear()
    running = kit.link("site-a", grid.port, busy)
    grid.wait_for_sites(1, 20)
    replies = grid.send_and_receive([kit.message("site-a")], timeout=30)
    busy.working.wait(10)
    (session,) = grid._connections._sessions.values()
    stream = running.link._stream
    for _ in range(6):
        before = session.heard, stream.heard
        kit.until(lambda then=before: session.heard > then[0] and stream.heard > then[1], "both have heard something")
        clock.forward(kit.QUICK.silence / 2)
    assert running.link.connected
    assert running.link._stream is stream
    busy.gate.set()
    assert len(list(replies)) == 1


def test_a_task_for_a_site_that_comes_later_is_delivered_then(kit):
    grid = kit.grid()
    kit.federation.site("site-a")
    replies = grid.send_and_receive([kit.message("site-a")], timeout=30)
    kit.link("site-a", grid.port)
    assert len(list(replies)) == 1


def test_a_repeated_task_is_answered_from_the_outbox_after_a_restart(kit):
    first, second = kit.Echo(), kit.Echo()
    grid = kit.grid()
    running = kit.link("site-a", grid.port, first)
    grid.wait_for_sites(1, 20)
    body = kit.content(400_000)

    def ask() -> Message:
        message = kit.message("site-a", body)
        assign_message_id(message, "same-question")
        (reply,) = grid.send_and_receive([message], timeout=20)
        return reply

    before = ask()
    running.stop()
    kit.link("site-a", grid.port, second)
    after = ask()

    assert len(first.asked) == 1
    assert second.asked == []
    assert second.released == first.released
    assert after.content["arrays"]["w"].data == before.content["arrays"]["w"].data


def test_a_repeated_task_in_one_life_of_the_site_is_answered_once(kit):
    echo = kit.Echo()
    grid = kit.grid()
    kit.link("site-a", grid.port, echo)
    grid.wait_for_sites(1, 20)
    for _ in range(2):
        message = kit.message("site-a")
        assign_message_id(message, "same-question")
        assert len(list(grid.send_and_receive([message], timeout=20))) == 1
    assert len(echo.asked) == 1


def test_a_site_that_dies_in_mid_round_and_comes_back_still_answers(kit):
    grid = kit.grid()
    doomed = kit.Echo()
    doomed.gate.clear()
    running = kit.link("site-a", grid.port, doomed)
    grid.wait_for_sites(1, 20)
    replies = grid.send_and_receive([kit.message("site-a")], timeout=30)
    doomed.working.wait(10)
    # Its state is that of a killed process: asked, and nothing in the outbox. (The old thread never gets to answer.)
    running.stop()
    survivor = kit.Echo()
    kit.link("site-a", grid.port, survivor)

    assert len(list(replies)) == 1
    assert len(survivor.asked) == 1


def test_the_server_restarts_and_sites_come_back_by_themselves(kit):
    echo = kit.Echo()
    grid = kit.grid()
    port = grid.port
    kit.link("site-a", port, echo)
    grid.wait_for_sites(1, 20)
    grid.__exit__(None, None, None)

    again = kit.grid(address=f"127.0.0.1:{port}")

    assert again.wait_for_sites(1, 20) == ("site-a",)
    assert len(list(again.send_and_receive([kit.message("site-a")], timeout=20))) == 1


def test_nothing_leaves_when_release_raises_but_that_nothing_will(kit, caplog):
    """The server is told at once, in one sentence for every cause, and does not wait until its deadline."""
    echo = kit.Echo()
    echo.release_error = RuntimeError("the ledger is full")
    grid = kit.grid()
    kit.link("site-a", grid.port, echo)
    grid.wait_for_sites(1, 20)
    (reply,) = grid.send_and_receive([kit.message("site-a")], timeout=60)
    assert reply.error.code == RefusalCode.FAILED
    assert "nothing leaves" in reply.error.reason
    assert "ledger" not in reply.error.reason
    assert len(echo.asked) == 1
    assert "left unanswered" in caplog.text


def test_a_handler_that_raises_gives_a_typed_error_without_its_text(kit):
    class Broken:
        def answer(self, message: Message) -> Message:
            raise ValueError("patient 4711 has a negative age")

        def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
            assert reply.has_error()

    grid = kit.grid()
    kit.link("site-a", grid.port, Broken())
    grid.wait_for_sites(1, 20)
    (reply,) = grid.send_and_receive([kit.message("site-a")], timeout=20)
    assert reply.error.code == RefusalCode.FAILED
    assert "4711" not in (reply.error.reason or "")


def test_a_second_connection_of_a_site_replaces_the_first(kit):
    grid = kit.grid()
    first = kit.link("site-a", grid.port, state=kit.scratch / "one")
    grid.wait_for_sites(1, 20)
    echo = kit.Echo()
    kit.link("site-a", grid.port, echo, state=kit.scratch / "two")

    error = first.ended()

    assert isinstance(error, ConnectionRefused)
    assert "has taken this one's place" in str(error)
    assert len(list(grid.send_and_receive([kit.message("site-a")], timeout=20))) == 1
    assert len(echo.asked) == 1


def test_a_message_above_the_limit_is_refused_where_it_is_made(kit):
    grid = kit.grid(Limits(max_message_bytes=10_000))
    with pytest.raises(TransportError, match="the limit is 10000"):
        grid.push_messages([kit.message("site-a", kit.content(5000))])


def test_a_reply_above_the_limit_becomes_a_typed_error(kit):
    class Talkative(kit.Echo):
        def answer(self, message: Message) -> Message:
            return Message(RecordDict(dict(kit.content(50_000))), reply_to=message)

    grid = kit.grid(Limits(heartbeat=0.15, max_message_bytes=100_000))
    kit.link("site-a", grid.port, Talkative())
    grid.wait_for_sites(1, 20)
    (reply,) = grid.send_and_receive([kit.message("site-a")], timeout=20)
    assert reply.error.code == RefusalCode.UPDATE_SIZE


def test_a_task_above_the_sites_own_limit_is_refused_by_the_site(kit):
    grid = kit.grid()
    kit.link("site-a", grid.port, limits=Limits(heartbeat=0.15, max_message_bytes=10_000))
    grid.wait_for_sites(1, 20)
    (reply,) = grid.send_and_receive([kit.message("site-a", kit.content(50_000))], timeout=20)
    assert reply.error.code == RefusalCode.UPDATE_SIZE
    assert "oversized" in (reply.error.reason or "")


def test_the_server_can_tell_what_a_site_has_signed(kit):
    verifier = kit.grid().verifier
    site = kit.federation.site("site-a")
    signature = site.sign("keys", b"what it says")
    certificate = site.certificate.public_bytes(serialization.Encoding.PEM)
    verifier.check("site-a", certificate, "keys", b"what it says", signature)
    for name, said in (("site-a", b"something else"), ("site-b", b"what it says")):
        with pytest.raises(SecureAggregationError, match=name):
            verifier.check(name, certificate, "keys", said, signature)
