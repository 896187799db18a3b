"""That a transfer has arrived goes along with the next frame, so that it costs no frame of its own."""

import pytest

from fedclaw.errors import TransportError
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.message_codec import encode
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.sender import MAX_CONFIRMATIONS, Sender
from tests.transport.grpc.uploader import Uploader


def sent(sender: Sender) -> list[pb.Frame]:
    """All frames that wait there, and then the end."""
    sender.close()
    return [pb.Frame.FromString(raw) for raw in sender.frames()]


def test_confirmations_go_along_with_the_next_control_frame():
    sender = Sender()
    sender.confirm("a")
    sender.confirm("b")
    sender.post(frames.heartbeat(1))
    sender.post(frames.heartbeat(2))
    assert [(frame.heartbeat.sequence, list(frame.also_done)) for frame in sent(sender)] == [(1, ["a", "b"]), (2, [])]


def test_so_many_wait_and_no_more():
    sender = Sender()
    for number in range(MAX_CONFIRMATIONS + 1):
        sender.confirm(str(number))
    (frame,) = sent(sender)
    assert frame.done.transfer_id == str(MAX_CONFIRMATIONS)
    assert list(frame.also_done) == [str(number) for number in range(MAX_CONFIRMATIONS)]
    frames.check_frame(frame)


def test_more_than_that_or_a_swollen_one_is_not_taken():
    for confirmed in (["a"] * (MAX_CONFIRMATIONS + 1), ["x" * 257]):
        with pytest.raises(TransportError, match=r"confirms more than|identifier"):
            frames.check_frame(pb.Frame(heartbeat=pb.Heartbeat(), also_done=confirmed))


def test_the_server_confirms_a_reply_with_its_next_frame(kit):
    grid = kit.grid()
    site = Uploader(kit.raw("site-a", grid.port), kit.federation.site("site-a"))
    grid.wait_for_sites(1, 20)
    stream = grid.send_and_receive([kit.message("site-a")], timeout=20)
    site.offer(0, content=b"".join(encode(kit.content()).parts))
    site.accepted()
    site.send(0, site.sealed.count)
    assert next(stream).has_content()
    assert list(site.raw.hear("heartbeat").also_done) == [site.task.transfer_id]


def test_both_ends_let_go_of_what_the_other_has_confirmed(kit):
    grid = kit.grid()
    running = kit.link("site-a", grid.port)
    grid.wait_for_sites(1, 20)
    kit.until(lambda: running.link.connected, "the site has its welcome")
    (session,) = grid._connections._sessions.values()
    list(grid.send_and_receive([kit.message("site-a")], timeout=20))
    kit.until(lambda: not session.sender._offered, "the server knows that its task has arrived")
    kit.until(lambda: not running.link._stream.sender._offered, "the site knows that its reply has arrived")
